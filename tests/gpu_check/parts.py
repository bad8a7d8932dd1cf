"""The commands of the check's parts, and the results from their output."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cuda_compile

from gpu_check import devices, variants
from gpu_check.check import Check, Part, last_lines

Run = Callable[[Part, Check, float], None]
# What a benchmark that has spent its budget may still take to finish the workload that it is at.
BENCH_OVERRUN = 30
# And a script, which begins no shape after its own.
SCRIPT_OVERRUN = 8
# A test that takes longer hangs.
TEST_SECONDS = 25
# What one metric of ncu's full set is called that says how near a kernel is to a bound, and what it waits for.
COUNTERS = re.compile(
    r"gpu__time_duration.sum|dram_+throughput.*pct|dram__bytes_(read|write).*sum|sm__throughput.*pct"
    r"|launch__(registers|cluster_max_active)|smsp__issue_active.*(pct|per_cycle_active)|sm__warps_active.*pct"
    r"|smsp__average_warps_issue_stalled_(long_scoreboard|membar|barrier|short_scoreboard|math_pipe).*ratio"
)


# What ncu says where it may not read them.
REFUSED = (
    r"==ERROR== .*(ERR_NVGPUCTRPERM|not supported|[Ff]ailed to (initialize|access|open/create lock|prepare kernel)"
    r"|unavailable).*"
)


def build(part: Part, check: Check, limit: float) -> None:
    """Makes what the other parts import: linked from objects made before, or built for the devices here."""
    deadline = time.monotonic() + limit
    names = list(dict.fromkeys(each.variant for each in check.parts))
    for name in names:
        status, output = "passed", ""
        for command, environment in _building(check, name):
            if status == "passed":
                limit = max(deadline - time.monotonic(), 1)
                outcome = check.python(*command, limit=limit, variant=name, **environment)
                status, output = outcome.status, outcome.output
        if status != "passed":
            part.failures.append(f"{name}: {status}: {last_lines(output, 15)}")
            continue
        said = dict(re.split(r"  +", line, maxsplit=1) for line in output.splitlines() if "  " in line)
        if check.setting.device == devices.CARD and said.get("CUDA architectures", "none") == "none":
            part.failures.append(f"{name}: what is imported was built without CUDA")
            continue
        if check.setting.built is not None and (spills := variants.spills_of(check.setting.built, name)):
            said["spills"] = "; ".join(spills)
        # Parts that import this one may run, whatever becomes of the others.
        part.results[name] = said
    part.status = "failed" if part.failures else "passed"
    part.detail = ", ".join(
        f"{name} (spills registers)" if "spills" in said else name for name, said in part.results.items()
    )


def _building(check: Check, name: str) -> Iterator[tuple[tuple[str, ...], dict[str, str]]]:
    """The commands that make a variant, each with its environment; the last one says what was made."""
    if check.setting.device == devices.EMULATED:
        yield ("-c", "import cuda_emulator; print(cuda_emulator.build())"), {}
    if check.setting.built is not None:
        yield ("-m", "gpu_check.variants", str(check.setting.built), "--link", name), {}
    elif check.setting.device == devices.CARD:
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(check.machine["capabilities"])
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        environment = {"PDL_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architectures, "MAX_JOBS": jobs}
        yield ("setup.py", "build_ext", "--inplace"), environment
    yield ("-m", "pdl_ext.cli", "info"), {}


def script(module: str, *arguments: str) -> Run:
    """The part that is a module of gpu_check in a process of its own, which writes its results as it goes."""

    def run(part: Part, check: Check, limit: float) -> None:
        command = ["-m", f"gpu_check.{module}", "--output", str(check.running.resolve()), *arguments]
        command += ["--device", check.setting.device, "--budget", f"{max(limit - SCRIPT_OVERRUN, 1):.0f}"]
        outcome = check.python(*command, limit=limit, variant=part.variant)
        part.status, part.detail = outcome.status, last_lines(outcome.output)
        left_out = re.findall(r"^(.*): left out for time$", outcome.output, re.MULTILINE)
        if part.status == "passed" and left_out:
            part.status = "incomplete"
            part.failures += [f"left out for time: {name}" for name in left_out]
        elif part.status != "passed":
            part.failures.append(last_lines(outcome.output, 5))

    return run


def run_tests(chosen: str, *files: str) -> Run:
    """The part that runs those tests of some files that use the device."""

    def run(part: Part, check: Check, limit: float) -> None:
        with tempfile.TemporaryDirectory() as folder:
            junit = Path(folder) / "junit.xml"
            command = [
                "-m",
                "pytest",
                "-v",
                "--tb=short",
                "-p",
                "no:cacheprovider",
                f"--junitxml={junit}",
                "-k",
                chosen,
            ]
            if importlib.util.find_spec("pytest_timeout") is not None:
                command += [f"--timeout={TEST_SECONDS}", "--timeout-method=thread"]
            else:
                # A test that hangs shows where, in the log, before this part's time is up.
                command += ["-o", f"faulthandler_timeout={max(limit / 2, 1):.0f}"]
            where = check.setting.root / "tests"
            command += ["--continue-on-collection-errors", *(str(where / f"{name}.py") for name in files)]
            outcome = check.python(*command, limit=limit, variant=part.variant)
            part.status = outcome.status
            if not junit.is_file():
                # A test that hangs takes the report with it.
                told = re.findall(r"^(\S*tests/\S+::\S+)(?: +(PASSED|FAILED|ERROR|SKIPPED))?", outcome.output, re.M)
                counts = Counter(status.lower() for _, status in told if status)
                part.results = {"counts": dict(counts)}
                last = f"the last test was {told[-1][0]}" if told else "no test began"
                part.detail = ", ".join([*(f"{count} {kind}" for kind, count in counts.items()), "no report", last])
                part.failures += [name for name, status in told if status in ("FAILED", "ERROR")]
                part.failures.append(last_lines(outcome.output, 5))
                return
            part.results, part.failures = read_junit(junit)
        counts = part.results["counts"]
        part.detail = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        if part.status == "passed" and (part.failures or counts["passed"] == 0):
            part.status = "failed"

    return run


def read_junit(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Counts, reasons of skips and the slowest tests; and a line for each failure."""
    counts = Counter(passed=0, failed=0, skipped=0)
    skips: Counter[str] = Counter()
    failures = []
    seconds = {}
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        seconds[name] = float(case.get("time") or 0)
        bad = next((found for kind in ("failure", "error") if (found := case.find(kind)) is not None), None)
        skipped = case.find("skipped")
        if bad is not None:
            counts["failed"] += 1
            failures.append(f"{name}: {' '.join((bad.get('message') or '').split())[:200]}")
        elif skipped is not None:
            counts["skipped"] += 1
            skips[skipped.get("message") or ""] += 1
        else:
            counts["passed"] += 1
    slowest = sorted(seconds, key=seconds.__getitem__, reverse=True)[:10]
    results = {
        "counts": dict(counts),
        "skipped": dict(skips),
        "slowest": {name: seconds[name] for name in slowest},
    }
    return results, failures


