"""NumPy arrays as tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["tensor_to_read"]


def tensor_to_read(array: np.ndarray[Any, Any]) -> Tensor:
    """A read-only tensor over the array's memory. Raises TypeError for a dtype that PyTorch does not have."""
    if not array.flags.writeable and not array.dtype.hasobject:
        # PyTorch warns about read-only arrays. A warnings filter would apply to the whole process, other threads
        # included.
        array = np.asarray(_Writable(array))
    return torch.from_numpy(array)


class _Writable:
    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array = array
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}
