"""Which lines of csrc/cuda the emulated tests execute, by gcov; fails below 95 %.

python tests/cuda_emulator/coverage.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import emulated_tests

ROOT = emulated_tests.ROOT
BUILD = ROOT / "build" / "cuda_emulator"
LEAST = 0.95


def executed_lines(data: list[Path]) -> dict[str, dict[int, int]]:
    """How often each line of each file of csrc/cuda ran, over all builds and instantiations."""
    lines: dict[str, dict[int, int]] = {}
    for path in data:
        command = ["gcov", "--json-format", "--stdout", str(path)]
        report = json.loads(subprocess.run(command, cwd=BUILD, check=True, capture_output=True, text=True).stdout)
        for file in report["files"]:
            source = (BUILD / file["file"]).resolve()
            if ROOT / "csrc" / "cuda" not in source.parents:
                continue
            counts = lines.setdefault(source.name, {})
            for line in file["lines"]:
                counts[line["line_number"]] = counts.get(line["line_number"], 0) + line["count"]
    return lines


def main() -> int:
    for path in BUILD.glob("*.gcda"):
        path.unlink()
    done = emulated_tests.run(PDL_EXT_EMULATOR_FLAGS="--coverage -O0")
    print(done.stdout.splitlines()[-1] if done.stdout else done.stderr)
    if done.returncode != 0:
        return 1
    lines = executed_lines(sorted(BUILD.glob("*.gcda")))
    all_run = all_lines = 0
    for name, counts in sorted(lines.items()):
        run = sum(count > 0 for count in counts.values())
        all_run, all_lines = all_run + run, all_lines + len(counts)
        print(f"{name:24} {run:4} of {len(counts):4} lines  {run / len(counts):6.1%}")
        text = (ROOT / "csrc" / "cuda" / name).read_text().splitlines()
        for number in sorted(number for number, count in counts.items() if count == 0):
            print(f"    {number:4}  {text[number - 1].strip()}")
    print(f"{'csrc/cuda':24} {all_run:4} of {all_lines:4} lines  {all_run / all_lines:6.1%}")
    return 0 if all_run >= LEAST * all_lines else 1


if __name__ == "__main__":
    sys.exit(main())
