"""Lists the runs, and makes them in the order in which they matter, until the budget is used.

    python -m evidence.plan, or with --budget 90m to make runs

A run that the budget interrupts is resumed the next time.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence

from evidence.run import Bench, execute, results_of
from evidence.runs import Run, planned
from evidence.tasks import TASKS
from evidence.training import OutOfTime
from pdl_ext.cli.demo.data import DemoError

_BUDGET = re.compile(r"(\d+)([smh])")
_SECONDS = {"s": 1, "m": 60, "h": 3600}


def budget(text: str) -> float:
    """Seconds of a number with its unit: 45s, 90m, 2h."""
    match = _BUDGET.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a number of seconds, minutes or hours such as 90m, got {text!r}")
    return int(match[1]) * _SECONDS[match[2]]


def table(bench: Bench, runs: Sequence[Run]) -> list[str]:
    """A line for each task and kind of run: the number done, the time of one, the time of the rest."""
    lines = [f"{'task':<10}{'kind':<12}{'done':>10}{'seconds each':>15}{'to do, hours':>15}"]
    for task, kind in dict.fromkeys((run.task, run.kind) for run in runs):
        files = [run.file(bench.results) for run in runs if (run.task, run.kind) == (task, kind)]
        seconds = [json.loads(file.read_text(encoding="utf-8"))["seconds"] for file in files if file.exists()]
        each = statistics.median(seconds) if seconds else None
        left = "?" if each is None else f"{each * (len(files) - len(seconds)) / 3600:.1f}"
        shown = "?" if each is None else f"{each:.0f}"
        lines.append(f"{task:<10}{kind:<12}{f'{len(seconds)} of {len(files)}':>10}{shown:>15}{left:>15}")
    following = next((run for run in runs if not run.file(bench.results).exists()), None)
    return [*lines, f"next: {f'{following.task} {following.name}' if following else 'nothing, all are done'}"]


def work_off(bench: Bench, runs: Sequence[Run], go_on: Callable[[], bool]) -> int:
    """Makes the missing runs, in their order, while `go_on` returns true; returns how many it finished."""
    finished = 0
    for run in runs:
        if not go_on():
            break
        if not run.file(bench.results).exists():
            try:
                execute(bench, run, go_on)
            except OutOfTime:
                break
            finished += 1
            print(f"done: {run.task} {run.name}", flush=True)
    return finished


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=budget, help="make runs for so long: 90m, 2h")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    runs = planned(options.tasks)
    try:
        bench = Bench(results_of(options.device), device=options.device)
        if options.budget is not None:
            end = time.monotonic() + options.budget
            work_off(bench, runs, lambda: time.monotonic() < end)
    except DemoError as error:
        print(f"evidence.plan: error: {error}", file=sys.stderr)
        return 1
    print("\n".join(table(bench, runs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
