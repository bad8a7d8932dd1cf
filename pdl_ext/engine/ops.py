"""Loads the compiled ops, and registers their fake kernels."""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pdl_ext.options import LossOptions

try:
    from pdl_ext import _C
except ImportError as error:
    folder = Path(__file__).resolve().parent.parent
    why = (
        f"was built with another PyTorch than {torch.__version__}, or on another system. Build it with this one: "
        "`pip install --no-deps --force-reinstall` and the same arguments as before"
        if any((folder / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES)
        else "is not built. In a source folder run `pip install -e .`, or leave the folder to use an installed pdl_ext"
    )
    raise ImportError(f"pdl_ext's compiled module cannot be imported: it {why}. ({error})") from error

__all__ = ["_C", "Factors", "LossInputs", "SavedRows", "accumulator_dtype", "compiled", "loss_outputs"]

compiled = torch.ops.pdl_ext


class LossInputs(NamedTuple):
    """The inputs of an op besides the logits, in its order.

    targets: [N]; token_weight: float32, the table [V] or one for each row [N, 1]; logit_offset: float32 [V].
    row_weight: [N] and normalizer: [2], both in the accumulator's dtype.
    """

    targets: Tensor
    token_weight: Tensor | None = None
    row_weight: Tensor | None = None
    logit_offset: Tensor | None = None
    normalizer: Tensor | None = None

    def of_rows(self, rows: slice | Tensor) -> LossInputs:
        """The inputs of some of the rows."""
        token_weight, row_weight = self.token_weight, self.row_weight
        return self._replace(
            targets=self.targets[rows],
            token_weight=token_weight[rows] if token_weight is not None and token_weight.dim() == 2 else token_weight,
            row_weight=None if row_weight is None else row_weight[rows],
        )

    def weights_of_rows(self, valid: Tensor) -> Tensor:
        """The token weight of each row with a valid target, and an arbitrary number for other rows: float32 [N]."""
        if self.token_weight is None:
            return torch.ones_like(valid, dtype=torch.float32)
        if self.token_weight.dim() == 2:
            return self.token_weight.squeeze(1)
        return self.token_weight[torch.where(valid, self.targets, 0)]


class SavedRows(NamedTuple):
    """The rows of an op's `saved_rows`, each [N]: the fields of csrc/row_loss.h's SavedRow, in order."""

    max: Tensor
    sum: Tensor
    log_sum: Tensor
    nll: Tensor
    ce: Tensor
    token_weight: Tensor
    modulation: Tensor
    entropy: Tensor
    smoothing_weight: Tensor

    @classmethod
    def of(cls, saved_rows: Tensor) -> SavedRows:
        """Views of the op's tensor."""
        return cls(*saved_rows.unbind())


class Factors(NamedTuple):
    """The numbers of an op's `factors`: the fields of csrc/row_loss.h's Factors, in order."""

    weighted: Tensor
    rows: Tensor
    correction: Tensor
    modulation: Tensor
    upstream: Tensor

    @classmethod
    def of(cls, factors: Tensor) -> Factors:
        """Views of the op's tensor."""
        return cls(*factors.unbind())


def accumulator_dtype(logits: torch.dtype) -> torch.dtype:
    """float64 for float64 logits, else float32: the dtype of losses and saved rows."""
    return torch.float64 if logits == torch.float64 else torch.float32


def _loss_shape(rows: int | torch.SymInt, options: list[float]) -> tuple[int | torch.SymInt, ...]:
    return (rows,) if LossOptions.unpacked(options).reduction == "none" else ()


def loss_outputs(logits: Tensor, options: list[float], stats: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results of loss_forward for logits [N, V], uninitialised."""
    n = logits.shape[0]
    dtype = accumulator_dtype(logits.dtype)
    return (
        logits.new_empty(_loss_shape(n, options), dtype=dtype),
        logits.new_empty((len(SavedRows._fields), n), dtype=dtype),
        logits.new_empty((len(Factors._fields),), dtype=dtype),
        logits.new_empty((n if stats else 0,), dtype=torch.int64),
    )


@torch.library.register_fake("pdl_ext::loss_forward")
def _(
    logits: Tensor,
    targets: Tensor,
    token_weight: Tensor | None,
    row_weight: Tensor | None,
    logit_offset: Tensor | None,
    normalizer: Tensor | None,
    options: list[float],
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return loss_outputs(logits, options, stats)


@torch.library.register_fake("pdl_ext::loss_and_gradient_")
def _(
    logits: Tensor,
    gradient: Tensor,
    targets: Tensor,
    token_weight: Tensor | None,
    row_weight: Tensor | None,
    logit_offset: Tensor | None,
    normalizer: Tensor | None,
    options: list[float],
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return loss_outputs(logits, options, stats)


@torch.library.register_fake("pdl_ext::loss_and_gradient")
def _(
    logits: Tensor,
    targets: Tensor,
    token_weight: Tensor | None,
    row_weight: Tensor | None,
    logit_offset: Tensor | None,
    normalizer: Tensor | None,
    upstream: Tensor | None,
    options: list[float],
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (*loss_outputs(logits, options, stats), _gradient_of(logits))


@torch.library.register_fake("pdl_ext::loss_backward")
def _(grad_loss: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return _gradient_of(logits)


def _gradient_of(logits: Tensor) -> Tensor:
    vocab_size = logits.shape[1]
    if logits.device.type != "cuda":
        return logits.new_empty(logits.shape)
    # The twin of csrc/cuda/loss.cu's allocate_gradient.
    between = torch.sym_max(logits.stride(0) - vocab_size, 0) % (16 // logits.element_size())
    return logits.new_empty_strided(logits.shape, (vocab_size + between, 1))


@torch.library.register_fake("pdl_ext::reduce_rows")
def _(
    saved_rows: Tensor,
    targets: Tensor,
    row_weight: Tensor | None,
    normalizer: Tensor | None,
    options: list[float],
) -> tuple[Tensor, Tensor]:
    loss = saved_rows.new_empty(_loss_shape(saved_rows.shape[1], options))
    return loss, saved_rows.new_empty((len(Factors._fields),))


@torch.library.register_fake("pdl_ext::token_weights")
def _(counts: Tensor, *_: Any) -> Tensor:
    return counts.new_empty(counts.shape, dtype=torch.float32)


for _name in ("correct_gradient_", "scale_", "complete_rows_", "loss_backward_", "count_tokens_"):
    torch.library.register_fake(f"pdl_ext::{_name}", lambda *_: None)
