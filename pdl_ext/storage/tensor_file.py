"""Safetensors files that are written completely or not at all, and in which any damage is detected."""

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
# Within a JSON string the quotation marks would be escaped.
_FORMAT = re.compile(rb'"format":"(pdl_ext\.[^"]*)"')
# The safetensors library refuses longer headers.
_LARGEST_HEADER = 100_000_000
# The space for everything in a header except the longest of the metadata.
_HEADER_OF_THE_REST = 4096
# The dtypes in counts and checkpoints, and their names in safetensors.
_DTYPES = {torch.uint8: "U8", torch.int64: "I64"}


def write_tensors(path: Place, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Replaces a file, or creates it; after a crash at any moment the old file is intact.

    metadata: its "format" first. The same tensors and metadata give the same bytes.
    Raises OSError that names the path, TypeError for tensors other than uint8 and int64, ValueError for metadata that
    are too large. An error leaves the old file untouched.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name}: got dtype {tensor.dtype}, expected one of {names_of(tuple(_DTYPES))}")
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # Not by the safetensors library: it copies all tensors, aborts the process if memory is short, and gives only the
    # owner access. It also writes the metadata in a different order each time. Here "format" comes first, so that it is
    # found in a truncated file.
    header: dict[str, Any] = {"__metadata__": {**metadata, _DIGEST: _digest(on_cpu, metadata)}}
    arrays = {name: tensor.numpy() for name, tensor in on_cpu.items()}
    # The widest dtype first, so that every tensor is aligned.
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
    """Raises ValueError that begins with `name` and contains `what` if `text` is too long for metadata."""
    size, largest = len(json.dumps(text)), _LARGEST_HEADER - _HEADER_OF_THE_REST
    if size > largest:
        raise ValueError(
            f"{name}: got {what}, which would need {size} bytes of metadata in a counts file, expected at most "
            f"{largest}"
        )


def read_tensors(path: Place, name: str, file_format: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata that write_tensors wrote, whose metadata has this "format".

    name: the beginning of errors. Raises FileNotFoundError, or ValueError for a file that cannot be read, is damaged or
    has another format.
    """
    try:
        # Reading a pipe would block.
        if not isinstance(path, RemotePath) and not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"{name}: {path} is not a regular file, expected one")
        with on_disk(path) as there:
            # The safetensors library reports any file that it cannot open as missing.
            with open(there, "rb") as head:
                head.read(1)
            # Not as "pt": the library then opens only files with names in UTF-8.
            with safe_open(there, framework="np") as file:
                metadata = dict(file.metadata() or {})
                # Checked before the tensors: those of other files may have dtypes that NumPy does not know.
                if metadata.get("format") != file_format:
                    raise ValueError(f"{name}: {path} has format {metadata.get('format')!r}, expected {file_format!r}")
                tensors = {key: _read(file.get_slice(key)) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: no file at {path}") from error
    except OSError as error:
        # OSErrors of the library have no strerror.
        raise ValueError(f"{name}: {path} cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise ValueError(f"{name}: {path} is damaged or not a safetensors file ({error})") from error
    digest = metadata.pop(_DIGEST, None)
    if digest != _digest(tensors, metadata):
        raise ValueError(f"{name}: {path} is damaged: its content does not have the digest that it states")
    return tensors, metadata


def _read(tensor: Any) -> Tensor:
    # If memory is short, the library's get_tensor panics, and its get_slice prints an error of its own (Python 3.11).
    # So the same number of bytes is allocated first.
    np.empty(tensor.get_shape(), np.int64)
    return torch.from_numpy(tensor[()])


def format_of(path: Place) -> str | None:
    """The "format" of a file that write_tensors wrote, also of a damaged or truncated one; None for any other file."""
    if not path.is_file():
        return None
    try:
        # A corpus has many files: most are opened only once.
        with path.open("rb") as file:
            head = file.read(64)
            if b'"__metadata__"' not in head:
                return None
            # Not by the safetensors library, which opens no truncated file.
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
