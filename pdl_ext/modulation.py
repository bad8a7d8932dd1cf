"""Factors of a row's loss, computed from the model's own prediction."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pdl_ext._checks import MAX, check_flag, check_number

__all__ = ["DFT", "EAFT", "MODULATIONS", "AntiFocal", "Focal", "MiLe", "Modulation"]

_EXPECTED = "a finite number >= 0"


@dataclass(frozen=True)
class Modulation:
    """The base of this module's classes; p is the probability of the row's target, exp(-nll).

    A modulation multiplies the row's cross-entropy, smoothed or not. It is not part of a denominator, and does not
    multiply the z-loss.
    """

    # Its value in the enum of the same name in csrc/modulation.h.
    number: ClassVar[int]
    # The arguments of the compiled ops: gamma, scale, whether it is detached, whether it is normalized. A string names
    # a field.
    packs: ClassVar[tuple[str | float, str | float, str | float, str | float]]
    # Whether it depends on the entropy of the row, which is then gathered in the same pass.
    of_entropy: ClassVar[bool] = False

    def factor(self, nll: Tensor, entropy: Tensor, vocab_size: int) -> Tensor:
        """The factor of each row by its definition, before it is normalized; `entropy` gets no gradient."""
        raise NotImplementedError

    @property
    def is_normalized(self) -> bool:
        """Whether the factors are divided by their mean over a call's rows."""
        return False

    @property
    def of_row(self) -> Modulation:
        """This modulation without the division by its mean."""
        return self

    @staticmethod
    def pack(modulation: Modulation | None) -> list[float]:
        """A modulation, or None, as the last options of the compiled ops: its number and its packed fields."""
        if modulation is None:
            return [0.0] * 5
        packed = [x if isinstance(x, float) else float(getattr(modulation, x)) for x in modulation.packs]
        return [float(modulation.number), *packed]

    @staticmethod
    def unpacked(number: float, *packed: float) -> Modulation | None:
        """The modulation with this number and these packed fields; None for 0."""
        if number == 0:
            return None
        kind = next(kind for kind in MODULATIONS if kind.number == number)
        flags = {field.name for field in dataclasses.fields(kind) if isinstance(field.default, bool)}
        named = {name: value for name, value in zip(kind.packs, packed, strict=True) if isinstance(name, str)}
        return kind(**{name: bool(value) if name in flags else value for name, value in named.items()})

    def _set_number(self, name: str) -> None:
        object.__setattr__(self, name, check_number(name, getattr(self, name), 0, MAX, _EXPECTED))


@dataclass(frozen=True)
class Focal(Modulation):
    """(1 - p) ** gamma: less weight for rows that are predicted well.

    Its derivative is part of the gradient, unless `detach` treats the factor as a constant. At p = 1 the derivative is
    taken as 0 for gamma < 1, where the limit is infinite, and is 0 for gamma > 1.

    Raises TypeError or ValueError that names the option.
    Source: Lin et al. 2017 (arXiv 1708.02002), focal loss.
    """

    gamma: float = 2.0
    detach: bool = False

    number: ClassVar[int] = 1
    packs = ("gamma", 0.0, "detach", 0.0)

    def __post_init__(self) -> None:
        self._set_number("gamma")
        check_flag("detach", self.detach)

    def factor(self, nll: Tensor, entropy: Tensor, vocab_size: int) -> Tensor:
        # The derivative at infinity is 0; computed directly it would be infinity times 0.
        masked = nll.isinf()
        q = torch.where(masked, 1.0, -torch.expm1(-torch.where(masked, 0.0, nll).clamp(min=0)))
        q = q.detach() if self.detach else q
        if self.gamma in (0, 1):
            return q**self.gamma
        # At 0 the derivative may be infinite, and is taken as 0.
        return torch.where(q == 0, 0.0, torch.where(q == 0, 1.0, q) ** self.gamma)


@dataclass(frozen=True)
class AntiFocal(Modulation):
    """(1 + scale * p) ** gamma, detached: more weight for rows that are predicted well.

    Raises TypeError or ValueError that names the option.
    Source: Raunak et al. 2020 (arXiv 2010.04867), anti-focal loss.
    """

    gamma: float = 1.0
    scale: float = 1.0

    number: ClassVar[int] = 2
    packs = ("gamma", "scale", 1.0, 0.0)

    def __post_init__(self) -> None:
        self._set_number("gamma")
        self._set_number("scale")

    def factor(self, nll: Tensor, entropy: Tensor, vocab_size: int) -> Tensor:
        return (1 + self.scale * torch.exp(-nll).detach()) ** self.gamma


@dataclass(frozen=True)
class DFT(Modulation):
    """p, detached: dynamic finetuning.

    Source: Wu et al. 2025 (arXiv 2508.05629).
    """

    number: ClassVar[int] = 3
    packs = (0.0, 0.0, 1.0, 0.0)

    def factor(self, nll: Tensor, entropy: Tensor, vocab_size: int) -> Tensor:
        return torch.exp(-nll).detach()


@dataclass(frozen=True)
class MiLe(Modulation):
    """(1 + H) ** gamma, detached, with H the entropy of the row in nats: more weight where the model is unsure.

    `normalize` divides it by its mean over the rows of a call that are not ignored. That is the mean over this rank and
    this micro-batch. For another mean pass `normalize=False` and a `normalizer`. A gamma above about 30 exceeds
    float32.

    Raises TypeError or ValueError that names the option.
    Source: Su et al. 2024 (arXiv 2310.19531), MiLe loss.
    """

    gamma: float = 1.0
    normalize: bool = True

    number: ClassVar[int] = 4
    packs = ("gamma", 0.0, 1.0, "normalize")
    of_entropy = True

    def __post_init__(self) -> None:
        self._set_number("gamma")
        check_flag("normalize", self.normalize)

    @property
    def is_normalized(self) -> bool:
        return self.normalize

    @property
    def of_row(self) -> Modulation:
        return MiLe(self.gamma, normalize=False) if self.normalize else self

    def factor(self, nll: Tensor, entropy: Tensor, vocab_size: int) -> Tensor:
        return (1 + entropy) ** self.gamma


@dataclass(frozen=True)
class EAFT(Modulation):
    """(H / log V) ** power, detached, with H the entropy of the row: less weight where the model is sure.

    Raises TypeError or ValueError that names the option.
    Source: arXiv 2601.02151, entropy-adaptive finetuning. There H is the entropy of the 20 largest logits, and V is 20.
    """

    power: float = 1.0

    number: ClassVar[int] = 5
    packs = ("power", 0.0, 1.0, 0.0)
    of_entropy = True

    def __post_init__(self) -> None:
        self._set_number("power")

    def factor(self, nll: Tensor, entropy: Tensor, vocab_size: int) -> Tensor:
        return (entropy / math.log(vocab_size) if vocab_size > 1 else entropy) ** self.power


# The modulations that the compiled ops implement.
MODULATIONS: tuple[type[Modulation], ...] = (Focal, AntiFocal, DFT, MiLe, EAFT)
