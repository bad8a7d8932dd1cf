"""Stand-ins for the programs of a card's machine: they accept the flags, and run the given command."""

from __future__ import annotations

import stat
from pathlib import Path

# As far as each has options: what follows the last of them is the program to run.
COMPUTE_SANITIZER = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do
  case "$1" in
    --tool) tool=$2 ;;
    --error-exitcode|--print-limit|--report-api-errors) ;;
    *) echo "compute-sanitizer: unknown option $1"; exit 2 ;;
  esac
  shift 2
done
"$@" || exit 1
echo "========= ERROR SUMMARY: 0 errors"
"""
NCU = """#!/bin/sh
while :; do
  case "$1" in
    --clock-control|--set|--page|-k|-c) shift 2 ;;
    --csv) shift ;;
    -*) echo "ncu: unknown option $1"; exit 2 ;;
    *) break ;;
  esac
done
"$@" || exit 1
cat << 'END'
==PROF== Disconnected from process 1
{counters}
END
"""
# As ncu's page "raw" has them.
COUNTERS = {
    "dram__bytes_read.sum": ("Gbyte", "2.10"),
    "dram__bytes_write.sum": ("Gbyte", "2.10"),
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": ("%", "88.1"),
    "gpu__time_duration.sum": ("us", "1,080.10"),
    "launch__cluster_max_active": ("cluster", "99"),
    "launch__registers_per_thread": ("register/thread", "56"),
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "61.2"),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("%", "37.0"),
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": ("inst", "0.2"),
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": ("inst", "1.9"),
    "smsp__average_warps_issue_stalled_math_pipe_throttle_per_issue_active.ratio": ("inst", "0.4"),
    "smsp__average_warps_issue_stalled_membar_per_issue_active.ratio": ("inst", "0.1"),
    "smsp__average_warps_issue_stalled_short_scoreboard_per_issue_active.ratio": ("inst", "0.3"),
    "smsp__cycles_active.avg": ("cycle", "1,700,000.25"),
    "smsp__issue_active.avg.per_cycle_active": ("inst/cycle", "0.61"),
}


def _csv(*row: str) -> str:
    return ",".join(f'"{value}"' for value in row)


def ncu() -> str:
    units, values = zip(*COUNTERS.values(), strict=True)
    rows = (("ID", "Kernel Name", *COUNTERS), ("", "", *units), ("0", "on_chip_kernel", *values))
    return NCU.replace("{counters}", "\n".join(_csv(*row) for row in rows))


def write(folder: Path) -> Path:
    """A folder for the front of PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("compute-sanitizer", COMPUTE_SANITIZER), ("ncu", ncu())):
        path = folder / name
        path.write_text(text, encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder
