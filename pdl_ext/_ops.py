"""Loads the compiled ops, and gives them their fake kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    from pdl_ext import _C
except ImportError as error:
    raise ImportError(
        "pdl_ext's compiled module cannot be imported. In a source folder, build it first: run `pip install -e .` "
        "there, or leave the folder to use an installed pdl_ext. "
        f"({error})"
    ) from error

__all__ = [
    "REDUCTIONS",
    "ROW_CE",
    "ROW_LOG_SUM",
    "ROW_MAX",
    "ROW_NLL",
    "ROW_TOKEN_WEIGHT",
    "_C",
    "accumulator_dtype",
    "loss_outputs",
    "ops",
]

ops = torch.ops.pdl_ext

# The numbers of csrc/row_loss.h's Reduction and csrc/loss_arguments.h's RowOutput.
REDUCTIONS = {"none": 0, "sum": 1, "mean": 2, "token_mean": 3}
ROW_MAX, ROW_LOG_SUM, ROW_NLL, ROW_CE, ROW_TOKEN_WEIGHT = range(5)


def accumulator_dtype(logits: torch.dtype) -> torch.dtype:
    """float64 for float64 logits, else float32: the dtype of losses and row statistics."""
    return torch.float64 if logits == torch.float64 else torch.float32


@torch.library.register_fake("pdl_ext::loss_forward")
def loss_outputs(
    logits: Tensor,
    targets: Tensor,
    token_weight: Tensor | None,
    row_weight: Tensor | None,
    logit_offset: Tensor | None,
    normalizer: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float,
    predict: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = logits.shape[0]
    dtype = accumulator_dtype(logits.dtype)
    return (
        logits.new_empty((n,) if reduction == REDUCTIONS["none"] else (), dtype=dtype),
        logits.new_empty((5, n), dtype=dtype),
        logits.new_empty((3,), dtype=dtype),
        logits.new_empty((n if predict else 0,), dtype=torch.int64),
    )


@torch.library.register_fake("pdl_ext::loss_and_gradient_")
def _(logits: Tensor, gradient: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return loss_outputs(logits, *rest)


@torch.library.register_fake("pdl_ext::loss_backward")
def _(grad_loss: Tensor, logits: Tensor, *_: Any) -> Tensor:
    vocab_size = logits.shape[1]
    if logits.device.type != "cuda":
        return logits.new_empty(logits.shape)
    # The twin of csrc/cuda/loss.cu's allocate_gradient.
    between = torch.sym_max(logits.stride(0) - vocab_size, 0) % (16 // logits.element_size())
    return logits.new_empty_strided(logits.shape, (vocab_size + between, 1))


@torch.library.register_fake("pdl_ext::reduce_rows")
def _(rows: Tensor, _targets: Tensor, _weight: Any, _normalizer: Any, reduction: int, *_: Any) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape[1:] if reduction == REDUCTIONS["none"] else ()), rows.new_empty((3,))


@torch.library.register_fake("pdl_ext::token_weights")
def _(counts: Tensor, *_: Any) -> Tensor:
    return counts.new_empty(counts.shape, dtype=torch.float32)


for _name in ("scale_", "loss_backward_", "count_tokens_"):
    torch.library.register_fake(f"pdl_ext::{_name}", lambda *_: None)
