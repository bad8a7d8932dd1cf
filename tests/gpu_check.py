"""Builds for the card that is there, tests, sanitizes and measures on it, and leaves one folder of results.

python tests/gpu_check.py [--output DIR] [--only tests,sanitizer,bench] [--budget SECONDS]

Needs no network: everything is run by the Python that runs this. The build always comes first and costs little when
nothing has changed. Results are written after every part, so that a run that is cut off leaves what it knew; a part is
ended rather than take the time that later ones need at least. Exit status: 0 if every part passed, 1 if not, 2 if
this machine cannot run the check at all.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import cuda_compile

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = ("memcheck", "racecheck", "initcheck")
WORDS = ("build", "tests", "sanitizer", "bench")
# As pyproject.toml asks for.
LEAST_SETUPTOOLS = 77
MODULES = ("numpy", "pybind11", "pytest", "safetensors", "setuptools")
NEEDS = "gpu-check needs a CUDA device, PyTorch built with CUDA, and nvcc"
# The log of one part keeps its beginning and its end.
LOG_BYTES_OF_A_PART = 2**21
# Failures of one part that are printed; all are in the results.
PRINTED_FAILURES = 20
# What a benchmark that has spent its budget may still take to finish the workload that it is at.
BENCH_OVERRUN = 45


@dataclass
class Part:
    """One part of the check and how it went."""

    name: str
    # The seconds that it may take, and those below which it is not worth to begin.
    most: float
    least: float
    run: Callable[[Part, Check, float], None]
    # not begun, running, passed, failed, timed out, absent (its tool is) or left out
    status: str = "not begun"
    seconds: float = 0.0
    detail: str = ""
    failures: list[str] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("name", "status", "seconds", "detail", "failures", "results")}


@dataclass
class Outcome:
    """How a command ended, and what it printed."""

    status: str
    output: str


class Check:
    """The parts in their order, the budget that they share, and the folder of results."""

    def __init__(self, folder: Path, machine: dict[str, Any], budget: float, parts: Sequence[Part]) -> None:
        self.folder, self.machine, self.budget, self.parts = folder, machine, budget, parts
        self.start = time.monotonic()
        self.log = _new_log(folder)

    @property
    def remaining(self) -> float:
        return self.budget - (time.monotonic() - self.start)

    def run(self) -> bool:
        """Runs all parts; whether every one passed."""
        self.write()
        for number, part in enumerate(self.parts):
            self._run_part(part, reserved=sum(later.least for later in self.parts[number + 1 :]))
            self.write()
        print(self.table(), flush=True)
        return all(part.status == "passed" for part in self.parts)

    def _run_part(self, part: Part, reserved: float) -> None:
        start = time.monotonic()
        build = self.parts[0]
        limit = min(part.most, max(self.remaining - reserved, part.least))
        if part is not build and build.status != "passed":
            part.status, part.detail = "left out", "there is no build to check"
        elif self.remaining < part.least:
            part.status, part.detail = "left out", f"{max(self.remaining, 0):.0f} s were left of {self.budget:.0f}"
        else:
            part.status = "running"
            self.write()
            print(f"{part.name} ...", flush=True)
            self.note(f"\n===== {part.name}")
            try:
                part.run(part, self, limit)
            except Exception as error:
                part.status, part.detail = "failed", f"{type(error).__name__}: {error}"
            if limit < part.most:
                part.detail += f" (allowed {limit:.0f} s of its {part.most:.0f})"
        part.seconds = round(time.monotonic() - start, 1)
        print(f"{part.name}: {part.status}, {part.seconds} s, {part.detail}", flush=True)

    def execute(self, command: Sequence[str], limit: float, **environment: str) -> Outcome:
        """Runs a command for at most `limit` seconds, its output in the log."""
        self.note(f"+ {' '.join(command)}")
        begin = os.fstat(self.log.fileno()).st_size
        paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        environment = {
            "PATH": search_path(),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
            **environment,
        }
        status = run_limited(command, limit, self.log, {**os.environ, **environment})
        output = self._end_of_log(begin)
        if status == "timed out":
            self.note(f"\ngpu-check: ended after {limit:.0f} s")
        return Outcome(status, output)

    def note(self, line: str) -> None:
        self.log.write(f"{line}\n".encode())

    def _end_of_log(self, begin: int) -> str:
        """What was logged since `begin`, which is shortened in the log if it is long."""
        with open(self.log.name, "rb") as log:
            log.seek(begin)
            output = log.read()
        if len(output) > LOG_BYTES_OF_A_PART:
            half = LOG_BYTES_OF_A_PART // 2
            left_out = f"\n[{len(output) - 2 * half} bytes are left out here]\n"
            output = output[:half] + left_out.encode() + output[-half:]
            self.log.truncate(begin)
            self.log.write(output)
        return output.decode(errors="replace")

    def write(self) -> None:
        data = {
            "machine": self.machine,
            "budget": self.budget,
            "seconds": round(time.monotonic() - self.start, 1),
            "parts": [part.record() for part in self.parts],
        }
        path = self.folder / "gpu_check.json"
        partial = path.with_name(".gpu_check.json.partial")
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)

    def table(self) -> str:
        """What failed, then a line for each part, then the verdict."""
        lines = []
        for part in self.parts:
            lines += [f"{part.name}: {failure}" for failure in part.failures[:PRINTED_FAILURES]]
            if len(part.failures) > PRINTED_FAILURES:
                lines.append(f"{part.name}: and {len(part.failures) - PRINTED_FAILURES} more, in gpu_check.json")
        width = max(len(part.name) for part in self.parts)
        lines += [""] if lines else []
        lines += [
            f"{part.name:<{width}}  {part.status:<9}  {part.seconds:6.1f} s  {part.detail}" for part in self.parts
        ]
        bad = [part.name for part in self.parts if part.status != "passed"]
        verdict = f"not passed: {', '.join(bad)}" if bad else "all parts passed"
        return "\n".join([*lines, f"{self.machine.get('device')}: {verdict}; results are in {self.folder}"])


def _new_log(folder: Path) -> IO[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    # An earlier run's results beside this one's would be taken for this one's.
    for name in ("gpu_check.json", "gpu_check.log", "benchmark.json", "benchmark.md"):
        (folder / name).unlink(missing_ok=True)
    # Not buffered, and every write at the end: commands write to it, too.
    return open(folder / "gpu_check.log", "ab", buffering=0)


def run_limited(command: Sequence[str], limit: float, output: IO[bytes], environment: dict[str, str]) -> str:
    """passed, failed or timed out; whatever happens, nothing that the command started goes on running."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return "passed" if process.wait(timeout=limit) == 0 else "failed"
    except subprocess.TimeoutExpired:
        # Interrupted, pytest still writes its report.
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGINT)
            process.wait(timeout=5)
        return "timed out"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # A process that waits for a stuck device may not die.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)


def search_path() -> str:
    """PATH with the programs that were installed with this Python, such as ninja, also where it is not activated."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])


def last_lines(text: str, count: int = 1) -> str:
    return "\n".join([line for line in text.splitlines() if line.strip()][-count:])


def build(part: Part, check: Check, limit: float) -> None:
    """Builds in place for the devices that are there, and lets the result tell what it is."""
    deadline = time.monotonic() + limit
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(check.machine["capabilities"])
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    outcome = check.execute(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        limit,
        PDL_EXT_CUDA="1",
        TORCH_CUDA_ARCH_LIST=architectures,
        MAX_JOBS=jobs,
    )
    if outcome.status == "passed":
        outcome = check.execute([sys.executable, "-m", "pdl_ext.cli", "info"], max(deadline - time.monotonic(), 20))
    part.status, part.detail = outcome.status, f"for {architectures}, {jobs} jobs"
    built_for = re.search(r"^CUDA architectures +(.+)$", outcome.output, re.MULTILINE)
    if outcome.status != "passed":
        part.failures.append(last_lines(outcome.output, 15))
    elif built_for is None or built_for[1] == "none":
        part.status = "failed"
        part.failures.append("what is imported was built without CUDA")
    else:
        part.results = dict(re.split(r"  +", line, maxsplit=1) for line in outcome.output.splitlines() if "  " in line)


def tests(part: Part, check: Check, limit: float) -> None:
    """All tests that use the device; those of the emulator and of the compiler need none."""
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "tests", "-v", "--tb=short", "-p", "no:cacheprovider"]
        command += ["-k", "cuda and not emulated"]
        command += ["--ignore=tests/test_cuda_emulator.py", "--ignore=tests/test_cuda_compile.py"]
        # A test that hangs shows where, in the log, before this part's time is up.
        command += ["-o", f"faulthandler_timeout={max(limit / 2, 1):.0f}", f"--junitxml={junit}"]
        outcome = check.execute(command, limit)
        part.status = outcome.status
        if not junit.is_file():
            last_test = re.findall(r"^tests/\S+::\S+", outcome.output, re.MULTILINE)
            part.detail = f"no report; the last test was {last_test[-1]}" if last_test else "no report"
            part.failures.append(last_lines(outcome.output, 5))
            return
        part.results, part.failures = read_junit(junit)
    counts = part.results["counts"]
    part.detail = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    if part.status == "passed" and (part.failures or counts["passed"] == 0):
        part.status = "failed"


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


def sanitizer(tool: str) -> Callable[[Part, Check, float], None]:
    """The part that runs all kernels under one tool of compute-sanitizer."""

    def run(part: Part, check: Check, limit: float) -> None:
        program = find_sanitizer()
        if program is None:
            part.status, part.detail = "absent", "compute-sanitizer is neither on PATH nor beside nvcc"
            return
        subset = "import gpu_check; gpu_check.exercise_kernels('cuda')"
        command = [program, "--tool", tool, "--error-exitcode", "1", "--print-limit", "20"]
        # Errors that PyTorch asks for and handles are none of ours; our launches are checked by themselves.
        command += ["--report-api-errors", "no"]
        # Without PyTorch's cache of memory every tensor ends where its allocation does, and begins as unwritten.
        outcome = check.execute([*command, sys.executable, "-c", subset], limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        part.status = outcome.status
        summary = re.search(r"(ERROR|RACECHECK) SUMMARY: (\d+) .*", outcome.output)
        part.detail = summary[0] if summary else "no summary"
        if part.status == "passed" and (summary is None or int(summary[2]) != 0):
            part.status = "failed"
        if part.status != "passed":
            part.failures.append(last_lines(outcome.output, 5))

    return run


def find_sanitizer() -> str | None:
    nvcc = cuda_compile.find_nvcc()
    beside = [nvcc.parent, nvcc.parent.parent / "compute-sanitizer"] if nvcc else []
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(map(str, beside))
    )


def bench(part: Part, check: Check, limit: float) -> None:
    """The GPU benchmarks, which shorten themselves to a budget."""
    budget = max(limit - BENCH_OVERRUN, 0)
    command = [
        sys.executable,
        "benchmarks/gpu.py",
        "--output",
        str(check.folder.resolve()),
        "--budget",
        f"{budget:.0f}",
    ]
    outcome = check.execute(command, limit)
    part.status = outcome.status
    report = check.folder / "benchmark.json"
    if report.is_file():
        data = json.loads(report.read_text(encoding="utf-8"))
        part.detail = f"{len(data['rows'])} rows, {len(data['left_out'])} workloads left out for time"
    if part.status != "passed":
        part.failures.append(last_lines(outcome.output, 8))


def parts_for(words: Sequence[str]) -> list[Part]:
    """The parts that the words choose, behind the build, which all need."""
    parts = [Part("build", 150, 60, build)]
    if "tests" in words:
        parts.append(Part("tests", 180, 30, tests))
    if "sanitizer" in words:
        parts += [Part(f"sanitizer: {tool}", 75, 45, sanitizer(tool)) for tool in SANITIZERS]
    if "bench" in words:
        # The last one, which has use for all that is left.
        parts.append(Part("bench", math.inf, BENCH_OVERRUN + 20, bench))
    return parts


def exercise_kernels(device: str) -> None:
    """Runs every kernel on small inputs and compares with the reference: what a sanitizer watches.

    Inputs are made and results compared on the CPU, so that hardly a kernel of PyTorch's own is watched.
    """
    import torch

    from pdl_ext import PowerLaw, functional, reference

    generator = torch.Generator().manual_seed(0)

    def check_loss(
        rows: int, vocab_size: int, dtype: torch.dtype, offset: int, target_dtype: torch.dtype, **options: Any
    ) -> None:
        # Rows of a wider tensor, which begin `offset` elements behind an aligned address.
        wide = torch.randn(rows, offset + vocab_size, generator=generator).to(dtype)
        targets = torch.randint(vocab_size, (rows,), generator=generator).to(target_dtype)
        if rows > 2:
            targets[1] = -100
        weight = 0.5 + torch.rand(vocab_size, generator=generator)
        row_weight = 0.5 + torch.rand(rows, generator=generator)
        in_place = options.pop("inplace_backward", False)
        if options.pop("logit_offset", False):
            options["logit_offset"] = torch.randn(vocab_size, generator=generator)

        def gradient(function: Callable[..., Any], where: str, dtype: torch.dtype, **more: Any) -> list[torch.Tensor]:
            leaf = wide.to(dtype, copy=True).to(where).requires_grad_()
            # What a model hands over is no leaf, and may be written to in place.
            logits = leaf.clone()[:, offset:]
            moved = {k: v.to(where) if isinstance(v, torch.Tensor) else v for k, v in {**options, **more}.items()}
            factors = row_weight.clone().to(where).requires_grad_()
            loss, stats = function(
                logits, targets.to(where), weight.to(where), row_weight=factors, return_stats=True, **moved
            )
            loss.backward(torch.full(loss.shape, 0.5, dtype=loss.dtype).to(where))
            results = [loss.detach(), leaf.grad, factors.grad, stats.nll, stats.lse, stats.predicted]
            return [result.cpu().double() for result in results]

        got = gradient(functional.pdl_loss, device, dtype, inplace_backward=in_place)
        expected = gradient(reference.pdl_loss, "cpu", torch.float64)
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 4 * torch.finfo(dtype).eps)
        for one, other in zip(got[:-1], expected[:-1], strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))
        assert torch.equal(got[-1], expected[-1]), "predicted"

    everything = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0, "logit_scale": 1.3, "logit_offset": True}
    reductions = ("mean", "none", "token_mean", "sum")
    shapes = [(3, 7), (300, 64), (5, 1000), (3, 4096), (3, 4097), (2, 50257), (1, 131072)]
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for number, (rows, vocab_size) in enumerate(shapes):
            target_dtype = (torch.int64, torch.int32)[number % 2]
            reduction = reductions[number % len(reductions)]
            check_loss(rows, vocab_size, dtype, number % 3, target_dtype, reduction=reduction)
            check_loss(
                rows, vocab_size, dtype, 0, target_dtype, reduction=reduction, inplace_backward=True, **everything
            )

    # Loss and gradient at once: in one block, in clusters, and from L2, with more rows than multiprocessors. A block's
    # share of 24,576 or 49,152 logits is 48 KiB, which only the kernel's own variables make too much without asking.
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device == "cuda" else 4
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for vocab_size in (1009, 24_576, 30_011, 49_152, 250_001):
            for options in ({}, everything):
                check_loss(multiprocessors + 3, vocab_size, dtype, 0, torch.int64, inplace_backward=True, **options)

    for dtype in (torch.uint8, torch.uint16, torch.int32, torch.uint32, torch.int64):
        # In warps, and on chip: all ids in a block, in a group of blocks, and only the first ones in a group.
        on_chip = 2 * multiprocessors * 58_080 + 1
        for count, vocab_size in (
            (1000, 200),
            (70_001, 50_257),
            (on_chip, 1009),
            (on_chip, 300_000),
            (on_chip, 600_000),
        ):
            highest = min(vocab_size + 50, 2 ** min(8 * dtype.itemsize, 31))
            tokens = torch.randint(highest, (count,), generator=generator)
            tokens[::7] = 3
            counts = functional.count_tokens(tokens.to(dtype).to(device), vocab_size, ignore_index=5)
            assert torch.equal(counts.cpu(), reference.count_tokens(tokens, vocab_size, ignore_index=5)), (dtype, count)

    for vocab_size in (5, 1000, 262_144):
        counts = torch.randint(0, 1000, (vocab_size,), generator=generator)
        for law in (
            PowerLaw(alpha=0.5, max_weight=50.0, blend=0.5, fixed={1: 0.0, 4: 2.0}),
            PowerLaw(normalize="types", relative=False),
            PowerLaw.reference(),
        ):
            weights = functional.token_weights(counts.to(device), law).cpu()
            torch.testing.assert_close(weights.double(), reference.token_weights(counts, law), rtol=1e-5, atol=0.0)


def probe() -> dict[str, Any]:
    """What this machine is and what it lacks."""
    missing = [f"the Python package {name}" for name in MODULES if importlib.util.find_spec(name) is None]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("setuptools")
        if int(version.split(".")[0]) < LEAST_SETUPTOOLS:
            missing.append(f"setuptools {LEAST_SETUPTOOLS} or later (there is {version})")
    if shutil.which("ninja", path=search_path()) is None:
        missing.append("ninja")
    nvcc = cuda_compile.find_nvcc()
    if nvcc is None:
        missing.append("nvcc (set CUDA_HOME)")
    try:
        import torch
    except ImportError:
        return {"missing": ["PyTorch, so that no CUDA device can be looked for", *missing]}
    if torch.version.cuda is None:
        missing.append(f"PyTorch built with CUDA (torch {torch.__version__} was built without)")
    if not torch.cuda.is_available():
        missing.append("a CUDA device that PyTorch sees")
    if missing or nvcc is None:
        return {"missing": missing}
    import harness

    devices = range(torch.cuda.device_count())
    capabilities = sorted({torch.cuda.get_device_capability(device) for device in devices})
    return {
        "missing": [],
        **harness.machine(torch.device("cuda", 0)),
        "nvcc": f"{nvcc}, {nvcc_version(nvcc)}",
        "capabilities": [f"{major}.{minor}" for major, minor in capabilities],
    }


def nvcc_version(nvcc: Path) -> str:
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\S+),", output)
    return found[1] if found else last_lines(output)


def probe_in_a_process() -> dict[str, Any]:
    """The probe, where a driver that hangs costs no more than its time limit."""
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    try:
        result = subprocess.run(
            [sys.executable, "-c", "import gpu_check, json; print(json.dumps(gpu_check.probe()))"],
            env={**os.environ, "PYTHONPATH": paths.rstrip(os.pathsep)},
            capture_output=True,
            text=True,
            timeout=60,
        )
    except subprocess.TimeoutExpired:
        return {"missing": ["a CUDA driver that answers within a minute"]}
    if result.returncode != 0:
        return {"missing": [f"a PyTorch that works: {last_lines(result.stderr)}"]}
    return json.loads(last_lines(result.stdout))


def default_folder(machine: dict[str, Any]) -> Path:
    device = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    return ROOT / "benchmarks" / "results" / f"{device}-torch{machine['torch'].partition('+')[0]}"


def words_of(text: str) -> list[str]:
    words = text.split(",")
    unknown = [word for word in words if word not in WORDS]
    if unknown:
        raise argparse.ArgumentTypeError(f"got {', '.join(map(repr, unknown))}, expected words of {', '.join(WORDS)}")
    return words


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: benchmarks/results/DEVICE-torchVERSION")
    parser.add_argument("--only", type=words_of, default=WORDS, metavar="WORDS", help=f"some of {','.join(WORDS)}")
    parser.add_argument("--budget", type=float, default=510.0, metavar="SECONDS", help="for everything; default: 510")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    machine = probe_in_a_process()
    if machine["missing"]:
        print(f"{NEEDS}; missing here: {'; '.join(machine['missing'])}", file=sys.stderr)
        return 2
    # Being ended must end what runs, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    budget = options.budget - (time.monotonic() - start)
    check = Check(options.output or default_folder(machine), machine, budget, parts_for(options.only))
    print(f"{machine['device']}, PyTorch {machine['torch']}, results in {check.folder}", flush=True)
    return 0 if check.run() else 1


if __name__ == "__main__":
    sys.exit(main())
