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
echo '==PROF== Disconnected from process 1'
echo '"ID","Kernel Name","gpu__time_duration.sum","smsp__issue_active.avg.pct_of_peak_sustained_active"'
echo '"","","us","%"'
echo '"0","on_chip_kernel","980.1","61.2"'
"""


def write(folder: Path) -> Path:
    """A folder for the front of PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("compute-sanitizer", COMPUTE_SANITIZER), ("ncu", NCU)):
        path = folder / name
        path.write_text(text, encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder
