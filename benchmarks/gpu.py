"""The loss, the histogram and the weights on a CUDA device, beside PyTorch and every peer that is installed.

    python benchmarks/gpu.py --output DIR [--budget SECONDS] [--compile-groups N] [--dry]

Writes DIR/benchmark.json and DIR/benchmark.md, by the protocol of harness.py. Workloads come in the order of their
importance; those beyond the budget are listed as left out. The loss is the weighted mean; a peer without weights
computes the unweighted one, and its row says so. Backward alone is measured if one forward allows several.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import torch
from harness import Clock, Group, Provider, Workload
from linear import linear_group
from torch import Tensor
from workloads import (
    IDS,
    LossFunction,
    LossInputs,
    backward,
    count_by_pdl_ext,
    count_by_torch,
    failures,
    forward,
    forward_and_backward,
    histogram_group,
    loss_limit,
    loss_provider,
    pdl_ext_functions,
    pytorch_functions,
    tiny_group,
    weights_group,
)

from pdl_ext import TokenFrequency, reference

PEERS = {
    "liger-kernel": "liger_kernel",
    "quack-kernels": "quack",
    "flash-attn": "flash_attn",
    "cut-cross-entropy": "cut_cross_entropy",
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of the workloads."""

    rows: int = 8192
    few_rows: tuple[int, ...] = (1, 64)
    vocab_sizes: tuple[int, ...] = (128256, 32000, 151936, 50257, 256000)
    tokens: int = 2**28
    histogram_vocab_sizes: tuple[int, ...] = (128256, 32000, 50257, 262144)
    host_vocab_size: int = 50257
    few_tokens: int = 65536
    table: int = 262144
    tiny_rows: int = 16
    tiny_vocab_size: int = 1009
    tiny_calls: int = 50
    # (N, H, V)
    linear: tuple[int, int, int] = (8192, 4096, 128256)
    copy_bytes: int = 2**31


TINY = Sizes(
    rows=6,
    few_rows=(1,),
    vocab_sizes=(1283, 320),
    tokens=10_000,
    histogram_vocab_sizes=(1283, 320),
    host_vocab_size=502,
    few_tokens=100,
    table=262,
    tiny_calls=2,
    linear=(8, 16, 1283),
    copy_bytes=2**20,
)


def installed_peers() -> dict[str, str]:
    """The version of each peer, or "absent"."""
    return {package: harness.version_of(package, module) for package, module in PEERS.items()}


def _peer_functions(weight: Tensor) -> Iterator[LossFunction]:
    peers = installed_peers()
    if peers["liger-kernel"] != "absent":
        # Resolved inside the call, so that a peer that cannot be imported loses only its own rows.
        def liger(logits: Tensor, targets: Tensor) -> Tensor:
            from liger_kernel.transformers import LigerCrossEntropyLoss

            return LigerCrossEntropyLoss(weight=weight)(logits, targets)

        waits = "it waits for the device"
        yield LossFunction("liger-kernel", liger, overwrites="forward", not_capturable=waits, note="in place")
    if peers["quack-kernels"] != "absent":
        yield from _quack_functions(weight)
    if peers["flash-attn"] != "absent":
        for name, in_place in (("flash-attn", False), ("flash-attn, in place", True)):

            def flash(logits: Tensor, targets: Tensor, in_place: bool = in_place) -> Tensor:
                from flash_attn.losses.cross_entropy import CrossEntropyLoss

                return CrossEntropyLoss(inplace_backward=in_place)(logits, targets)

            yield LossFunction(
                name, flash, weighted=False, overwrites="backward" if in_place else "", note="unweighted"
            )


def _quack_functions(weight: Tensor) -> Iterator[LossFunction]:
    try:
        cross_entropy = importlib.import_module("quack.cross_entropy").cross_entropy
        takes_weight = "weight" in inspect.signature(cross_entropy).parameters
    except Exception as error:
        why = harness.describe(error)

        def cross_entropy(*_: Tensor, **__: object) -> Tensor:
            raise RuntimeError(why)

        takes_weight = True
    options = {"weight": weight} if takes_weight else {}
    note = "" if takes_weight else "unweighted"
    for name, in_place in (("quack-kernels", False), ("quack-kernels, in place", True)):

        def quack(logits: Tensor, targets: Tensor, in_place: bool = in_place) -> Tensor:
            return cross_entropy(logits, targets, reduction="mean", inplace_backward=in_place, **options)

        yield LossFunction(name, quack, takes_weight, overwrites="backward" if in_place else "", note=note)


def loss_functions(weight: Tensor, dtype: torch.dtype, compiled: bool) -> list[LossFunction]:
    """pdl_ext and everything that it is compared with."""
    return [*pdl_ext_functions(weight), *pytorch_functions(weight, dtype, compiled), *_peer_functions(weight)]


MODES = {
    "forward + backward": forward_and_backward,
    # The same call; if forward overwrites the logits with the gradient, it must move other bytes.
    "at once, in place": forward_and_backward,
    "forward": forward,
    "backward": backward,
}


def _takes_part(mode: str, loss: LossFunction) -> bool:
    if mode == "forward":
        return loss.forward_alone and loss.overwrites != "backward"
    if mode == "at once, in place":
        return loss.overwrites == "forward"
    return mode != "backward" or loss.repeats_backward


def loss_group(
    clock: Clock,
    rows: int,
    vocab_size: int,
    dtype: torch.dtype,
    peaked: bool = False,
    ignored: float = 0.0,
    functions: Callable[[Tensor], list[LossFunction]] | None = None,
    compiled: bool = True,
) -> Group:
    """The loss with its gradient, and either alone. functions: of the weights, by default all that exist.

    compiled: whether PyTorch's compiler takes part, which costs a quarter of a minute for each shape.
    """
    kind = f"{'peaked' if peaked else 'random'}, {ignored:.0%} ignored"
    name = f"loss {str(dtype).removeprefix('torch.')} [{rows}, {vocab_size}], {kind}"

    def workloads() -> Iterator[Workload]:
        inputs = LossInputs(clock, rows, vocab_size, dtype, peaked, ignored)
        compared = functions(inputs.weight) if functions else loss_functions(inputs.weight, dtype, compiled)
        # Logits of ignored rows need not be read; their gradient has to be written.
        read = inputs.counted * vocab_size * dtype.itemsize
        written = rows * vocab_size * dtype.itemsize
        least = {
            "forward + backward": read + written,
            "at once, in place": read + written,
            "forward": read,
            "backward": read + written,
        }
        for mode, make in MODES.items():
            providers = [loss_provider(inputs, loss, make) for loss in compared if _takes_part(mode, loss)]
            yield Workload(
                f"{name}: {mode}",
                providers,
                loss_limit(dtype),
                least[mode],
                len(inputs.logits),
                items=rows * vocab_size,
            )

    return Group(name, workloads)


def counting_group(clock: Clock, vocab_size: int, kind: str, count: int) -> Group:
    """Counting of ids, in each dtype that holds them."""
    dtypes = [torch.int32, torch.int64] + [torch.uint16] * (vocab_size <= 2**16)
    return histogram_group(clock, vocab_size, kind, count, dtypes, [count_by_pdl_ext, count_by_torch])


def host_group(clock: Clock, vocab_size: int, count: int) -> Group:
    """Counting of uint16 ids in the host's memory, beside copying them from pinned memory."""
    name = f"histogram of {count} ids in host memory, V {vocab_size}"

    def workloads() -> Iterator[Workload]:
        ids = IDS["Zipf"](clock, count, vocab_size).to(torch.uint16)
        truth = reference.count_tokens(ids, vocab_size).double()
        in_host_memory = ids.cpu()
        pinned = in_host_memory.pin_memory() if clock.device.type == "cuda" else in_host_memory
        arrived = torch.empty_like(ids)
        frequency = TokenFrequency(vocab_size).to(clock.device)
        array = in_host_memory.numpy()

        def counted(_: int) -> Tensor:
            frequency.update(array)
            return frequency.counts

        why = "it begins on the host"
        providers = [
            Provider("pdl_ext", counted, functools.partial(harness.relative_error, truth=truth), not_capturable=why),
            Provider(
                "copy from pinned memory",
                lambda _: arrived.copy_(pinned, non_blocking=True),
                lambda copied: 0.0 if copied.view(torch.int16).equal(ids.view(torch.int16)) else 1.0,
                not_capturable=why,
            ),
        ]
        yield Workload(name, providers, 0.0, ids.nbytes, items=count)

    return Group(name, workloads)


