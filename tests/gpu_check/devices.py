"""Where a part runs: on a card, or in a dry run on the CPU by the emulated kernels."""

from __future__ import annotations

import argparse

import torch

from pdl_ext.engine import ops

CARD, EMULATED = "cuda", "emulated"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=(CARD, EMULATED), default=CARD, help="default: %(default)s")
    parser.add_argument("--budget", type=float, default=600.0, metavar="SECONDS", help="no shape is begun after it")


def prepare(name: str) -> torch.device:
    """The device of that name, with what it takes to call pdl_ext there."""
    if name == EMULATED:
        import cuda_emulator

        ops.compiled = cuda_emulator.load()
        return torch.device("cpu")
    return torch.device(name)


def multiprocessors(device: torch.device) -> int:
    if device.type == CARD:
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4


def synchronize(device: torch.device) -> None:
    if device.type == CARD:
        torch.cuda.synchronize(device)
