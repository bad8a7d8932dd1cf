"""The kernels of one step, from a profile: grid, cluster, registers, occupancy, time, and the gap before each.

python -m gpu_check.launches --output DIR [--device emulated] [--vocab-size V ...]
python -m gpu_check.launches --step V [--device emulated]      only a step, for a profiler to watch

On the CPU a trace of the same form stands in for the profiler's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from computed import computed

from gpu_check import devices
from pdl_ext import functional

# Rows of one block, of clusters up to sixteen, and beyond what a cluster holds in bfloat16. 151,936 leaves four blocks
# only 288 bytes of a multiprocessor's shared memory.
VOCAB_SIZES = (128256, 151936, 32000, 50257, 256000, 462600, 600000, 1200000)
OF_ROWS = ("on_chip_kernel", "cached_kernel")
# As PyTorch's profiler exports a launch: a cluster of four blocks for each of the step's rows.
STAND_IN = {
    "ph": "X",
    "cat": "kernel",
    "name": "void pdl::cuda::(anonymous namespace)::on_chip_kernel<float>()",
    "ts": 10.0,
    "dur": 5.0,
    "args": {"grid": [12, 1, 1], "block": [256, 1, 1], "registers per thread": 77, "shared memory": 65000},
}


def step(device: torch.device, rows: int, vocab_size: int, in_place: bool = True) -> None:
    logits = torch.randn(rows, vocab_size, device=device, dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(vocab_size, (rows,), device=device)
    for _ in range(2):
        functional.pdl_loss(computed(logits), targets, inplace_backward=in_place).backward()
    devices.synchronize(device)


def profile(device: torch.device, rows: int, vocab_size: int) -> list[dict[str, Any]]:
    """The events of a step, which ran once before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == devices.CARD:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    step(device, rows, vocab_size)
    with torch.profiler.profile(activities=activities) as profiler:
        step(device, rows, vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text(encoding="utf-8"))["traceEvents"]


def limits(device: torch.device) -> dict[str, int]:
    """What a block and a multiprocessor may have, where PyTorch tells it."""
    if device.type != devices.CARD:
        return {}
    properties = torch.cuda.get_device_properties(device)
    names = ("shared_memory_per_block_optin", "shared_memory_per_multiprocessor", "regs_per_multiprocessor")
    return {name: getattr(properties, name) for name in names if hasattr(properties, name)}


def kernels(events: list[dict[str, Any]], rows: int) -> list[dict[str, Any]]:
    """Ours among the events, in order. Times and gaps in microseconds."""
    found = sorted((event for event in events if event.get("cat") == "kernel"), key=lambda event: event["ts"])
    lines, end = [], None
    for event in found:
        gap = None if end is None else round(event["ts"] - end, 2)
        end = event["ts"] + event["dur"]
        if "pdl::cuda" not in event["name"]:
            continue
        args = event.get("args", {})
        blocks = args.get("grid", [0])[0]
        lines.append(
            {
                "kernel": event["name"].split("(anonymous namespace)::")[-1].split("<")[0].split("(")[0],
                "microseconds": event["dur"],
                "gap": gap,
                "blocks_of_a_row": blocks // rows if blocks % rows == 0 else None,
                **{name: args.get(name) for name in ("grid", "block", "registers per thread", "shared memory")},
                **{name: args.get(name) for name in ("blocks per SM", "est. achieved occupancy %")},
            }
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="DIR")
    parser.add_argument("--vocab-size", nargs="+", type=int, default=VOCAB_SIZES, metavar="V")
    parser.add_argument("--step", type=int, metavar="V")
    devices.add_arguments(parser)
    options = parser.parse_args()
    device = devices.prepare(options.device)
    small = options.device == devices.EMULATED
    rows, shrunk = (3, 100) if small else (1024, 1)
    if options.step is not None:
        step(device, rows, options.step // shrunk)
        return 0
    if options.output is None:
        parser.error("--output is missing, unless --step is given")
    found: dict[str, list[dict[str, Any]]] = {}
    end = time.monotonic() + options.budget
    for vocab_size in options.vocab_size:
        if time.monotonic() >= end:
            print(f"V {vocab_size}: left out for time")
            continue
        events = profile(device, rows, vocab_size // shrunk)
        found[str(vocab_size)] = kernels([*events, *([STAND_IN] if small else [])], rows)
        written = {"device": limits(device), "steps": found}
        (options.output / "launches.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        for line in found[str(vocab_size)]:
            print(f"V {vocab_size}: {' '.join(f'{name}={value}' for name, value in line.items())}", flush=True)
    empty = [vocab_size for vocab_size, lines in found.items() if not lines]
    # The kernel that reads the rows.
    reached = {
        vocab_size: next((x["kernel"] for x in lines if x["kernel"] in OF_ROWS), "another kernel")
        for vocab_size, lines in found.items()
    }
    print(f"{len(found)} steps: " + ", ".join(f"V {vocab_size} by {name}" for vocab_size, name in reached.items()))
    return int(bool(empty))


if __name__ == "__main__":
    sys.exit(main())
