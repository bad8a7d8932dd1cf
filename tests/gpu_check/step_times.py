"""The times of one build's kernels, by replay of a graph, which distinguish the variants.

    python -m gpu_check.step_times --output DIR [--device emulated] [--dtype NAME ...] [--vocab-size V ...] [--count]

No peers and no compiler, so that a shape costs seconds. Writes DIR/benchmark.json and .md, by benchmarks/harness.py. On
the CPU the host's clock replaces the card's, and the sizes are tiny.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import gpu
import harness
import torch
from workloads import count_by_pdl_ext, failures, histogram_group, pdl_ext_functions

from gpu_check import devices

PROTOCOL = harness.Protocol(seconds=0.5)
BRIEF = harness.Protocol(warm_up=0, least_rounds=2, most_rounds=2)
VOCAB_SIZES = (128256, 32000, 50257)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16"])
    parser.add_argument("--vocab-size", nargs="+", type=int, default=VOCAB_SIZES, metavar="V")
    parser.add_argument("--count", action="store_true", help="also the histogram, in each dtype of its ids")
    devices.add_arguments(parser)
    options = parser.parse_args()
    device = devices.prepare(options.device)
    small = options.device == devices.EMULATED
    clock = harness.HostClock(0) if small else harness.CudaClock(device)
    rows, shrunk, count = (3, 1000, 1000) if small else (8192, 1, 2**28)
    groups = [
        gpu.loss_group(clock, rows, vocab_size // shrunk, getattr(torch, dtype), functions=pdl_ext_functions)
        for dtype in options.dtype
        for vocab_size in options.vocab_size
    ]
    if options.count:
        groups += [
            histogram_group(clock, vocab_size // shrunk, "Zipf", count, [torch.int32, torch.int64], [count_by_pdl_ext])
            for vocab_size in options.vocab_size
        ]
    about = harness.machine(device)
    report = harness.Report(
        options.output, "pdl_ext: times of the kernels", about, BRIEF if small else PROTOCOL, not small
    )
    harness.run(groups, clock, report, budget=options.budget, copy_bytes=2**20 if small else 2**31)
    broken = failures(report)
    print("\n".join([*broken, f"{len(report.rows)} rows, {len(broken)} broken, {len(report.left_out)} left out"]))
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
