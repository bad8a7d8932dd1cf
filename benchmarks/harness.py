"""Times several providers of one result side by side, on any device: the protocol of the benchmarks.

- A provider's time is valid only if its result agrees with the float64 definition.
- Each warms up for 200 ms, after the peaks of all are measured. Then they take turns, a sample each, so that a noisy
  neighbour or a lower clock affects all. The order is drawn anew each time. So no provider always suffers from the
  effects of the same other one, such as memory that the system reclaims.
- Calls rotate over buffers that exceed three times the last cache, so that inputs come from memory.
- A sample is several consecutive calls. `wall` is the host's clock around eager calls, until the device has finished.
  `kernel`, on CUDA, is the device's clock around the same calls replayed as one CUDA graph, without the host.
- Reported are the median, and the 20th and 80th percentile. Bytes a second count the least bytes that the task has to
  move. They are compared with the bandwidth of a large copy in the same run.
- A failure only costs its own row: it is recorded and the run continues, until its budget of seconds is used.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pdl_ext.engine import products

ROOT = Path(__file__).resolve().parent.parent
CACHE_MULTIPLE = 3


@dataclasses.dataclass(frozen=True)
class Provider:
    """One way to compute a workload's result."""

    name: str
    # Makes the call that uses buffer `i` and returns its result.
    call: Callable[[int], Any]
    # The error of call(0) against the float64 definition, relative to the definition's largest entry.
    error: Callable[[Any], float]
    # Restores inputs that a call overwrote; its time does not count.
    restore: Callable[[], None] | None = None
    # Why no CUDA graph can hold the call; empty if one can.
    not_capturable: str = ""
    note: str = ""
    # The multiple of the workload's limit that its error may have.
    leeway: float = 1.0


@dataclasses.dataclass(frozen=True)
class Workload:
    """A result to compute, and its providers; the others are compared with the first."""

    name: str
    providers: Sequence[Provider]
    # The largest error of a valid time.
    limit: float
    # The least bytes that one call has to read and write; 0 if the time does not depend on it.
    least_bytes: int
    # Calls in a sample, each on the buffer of its number.
    calls: int = 1
    # The elements, ids or tokens of one call; 0 if the time of each is meaningless.
    items: int = 0
    # The operations of the products that the task needs; 0 if it is bound by memory.
    flop: int = 0
    # The bytes that a call returns, which its peak of memory leaves out.
    result_bytes: int = 0
    # A smaller number of samples for slow calls; 0 for the protocol's.
    least_rounds: int = 0


@dataclasses.dataclass(frozen=True)
class Group:
    """Workloads that share inputs, which are created when it is the group's turn."""

    name: str
    workloads: Callable[[], Iterator[Workload]]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How long to measure: samples of one workload end after `seconds` once there are `least_rounds` of them."""

    warm_up: float = 0.2
    least_rounds: int = 5
    most_rounds: int = 50
    seconds: float = 1.0


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one call."""

    median: float
    p20: float
    p80: float
    samples: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        deciles = statistics.quantiles(seconds, n=10, method="inclusive")
        return cls(statistics.median(seconds), deciles[1], deciles[7], len(seconds))


@dataclasses.dataclass
class Row:
    """The measurements of one provider."""

    workload: str
    provider: str
    note: str
    least_bytes: int
    limit: float
    error: float | None = None
    peak_bytes: int | None = None
    wall: Times | None = None
    kernel: Times | None = None
    bytes_per_second: float | None = None
    share_of_copy: float | None = None
    seconds_per_item: float | None = None
    flop_per_second: float | None = None
    # This provider's time over the first one's.
    wall_ratio: float | None = None
    kernel_ratio: float | None = None
    # The reason why there are no times, or no kernel time.
    failure: str = ""
    no_kernel: str = ""


