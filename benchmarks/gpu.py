"""The loss, the histogram and the weights on a CUDA device, beside PyTorch and every peer that is installed.

python benchmarks/gpu.py --output DIR [--budget SECONDS]

Writes DIR/benchmark.json and DIR/benchmark.md, by the protocol of harness.py. Workloads come in the order of their
importance; what the budget has no room for is listed as left out. The loss is the weighted mean; a peer that takes no
weights computes the unweighted one, and its row says so. Backward alone is measured where one forward allows many.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import harness
import torch
import torch.nn.functional as F
from harness import Clock, Group, Provider, Workload
from torch import Tensor

import pdl_ext
from pdl_ext import PDLLoss, PowerLaw, TokenFrequency, reference

PEERS = {"liger-kernel": "liger_kernel", "quack-kernels": "quack", "flash-attn": "flash_attn"}
IGNORED = -100
# Rows whose gradient is compared, spread over all of them.
CHECKED_ROWS = 16


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the workloads are."""

    rows: int = 8192
    vocab_sizes: tuple[int, ...] = (128256, 32000, 151936, 50257, 256000)
    tokens: int = 2**28
    histogram_vocab_sizes: tuple[int, ...] = (128256, 32000, 50257, 262144)
    few_tokens: int = 65536
    table: int = 262144
    tiny_rows: int = 16
    tiny_vocab_size: int = 1009
    tiny_calls: int = 50
    copy_bytes: int = 2**31


@dataclasses.dataclass(frozen=True)
class LossFunction:
    """A mean loss of logits and targets."""

    name: str
    function: Callable[[Tensor, Tensor], Tensor]
    weighted: bool = True
    # Whether backward leaves the gradient where the logits were; "forward" if forward already does.
    overwrites: str = ""
    # Whether the graph of one forward can be differentiated again and again.
    repeats_backward: bool = False
    forward_alone: bool = True
    not_capturable: str = ""
    note: str = ""


def installed_peers() -> dict[str, str]:
    """The version of each peer, or "absent"."""
    found = {}
    for package, module in PEERS.items():
        try:
            found[package] = importlib.metadata.version(package) if importlib.util.find_spec(module) else "absent"
        except importlib.metadata.PackageNotFoundError:
            found[package] = "of unknown version"
    return found


def _peer_functions(weight: Tensor) -> Iterator[LossFunction]:
    peers = installed_peers()
    if peers["liger-kernel"] != "absent":
        # Resolved inside the call, so that a peer that cannot be imported costs its rows and nothing else.
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


def loss_functions(weight: Tensor, dtype: torch.dtype) -> list[LossFunction]:
    """pdl_ext and everything that it is compared with."""
    in_dtype = weight.to(dtype)
    # What was compiled for another vocabulary must not make this one dynamic, nor count to the limit of recompilations.
    torch.compiler.reset()
    compiled = torch.compile(lambda x, y: F.cross_entropy(x.float(), y, weight=weight), dynamic=False)
    return [
        LossFunction("pdl_ext", lambda x, y: pdl_ext.functional.pdl_loss(x, y, weight), repeats_backward=True),
        LossFunction(
            "pdl_ext, in place",
            lambda x, y: pdl_ext.functional.pdl_loss(x, y, weight, inplace_backward=True),
            overwrites="backward",
        ),
        LossFunction("F.cross_entropy", lambda x, y: F.cross_entropy(x, y, weight=in_dtype), repeats_backward=True),
        # Compiled once, with its backward: compiling takes longer than measuring.
        LossFunction("F.cross_entropy, compiled", compiled, forward_alone=False, note="logits.float()"),
        *_peer_functions(weight),
    ]


