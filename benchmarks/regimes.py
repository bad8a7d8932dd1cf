"""The source of a large tensor's memory: pages that the system maps anew, or pages that malloc has kept.

By default, glibc maps a large tensor and returns it to the system when it is freed, so that each step first touches new
pages. Most set-ups for training on a CPU keep freed memory, by tcmalloc or jemalloc. So does glibc with certain
environment variables, which it reads when a process starts.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
from typing import Any

import torch

FRESH, KEPT = "fresh", "kept"
VARIABLES = {
    FRESH: {},
    KEPT: {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34)},
}
NAMES = {FRESH: "fresh pages", KEPT: "pages kept"}
TENSOR_BYTES = 2**27
# After some tensors glibc finds room for a new one, since aligning one splits the remains of another.
TENSORS_BEFORE = 12
# With huge pages a new tensor has as few as 64 faults.
FEW_FAULTS = 16


def environment(regime: str) -> dict[str, str]:
    """The environment of a process in this regime."""
    others = {name: value for name, value in os.environ.items() if name not in VARIABLES[KEPT]}
    return others | VARIABLES[regime]


def is_told(regime: str) -> bool:
    """Whether this process was started in the environment of the regime."""
    return environment(regime) == dict(os.environ)


def page_faults() -> int:
    """The number of new pages that this process requests for a new tensor, after many of the same size."""
    faults = []
    for _ in range(TENSORS_BEFORE + 3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(TENSOR_BYTES, dtype=torch.uint8).fill_(0)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return int(statistics.median(faults[TENSORS_BEFORE:]))


def about(regime: str) -> tuple[dict[str, Any], str]:
    """A description of this process' memory for a report, and why it is not that of the regime; empty if it is."""
    faults = page_faults()
    libc = " ".join(platform.libc_ver()).strip() or f"the C library of {platform.system()}"
    told = " ".join(f"{name}={value}" for name, value in VARIABLES[regime].items())
    why = ""
    if (faults < FEW_FAULTS) != (regime == KEPT):
        does = "maps new pages" if regime == KEPT else "keeps pages"
        why = f"not available: the malloc of {libc} {does} {f'in spite of {told}' if told else 'unasked'}"
    return {
        "memory": NAMES[regime] + (f": {why}" if why else ""),
        "malloc": f"{libc}, {told or 'as it comes'}",
        f"page_faults_of_a_new_tensor_of_{TENSOR_BYTES // 2**20}_MiB": faults,
    }, why
