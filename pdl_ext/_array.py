"""NumPy arrays as tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["tensor_to_read"]


def tensor_to_read(array: np.ndarray[Any, Any]) -> Tensor:
    """A tensor of the array's memory, which is not to be written to. Raises TypeError for a dtype that tensors lack."""
    if not array.flags.writeable and not array.dtype.hasobject:
        # PyTorch warns of those. A filter would be the whole process', and come in the way of other threads'.
        array = np.asarray(_Writable(array))
    return torch.from_numpy(array)


class _Writable:
    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array = array
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}