class LossInputs:
    """The rotating logits and targets of a group, and what the results must be."""

    def __init__(
        self, clock: Clock, rows: int, vocab_size: int, dtype: torch.dtype, peaked: bool, ignored: float
    ) -> None:
        generator = torch.Generator(clock.device).manual_seed(0)
        self.weight = 0.5 + torch.rand(vocab_size, device=clock.device, generator=generator)
        self.logits: list[Tensor] = []
        self.targets: list[Tensor] = []
        # Copies for the providers that overwrite their logits.
        self.scratch: list[Tensor] = []
        self._truths: dict[bool, tuple[Tensor, Tensor]] = {}
        for _ in range(harness.buffers_for(clock, rows * vocab_size * dtype.itemsize)):
            logits = torch.empty(rows, vocab_size, dtype=dtype, device=clock.device)
            logits.normal_(std=6.0 if peaked else 1.0, generator=generator)
            targets = torch.randint(vocab_size, (rows,), device=clock.device, generator=generator)
            if peaked:  # every other row is nearly sure of its target, the rest of something else
                sure = torch.arange(0, rows, 2, device=clock.device)
                logits[sure, targets[sure]] += 18
            targets[torch.rand(rows, device=clock.device, generator=generator) < ignored] = IGNORED
            self.logits.append(logits.requires_grad_())
            self.targets.append(targets)
        self.scratch = [logits.detach().clone().requires_grad_() for logits in self.logits]

    @property
    def counted(self) -> int:
        """The rows of the first buffer that are not ignored."""
        return int((self.targets[0] != IGNORED).sum())

    @functools.cached_property
    def checked(self) -> Tensor:
        rows = self.targets[0].numel()
        return torch.linspace(0, rows - 1, min(CHECKED_ROWS, rows), device=self.weight.device).long()

    def truth(self, weighted: bool) -> tuple[Tensor, Tensor]:
        """The float64 mean loss of the first buffer, and its gradient at the checked rows."""
        if weighted not in self._truths:
            self._truths[weighted] = self._compute_truth(weighted)
        return self._truths[weighted]

    def _compute_truth(self, weighted: bool) -> tuple[Tensor, Tensor]:
        logits, targets = self.logits[0].detach(), self.targets[0]
        weight = self.weight if weighted else torch.ones_like(self.weight)
        counted = targets[targets != IGNORED]
        denominator = weight[counted].double().sum()
        total = torch.zeros_like(denominator)
        # Part by part, or float64 would take many times the logits' memory.
        for part in torch.arange(targets.numel(), device=targets.device).split(max(1, 2**25 // logits.shape[1])):
            total += reference.pdl_loss(logits[part].double(), targets[part], weight, reduction="sum")
        exact = logits[self.checked].double().requires_grad_()
        loss = reference.pdl_loss(exact, targets[self.checked], weight, reduction="sum") / denominator
        (gradient,) = torch.autograd.grad(loss, exact)
        return total / denominator, gradient

    def error(self, result: tuple[Tensor | None, Tensor | None], weighted: bool) -> float:
        """The larger error of the loss and of the gradient, of which either may be missing."""
        loss, gradient = result
        true_loss, true_gradient = self.truth(weighted)
        errors = []
        if loss is not None:
            errors.append(harness.relative_error(loss, true_loss))
        if gradient is not None:
            errors.append(harness.relative_error(gradient[self.checked], true_gradient))
        return harness.largest(errors)

    def restore(self) -> None:
        with torch.no_grad():
            for scratch, logits in zip(self.scratch, self.logits, strict=True):
                scratch.copy_(logits)


def _forward(inputs: LossInputs, loss: LossFunction) -> Callable[[int], tuple[Tensor, None]]:
    def call(i: int) -> tuple[Tensor, None]:
        with torch.no_grad():
            return loss.function(logits[i], inputs.targets[i]), None

    logits = inputs.scratch if loss.overwrites == "forward" else inputs.logits
    return call


def _backward(inputs: LossInputs, loss: LossFunction) -> Callable[[int], tuple[None, Tensor]]:
    @functools.cache
    def forward(i: int) -> Tensor:
        return loss.function(inputs.logits[i], inputs.targets[i])

    def call(i: int) -> tuple[None, Tensor]:
        (gradient,) = torch.autograd.grad(forward(i), inputs.logits[i], retain_graph=True)
        return None, gradient

    return call


def _both(inputs: LossInputs, loss: LossFunction) -> Callable[[int], tuple[Tensor, Tensor]]:
    def call(i: int) -> tuple[Tensor, Tensor]:
        result = loss.function(logits[i], inputs.targets[i])
        (gradient,) = torch.autograd.grad(result, logits[i])
        return result, gradient

    logits = inputs.scratch if loss.overwrites else inputs.logits
    return call


MODES = {"forward + backward": _both, "forward": _forward, "backward": _backward}


def _takes_part(mode: str, loss: LossFunction) -> bool:
    if mode == "forward":
        return loss.forward_alone and loss.overwrites != "backward"
    return mode != "backward" or loss.repeats_backward


def loss_group(
    clock: Clock, sizes: Sizes, vocab_size: int, dtype: torch.dtype, peaked: bool = False, ignored: float = 0.0
) -> Group:
    """The loss with its gradient, and either alone."""
    kind = f"{'peaked' if peaked else 'random'}, {ignored:.0%} ignored"
    name = f"loss {str(dtype).removeprefix('torch.')} [{sizes.rows}, {vocab_size}], {kind}"

    def workloads() -> Iterator[Workload]:
        inputs = LossInputs(clock, sizes.rows, vocab_size, dtype, peaked, ignored)
        functions = loss_functions(inputs.weight, dtype)
        # Logits of ignored rows need not be read; their gradient has to be written.
        read = inputs.counted * vocab_size * dtype.itemsize
        written = sizes.rows * vocab_size * dtype.itemsize
        least = {"forward + backward": 2 * read + written, "forward": read, "backward": read + written}
        # The exponent of a large logit rounds more than one epsilon.
        limit = max(4 * torch.finfo(dtype).eps, 1e-5)
        for mode, make in MODES.items():
            providers = [
                Provider(
                    loss.name,
                    make(inputs, loss),
                    functools.partial(inputs.error, weighted=loss.weighted),
                    restore=inputs.restore if loss.overwrites else None,
                    not_capturable=loss.not_capturable,
                    note=loss.note,
                )
                for loss in functions
                if _takes_part(mode, loss)
            ]
            yield Workload(f"{name}: {mode}", providers, limit, least[mode], len(inputs.logits))

    return Group(name, workloads)


def zipf_ids(clock: Clock, count: int, vocab_size: int) -> Tensor:
    """int32 ids, the id of rank r with a probability in proportion to 1 / r."""
    generator = torch.Generator(clock.device).manual_seed(1)
    ranks = torch.arange(1, vocab_size + 1, device=clock.device, dtype=torch.float64)
    edges = (1 / ranks).cumsum(0)
    edges = (edges / edges[-1]).float()
    ids = torch.empty(count, dtype=torch.int32, device=clock.device)
    for part in ids.split(2**26):
        draws = torch.rand(part.numel(), device=clock.device, generator=generator)
        part.copy_(torch.searchsorted(edges, draws, out_int32=True).clamp_(max=vocab_size - 1))
    return ids


def uniform_ids(clock: Clock, count: int, vocab_size: int) -> Tensor:
    generator = torch.Generator(clock.device).manual_seed(1)
    return torch.randint(vocab_size, (count,), dtype=torch.int32, device=clock.device, generator=generator)


def equal_ids(clock: Clock, count: int, vocab_size: int) -> Tensor:
    return torch.full((count,), vocab_size // 3, dtype=torch.int32, device=clock.device)


IDS = {"Zipf": zipf_ids, "uniform": uniform_ids, "all equal": equal_ids}


def _count_by_pdl_ext(clock: Clock, ids: list[Tensor], vocab_size: int) -> Callable[[int], Tensor]:
    frequency = TokenFrequency(vocab_size).to(clock.device)

    def call(i: int) -> Tensor:
        frequency.update(ids[i])
        return frequency.counts

    return call


def histogram_group(clock: Clock, sizes: Sizes, vocab_size: int, kind: str, count: int) -> Group:
    """Counting of ids, in each dtype that holds them."""
    name = f"histogram of {count} ids, V {vocab_size}, {kind}"

    def workloads() -> Iterator[Workload]:
        ids = IDS[kind](clock, count, vocab_size)
        truth = torch.zeros(vocab_size, dtype=torch.int64, device=clock.device)
        for part in ids.split(2**26):
            truth += reference.count_tokens(part, vocab_size)
        # The first call adds to nothing, so what it leaves are the counts of its buffer.
        error = functools.partial(harness.relative_error, truth=truth.double())
        dtypes = [torch.int32, torch.int64] + [torch.uint16] * (vocab_size <= 2**16)
        for dtype in dtypes:
            size = count * dtype.itemsize
            buffers = [ids.to(dtype) for _ in range(harness.buffers_for(clock, size))]
            bincount, note = _bincount(buffers, vocab_size)
            providers = [
                Provider("pdl_ext", _count_by_pdl_ext(clock, buffers, vocab_size), error),
                Provider("torch.bincount", bincount, error, not_capturable="it waits for the device", note=note),
            ]
            dtype_name = str(dtype).removeprefix("torch.")
            yield Workload(f"{name}, {dtype_name}", providers, 0.0, size + 8 * vocab_size, len(buffers))

    return Group(name, workloads)


def _bincount(ids: list[Tensor], vocab_size: int) -> tuple[Callable[[int], Tensor], str]:
    if ids[0].dtype == torch.uint16:
        return lambda i: torch.bincount(ids[i].to(torch.int32), minlength=vocab_size), "of ids.to(int32)"
    return lambda i: torch.bincount(ids[i], minlength=vocab_size), ""


def weights_group(clock: Clock, sizes: Sizes) -> Group:
    """The table of weights from the counts."""
    name = f"token weights, V {sizes.table}"
    law = PowerLaw(alpha=0.5)

    def workloads() -> Iterator[Workload]:
        counts = torch.bincount(zipf_ids(clock, 16 * sizes.table, sizes.table), minlength=sizes.table)
        buffers = [counts.clone() for _ in range(harness.buffers_for(clock, 12 * sizes.table))]
        error = functools.partial(harness.relative_error, truth=reference.token_weights(counts, law))
        providers = [
            Provider("pdl_ext", lambda i: pdl_ext.functional.token_weights(buffers[i], law), error),
            Provider(
                "plain PyTorch",
                lambda i: reference.token_weights(buffers[i], law).float(),
                error,
                not_capturable="it waits for the device",
                note="in float64",
            ),
        ]
        yield Workload(name, providers, 1e-5, 12 * sizes.table, len(buffers))

    return Group(name, workloads)


def tiny_group(clock: Clock, sizes: Sizes) -> Group:
    """A step of the module on logits so few that only the overhead is left."""
    rows, vocab_size = sizes.tiny_rows, sizes.tiny_vocab_size
    name = f"step of the module, float32 [{rows}, {vocab_size}]"
    law = PowerLaw(alpha=0.5)

    def workloads() -> Iterator[Workload]:
        inputs = LossInputs(clock, rows, vocab_size, torch.float32, peaked=False, ignored=0.0)
        logits, targets = inputs.logits[0], inputs.targets[0]
        counts = torch.bincount(zipf_ids(clock, 16 * vocab_size, vocab_size), minlength=vocab_size)
        given, online = PDLLoss(counts, weighting=law), PDLLoss(vocab_size=vocab_size, weighting=law).to(clock.device)
        seen_once = reference.count_tokens(targets, vocab_size)
        steps: list[tuple[str, Callable[[Tensor, Tensor], Tensor], Tensor]] = [
            ("PDLLoss", given, counts),
            ("PDLLoss, online", online, seen_once),
            ("F.cross_entropy", functools.partial(F.cross_entropy, weight=law.weights(given.frequency)), counts),
        ]

        def provider(name: str, step: Callable[[Tensor, Tensor], Tensor], counted: Tensor) -> Provider:
            exact = logits.detach().double().requires_grad_()
            loss = reference.pdl_loss(exact, targets, reference.token_weights(counted, law))
            (gradient,) = torch.autograd.grad(loss, exact)

            def call(_: int) -> tuple[Tensor, Tensor]:
                loss = step(logits, targets)
                return loss, torch.autograd.grad(loss, logits)[0]

            def error(result: tuple[Tensor, Tensor]) -> float:
                return harness.largest(map(harness.relative_error, result, (loss, gradient)))

            return Provider(name, call, error)

        providers = [provider(*step) for step in steps]
        yield Workload(name, providers, 1e-5, 3 * 4 * rows * vocab_size, sizes.tiny_calls)

    return Group(name, workloads)


def plan(clock: Clock, sizes: Sizes) -> list[Group]:
    """All workloads, the most important first."""
    loss = functools.partial(loss_group, clock, sizes)
    histogram = functools.partial(histogram_group, clock, sizes)
    first, *others = sizes.vocab_sizes
    ids_first, *ids_others = sizes.histogram_vocab_sizes
    return [
        loss(first, torch.bfloat16),
        histogram(ids_first, "Zipf", sizes.tokens),
        tiny_group(clock, sizes),
        loss(others[0], torch.bfloat16),
        loss(first, torch.bfloat16, peaked=True, ignored=0.3),
        histogram(ids_first, "Zipf", sizes.few_tokens),
        weights_group(clock, sizes),
        histogram(ids_first, "uniform", sizes.tokens),
        histogram(ids_first, "all equal", sizes.tokens),
        *(loss(vocab_size, torch.bfloat16) for vocab_size in others[1:]),
        *(histogram(vocab_size, "Zipf", sizes.tokens) for vocab_size in ids_others),
        *(loss(others[0], dtype) for dtype in (torch.float32, torch.float16)),
        loss(first, torch.bfloat16, peaked=True),
        loss(first, torch.bfloat16, ignored=0.3),
        *(histogram(*which, sizes.tokens) for which in itertools.product(ids_others, ("uniform", "all equal"))),
    ]


def benchmark(
    clock: Clock, sizes: Sizes, folder: Path, budget: float, protocol: harness.Protocol | None = None
) -> harness.Report:
    """Measures the plan, and leaves its files in `folder`."""
    about = {**harness.machine(clock.device), **installed_peers()}
    report = harness.Report(folder, "pdl_ext: GPU benchmarks", about, protocol or harness.Protocol())
    harness.run(plan(clock, sizes), clock, report, budget, sizes.copy_bytes)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--budget", type=float, default=180.0, metavar="SECONDS", help="default: 180")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"there is no CUDA device that this PyTorch ({torch.__version__}) sees", file=sys.stderr)
        return 2
    torch.cuda.set_device(0)
    report = benchmark(harness.CudaClock(torch.device("cuda", 0)), Sizes(), options.output, options.budget)
    ours = [row for row in report.rows if row.provider.startswith(("pdl_ext", "PDLLoss"))]
    broken = [f"{row.workload}, {row.provider}: {row.failure}" for row in ours if row.failure]
    broken += [f"{name}: {why}" for name, why in report.failures.items()]
    print("\n".join([f"{len(report.rows)} rows in {report.seconds:.0f} s, written to {options.output}", *broken]))
    return 1 if broken or not ours else 0


if __name__ == "__main__":
    sys.exit(main())
