"""The options of a loss: the only list of them in Python."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, TypedDict, TypeVar

import torch

from pdl_ext._checks import MAX, check_choice, check_flag, check_ignore_index, check_number
from pdl_ext.modulation import MODULATIONS, Modulation

__all__ = [
    "DEFAULTS",
    "OP_OPTIONS",
    "REDUCTIONS",
    "SMOOTHING_WEIGHTS",
    "LossKeywords",
    "LossOptions",
    "OptionsAsAttributes",
    "check_keywords",
    "spells_out_options",
]

REDUCTIONS = {"none": 0, "sum": 1, "mean": 2, "token_mean": 3}  # csrc/loss_options.h's Reduction
SMOOTHING_WEIGHTS = {"target": 0, "none": 1, "class": 2}  # and its SmoothingWeight

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


class LossKeywords(TypedDict, total=False):
    """LossOptions as keywords, for `**options: Unpack[LossKeywords]`."""

    reduction: str
    ignore_index: int
    shift: bool
    label_smoothing: float
    label_smoothing_weight: str
    z_loss: float
    softcap: float | None
    logit_scale: float
    modulation: Modulation | None


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The options of a loss besides its tensors; `functional.pdl_loss` explains each.

    Raises TypeError or ValueError that names the first option of a wrong type or outside its range.
    """

    reduction: str = "mean"
    ignore_index: int = -100
    shift: bool = False
    label_smoothing: float = 0.0
    label_smoothing_weight: str = "target"
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    modulation: Modulation | None = None

    def __post_init__(self) -> None:
        check_choice("reduction", self.reduction, REDUCTIONS)
        self._set("ignore_index", check_ignore_index(self.ignore_index))
        check_flag("shift", self.shift)
        self._set(
            "label_smoothing", check_number("label_smoothing", self.label_smoothing, 0, 1, "a number from 0 to 1")
        )
        check_choice("label_smoothing_weight", self.label_smoothing_weight, SMOOTHING_WEIGHTS)
        self._set("z_loss", check_number("z_loss", self.z_loss, 0, MAX, "a finite number >= 0"))
        if self.softcap is not None:
            expected = "None or a finite number > 0"
            self._set("softcap", check_number("softcap", self.softcap, 0, MAX, expected, open_low=True))
        expected = "a finite number other than 0"
        self._set("logit_scale", check_number("logit_scale", self.logit_scale, -MAX, MAX, expected))
        if self.logit_scale == 0:
            raise ValueError(f"logit_scale: got {self.logit_scale!r}, expected {expected}")
        if self.modulation is not None and type(self.modulation) not in MODULATIONS:
            raise TypeError(
                f"modulation: got {type(self.modulation).__name__}, expected None or one of pdl_ext.modulation"
            )
        numbers = [_number(name, getattr(self, name)) for name in _SCALARS]
        self._set("_packed", [*numbers, *Modulation.pack(self.modulation)])

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A state of a build with fewer options; its packed list is that build's.
        LossOptions.__init__(self, **{name: state[name] for name in DEFAULTS.keys() & state.keys()})

    @property
    def packed(self) -> list[float]:
        """The options as the compiled ops take them, in the order of OP_OPTIONS."""
        # Not a field: the compiler of PyTorch 2.10 rebuilds a frozen dataclass from all of its fields.
        packed: list[float] = self.__dict__["_packed"]
        return packed

    @property
    def smooths_by_class(self) -> bool:
        """Whether label smoothing spreads its share by each class's own weight."""
        return self.label_smoothing_weight == "class" and self.label_smoothing > 0

    @property
    def unnormalized(self) -> LossOptions:
        """The options with a modulation that is not divided by its mean, which may be known too late."""
        if self.modulation is None or not self.modulation.is_normalized:
            return self
        return dataclasses.replace(self, modulation=self.modulation.of_row)

    @classmethod
    def of(cls, function: str, keywords: LossKeywords) -> LossOptions:
        """The options of a call. Raises TypeError in the name of the function for an unknown keyword."""
        # Checking them takes ten microseconds of a step's thirty. A tracer would look inside the cache.
        if not torch.compiler.is_compiling():
            try:
                return _kept(**keywords)
            except TypeError:
                # An unknown option, a wrong type or an unhashable value: reported below.
                pass
        check_keywords(function, keywords)
        return cls(**keywords)

    @classmethod
    def unpacked(cls, numbers: Sequence[float]) -> LossOptions:
        """The options from their list `packed`; `shift` is applied before an op is called.

        Raises ValueError for a list of another length.
        """
        return _unpacked(tuple(numbers))


