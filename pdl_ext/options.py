"""The options of a loss: the only list of them in Python."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict, TypeVar

from pdl_ext._checks import MAX, check_choice, check_flag, check_ignore_index, check_number

__all__ = ["OP_OPTIONS", "REDUCTIONS", "LossKeywords", "LossOptions", "spells_out_options"]

REDUCTIONS = {"none": 0, "sum": 1, "mean": 2, "token_mean": 3}  # csrc/loss_options.h's Reduction


F = TypeVar("F", bound=Callable[..., Any])


class LossKeywords(TypedDict, total=False):
    """LossOptions as keywords, for `**options: Unpack[LossKeywords]`."""

    reduction: str
    ignore_index: int
    shift: bool
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOptions:
    """What a loss is told beside its tensors; `functional.pdl_loss` says what each option does.

    packed: the options as the compiled ops take them, in the order of OP_OPTIONS.
    Raises TypeError or ValueError that names the first option of a wrong type or outside its range.
    """

    reduction: str = "mean"
    ignore_index: int = -100
    shift: bool = False
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    packed: list[float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_choice("reduction", self.reduction, REDUCTIONS)
        self._set("ignore_index", check_ignore_index(self.ignore_index))
        check_flag("shift", self.shift)
        self._set("label_smoothing", check_number("label_smoothing", self.label_smoothing, 0, 1, "a number in [0, 1]"))
        self._set("z_loss", check_number("z_loss", self.z_loss, 0, MAX, "a finite number >= 0"))
        if self.softcap is not None:
            expected = "None or a finite number > 0"
            self._set("softcap", check_number("softcap", self.softcap, 0, MAX, expected, open_low=True))
        expected = "a finite number other than 0"
        self._set("logit_scale", check_number("logit_scale", self.logit_scale, -MAX, MAX, expected))
        if self.logit_scale == 0:
            raise ValueError(f"logit_scale: got {self.logit_scale!r}, expected {expected}")
        self._set("packed", [_number(getattr(self, name)) for name in OP_OPTIONS])

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def of(cls, function: str, keywords: LossKeywords) -> LossOptions:
        """The options of a call. Raises TypeError in the name of the function for a keyword that is no option."""
        if not keywords:
            return _DEFAULT
        unknown = keywords.keys() - LossKeywords.__annotations__.keys()
        if unknown:
            raise TypeError(f"{function}() got an unexpected keyword argument {min(unknown)!r}")
        return cls(**keywords)

    @classmethod
    def unpacked(cls, numbers: Sequence[float]) -> LossOptions:
        """The options of which `packed` is the list; `shift` is done before an op is called."""
        values: dict[str, Any] = dict(zip(OP_OPTIONS, numbers, strict=True))
        values["reduction"] = next(name for name, number in REDUCTIONS.items() if number == values["reduction"])
        values["ignore_index"] = int(values["ignore_index"])
        values["softcap"] = values["softcap"] or None
        return cls(**values)


def _number(value: Any) -> float:
    if isinstance(value, str):
        return float(REDUCTIONS[value])
    return 0.0 if value is None else float(value)


# What the ops do not take: targets are shifted before.
_NOT_OF_OPS = ("shift", "packed")
OP_OPTIONS = tuple(option.name for option in fields(LossOptions) if option.name not in _NOT_OF_OPS)

_DEFAULT = LossOptions()


def spells_out_options(function: F) -> F:
    """Decorates what takes `**options: Unpack[LossKeywords]`: its signature, as help() shows it, names them all."""
    signature = inspect.signature(function)
    named = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    options = inspect.signature(LossOptions).parameters.values()
    function.__signature__ = signature.replace(parameters=[*named, *options])  # type: ignore[attr-defined]
    return function
