"""What every weighting of tokens has: weights that are fixed by hand, and a blend with 1."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pdl_ext._checks import check_integer, check_number

__all__ = ["check_blend", "check_fixed", "checked_fixed", "fixed_table"]

_FLOAT32_MAX = (2 - 2**-23) * 2.0**127


def check_blend(blend: float) -> float:
    """The blend as a float. Raises TypeError or ValueError unless it is a number in [0, 1]."""
    return check_number("blend", blend, 0, 1, "a number in [0, 1]")


def checked_fixed(fixed: Mapping[int, float]) -> dict[int, float]:
    """A copy of fixed weights, that nobody else writes to. Raises TypeError or ValueError for what is none."""
    if not isinstance(fixed, Mapping):
        raise TypeError(f"fixed: got {type(fixed).__name__}, expected a mapping from token ids to weights")
    checked: dict[int, float] = {}
    for token, weight in fixed.items():
        token = check_integer("fixed", token, 0, 2**31 - 1, "token ids that are ints >= 0")
        checked[token] = check_number(f"fixed[{token}]", weight, 0, _FLOAT32_MAX, "a finite number >= 0 in float32")
    return checked


def check_fixed(fixed: Mapping[int, float], vocab_size: int) -> None:
    """Raises ValueError if a weight is fixed for a token outside the vocabulary."""
    if fixed and max(fixed) >= vocab_size:
        raise ValueError(f"fixed: got token id {max(fixed)}, expected ids below the vocabulary size {vocab_size}")


def fixed_table(fixed: Mapping[int, float], counts: Tensor) -> Tensor | None:
    """float32 [V] with the fixed weights and NaN elsewhere, on the counts' device; None where nothing is fixed."""
    if not fixed:
        return None
    check_fixed(fixed, counts.shape[0])
    table = torch.full((counts.shape[0],), math.nan, dtype=torch.float32, device="cpu")
    ids = torch.tensor(list(fixed), dtype=torch.int64, device="cpu")
    table[ids] = torch.tensor(list(fixed.values()), dtype=torch.float32, device="cpu")
    return table.to(counts.device)