# typed, so that True and 1 are different keys.
@functools.lru_cache(maxsize=64, typed=True)
def _kept(**keywords: Any) -> LossOptions:
    return LossOptions(**keywords)


@functools.lru_cache(maxsize=64)
def _unpacked(numbers: tuple[float, ...]) -> LossOptions:
    named = dict(zip(OP_OPTIONS, numbers, strict=True))
    values: dict[str, Any] = {name: named[name] for name in _SCALARS}
    for option, numbered in _NUMBERED.items():
        values[option] = next(name for name, number in numbered.items() if number == values[option])
    values["ignore_index"] = int(values["ignore_index"])
    values["softcap"] = values["softcap"] or None
    values["modulation"] = Modulation.unpacked(*(named[name] for name in _OF_MODULATION))
    return LossOptions(**values)


# Options with words as values, and the numbers of these in C++.
_NUMBERED = {"reduction": REDUCTIONS, "label_smoothing_weight": SMOOTHING_WEIGHTS}


def _number(name: str, value: Any) -> float:
    if name in _NUMBERED:
        return float(_NUMBERED[name][value])
    return 0.0 if value is None else float(value)


DEFAULTS: dict[str, Any] = {option.name: option.default for option in fields(LossOptions)}
# The fields that a modulation is packed into.
_OF_MODULATION = ("modulation", "gamma", "modulation_scale", "modulation_detach", "modulation_normalize")
# `shift` is not an option of the ops: targets are shifted before.
_SCALARS = tuple(name for name in DEFAULTS if name not in ("shift", "modulation"))
OP_OPTIONS = _SCALARS + _OF_MODULATION


def check_keywords(function: str, keywords: LossKeywords) -> None:
    """Raises TypeError in the name of the function for an unknown keyword."""
    unknown = keywords.keys() - DEFAULTS.keys()
    if unknown:
        raise TypeError(f"{function}() got an unexpected keyword argument {min(unknown)!r}")


class _Attribute(Generic[T]):
    """One of the options in an owner's `_options`; setting it makes new options."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, owner: Any, _: type | None = None) -> T:
        # On the class, as for help(), it is the default.
        return DEFAULTS[self._name] if owner is None else getattr(owner._options, self._name)

    def __set__(self, owner: Any, value: T) -> None:
        owner._options = dataclasses.replace(owner._options, **{self._name: value})


class OptionsAsAttributes:
    """A mixin for classes with LossOptions as `_options`: each option is an attribute that may be set."""

    _options: LossOptions

    reduction = _Attribute[str]()
    ignore_index = _Attribute[int]()
    shift = _Attribute[bool]()
    label_smoothing = _Attribute[float]()
    label_smoothing_weight = _Attribute[str]()
    z_loss = _Attribute[float]()
    softcap = _Attribute["float | None"]()
    logit_scale = _Attribute[float]()
    modulation = _Attribute["Modulation | None"]()


def spells_out_options(function: F) -> F:
    """Decorates a function with `**options: Unpack[LossKeywords]`: help() then shows all options in its signature."""
    signature = inspect.signature(function)
    named = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    options = inspect.signature(LossOptions).parameters.values()
    function.__signature__ = signature.replace(parameters=[*named, *options])  # type: ignore[attr-defined]
    return function
