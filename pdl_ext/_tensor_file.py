"""Safetensors files that appear whole or not at all, and in which any damage is found."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from pdl_ext._whole_file import whole_file

__all__ = ["format_of", "read_tensors", "write_tensors"]

_DIGEST = "digest"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Replaces a file, or makes it; a crash at any moment leaves the one that was there.

    Raises OSError that names the path, with what was there untouched.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = serialize(on_cpu, metadata={**metadata, _DIGEST: _digest(on_cpu, metadata)})
    # Not safetensors' save_file, which makes a file that only its owner can read.
    with whole_file(path) as partial, open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_tensors(path: Path, name: str, file_format: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata that write_tensors wrote, whose metadata has this "format".

    name: what errors begin with. Raises FileNotFoundError, or ValueError for another format or a damaged file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{name}: no file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{name}: {path} is damaged or no safetensors file ({error})") from error
    if metadata.get("format") != file_format:
        raise ValueError(f"{name}: {path} has format {metadata.get('format')!r}, expected {file_format!r}")
    digest = metadata.pop(_DIGEST, None)
    if digest != _digest(tensors, metadata):
        raise ValueError(f"{name}: {path} is damaged: its content does not have the digest that it states")
    return tensors, metadata


def format_of(path: Path) -> str | None:
    """The "format" of a file that write_tensors wrote, whole or damaged behind its head; None for any other file."""
    if not path.is_file():
        return None
    try:
        # A corpus has many files, of which few are opened twice.
        with open(path, "rb") as file:
            if b'"__metadata__"' not in file.read(64):
                return None
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format")
    except (SafetensorError, OSError):
        return None


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(repr((name, tensor.dtype, list(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).numpy().tobytes())
    return digest.hexdigest()