def sanitizer(tool: str) -> Run:
    """The part that runs all kernels under one tool of compute-sanitizer."""

    def run(part: Part, check: Check, limit: float) -> None:
        program = find_sanitizer(check.path)
        if program is None:
            part.status, part.detail = "absent", "compute-sanitizer is neither on PATH nor beside nvcc"
            return
        command = [program, "--tool", tool, "--error-exitcode", "1", "--print-limit", "20"]
        # Errors that PyTorch asks for and handles are none of ours; our launches are checked by themselves.
        command += ["--report-api-errors", "no"]
        command += [sys.executable, "-m", "gpu_check.kernels", check.setting.device]
        # Without PyTorch's cache of memory every tensor ends where its allocation does, and begins as unwritten.
        outcome = check.execute(command, limit, part.variant, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        part.status = outcome.status
        summary = re.search(r"(ERROR|RACECHECK) SUMMARY: (\d+) .*", outcome.output)
        part.detail = summary[0] if summary else "no summary"
        if part.status == "passed" and (summary is None or int(summary[2]) != 0):
            part.status = "failed"
        if part.status != "passed":
            part.failures.append(last_lines(outcome.output, 5))

    return run


def find_sanitizer(path: str) -> str | None:
    nvcc = cuda_compile.find_nvcc()
    beside = [nvcc.parent, nvcc.parent.parent / "compute-sanitizer"] if nvcc else []
    folders = os.pathsep.join([path, *map(str, beside)])
    return shutil.which("compute-sanitizer", path=folders)


def counters(vocab_size: int) -> Run:
    """The part that lets ncu read the card's counters while one on_chip_kernel runs."""

    def run(part: Part, check: Check, limit: float) -> None:
        program = shutil.which("ncu", path=check.path)
        if program is None:
            part.status, part.detail = "absent", "ncu is not on PATH"
            return
        # Clocks are left as they are.
        command = [program, "--clock-control", "none", "--set", "full", "-k", "regex:on_chip", "-c", "1"]
        command += ["--csv", "--page", "raw", sys.executable, "-m", "gpu_check.launches", "--step", str(vocab_size)]
        outcome = check.execute([*command, "--device", check.setting.device], limit, part.variant)
        part.status = outcome.status
        part.results = read_counters(outcome.output)
        part.detail = f"{len(part.results)} counters"
        if refusal := re.search(REFUSED, outcome.output):
            # Virtual machines and containers often refuse them. That says nothing of the kernels.
            part.status, part.detail = "refused", refusal[0]
            return
        if part.status == "passed" and not part.results:
            part.status = "failed"
        if part.status != "passed":
            part.failures.append(last_lines(outcome.output, 5))

    return run


def read_counters(output: str) -> dict[str, str]:
    """Some of what `ncu --csv --page raw` prints of one kernel: names, units, values, amid other lines."""
    table = list(csv.reader(line for line in output.splitlines() if line.startswith('"')))
    heading = next((number for number, row in enumerate(table) if row[0] == "ID"), None)
    if heading is None or len(table) < heading + 3:
        return {}
    columns = zip(*table[heading : heading + 3], strict=False)
    return {name: f"{value} {unit}".strip() for name, unit, value in columns if COUNTERS.search(name)}


def bench(*arguments: str) -> Run:
    """The GPU benchmarks, which shorten themselves to a budget."""

    def run(part: Part, check: Check, limit: float) -> None:
        budget = max(limit - BENCH_OVERRUN, 0)
        (check.folder / "benchmark.json").unlink(missing_ok=True)
        command = [str(check.setting.root / "benchmarks" / "gpu.py"), "--output", str(check.folder.resolve())]
        command += ["--budget", f"{budget:.0f}", *arguments]
        if check.setting.device == devices.EMULATED:
            command.append("--dry")
        outcome = check.python(*command, limit=limit, variant=part.variant)
        part.status = outcome.status
        report = check.folder / "benchmark.json"
        if report.is_file():
            data = json.loads(report.read_text(encoding="utf-8"))
            part.detail = f"{len(data['rows'])} rows, {len(data['left_out'])} workloads left out for time"
        if part.status != "passed":
            part.failures.append(last_lines(outcome.output, 8))

    return run
