"""The version of the package, in a module that imports nothing else of it."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("pdl_ext")
except PackageNotFoundError:  # built in place, never installed
    __version__ = "unknown"
