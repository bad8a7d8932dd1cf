"""How a token's weight follows from its frequency."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from pdl_ext.frequency import TokenFrequency

__all__ = ["PowerLaw"]

NORMALIZE = {"none": 0, "corpus": 1, "types": 2}  # csrc/token_weights.h's Normalize


@dataclass(frozen=True)
class PowerLaw:
    """The weight of a token as a power of its frequency: w(t) = (f(t) + epsilon) ** -alpha.

    f(t) is the smoothed relative frequency (n(t) + smoothing) / (N + smoothing * V), or n(t) + smoothing with
    `relative=False`. The weight is then limited to `max_weight`, divided by its mean (`normalize`: over the tokens of
    the corpus, over the vocabulary's "types", or "none"), and blended with 1: 1 + blend * (w - 1). `fixed` maps token
    ids to final weights; those tokens take no part in the mean.

    Raises ValueError for a value outside its range. Source: arXiv 2505.16900, the definition of w(t); smoothing and
    normalisation are this library's.
    """

    alpha: float = 1.0
    epsilon: float = 1e-7
    smoothing: float = 1.0
    relative: bool = True
    normalize: str = "corpus"
    max_weight: float | None = None
    blend: float = 1.0
    fixed: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("alpha", "epsilon", "smoothing"):
            _check_number(name, getattr(self, name), "a finite number >= 0", lambda x: 0 <= x < math.inf)
        if self.alpha > 0 and self.epsilon == 0 and self.smoothing == 0:
            raise ValueError(
                "epsilon: got 0 with smoothing 0, expected one of them > 0: a token never counted would weigh infinity"
            )
        if self.normalize not in NORMALIZE:
            raise ValueError(f"normalize: got {self.normalize!r}, expected one of {sorted(NORMALIZE)}")
        if self.max_weight is not None:
            _check_number("max_weight", self.max_weight, "a number > 0", lambda x: x > 0)
        check_blend(self.blend)
        for token, weight in self.fixed.items():
            if not isinstance(token, int) or token < 0:
                raise ValueError(f"fixed: got token id {token!r}, expected an int >= 0")
            _check_number(f"fixed[{token}]", weight, "a finite number >= 0", lambda x: 0 <= x < math.inf)

    def __hash__(self) -> int:
        return hash(
            (self.alpha, self.epsilon, self.smoothing, self.relative, self.normalize, self.max_weight, self.blend)
        )

    @classmethod
    def reference(cls) -> PowerLaw:
        """The settings of the paper's authors: raw counts, epsilon 1e-7, alpha 1, nothing smoothed or normalised."""
        return cls(alpha=1.0, epsilon=1e-7, smoothing=0.0, relative=False, normalize="none")

    def weights(self, frequency: TokenFrequency) -> Tensor:
        """The weight of every vocabulary entry.

        Returns float32 [V] on the device of the frequency's counts.
        Raises ValueError if `fixed` names a token outside the vocabulary.
        """
        from pdl_ext import functional

        return functional.token_weights(frequency.counts, self)


def check_blend(blend: float) -> None:
    """Raises ValueError unless blend is a number in [0, 1]."""
    _check_number("blend", blend, "a number in [0, 1]", lambda x: 0 <= x <= 1)


def _check_number(name: str, value: float, expected: str, accepts: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not accepts(value):  # type: ignore[operator]
        raise ValueError(f"{name}: got {value!r}, expected {expected}")
