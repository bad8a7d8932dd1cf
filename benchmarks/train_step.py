"""The cost of the loss in a training step: a small transformer, trained with plain cross-entropy and with PDLLoss.

    python benchmarks/train_step.py [--output DIR]

One copy of the same model for each loss, all on the same batches of random Zipf tokens, in turns of a step each. Writes
DIR/benchmark.json and DIR/benchmark.md by harness.py. They have a step's median time, its ratio to that of plain
cross-entropy, and the growth of memory while one runs. A time is valid if the first step's loss, and its gradient
through all layers, agree with the same model in float64.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import harness
import torch
import torch.nn.functional as F
from harness import Clock, Group, Provider, Workload
from torch import Tensor, nn
from workloads import failures, zipf_ids

from pdl_ext import PDLLoss, PowerLaw, reference

# A sample is one step, so many are needed.
PROTOCOL = harness.Protocol(least_rounds=20, most_rounds=20)
LAW = PowerLaw(alpha=0.5)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of the model and its batches."""

    vocab_size: int = 32000
    width: int = 256
    heads: int = 4
    layers: int = 4
    sequences: int = 8
    length: int = 128
    batches: int = 16
    copy_bytes: int = 2**28


class LanguageModel(nn.Module):
    """A causal transformer, whose output layer is its embedding."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocab_size, sizes.width)
        self.position = nn.Parameter(torch.zeros(sizes.length, sizes.width))
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.position, std=0.02)
        layer = nn.TransformerEncoderLayer(
            sizes.width, sizes.heads, 4 * sizes.width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(
            layer, sizes.layers, norm=nn.LayerNorm(sizes.width), enable_nested_tensor=False
        )
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(sizes.length))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.layers(self.embedding(tokens) + self.position, mask=self.mask, is_causal=True)
        return F.linear(hidden, self.embedding.weight)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


LossOfStep = Callable[[Tensor, Tensor], Tensor]


def step_provider(
    name: str, loss_of: LossOfStep, truth: tuple[Tensor, Tensor], model: LanguageModel, batches: Tensor
) -> Provider:
    """Steps of a copy of the model, one batch after the other; the truth is that of the first step."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    following = itertools.cycle(batches)

    def call(_: int) -> tuple[Tensor, Tensor]:
        tokens = next(following)
        optimizer.zero_grad()
        loss = loss_of(model(tokens[:, :-1]), tokens[:, 1:])
        loss.backward()
        optimizer.step()
        return loss.detach(), model.position.grad

    def error(result: tuple[Tensor, Tensor]) -> float:
        return harness.largest(map(harness.relative_error, result, truth))

    return Provider(name, call, error)


def step_group(clock: Clock, sizes: Sizes) -> Group:
    """The training step with each loss."""
    tokens = sizes.sequences * sizes.length
    name = f"training step, width {sizes.width}, {sizes.layers} layers, V {sizes.vocab_size}, {tokens} tokens"

    def workloads() -> Iterator[Workload]:
        torch.manual_seed(0)
        model = LanguageModel(sizes)
        shape = sizes.batches, sizes.sequences, sizes.length + 1
        batches = zipf_ids(clock, torch.Size(shape).numel(), sizes.vocab_size).long().view(shape)
        counts = reference.count_tokens(batches[:, :, 1:], sizes.vocab_size)
        seen_once = reference.count_tokens(batches[0, :, 1:], sizes.vocab_size)

        @functools.cache
        def truth(counted: Tensor | None) -> tuple[Tensor, Tensor]:
            exact = copy.deepcopy(model).double()
            weight = None if counted is None else reference.token_weights(counted, LAW)
            loss = reference.pdl_loss(exact(batches[0, :, :-1]), batches[0, :, 1:], weight)
            (gradient,) = torch.autograd.grad(loss, exact.position)
            return loss.detach(), gradient

        losses: list[tuple[str, LossOfStep, Tensor | None]] = [
            ("F.cross_entropy", cross_entropy, None),
            ("PDLLoss of counts", PDLLoss(counts, weighting=LAW), counts),
            ("PDLLoss, online", PDLLoss(weighting=LAW), seen_once),
            ("PDLLoss, online, in place", PDLLoss(weighting=LAW, inplace_backward=True), seen_once),
        ]
        providers = [
            step_provider(loss_name, loss_of, truth(counted), model, batches) for loss_name, loss_of, counted in losses
        ]
        yield Workload(name, providers, 1e-3, 0)

    return Group(name, workloads)


def benchmark(clock: Clock, sizes: Sizes, folder: Path | None, protocol: harness.Protocol = PROTOCOL) -> harness.Report:
    """Measures the step, and leaves the files in `folder`, by default one named after the machine and the day."""
    about = harness.machine(clock.device)
    folder = folder or harness.results_folder("train-step", about)
    report = harness.Report(folder, "pdl_ext: a training step", about, protocol, kernel_times=False)
    harness.run([step_group(clock, sizes)], clock, report, float("inf"), sizes.copy_bytes)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: benchmarks/results/train-step-DEVICE-DATE")
    options = parser.parse_args()
    report = benchmark(harness.HostClock(), Sizes(), options.output)
    broken = failures(report)
    print("\n".join([report.markdown(), f"written to {report.folder}", *broken]))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
