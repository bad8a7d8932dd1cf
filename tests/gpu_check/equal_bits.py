"""Whole gradients of the one-call kernel: right, and with the same bits in every run beside other work on the card.

    python -m gpu_check.equal_bits --output DIR [--device emulated]

Every element is compared, since a race affects only a few. DIR/equal_bits.json is extended after each shape.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from computed import computed
from torch import Tensor

from gpu_check import devices
from pdl_ext import functional, reference

RUNS = 20
# Relative errors of an exponential, of what cancels at a target by its row's largest, and of the loss.
EXPONENTIAL, CANCELLED, OF_LOSS = 8e-6, 1e-6, 1e-5
IGNORED = -100
# Elements of a float64 truth at once.
PART = 2**26


def shapes(device: torch.device) -> Iterator[tuple[torch.dtype, int, int]]:
    """Of each dtype, rows and vocabulary: rows that a block has, that clusters share, and more than run at once."""
    for dtype, vocab_sizes in (
        (torch.bfloat16, (128256, 32000, 50257, 151936, 256000)),
        (torch.float32, (128256, 50257, 256000)),
    ):
        for vocab_size in vocab_sizes:
            yield (dtype, 4096, vocab_size) if device.type == devices.CARD else (dtype, 7, vocab_size // 50)


def error(logits: Tensor, targets: Tensor, weight: Tensor, loss: Tensor, gradient: Tensor) -> float:
    """The largest error of the loss and of any element of its gradient, over what each may have.

    An element may have a rounding of its dtype and of its exponential. At the target terms cancel, so it may also have
    a millionth of its row's largest.
    """
    valid = targets != IGNORED
    denominator = weight[targets[valid]].double().sum()
    total, worst = torch.zeros_like(denominator), 0.0
    # Half a unit of the last place, and a little more for what is rounded before.
    relative = 0.5625 * torch.finfo(gradient.dtype).eps + EXPONENTIAL
    # What rounding and exponentials that are flushed leave of the smallest gradients.
    step = torch.finfo(torch.float32).tiny
    for part in torch.arange(len(targets), device=targets.device).split(max(1, PART // logits.shape[1])):
        exact = logits[part].double().requires_grad_()
        term = reference.pdl_loss(exact, targets[part], weight, reduction="sum") / denominator
        (truth,) = torch.autograd.grad(term, exact)
        total += term.detach()
        size = truth.abs()
        at_target = torch.where(valid[part], targets[part], 0).unsqueeze(1)
        allowed = relative * size + step
        allowed.scatter_add_(1, at_target, CANCELLED * size.amax(1, keepdim=True))
        # Of an ignored row all is 0.
        of_part = (gradient[part].double() - truth).abs() / allowed.clamp(min=torch.finfo(torch.float64).tiny)
        worst = max(worst, float(of_part.max().nan_to_num(nan=torch.inf)))
    of_loss = ((loss.double() - total) / total).abs() / OF_LOSS
    return max(worst, float(of_loss.nan_to_num(nan=torch.inf)))


def check(device: torch.device, dtype: torch.dtype, rows: int, vocab_size: int, in_place: bool) -> dict[str, object]:
    """What was found of one shape; `failure` is empty where all is well."""
    generator = torch.Generator(device).manual_seed(vocab_size)
    logits = (3 * torch.randn(rows, vocab_size, device=device, generator=generator)).to(dtype)
    targets = torch.randint(vocab_size, (rows,), device=device, generator=generator)
    targets[::7] = IGNORED
    weight = 0.5 + torch.rand(vocab_size, device=device, generator=generator)
    # Other work, so that the blocks of a cluster start apart.
    side = torch.cuda.Stream(device) if device.type == devices.CARD else None
    noise = torch.empty(2**28 if side else 1, dtype=torch.uint8, device=device)

    def step() -> tuple[Tensor, Tensor]:
        leaf = logits.clone().requires_grad_()
        loss = functional.pdl_loss(computed(leaf), targets, weight, inplace_backward=in_place)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    first = step()
    wrong = error(logits, targets, weight, *first)
    failure = "" if wrong <= 1 else f"off by {wrong:.3g} times what rounding explains"
    for turn in range(1, RUNS if side else 3):
        if side is not None and turn % 2:
            with torch.cuda.stream(side):
                noise.random_()
        again = step()
        if failure or all(map(torch.equal, again, first)):
            continue
        others = (again[1] != first[1]).any(1).nonzero().flatten()[:10].tolist()
        failure = f"other bits in run {turn}: rows {others}"
    devices.synchronize(device)
    return {"error": wrong, "failure": failure}


def name_of(dtype: torch.dtype, rows: int, vocab_size: int, in_place: bool) -> str:
    return f"{str(dtype).removeprefix('torch.')} [{rows}, {vocab_size}], {'in place' if in_place else 'new gradient'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    devices.add_arguments(parser)
    options = parser.parse_args()
    device = devices.prepare(options.device)
    found = []
    end = time.monotonic() + options.budget
    planned = [(*shape, in_place) for shape in shapes(device) for in_place in (False, True)]
    for dtype, rows, vocab_size, in_place in planned:
        name = name_of(dtype, rows, vocab_size, in_place)
        if time.monotonic() >= end:
            print(f"{name}: left out for time")
            continue
        found.append({"name": name, **check(device, dtype, rows, vocab_size, in_place)})
        print(f"{name}: {found[-1]['failure'] or 'equal bits'}", flush=True)
        (options.output / "equal_bits.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    bad = sum(bool(each["failure"]) for each in found)
    print(f"{len(found)} shapes, {bad} bad, {len(planned) - len(found)} left out")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
