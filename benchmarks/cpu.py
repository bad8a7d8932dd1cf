"""The loss, the histogram and the weights on the CPU, beside PyTorch, NumPy and the standard library.

    python benchmarks/cpu.py [--only WORD...] [--regime fresh kept] [--budget SECONDS] [--output DIR]

Measures in one process for each regime of memory (regimes.py). Writes benchmark.json and benchmark.md into DIR/fresh
and DIR/kept, by the protocol of harness.py. It ends with a table of ratios for both. Workloads come in the order of
their importance; those beyond the budget are listed as left out. Where PyTorch has only loops for products in bfloat16,
peers of the fused linear get fewer of them.

The loss is the weighted mean with its gradient. A new gradient is new memory in every call, as in training. In both
regimes the loss is also compared with a copy of the logits into an existing buffer. The fused linear is compared with
its three products alone.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
import regimes
import torch
from family import family_group, family_linear_group
from harness import Clock, Group, Provider, Row, Workload
from linear import PRODUCTS, cpu_peers, linear_group
from torch import Tensor
from workloads import (
    IDS,
    Counter,
    LossInputs,
    count_by_pdl_ext,
    count_by_torch,
    failures,
    forward,
    forward_and_backward,
    forward_with_graph,
    histogram_group,
    is_ours,
    loss_limit,
    loss_provider,
    pdl_ext_functions,
    pytorch_functions,
    tiny_group,
    weights_group,
)

from pdl_ext.engine.ops import _C

# The provider that is not a peer: it moves the logits as often as a loss in place has to.
COPY = "copy of the logits"
NO_PEERS = (COPY, PRODUCTS)
# More rounds than on a card, since neighbours on the same host disturb.
PROTOCOL = harness.Protocol(least_rounds=11, seconds=2.0)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of the workloads."""

    # The bytes of the logits, which must exceed every cache.
    elements: int = 2**25
    vocab_sizes: tuple[int, ...] = (32000, 50257, 128256, 262144)
    tokens: int = 2**26
    # The tokens that collections.Counter counts in a reasonable time.
    few_tokens: int = 2**20
    # The targets of a training step.
    step_tokens: int = 4096
    histogram_vocab_size: int = 50257
    table: int = 262144
    tiny_rows: int = 16
    tiny_vocab_size: int = 1009
    tiny_calls: int = 50
    # Two decades of each, the other one fixed.
    growth_rows: tuple[int, ...] = (16, 50, 160, 500, 1600)
    growth_vocab_size: int = 32000
    growth_vocab_sizes: tuple[int, ...] = (2560, 8192, 25600, 81920, 256000)
    growth_fixed_rows: int = 256
    # (N, H, V)
    linear: tuple[int, int, int] = (1024, 768, 50257)
    # Shapes that take half a minute a call in loops of 16-bit products.
    small_linear: tuple[int, int, int] = (256, 256, 8192)
    growth_linear: tuple[tuple[int, int, int], ...] = tuple((rows, 256, 50257) for rows in (1024, 4096, 16384))
    copy_bytes: int = 2**28


def _copy_provider(inputs: LossInputs) -> Provider:
    logits = [each.detach() for each in inputs.logits]
    buffers = [each.detach() for each in inputs.scratch]
    return Provider(COPY, lambda i: buffers[i].copy_(logits[i]), lambda copied: 0.0 if copied.equal(logits[0]) else 1.0)


def _loss_workload(clock: Clock, rows: int, vocab_size: int, dtype: torch.dtype, with_peers: bool) -> Workload:
    inputs = LossInputs(clock, rows, vocab_size, dtype, peaked=False, ignored=0.0)
    functions = pdl_ext_functions(inputs.weight)
    if with_peers:
        functions += pytorch_functions(inputs.weight, dtype)
    providers = [loss_provider(inputs, loss, forward_and_backward) for loss in functions]
    elements = rows * vocab_size
    return Workload(
        f"loss {str(dtype).removeprefix('torch.')} [{rows}, {vocab_size}]",
        [*providers, _copy_provider(inputs)],
        loss_limit(dtype),
        # A row stays in cache between its passes: the logits are read once, and the gradient is written once.
        2 * elements * dtype.itemsize,
        len(inputs.logits),
        items=elements,
    )


