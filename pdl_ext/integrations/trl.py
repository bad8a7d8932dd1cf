"""TRL: supervised finetuning with PDL, from the hidden states."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor

import pdl_ext
from pdl_ext._optional import require
from pdl_ext.integrations.transformers import ModelLoss, PDLCallback, apply_pdl_loss, base_model

__all__ = ["PDLSFTTrainer"]

_trl: Any = require("trl", "trl")
_outputs: Any = require("transformers.utils", "trl")


class PDLSFTTrainer(_trl.SFTTrainer):
    """An SFTTrainer that trains with a PDLLoss, and evaluates with the plain negative log-likelihood.

    Its metrics, packing, padding-free batches, masks of completions and of assistants, and PEFT are TRL's. The loss is
    computed from the hidden states by `PDLLoss.linear`, with all its options, as by `apply_pdl_loss`. `PDLCallback` is
    added to its callbacks.

    pdl_loss: a PDLLoss; the other arguments are SFTTrainer's. Raises TypeError or ValueError that names the argument,
    as apply_pdl_loss does. Raises ValueError, too, for a `compute_loss_func`, and for a `loss_type` other than "nll".
    Source: arXiv 2505.16900.
    """

    def __init__(self, *args: Any, pdl_loss: pdl_ext.PDLLoss, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The first releases have no other loss_type.
        loss_type = getattr(self.args, "loss_type", "nll")
        if loss_type not in ("nll", None):
            raise ValueError(
                f"loss_type: got {loss_type!r}, expected SFTConfig(loss_type='nll'): pass losses such as 'dft' as a "
                "modulation of the PDLLoss"
            )
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func: got one together with pdl_loss, expected either")
        apply_pdl_loss(self.model, pdl_loss)
        _answer_fused_calls(base_model(self.model))
        # Before the callbacks that report the logs to which it adds.
        self.callback_handler.callbacks.insert(0, PDLCallback(pdl_loss))


class _LastCall:
    """The loss's last call in training."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def add(self, value: Tensor, stats: pdl_ext.RowStats, targets: Tensor, counted: Tensor) -> None:
        self.value, self.stats, self.targets, self.counted = value, stats, targets, counted


def _answer_fused_calls(base: Any) -> None:
    """Answers a training call for TRL's log-probabilities by numbers whose negative sum is the sum of the loss.

    From 1.16 on TRL requests them by `fused_lm_head=True`, and trains with their negative sum over the number of items.
    It uses them for nothing else.
    """
    forward = base.__dict__["forward"].__func__

    @functools.wraps(forward)
    def fused_forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return forward(self, *args, **kwargs)
        if not self.training:
            return forward(self, *args, fused_lm_head=True, **kwargs)
        kwargs.pop("num_items_in_batch", None)
        last = _LastCall()
        of_model: ModelLoss = self.loss_function
        with of_model.observed_by(last):
            # The denominator of 1 makes the loss a sum.
            outputs = forward(self, *args, num_items_in_batch=1, **kwargs)
        if last.value is None:
            raise RuntimeError(
                "PDLLoss: got no call in the model's forward, expected one: something else computes its loss"
            )
        stats, counted = last.stats, last.counted
        # Only the sum of the rows' losses is used, and the gradient of a sum is computed at once.
        spread = -last.value / counted.sum().clamp(min=1)
        return _outputs.ModelOutput(
            log_probs=torch.where(counted, spread, 0.0),
            entropy=stats.entropy,
            is_top1=counted & (stats.predicted == last.targets),
            label_mask=counted,
            aux_loss=getattr(outputs, "aux_loss", None),
        )

    base.forward = types.MethodType(fused_forward, base)
