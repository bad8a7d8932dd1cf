"""Power-Law Decay Loss for PyTorch (arXiv 2505.16900): cross-entropy that weighs each target by its rarity.

A name is imported when it is first used, and PyTorch with it. A process that needs the compiled ops alone, as to load
an exported program, imports `pdl_ext.functional`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pdl_ext._version import __version__ as __version__

__all__ = ["PDLLoss", "PowerLaw", "RowStats", "TokenFrequency", "count_labels", "functional", "reference"]

if TYPE_CHECKING:
    # With "as", a module is public for type checkers although `__all__` does not have it.
    from pdl_ext import corpus as corpus
    from pdl_ext import functional, reference
    from pdl_ext import modulation as modulation
    from pdl_ext import statistics as statistics
    from pdl_ext import weighting as weighting
    from pdl_ext.frequency import TokenFrequency
    from pdl_ext.functional import RowStats
    from pdl_ext.labels import count_labels
    from pdl_ext.loss import PDLLoss
    from pdl_ext.weighting import PowerLaw
else:
    _HOMES = {
        "PDLLoss": "loss",
        "PowerLaw": "weighting",
        "RowStats": "functional",
        "TokenFrequency": "frequency",
        "count_labels": "labels",
    }

    # The command's help and `pdl-ext doctor` do without PyTorch, whose import takes a second or fails.
    def __getattr__(name: str) -> object:
        import importlib
        import sys

        # With the name and the module Python suggests a name that is there.
        missing = AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
        # The import system asks for `_C` before it looks for the module.
        if name.startswith("_"):
            raise missing
        module = f"{__name__}.{_HOMES.get(name, name)}"
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            raise missing from None
        globals()[name] = getattr(found, name) if name in _HOMES else found
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
