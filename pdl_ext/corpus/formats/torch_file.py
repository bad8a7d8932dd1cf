"""Files of torch.save: a tensor, or a dict or list of tensors. A file is held in memory as a whole."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from pdl_ext.corpus.reading.arrays import (
    ZIP_MAGIC,
    array_batches,
    check_whole_zip,
    chosen_array,
    first_zip_name,
    zip_names,
)
from pdl_ext.corpus.reading.foreign import kind_of_content
from pdl_ext.corpus.source import Batch, Format, Part, ReadOptions, Source, check_stated_dtype, count_dtype
from pdl_ext.storage.place import Place

__all__ = ["FORMAT"]

_SUFFIXES = (".pt", ".pth", ".ckpt")
_PICKLE = "/data.pkl"


class _TorchSource(Source):
    """The whole file is one part. One tensor of a dict is read, or all of a list."""

    def __init__(self, path: Place, options: ReadOptions) -> None:
        # Only the names and shapes are read here.
        arrays = _arrays(path, options, mapped=True)
        dtypes = {count_dtype(array.dtype.name) for array in arrays}
        super().__init__("torch", path, dtypes.pop() if len(dtypes) == 1 else "int64")
        check_stated_dtype(path, self.dtype, options)
        self._options = options
        self._tokens = sum(array.size for array in arrays)

    def stated_tokens(self) -> int:
        return self._tokens

    def parts(self, size: int) -> Iterator[Part]:
        yield Part(0, 1, self.size)

    def batches(self, part: Part) -> Iterator[Batch]:
        for array in _arrays(self.path, self._options, mapped=False):
            yield from array_batches(array, self._options.policy.targets == "shifted")


def _arrays(path: Place, options: ReadOptions, *, mapped: bool) -> list[NDArray[Any]]:
    content, sizes = _loaded(path, mapped)
    is_list = isinstance(content, (list, tuple))
    items = dict(enumerate(content)) if is_list else content if isinstance(content, dict) else {"tokens": content}
    arrays: dict[str, NDArray[Any]] = {}
    refused: dict[str, ValueError] = {}
    for key, item in items.items():
        if (reason := _why_no_ids(item, sizes)) is None:
            arrays[str(key)] = item.numpy()
        else:
            refused[str(key)] = ValueError(f"{path}: {key!r} is {reason}, expected a tensor of integers")
    if is_list and not arrays | refused:
        raise ValueError(f"{path}: got an empty list, expected tensors of integers")
    if is_list and refused:
        raise next(iter(refused.values()))
    names = arrays if is_list else [chosen_array(path, {key: arrays[key].ndim for key in arrays}, refused, options)]
    return [arrays[name].copy(order="C") if not arrays[name].flags.c_contiguous else arrays[name] for name in names]


def _why_no_ids(item: Any, sizes: Container[int]) -> str | None:
    """A description of an object that is not a tensor of ids with an axis; None for such a tensor.

    sizes: in bytes, of the members of the file. The memory of each tensor is one of them.
    """
    if not isinstance(item, Tensor):
        return f"a {type(item).__name__}"
    if item.is_meta or item.is_nested:
        return f"a {'meta' if item.is_meta else 'nested'} tensor"
    if item.layout != torch.strided or item.dtype.is_floating_point or item.dtype.is_complex or item.is_quantized:
        return f"a tensor of {item.dtype}"
    if item.dtype == torch.bool or not item.dim():
        return f"a tensor of {item.dtype} with {item.dim()} axes"
    # With axes that repeat one number, a small file may claim any size. So may the header of mapped memory.
    memory = item.untyped_storage().nbytes()
    if item.numel() * item.element_size() > memory or memory not in sizes:
        return "a tensor with more numbers than the file"
    return None


def _loaded(path: Place, mapped: bool) -> tuple[Any, set[int]]:
    """The content of a file, and the sizes of its members in bytes."""
    try:
        with path.open("rb") as file:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                # PyTorch does not write such files, and reading them might use any amount of memory.
                raise ValueError("it is compressed")
            sizes = {member.file_size for member in members}
            if isinstance(path, Path):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped), sizes
            # Objects of a store cannot be mapped.
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True), sizes
    except Exception as error:
        if isinstance(error, zipfile.BadZipFile):
            check_whole_zip(path, "torch.save of PyTorch 1.6 or later")
        # Damaged files raise many kinds of errors.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, pickle.UnpicklingError):
            # PyTorch's own message advises to load it nevertheless.
            reason = "it holds something else"
        raise ValueError(
            f"{path}: cannot be read by torch.load(weights_only=True), which loads tensors and nothing that could run "
            f"({reason})"
        ) from error


def _recognises(path: Place, head: bytes) -> bool:
    if head and path.suffix.lower() in _SUFFIXES:
        # Not those of other kinds, older ones of PyTorch among them, which are told with what to do.
        return head.startswith(ZIP_MAGIC) or kind_of_content(head) is None
    if not head.startswith(ZIP_MAGIC):
        return False
    # The first one also of an archive that was cut off.
    return any(name.endswith(_PICKLE) for name in (first_zip_name(head), *zip_names(path)))


def _open(path: Place, options: ReadOptions) -> list[Source]:
    return [_TorchSource(path, options)]


FORMAT = Format("torch", _open, _recognises, has_header=True)