def last_cache_bytes(caches: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """The size of the CPU's largest cache, from Linux; otherwise a size that few exceed by much."""
    # Not os.sysconf, which has no name for it in Python.
    sizes = [_read(str(path)).strip() for path in caches.glob("index*/size")]
    return max((1024 * int(size[:-1]) for size in sizes if size.endswith("K")), default=2**25)


class HostClock:
    """Times calls on the CPU."""

    def __init__(self, cache_bytes: int | None = None) -> None:
        self.device = torch.device("cpu")
        self.cache_bytes = last_cache_bytes() if cache_bytes is None else cache_bytes

    def current(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def wall(self, work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def capture(self, work: Callable[[], Any]) -> None:
        return None

    def peak_bytes(self, work: Callable[[], Any]) -> int | None:
        """The growth of resident memory while `work` runs; None if Linux does not report it."""
        try:
            # Without this, garbage that is collected meanwhile, or free memory, would hide the memory of the work.
            self.release()
            Path("/proc/self/clear_refs").write_text("5")
            before = _status_bytes("VmRSS")
            work()
            return _status_bytes("VmHWM") - before
        except OSError:
            return None

    def release(self) -> None:
        gc.collect()
        # The C library keeps freed memory, and returns it to the system if it supports that.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _status_bytes(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


class CudaClock:
    """Times calls on a CUDA device, all on one stream of its own, as a capture needs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._stream = torch.cuda.Stream(device)

    def current(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream)

    def wall(self, work: Callable[[], Any]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def capture(self, work: Callable[[], Any]) -> Callable[[], float]:
        """Records the work as a graph. The result replays it and returns the device's time."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            work()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def replay() -> float:
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        return replay

    def peak_bytes(self, work: Callable[[], Any]) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


Clock = HostClock | CudaClock


def buffers_for(clock: Clock, bytes_each: int) -> int:
    """The number of buffers of this size that exceed three times the last cache."""
    return CACHE_MULTIPLE * clock.cache_bytes // bytes_each + 1


def describe(error: Exception) -> str:
    """One line for a table."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


class _Contestant:
    """A provider that passed its check, with its samples so far."""

    def __init__(self, provider: Provider, row: Row, workload: Workload, clock: Clock) -> None:
        self.provider, self.row, self.calls, self.clock = provider, row, workload.calls, clock
        self.wall: list[float] = []
        self.kernel: list[float] = []
        self.replay: Callable[[], float] | None = None
        row.peak_bytes = clock.peak_bytes(lambda: provider.call(0))
        if row.peak_bytes is not None:
            row.peak_bytes = max(0, row.peak_bytes - workload.result_bytes)

    def prepare(self, protocol: Protocol) -> None:
        """Warms up, and records the work if the device can replay it."""
        self._warm_up(protocol, lambda: self.clock.wall(self.work))
        if self.provider.not_capturable:
            self.row.no_kernel = self.provider.not_capturable
            return
        try:
            self.replay = self.clock.capture(self.work)
            if self.replay is not None:
                self.replay()
        except Exception as error:
            self.replay = None
            self.row.no_kernel = describe(error)

    def work(self) -> None:
        for i in range(self.calls):
            self.provider.call(i)

    def restore(self) -> None:
        if self.provider.restore is not None:
            self.provider.restore()

    def _warm_up(self, protocol: Protocol, sample: Callable[[], Any]) -> None:
        start = time.perf_counter()
        while True:
            self.restore()
            sample()
            if time.perf_counter() - start >= protocol.warm_up:
                return

    def sample(self) -> None:
        self.restore()
        self.wall.append(self.clock.wall(self.work) / self.calls)
        if self.replay is not None:
            self.restore()
            self.kernel.append(self.replay() / self.calls)


def measure(workload: Workload, clock: Clock, protocol: Protocol, copy_rate: float | None = None) -> list[Row]:
    """A row for each provider, whatever fails."""
    rows = [
        Row(workload.name, provider.name, provider.note, workload.least_bytes, workload.limit * provider.leeway)
        for provider in workload.providers
    ]
    contestants = []
    for provider, row in zip(workload.providers, rows, strict=True):
        try:
            if provider.restore is not None:
                provider.restore()
            error_of_result = provider.error(provider.call(0))
            # JSON has neither NaN nor infinity.
            row.error = error_of_result if math.isfinite(error_of_result) else None
            if not error_of_result <= row.limit:
                row.failure = f"wrong: off by {error_of_result:.2g} of the largest entry, above {row.limit:.2g}"
                continue
            contestants.append(_Contestant(provider, row, workload, clock))
        except Exception as error:
            row.failure = describe(error)
            clock.release()
    # Only after all peaks are measured, since measuring one releases the memory that malloc has kept.
    for contestant in list(contestants):
        try:
            contestant.prepare(protocol)
        except Exception as error:
            contestant.row.failure = describe(error)
            contestants.remove(contestant)

    start = time.perf_counter()
    for turn in range(protocol.most_rounds):
        if turn >= (workload.least_rounds or protocol.least_rounds) and time.perf_counter() - start > protocol.seconds:
            break
        for contestant in random.sample(contestants, len(contestants)):
            try:
                contestant.sample()
            except Exception as error:
                contestant.row.failure = describe(error)
                contestants.remove(contestant)

    for contestant in contestants:
        row = contestant.row
        row.wall = Times.of(contestant.wall)
        row.kernel = Times.of(contestant.kernel) if contestant.kernel else None
        median = (row.kernel or row.wall).median
        if workload.least_bytes:
            row.bytes_per_second = workload.least_bytes / median
            row.share_of_copy = row.bytes_per_second / copy_rate if copy_rate else None
        if workload.items:
            row.seconds_per_item = median / workload.items
        if workload.flop:
            row.flop_per_second = workload.flop / median
    first = rows[0]
    for row in rows[1:]:
        if row.wall and first.wall:
            row.wall_ratio = row.wall.median / first.wall.median
        if row.kernel and first.kernel:
            row.kernel_ratio = row.kernel.median / first.kernel.median
    return rows


def copy_row(clock: Clock, size: int, protocol: Protocol) -> Row:
    """A copy of `size` bytes, which reads and writes them: the bandwidth to which results are compared."""
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=clock.device)
    destination = torch.empty_like(source)
    copy = Provider("copy", lambda i: destination.copy_(source), lambda copied: 0.0 if copied.equal(source) else 1.0)
    return measure(Workload(f"copy of {size / 2**20:g} MiB", [copy], 0.0, 2 * size), clock, protocol)[0]


@dataclasses.dataclass
class Report:
    """The results, written as JSON and Markdown after every workload, so that an interrupted run leaves its part."""

    folder: Path
    title: str
    about: dict[str, Any]
    protocol: Protocol
    # Whether the clock supports kernel times; if not, tables leave them out.
    kernel_times: bool = True
    copy: Row | None = None
    rows: list[Row] = dataclasses.field(default_factory=list)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    left_out: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    finished: bool = False

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        data = {name: value for name, value in dataclasses.asdict(self).items() if name != "folder"}
        write_whole(self.folder / "benchmark.json", json.dumps(data, indent=1) + "\n")
        write_whole(self.folder / "benchmark.md", self.markdown())

    def markdown(self) -> str:
        lines = [f"# {self.title}", ""]
        lines += [f"- {name}: {value}" for name, value in self.about.items()]
        if self.copy is not None:
            rate = self.copy.bytes_per_second
            lines.append(f"- {self.copy.workload}: {f'{rate / 1e9:.1f} GB/s' if rate else self.copy.failure}")
        lines += [
            f"- at least {self.protocol.least_rounds} interleaved samples a provider after "
            f"{1e3 * self.protocol.warm_up:g} ms of warm-up; {self.seconds:.0f} s in all",
            "- ratio: the provider's time over that of the workload's first one",
            "",
        ]
        headings = list(_row_cells(Row("", "", "", 0, 0.0), self.kernel_times))
        lines += [table_line(headings), table_line(["---"] * len(headings))]
        lines += [self.line(row) for row in self.rows]
        if self.failures:
            lines += ["", "Failed as a whole:", ""] + [f"- {name}: {why}" for name, why in self.failures.items()]
        if self.left_out:
            lines += ["", f"Left out, for time: {', '.join(self.left_out)}."]
        if not self.finished:
            lines += ["", "The run did not end."]
        return "\n".join(lines) + "\n"

    def line(self, row: Row) -> str:
        """The row of the Markdown table."""
        return table_line(list(_row_cells(row, self.kernel_times).values()))


def table_line(values: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(value.replace('|', '/') for value in values)} |"


def _row_cells(row: Row, kernel_times: bool) -> dict[str, str]:
    """The cells of a row, by the columns' headings."""

    def number(value: float | None, form: str, scale: float = 1.0) -> str:
        return "" if value is None else format(value * scale, form)

    def times(value: Times | None) -> str:
        return "" if value is None else f"{1e3 * value.median:.4g} ({1e3 * value.p20:.4g}, {1e3 * value.p80:.4g})"

    no_kernel = f"no kernel time: {row.no_kernel}" if row.no_kernel and kernel_times else ""
    cells = {
        "workload": row.workload,
        "provider": row.provider,
        "wall, ms (p20, p80)": times(row.wall),
        "kernel, ms (p20, p80)": times(row.kernel),
        "GB/s": number(row.bytes_per_second, ".1f", 1e-9),
        "of copy": number(row.share_of_copy, ".0%"),
        "ns an item": number(row.seconds_per_item, ".3g", 1e9),
        "TFLOP/s": number(row.flop_per_second, ".3g", 1e-12),
        "ratio, wall": number(row.wall_ratio, ".2f"),
        "ratio, kernel": number(row.kernel_ratio, ".2f"),
        "peak, MiB": number(row.peak_bytes, ".0f", 2**-20),
        "error": number(row.error, ".1e"),
        "note": "; ".join(note for note in (row.note, row.failure, no_kernel) if note),
    }
    return {heading: cell for heading, cell in cells.items() if kernel_times or "kernel" not in heading}


def read_rows(path: Path) -> list[Row]:
    """The rows of a report's JSON."""

    def row(values: dict[str, Any]) -> Row:
        times = {name: values[name] and Times(**values[name]) for name in ("wall", "kernel")}
        return Row(**(values | times))

    return [row(values) for values in json.loads(path.read_text(encoding="utf-8"))["rows"]]


def write_whole(path: Path, text: str) -> None:
    """Writes a file completely or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def run(groups: Sequence[Group], clock: Clock, report: Report, budget: float, copy_bytes: int) -> None:
    """Measures the groups in their order until the budget of seconds is used, and records those left out."""
    start = time.monotonic()

    def spent() -> bool:
        report.seconds = time.monotonic() - start
        return report.seconds >= budget

    with clock.current():
        report.write()
        try:
            report.copy = copy_row(clock, copy_bytes, report.protocol)
        except Exception as error:
            report.failures["copy"] = describe(error)
        clock.release()
        for group in groups:
            if spent():
                report.left_out.append(group.name)
                continue
            try:
                _run_group(group, clock, report, spent)
            except Exception as error:
                report.failures[group.name] = describe(error)
                print(f"{group.name}: {report.failures[group.name]}", flush=True)
            clock.release()
            report.write()
    spent()
    report.finished = True
    report.write()


# A separate function: when it returns, the group's tensors are freed.
def _run_group(group: Group, clock: Clock, report: Report, spent: Callable[[], bool]) -> None:
    copy_rate = report.copy.bytes_per_second if report.copy else None
    for workload in group.workloads():
        if spent():
            report.left_out.append(workload.name)
            continue
        rows = measure(workload, clock, report.protocol, copy_rate)
        report.rows += rows
        spent()
        report.write()
        for row in rows:
            print(report.line(row), flush=True)


def machine(device: torch.device) -> dict[str, Any]:
    """The properties of the machine on which a result depends: the device, the versions, the commit."""
    about: dict[str, Any] = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about["device"] = properties.name
        about["capability"] = f"{properties.major}.{properties.minor}"
        about["multiprocessors"] = properties.multi_processor_count
        about["memory_bytes"] = properties.total_memory
        about["cache_bytes"] = properties.L2_cache_size
        about["devices"] = torch.cuda.device_count()
        about["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    else:
        model = re.search(r"model name\s*:\s*(.+)", _read("/proc/cpuinfo"))
        about["device"] = model[1] if model else platform.machine()
        about["threads"] = torch.get_num_threads()
    about["cuda"] = torch.version.cuda
    about["torch"] = torch.__version__
    about["python"] = platform.python_version()
    about["commit"] = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    about["uncommitted_changes"] = None if changes is None else changes != ""
    return about


def has_bfloat16_products() -> bool:
    """Whether PyTorch has more than its own loops for products in bfloat16 on this CPU."""
    return products._has_instructions(torch.bfloat16)


def version_of(package: str, module: str) -> str:
    """The version of an installed package, or "absent"."""
    if importlib.util.find_spec(module) is None:
        return "absent"
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def results_folder(kind: str, about: dict[str, Any]) -> Path:
    """The default folder for the results of a kind of benchmark on a machine."""
    device = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    return ROOT / "benchmarks" / "results" / f"{kind}-{device}-{about['date'][:10]}"


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _output(*command: str) -> str | None:
    """The first line that a command prints; None if it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return None
    if result.returncode != 0:
        return None
    return result.stdout.strip().partition("\n")[0]


def relative_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest difference over the truth's largest entry; NaN stays NaN, which is below no limit."""
    got, truth = got.detach(), truth.detach()
    size = float(truth.abs().max())
    return float((got.double() - truth).abs().max()) / (size if size > 0 else math.ulp(0.0))


def largest(errors: Iterable[float]) -> float:
    """The largest error, or NaN if one is."""
    return float(torch.tensor(list(errors), dtype=torch.float64).max())
