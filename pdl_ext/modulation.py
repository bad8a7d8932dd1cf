"""Factors of a row's loss that follow from the model's own prediction of its target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pdl_ext._checks import MAX, check_flag, check_number

__all__ = ["DFT", "AntiFocal", "Focal", "Modulation"]

_EXPECTED = "a finite number >= 0"


@dataclass(frozen=True)
class Modulation:
    """What the classes of this module have in common; p is the probability of the row's target, exp(-nll).

    A modulation multiplies the row's cross-entropy, smoothed or not. It is no part of a denominator, and of no z-loss.
    """

    # In csrc/modulation.h's enum of the same name.
    number: ClassVar[int]

    def packed(self) -> tuple[float, float, float]:
        """gamma, scale and whether it is detached, as the compiled ops take them."""
        raise NotImplementedError

    @staticmethod
    def pack(modulation: Modulation | None) -> tuple[float, float, float, float]:
        """A modulation, or none, as the last options of the compiled ops: its number, gamma, scale and detachment."""
        return (0.0, 0.0, 0.0, 0.0) if modulation is None else (float(modulation.number), *modulation.packed())

    @staticmethod
    def unpacked(number: float, gamma: float, scale: float, detach: float) -> Modulation | None:
        """The modulation with a number, of which the others are `packed`; None for 0."""
        if number == Focal.number:
            return Focal(gamma, detach=bool(detach))
        if number == AntiFocal.number:
            return AntiFocal(gamma, scale)
        return DFT() if number == DFT.number else None

    def _set_number(self, name: str) -> None:
        object.__setattr__(self, name, check_number(name, getattr(self, name), 0, MAX, _EXPECTED))


@dataclass(frozen=True)
class Focal(Modulation):
    """(1 - p) ** gamma: less weight for what is predicted well.

    Its derivative is a part of the gradient, unless `detach` takes it as a constant. At p = 1 the derivative is 0 for
    gamma > 1 and for gamma < 1, where the limit is infinite.

    Raises TypeError or ValueError that names the option.
    Source: Lin et al. 2017 (arXiv 1708.02002), focal loss.
    """

    gamma: float = 2.0
    detach: bool = False

    number: ClassVar[int] = 1

    def __post_init__(self) -> None:
        self._set_number("gamma")
        check_flag("detach", self.detach)

    def packed(self) -> tuple[float, float, float]:
        return self.gamma, 0.0, float(self.detach)


@dataclass(frozen=True)
class AntiFocal(Modulation):
    """(1 + scale * p) ** gamma, detached: more weight for what is predicted well.

    Raises TypeError or ValueError that names the option.
    Source: Raunak et al. 2020 (arXiv 2010.04867), anti-focal loss.
    """

    gamma: float = 1.0
    scale: float = 1.0

    number: ClassVar[int] = 2

    def __post_init__(self) -> None:
        self._set_number("gamma")
        self._set_number("scale")

    def packed(self) -> tuple[float, float, float]:
        return self.gamma, self.scale, 1.0


@dataclass(frozen=True)
class DFT(Modulation):
    """p, detached: dynamic finetuning.

    Source: Wu et al. 2025 (arXiv 2508.05629).
    """

    number: ClassVar[int] = 3

    def packed(self) -> tuple[float, float, float]:
        return 0.0, 0.0, 1.0
