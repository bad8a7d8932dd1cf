"""Optional packages, which only parts of the library need."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["require"]


def require(module: str, extra: str) -> Any:
    """Imports a module of an optional package. Raises ImportError with the pip command if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{module.partition(".")[0]} is not installed: run `pip install "pdl_ext[{extra}]"` ({error})'
        ) from error
