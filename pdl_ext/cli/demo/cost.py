"""The time and memory of a training step for each way to compute its loss."""

from __future__ import annotations

import ctypes
import gc
import itertools
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pdl_ext.cli.demo.data import Encoded, collate
from pdl_ext.cli.demo.model import CausalLM
from pdl_ext.cli.demo.train import loss_of
from pdl_ext.cli.progress import steps

TIMED_STEPS = 3

_PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class StepCost:
    """Median seconds of a step, and its peak bytes beyond those held before it; None if not measured."""

    seconds: float
    peak_bytes: int | None


def step_costs(
    model: CausalLM,
    batches: Sequence[Sequence[Encoded]],
    ways: Mapping[str, Callable[[CausalLM], object]],
    *,
    pad_id: int,
) -> dict[str, StepCost]:
    """Return the cost of forward and backward of ``model`` with each of ``ways``, in turns on the same batches.

    A way gives the model its PDLLoss, by ``apply_pdl_loss``. The first of ``batches`` is for warm-up, and the next
    three are measured, from the beginning again if there are fewer. The gradients are discarded: the model does not
    change, and is left in eval mode.
    """
    from pdl_ext.integrations.transformers import remove_pdl_loss

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, list[int | None]] = {name: [] for name in ways}
    chosen = list(itertools.islice(itertools.cycle(batches), 1 + TIMED_STEPS))
    model.train()
    for examples in steps(chosen, f"compare {' and '.join(ways)}", "batch"):
        ids, labels = (tensor.to(model.device) for tensor in collate(examples, pad_id))
        for name, give_loss in ways.items():
            give_loss(model)
            before = _reset_peak(model.device)
            start = time.perf_counter()
            loss_of(model, ids, labels).backward()
            _wait(model.device)
            seconds[name].append(time.perf_counter() - start)
            peak = _peak(model.device)
            peaks[name].append(None if before is None or peak is None else peak - before)
            model.zero_grad(set_to_none=True)
            remove_pdl_loss(model)
    model.eval()
    return {name: StepCost(statistics.median(seconds[name][1:]), _largest(peaks[name][1:])) for name in ways}


def _largest(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> int | None:
    """Reset the peak, and return the bytes held now; None if the system does not support it."""
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if sys.platform != "linux":
        return None
    # Garbage that is collected meanwhile, or freed memory that the C library keeps, would hide the step's memory.
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return None
    return _resident("VmRSS")


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(name: str) -> int | None:
    try:
        found = re.search(rf"{name}:\s+(\d+) kB", (_PROCESS / "status").read_text())
    except OSError:
        return None
    return 1024 * int(found[1]) if found else None