def loss_group(clock: Clock, elements: int, vocab_size: int, dtype: torch.dtype) -> Group:
    """The loss with its gradient, on at least this number of elements."""
    rows = -(-elements // vocab_size)

    def workloads() -> Iterator[Workload]:
        yield _loss_workload(clock, rows, vocab_size, dtype, with_peers=True)

    return Group(f"loss {str(dtype).removeprefix('torch.')} [{rows}, {vocab_size}]", workloads)


def never_differentiated_group(clock: Clock, elements: int, vocab_size: int, dtype: torch.dtype) -> Group:
    """The loss of logits that require grad, without a backward, beside the loss alone and the whole step."""
    rows = -(-elements // vocab_size)
    name = f"never differentiated {str(dtype).removeprefix('torch.')} [{rows}, {vocab_size}]"

    def workloads() -> Iterator[Workload]:
        inputs = LossInputs(clock, rows, vocab_size, dtype, peaked=False, ignored=0.0)
        loss = pdl_ext_functions(inputs.weight)[0]
        ways = {"no_grad": forward, "no backward": forward_with_graph, "whole step": forward_and_backward}
        providers = [
            dataclasses.replace(loss_provider(inputs, loss, make), name=f"{loss.name}, {way}")
            for way, make in ways.items()
        ]
        yield Workload(name, providers, loss_limit(dtype), 0, len(inputs.logits), items=rows * vocab_size)

    return Group(name, workloads)


def growth_group(clock: Clock, name: str, shapes: Sequence[tuple[int, int]]) -> Group:
    """The loss with its gradient at one shape after the other, to show how the time of an element changes."""

    def workloads() -> Iterator[Workload]:
        for rows, vocab_size in shapes:
            workload = _loss_workload(clock, rows, vocab_size, torch.float32, with_peers=False)
            yield dataclasses.replace(workload, name=f"{name}: {workload.name}")

    return Group(name, workloads)


def _count_on_one_thread(buffers: list[Tensor], vocab_size: int, error: Callable[[Tensor], float]) -> Provider:
    on_all = count_by_pdl_ext(buffers, vocab_size, error)

    def call(i: int) -> Tensor:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return on_all.call(i)
        finally:
            torch.set_num_threads(threads)

    return dataclasses.replace(on_all, name="pdl_ext, 1 thread", call=call)


def _count_by_numpy(buffers: list[Tensor], vocab_size: int, error: Callable[[Tensor], float]) -> Provider:
    arrays = [buffer.numpy() for buffer in buffers]
    return Provider(
        "np.bincount",
        lambda i: np.bincount(arrays[i], minlength=vocab_size),
        lambda counts: error(torch.from_numpy(counts)),
    )


def _count_by_counter(buffers: list[Tensor], vocab_size: int, error: Callable[[Tensor], float]) -> Provider:
    # One list for all calls: its integers are objects, which exceed the cache without rotation.
    ids = buffers[0].tolist()

    def error_of(counter: collections.Counter[int]) -> float:
        return error(torch.tensor([counter[token] for token in range(vocab_size)]))

    return Provider("collections.Counter", lambda _: collections.Counter(ids), error_of, note="of a list")


def _linear_groups_in_bfloat16(clock: Clock, sizes: Sizes) -> Iterator[Group]:
    fast = harness.has_bfloat16_products()
    yield linear_group(clock, "linear", [sizes.linear], torch.bfloat16, peers=fast)
    if not fast:
        yield linear_group(clock, "linear", [sizes.small_linear], torch.bfloat16)


def plan(clock: Clock, sizes: Sizes) -> list[Group]:
    """All workloads, the most important first."""
    vocab_size = sizes.histogram_vocab_size
    large: list[Counter] = [count_by_pdl_ext, _count_on_one_thread, _count_by_numpy, count_by_torch]
    few: list[Counter] = [count_by_pdl_ext, _count_by_numpy, count_by_torch, _count_by_counter]
    of_step: list[Counter] = [count_by_pdl_ext, _count_by_numpy, count_by_torch]
    dtypes = [torch.uint16, torch.int64, torch.int32]
    return [
        *(
            loss_group(clock, sizes.elements, *shape)
            for shape in itertools.product(sizes.vocab_sizes, (torch.float32, torch.bfloat16))
        ),
        *(histogram_group(clock, vocab_size, kind, sizes.tokens, dtypes, large) for kind in IDS),
        histogram_group(clock, vocab_size, "Zipf", sizes.step_tokens, [torch.int64], of_step),
        histogram_group(clock, vocab_size, "Zipf", sizes.few_tokens, [torch.int64], few),
        weights_group(clock, sizes.table),
        tiny_group(clock, sizes.tiny_rows, sizes.tiny_vocab_size, sizes.tiny_calls),
        *(
            never_differentiated_group(clock, sizes.elements, sizes.vocab_sizes[0], dtype)
            for dtype in (torch.float32, torch.bfloat16)
        ),
        growth_group(clock, "growth with N", [(rows, sizes.growth_vocab_size) for rows in sizes.growth_rows]),
        growth_group(clock, "growth with V", [(sizes.growth_fixed_rows, size) for size in sizes.growth_vocab_sizes]),
        linear_group(clock, "linear", [sizes.linear], torch.float32),
        *_linear_groups_in_bfloat16(clock, sizes),
        *(
            family_group(clock, sizes.elements, sizes.vocab_sizes[0], dtype)
            for dtype in (torch.float32, torch.bfloat16)
        ),
        family_linear_group(clock, sizes.linear, torch.float32),
        *(
            linear_group(clock, "linear, growth with N", sizes.growth_linear, dtype, peers=False)
            for dtype in (torch.float32, torch.bfloat16)
        ),
    ]


def chosen(groups: Sequence[Group], words: Sequence[str]) -> list[Group]:
    """The groups with one of the words in their name; without words all.

    Raises ValueError for a word without a group.
    """
    for word in words:
        if not any(word in group.name for group in groups):
            raise ValueError(f"--only: no group has {word!r} in its name, which are:\n" + _names(groups))
    return [group for group in groups if not words or any(word in group.name for word in words)]


def _names(groups: Sequence[Group]) -> str:
    return "\n".join(f"  {group.name}" for group in groups)


def benchmark(
    clock: Clock,
    groups: Sequence[Group],
    folder: Path,
    regime: str,
    budget: float,
    copy_bytes: int,
    protocol: harness.Protocol = PROTOCOL,
) -> tuple[harness.Report, str]:
    """Measures the groups, and leaves the files in `folder`. Returns the reason if the regime is not available."""
    about: dict[str, Any] = {**harness.machine(clock.device), "instructions": _C.cpu_capability()}
    about["cache_bytes"] = clock.cache_bytes
    of_memory, why = regimes.about(regime)
    about |= of_memory | cpu_peers()
    report = harness.Report(folder, f"pdl_ext: CPU benchmarks, {regimes.NAMES[regime]}", about, protocol, False)
    if why:
        report.finished = True
        report.write()
    else:
        harness.run(groups, clock, report, budget, copy_bytes)
    return report, why


def ratios(rows: Sequence[Row]) -> list[str]:
    """A table for readers: for each workload our times, and every peer's as a multiple of them."""
    lines = ["", "Times of pdl_ext, and the others' over them: above 1 the other is slower."]
    for workload, group in itertools.groupby(rows, key=lambda row: row.workload):
        lines.append(workload)
        of_workload = list(group)
        first = of_workload[0]
        for row in filter(is_ours, of_workload):
            # Besides the first one, also our own variants.
            others = [other for other in of_workload if other is not row and (row is first or not is_ours(other))]
            figures = [_figure(row), *(_multiple(row, other) for other in others)]
            lines.append(f"  {row.provider:18} {'; '.join(figures)}")
    return lines


def _figure(row: Row) -> str:
    if row.wall is None:
        return "failed"
    each = "" if row.seconds_per_item is None else f", {1e9 * row.seconds_per_item:.3g} ns an item"
    if row.flop_per_second is not None:
        each = f", {1e-12 * row.flop_per_second:.3g} TFLOP/s"
    peak = "" if row.peak_bytes is None else f", peak {row.peak_bytes / 2**20:.0f} MiB"
    return f"{1e3 * row.wall.median:.4g} ms{each}{peak}"


def _multiple(row: Row, other: Row) -> str:
    if row.wall is None or other.wall is None:
        return f"{other.provider}: none"
    ratio = other.wall.median / row.wall.median
    if other.provider in NO_PEERS:
        return f"{1 / ratio:.2f} times {'a ' if other.provider == COPY else ''}{other.provider}"
    of_linear = other.flop_per_second is not None and other.peak_bytes is not None
    peak = f" with a peak of {other.peak_bytes / 2**20:.0f} MiB" if of_linear else ""
    return f"{other.provider} {ratio:.2f}{peak}"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def side_by_side(
    runs_of: Mapping[str, Sequence[Sequence[Row]]], kinds: Sequence[str] = ("loss", "linear")
) -> list[str]:
    """Tables of the losses for readers, with each figure for every regime: the median over its runs."""
    # The times of each run, by workload, provider and regime.
    seconds: dict[str, dict[str, dict[str, dict[int, float]]]] = {}
    ours = set()
    for regime, runs in runs_of.items():
        for run, rows in enumerate(runs):
            for row in rows:
                if row.wall is not None and re.match(r"(loss|linear) \w+ \[", row.workload):
                    times = seconds.setdefault(row.workload, {}).setdefault(row.provider, {})
                    times.setdefault(regime, {})[run] = row.wall.median
                    ours |= {row.provider} if is_ours(row) else set()

    def figures(of: Mapping[str, Mapping[int, float]], over: Mapping[str, Mapping[int, float]] | None = None) -> str:
        cells = []
        for regime in runs_of:
            times, others = of.get(regime, {}), None if over is None else over.get(regime, {})
            both = times.keys() if others is None else times.keys() & others.keys()
            values = [times[run] / (1e-3 if others is None else others[run]) for run in both]
            cells.append(_number(statistics.median(values)) if values else "none")
        return " / ".join(cells)

    names = " / ".join(regimes.NAMES[regime] for regime in runs_of)
    lines = [
        "",
        f"Each cell: {names}. `ms` is the time of pdl_ext. A column of another implementation is its time over ours. "
        "A column of a copy or of products alone is our time over it.",
    ]
    for kind in kinds:
        workloads = {name: times for name, times in seconds.items() if name.startswith(f"{kind} ")}
        others = [name for name in dict.fromkeys(itertools.chain(*workloads.values())) if name not in ours]
        table = [["workload", "provider", "ms", *others], ["---"] * (3 + len(others))]
        for workload, times in workloads.items():
            for provider in filter(ours.__contains__, times):
                mine = times[provider]
                ratios = (
                    figures(mine, times.get(other, {})) if other in NO_PEERS else figures(times.get(other, {}), mine)
                    for other in others
                )
                table.append([workload, provider, figures(mine), *ratios])
        if workloads:
            lines += ["", *map(harness.table_line, table)]
    return lines


def _measure(regime: str, only: Sequence[str], budget: float, folder: Path) -> int:
    clock, sizes = harness.HostClock(), Sizes()
    groups = plan(clock, sizes)
    report, why = benchmark(clock, chosen(groups, only), folder, regime, budget, sizes.copy_bytes)
    if why:
        print(f"{regimes.NAMES[regime]}: {why}")
        return 0
    broken = failures(report)
    print("\n".join([f"{len(report.rows)} rows in {report.seconds:.0f} s, written to {report.folder}", *broken]))
    print("\n".join(ratios(report.rows)), flush=True)
    return 1 if broken else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="groups with one of these in their name")
    known = list(regimes.NAMES)
    parser.add_argument(
        "--regime", nargs="+", choices=known, default=known, help="of memory; default: one after the other"
    )
    parser.add_argument("--budget", type=float, default=900.0, metavar="SECONDS", help="of each regime; default: 900")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: benchmarks/results/cpu-DEVICE-DATE")
    options = parser.parse_args()
    try:
        chosen(plan(harness.HostClock(), Sizes()), options.only)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    folder = options.output or harness.results_folder("cpu", harness.machine(torch.device("cpu")))
    if len(options.regime) == 1 and regimes.is_told(options.regime[0]):
        return _measure(options.regime[0], options.only, options.budget, folder / options.regime[0])
    codes, runs_of = [], {}
    for regime in options.regime:
        command = [
            sys.executable,
            __file__,
            "--regime",
            regime,
            "--budget",
            str(options.budget),
            "--output",
            str(folder),
        ]
        only = ["--only", *options.only] if options.only else []
        codes.append(subprocess.run([*command, *only], env=regimes.environment(regime)).returncode)
        report = folder / regime / "benchmark.json"
        runs_of[regime] = [harness.read_rows(report)] if report.exists() else []
    print("\n".join(side_by_side(runs_of)))
    return 1 if any(codes) else 0


if __name__ == "__main__":
    sys.exit(main())
