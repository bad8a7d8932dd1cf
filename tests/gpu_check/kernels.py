"""Runs every kernel on small inputs and compares with the reference, for sanitizers.

python -m gpu_check.kernels cuda|emulated
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from gpu_check import devices
from pdl_ext import PowerLaw, functional, reference

ID_DTYPES = (torch.uint8, torch.uint16, torch.int32, torch.uint32, torch.int64)


def exercise(device: str) -> None:
    """Inputs are made and results compared on the CPU, so that hardly a kernel of PyTorch's own is watched."""
    on = devices.prepare(device)
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

        got = gradient(functional.pdl_loss, str(on), dtype, inplace_backward=in_place)
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

    # Loss and gradient at once: in one block and in clusters, with more rows than multiprocessors. A block's share of
    # 24,576 or 49,152 logits is 48 KiB. With the kernel's own variables that exceeds the limit without a request.
    multiprocessors = devices.multiprocessors(on)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for vocab_size in (1009, 24_576, 30_011, 49_152):
            for options in ({}, everything):
                check_loss(multiprocessors + 3, vocab_size, dtype, 0, torch.int64, inplace_backward=True, **options)
    # Of the longest, whose reference in float64 takes the CPU seconds, few rows and once a dtype.
    for dtype in (torch.float32, torch.bfloat16):
        check_loss(9, 250_001, dtype, 0, torch.int64, inplace_backward=True, **everything)
    # From L2: sixteen blocks with two on a multiprocessor hold 466,944 logits of float32.
    for options in ({}, everything):
        check_loss(3, 500_001, torch.float32, 0, torch.int64, inplace_backward=True, **options)

    # In warps, and on chip: all ids in a block, in a group of blocks, and only the first ones in a group.
    on_chip = 2 * multiprocessors * 58_080 + 1
    few = [(dtype, *size) for dtype in ID_DTYPES for size in ((1000, 200), (70_001, 50_257))]
    for dtype, count, vocab_size in [*few, *((torch.int32, on_chip, size) for size in (1009, 300_000, 600_000))]:
        highest = min(vocab_size + 50, 2 ** min(8 * dtype.itemsize, 31))
        tokens = torch.randint(highest, (count,), generator=generator)
        tokens[::7] = 3
        counts = functional.count_tokens(tokens.to(dtype).to(on), vocab_size, ignore_index=5)
        assert torch.equal(counts.cpu(), reference.count_tokens(tokens, vocab_size, ignore_index=5)), (dtype, count)

    for vocab_size in (5, 1000, 262_144):
        counts = torch.randint(0, 1000, (vocab_size,), generator=generator)
        for law in (
            PowerLaw(alpha=0.5, max_weight=50.0, blend=0.5, fixed={1: 0.0, 4: 2.0}),
            PowerLaw(normalize="types", relative=False),
            PowerLaw.reference(),
        ):
            weights = functional.token_weights(counts.to(on), law).cpu()
            torch.testing.assert_close(weights.double(), reference.token_weights(counts, law), rtol=1e-5, atol=0.0)


if __name__ == "__main__":
    exercise(sys.argv[1])
