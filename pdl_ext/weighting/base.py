"""The base of all weightings: a table of weights from a table of counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from pdl_ext._checks import check_choice, check_integer, check_number
from pdl_ext.counts import check_counts

if TYPE_CHECKING:
    from pdl_ext.frequency import TokenFrequency

__all__ = [
    "NORMALIZE",
    "Weighting",
    "check_blend",
    "check_fixed",
    "check_weighting",
    "fixed_table",
    "weights_of_counts",
]

_FLOAT32_MAX = (2 - 2**-23) * 2.0**127
NORMALIZE = {"none": 0, "corpus": 1, "types": 2}  # csrc/token_weights.h's Normalize


@dataclass(frozen=True, kw_only=True, repr=False)
class Weighting:
    """How the weight of a token is computed from its count. A subclass is a frozen dataclass that defines `raw`.

    The result of `raw` is limited to `max_weight`, divided by its mean, and blended with 1: 1 + blend * (w - 1).
    `normalize` selects the mean: over the tokens of the "corpus", over the "types" of the vocabulary, or "none".
    `fixed` maps token ids to final weights; those tokens are left out of the mean. Weights outside the range of float32
    become its largest number, or 0.

    Raises TypeError or ValueError that names the option.
    """

    # Whether the weights depend on counts.
    needs_counts: ClassVar[bool] = True

    normalize: str = "corpus"
    max_weight: float | None = None
    blend: float = 1.0
    fixed: Mapping[int, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_choice("normalize", self.normalize, NORMALIZE)
        if self.max_weight is not None:
            limit = check_number("max_weight", self.max_weight, 0, math.inf, "a number > 0", open_low=True)
            self._set("max_weight", limit)
        self._set("blend", check_blend(self.blend))
        self._set("fixed", _checked_fixed(self.fixed))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        shared = [option.name for option in fields(Weighting)]
        own = [option.name for option in fields(self) if option.name not in shared]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in own + shared)})"

    def raw(self, counts: Tensor) -> Tensor:
        """The weights before they are limited, normalised and blended: float64 [V] >= 0 of int64 [V] counts."""
        raise NotImplementedError

    def weights(self, frequency: TokenFrequency) -> Tensor:
        """The weight of every vocabulary entry.

        Returns float32 [V] on the device of the frequency's counts.
        Raises TypeError if `frequency` is not a TokenFrequency, ValueError if `fixed` names a token outside the
        vocabulary.
        """
        counts = getattr(frequency, "counts", None)
        if not isinstance(counts, Tensor):
            raise TypeError(f"frequency: got {type(frequency).__name__}, expected a TokenFrequency")
        return weights_of_counts(counts, self)

    def table(self, counts: Tensor, blend: Tensor | None, fixed: Tensor | None) -> Tensor:
        """weights_of_counts, with the blend and the table of fixed weights already on the counts' device."""
        weight, total = self.raw(counts), counts.sum()
        if self.max_weight is not None:
            weight = weight.clamp(max=self.max_weight)
        free = None if fixed is None else fixed.isnan()
        if self.normalize != "none":
            share = torch.ones_like(weight)
            if self.normalize == "corpus":
                share = torch.where(total > 0, counts.double(), share)
            if free is not None:
                share = torch.where(free, share, 0.0)
            mean = torch.where(share > 0, share * weight, 0.0).sum() / share.sum()
            # The mean is NaN or 0 if no token with a weight is left.
            weight = weight / torch.where(mean > 0, mean, 1.0)
        if blend is not None:
            # Not 1 + blend * (w - 1), which rounds a small w to the spacing of numbers near 1.
            weight = (1 - blend.double()) + blend.double() * weight
        weight = weight.clamp(max=_FLOAT32_MAX).to(torch.float32)
        # On the CPU invalid counts were already refused.
        weight = torch.where((counts < 0) | (total < 0), math.nan, weight)
        return weight if free is None or fixed is None else torch.where(free, weight, fixed)

    def is_one(self) -> bool:
        """Whether every token has weight 1, whatever the counts."""
        return False


def check_weighting(weighting: Weighting) -> None:
    """Raises TypeError unless it is an instance of a subclass of Weighting."""
    if not isinstance(weighting, Weighting) or type(weighting) is Weighting:
        raise TypeError(f"weighting: got {type(weighting).__name__}, expected a Weighting, such as PowerLaw")


def weights_of_counts(counts: Tensor, weighting: Weighting) -> Tensor:
    """The weights [V] of counts. Raises TypeError or ValueError that names the argument."""
    check_counts(counts)
    blend = None
    if weighting.blend != 1.0:
        blend = torch.full((), weighting.blend, dtype=torch.float32, device=counts.device)
    return weighting.table(counts, blend, fixed_table(weighting.fixed, counts))


def check_blend(blend: float) -> float:
    """The blend as a float. Raises TypeError or ValueError unless it is a number from 0 to 1."""
    return check_number("blend", blend, 0, 1, "a number from 0 to 1")


def _checked_fixed(fixed: Mapping[int, float]) -> dict[int, float]:
    # A copy, so that later changes of the caller's mapping have no effect.
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
    """float32 [V] on the counts' device: the fixed weights, and NaN elsewhere. None if nothing is fixed."""
    if not fixed:
        return None
    check_fixed(fixed, counts.shape[0])
    table = torch.full((counts.shape[0],), math.nan, dtype=torch.float32, device="cpu")
    ids = torch.tensor(list(fixed), dtype=torch.int64, device="cpu")
    table[ids] = torch.tensor(list(fixed.values()), dtype=torch.float32, device="cpu")
    return table.to(counts.device)
