"""`pdl-ext info`: the installed versions, and how they were built."""

from __future__ import annotations

import argparse
import platform
from typing import Any

from pdl_ext._version import __version__
from pdl_ext.cli.streams import write

__all__ = ["add_parser", "print_version"]


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds the sub-command `info`."""
    parser = subparsers.add_parser("info", help="print versions, the CPU capability chosen, and the CUDA build")
    parser.set_defaults(run=_run)


def print_version(_: argparse.Namespace) -> int:
    """Prints the version of pdl_ext; returns 0."""
    write(f"pdl_ext {__version__}")
    return 0


def _run(_: argparse.Namespace) -> int:
    import torch

    from pdl_ext.engine.ops import _C

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines = {
        "pdl_ext": __version__,
        "Python": platform.python_version(),
        "PyTorch": f"{torch.__version__} (extension built with {_C.built_with_torch()})",
        "CPU capability": f"{_C.cpu_capability()}, {torch.get_num_threads()} threads",
        "CUDA kernels": _C.cuda_status(),
        "CUDA architectures": _C.cuda_architectures() or "none",
        "CUDA devices": ", ".join(devices) or "none",
    }
    width = max(map(len, lines))
    write(*(f"{name:<{width}}  {value}" for name, value in lines.items()))
    return 0
