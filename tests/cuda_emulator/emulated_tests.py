"""How mutants.py and coverage.py run the tests of the emulated kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# Those of kernels, the quick and the telling first.
FILES = [
    "modulation",
    "label_smoothing",
    "memory",
    "reduced_rows",
    "edges",
    "combinations",
    "loss_and_gradient",
    "gradient_at_once",
    "layouts",
    "weighting",
    "numbers",
    "uninitialized_memory",
    "frequency",
    "determinism",
    "errors",
    "functional",
    "linear",
    "vocabulary_parallel",
]


def run(timeout: float | None = None, stop_at_first: bool = False, **environment: str) -> subprocess.CompletedProcess:
    """Runs them in one thread."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-k", "emulated", *(["-x"] if stop_at_first else [])]
    command += [str(ROOT / "tests" / f"test_{name}.py") for name in FILES]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
