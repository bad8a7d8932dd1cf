"""Safetensors files that appear whole or not at all, and in which any damage is found."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pdl_ext._checks import names_of
from pdl_ext.storage.place import Place, RemotePath, on_disk
from pdl_ext.storage.whole_file import whole_file

__all__ = ["check_fits", "format_of", "read_tensors", "write_tensors"]

_DIGEST = "digest"
# In a string of JSON the marks would have backslashes before them.
_FORMAT = re.compile(rb'"format":"(pdl_ext\.[^"]*)"')
# The library refuses longer ones.
_LARGEST_HEADER = 100_000_000
# For all in a header but the longest of the metadata.
_HEADER_OF_THE_REST = 4096
# What counts and checkpoints hold, by the names that the library has for it.
_DTYPES = {torch.uint8: "U8", torch.int64: "I64"}


def write_tensors(path: Place, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Replaces a file, or makes it; a crash at any moment leaves the one that was there.

    metadata: its "format" first. The same tensors and metadata give the same bytes.
    Raises, with what was there untouched, OSError that names the path, TypeError for other tensors than uint8 and
    int64, ValueError for metadata that are too large.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name}: got dtype {tensor.dtype}, expected one of {names_of(tuple(_DTYPES))}")
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # Not by the library, which has the metadata in another order each time, makes a copy of all tensors and ends the
    # process where there is no memory for it, and makes files that only their owner can read.
    # In this order, so that the format, which stands in front, is found in a file that is cut off.
    header: dict[str, Any] = {"__metadata__": {**metadata, _DIGEST: _digest(on_cpu, metadata)}}
    arrays = {name: tensor.numpy() for name, tensor in on_cpu.items()}
    # The widest first, so that each is aligned.
    names = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    end = 0
    for name in names:
        array = arrays[name]
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": _DTYPES[on_cpu[name].dtype], "shape": array.shape, "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    if len(head) > _LARGEST_HEADER:
        largest = max(metadata, key=lambda name: len(metadata[name]))
        raise ValueError(
            f"{largest}: got {len(metadata[largest])} characters, expected fewer: a file's header of {len(head)} bytes "
            f"is above {_LARGEST_HEADER}"
        )
    pieces: list[Any] = [len(head).to_bytes(8, "little") + head, *(arrays[name].reshape(-1).data for name in names)]
    if isinstance(path, RemotePath):
        path.write_bytes(b"".join(pieces))
        return
    with whole_file(path) as partial, open(partial, "wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def check_fits(name: str, what: str, text: str) -> None:
    """Raises ValueError that begins with `name` and tells `what` came, if `text` is too long for metadata."""
    size, largest = len(json.dumps(text)), _LARGEST_HEADER - _HEADER_OF_THE_REST
    if size > largest:
        raise ValueError(
            f"{name}: got {what}, of which a file of counts would have {size} bytes of metadata, expected at most "
            f"{largest}"
        )


def read_tensors(path: Place, name: str, file_format: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata that write_tensors wrote, whose metadata has this "format".

    name: what errors begin with. Raises FileNotFoundError, or ValueError for a file that cannot be read, is damaged or
    of another format.
    """
    try:
        # A pipe would be waited for.
        if not isinstance(path, RemotePath) and not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"{name}: {path} is no regular file, expected one")
        with on_disk(path) as there:
            # The library takes any file that it cannot open for absent.
            with open(there, "rb") as head:
                head.read(1)
            # Not as PyTorch's, which the library opens by names in UTF-8 alone.
            with safe_open(there, framework="np") as file:
                metadata = dict(file.metadata() or {})
                # Before the tensors, which in other files may be of dtypes that NumPy does not know.
                if metadata.get("format") != file_format:
                    raise ValueError(f"{name}: {path} has format {metadata.get('format')!r}, expected {file_format!r}")
                tensors = {key: _read(file.get_slice(key)) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: no file at {path}") from error
    except OSError as error:
        # Those of the library have no strerror.
        raise ValueError(f"{name}: {path} cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise ValueError(f"{name}: {path} is damaged or no safetensors file ({error})") from error
    digest = metadata.pop(_DIGEST, None)
    if digest != _digest(tensors, metadata):
        raise ValueError(f"{name}: {path} is damaged: its content does not have the digest that it states")
    return tensors, metadata


def _read(tensor: Any) -> Tensor:
    # Where memory is short the library's get_tensor panics, and the bytearray that a slice is read into prints an error
    # of its own (Python 3.11): as many bytes are asked for before.
    np.empty(tensor.get_shape(), np.int64)
    return torch.from_numpy(tensor[()])


def format_of(path: Place) -> str | None:
    """The "format" of a file that write_tensors wrote, whole, damaged or cut off behind it; None for any other file."""
    if not path.is_file():
        return None
    try:
        # A corpus has many files, of which few are opened twice.
        with path.open("rb") as file:
            head = file.read(64)
            if b'"__metadata__"' not in head:
                return None
            # Not by the library, which opens no file that is cut off.
            found = _FORMAT.search(head + file.read(min(int.from_bytes(head[:8], "little"), _LARGEST_HEADER)))
    except OSError:
        return None
    return None if found is None else found[1].decode("utf-8", "replace")


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(repr((name, tensor.dtype, list(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).numpy().data)
    return digest.hexdigest()