def plan(clock: Clock, sizes: Sizes, compile_groups: int) -> list[Group]:
    """All workloads, the most important first.

    compile_groups: the number of groups in which the compiler takes part.
    """
    numbers = itertools.count()

    def compiled() -> bool:
        return next(numbers) < compile_groups

    def loss(vocab_size: int, dtype: torch.dtype, rows: int = sizes.rows, **kind: Any) -> Group:
        return loss_group(clock, rows, vocab_size, dtype, **kind, compiled=compiled())

    histogram = functools.partial(counting_group, clock)
    first, *others = sizes.vocab_sizes
    ids_first, *ids_others = sizes.histogram_vocab_sizes
    return [
        loss(first, torch.bfloat16),
        histogram(ids_first, "Zipf", sizes.tokens),
        tiny_group(clock, sizes.tiny_rows, sizes.tiny_vocab_size, sizes.tiny_calls),
        linear_group(clock, "linear", [sizes.linear], torch.bfloat16, compiled=compiled()),
        loss(others[0], torch.bfloat16),
        loss(first, torch.bfloat16, peaked=True, ignored=0.3),
        histogram(ids_first, "Zipf", sizes.few_tokens),
        weights_group(clock, sizes.table),
        host_group(clock, sizes.host_vocab_size, sizes.tokens),
        histogram(ids_first, "uniform", sizes.tokens),
        histogram(ids_first, "all equal", sizes.tokens),
        *(loss(vocab_size, torch.bfloat16) for vocab_size in others[1:]),
        histogram(ids_others[-1], "Zipf, scattered", sizes.tokens),
        *(histogram(vocab_size, "Zipf", sizes.tokens) for vocab_size in ids_others),
        *(
            loss(vocab_size, dtype)
            for vocab_size in dict.fromkeys((others[-1], others[0]))
            for dtype in (torch.float32, torch.float16)
        ),
        *(loss(first, torch.bfloat16, rows) for rows in sizes.few_rows),
        histogram(ids_first, "two in turn", sizes.tokens),
        loss(first, torch.bfloat16, peaked=True),
        loss(first, torch.bfloat16, ignored=0.3),
        *(histogram(*which, sizes.tokens) for which in itertools.product(ids_others, ("uniform", "all equal"))),
    ]


def benchmark(
    clock: Clock,
    sizes: Sizes,
    folder: Path,
    budget: float,
    protocol: harness.Protocol | None = None,
    compile_groups: int = sys.maxsize,
) -> harness.Report:
    """Measures the plan, and leaves its files in `folder`."""
    about = {**harness.machine(clock.device), **installed_peers()}
    report = harness.Report(folder, "pdl_ext: GPU benchmarks", about, protocol or harness.Protocol())
    harness.run(plan(clock, sizes, compile_groups), clock, report, budget, sizes.copy_bytes)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--budget", type=float, default=180.0, metavar="SECONDS", help="default: 180")
    parser.add_argument(
        "--compile-groups",
        type=int,
        default=sys.maxsize,
        metavar="N",
        help="torch.compile in so many groups of peers",
    )
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU, to see that every step can be taken")
    options = parser.parse_args()
    if options.dry:
        protocol = harness.Protocol(warm_up=0, least_rounds=2, most_rounds=2)
        report = benchmark(harness.HostClock(0), TINY, options.output, options.budget, protocol, options.compile_groups)
    elif not torch.cuda.is_available():
        print(f"there is no CUDA device that this PyTorch ({torch.__version__}) sees", file=sys.stderr)
        return 2
    else:
        torch.cuda.set_device(0)
        clock = harness.CudaClock(torch.device("cuda", 0))
        report = benchmark(clock, Sizes(), options.output, options.budget, compile_groups=options.compile_groups)
    broken = failures(report)
    print("\n".join([f"{len(report.rows)} rows in {report.seconds:.0f} s, written to {options.output}", *broken]))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
