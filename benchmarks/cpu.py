"""Forward plus backward on the CPU beside PyTorch's own, in one run.

Providers are interleaved round by round, so that a noisy neighbour hits all of them; medians and the ratio to
`F.cross_entropy(weight=)` are printed. pdl_ext's gradient is checked against the float64 definition before its time
counts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

import pdl_ext
from pdl_ext._ops import _C

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check(name: str, logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> None:
    """Fails unless the gradient is right to the dtype's precision, on the first rows."""
    exact = logits.detach()[:8].double().requires_grad_()
    pdl_ext.reference.pdl_loss(
        exact, targets[:8], weight, reduction="mean", normalizer=float(weight[targets].sum())
    ).backward()
    error = (logits.grad[:8].double() - exact.grad).abs().max() / exact.grad.abs().max()
    limit = 4 * torch.finfo(logits.dtype).eps
    if not error <= limit:
        raise SystemExit(f"{name}: gradient is off by {error:.2g} of its largest entry, expected at most {limit:.2g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, capability {_C.cpu_capability()}")
    print(f"forward + backward, logits [{arguments.rows}, {arguments.vocab_size}], median of {arguments.rounds} rounds")
    for dtype_name, dtype in DTYPES.items():
        torch.manual_seed(0)
        logits = (3 * torch.randn(arguments.rows, arguments.vocab_size)).to(dtype).requires_grad_()
        targets = torch.randint(0, arguments.vocab_size, (arguments.rows,))
        weight = torch.rand(arguments.vocab_size) + 0.5
        in_dtype = weight.to(dtype)
        providers: dict[str, Callable[[], torch.Tensor]] = {
            "F.cross_entropy(weight=)": lambda x=logits, y=targets, w=in_dtype: F.cross_entropy(x, y, weight=w),
            "pdl_ext": lambda x=logits, y=targets, w=weight: pdl_ext.functional.pdl_loss(x, y, w),
        }
        times: dict[str, list[float]] = {name: [] for name in providers}
        for turn in range(arguments.rounds + 2):
            for name, loss in providers.items():
                logits.grad = None
                start = time.perf_counter()
                loss().backward()
                if turn >= 2:
                    times[name].append(time.perf_counter() - start)
                elif name == "pdl_ext":
                    check(name, logits, targets, weight)
        medians = {name: statistics.median(values) for name, values in times.items()}
        for name, median in medians.items():
            print(
                f"{dtype_name:9} {name:26} {1e3 * median:8.1f} ms  {medians['F.cross_entropy(weight=)'] / median:5.2f}x"
            )


if __name__ == "__main__":
    main()
