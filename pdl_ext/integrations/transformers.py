"""Hugging Face transformers: PDL as the loss of a model and of a Trainer, from the hidden states.

`apply_pdl_loss(model, loss)` sets the model's loss. `PDLCallback(loss)` stores counts in checkpoints and logs
statistics of the weighting. It stops a training in which the loss is not called.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import threading
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import pdl_ext
from pdl_ext._checks import check_choice, check_flag
from pdl_ext._optional import require
from pdl_ext.integrations import lazy_logits
from pdl_ext.integrations.lazy_logits import LazyLogits

__all__ = ["ModelLoss", "PDLCallback", "apply_pdl_loss", "base_model", "remove_pdl_loss"]

_transformers: Any = require("transformers", "transformers")
_losses: Any = require("transformers.loss.loss_utils", "transformers")

Model = TypeVar("Model", bound=nn.Module)

EVALUATION_LOSSES = ("nll", "pdl")
_FILE = "pdl_loss.pt"


class _Forward(threading.local):
    """The mode of this thread's innermost model with a PDLLoss that is in its forward."""

    is_training: bool | None = None


_forward = _Forward()


def apply_pdl_loss(model: Model, loss: pdl_ext.PDLLoss, *, fused: bool = True, eval_loss: str = "nll") -> Model:
    """Makes a language model compute its loss by a PDLLoss, in place; returns the model.

    Args:
        model: a PreTrainedModel with a language-modelling head, or a PeftModel of one, before or after fully_shard.
        loss: a PDLLoss of reduction "mean" or "token_mean". The model determines the shift of the targets, and the
            softcap and scale of the logits; do not set these options of the loss. The loss is not part of the model,
            and counts in training only. The normalizer is `num_items_in_batch` if the caller, such as a Trainer, passes
            it.
        fused: whether the loss is computed from the hidden states, without the logits. The logits are computed
            nevertheless if other code reads them, under torch.compile, and for a quantised or adapted head. The same
            holds if the model does an operation on them that cannot be recorded; a warning reports this once. With
            ZeRO-3, and with a head that is an FSDP2 unit of its own, they are always computed.
        eval_loss: "nll", the plain negative log-likelihood of a model in eval mode, or "pdl", the loss itself.

    Raises TypeError for another model or loss. Raises ValueError for a model without a head or with a PDLLoss already,
    for options that the model determines, and for counts of another vocabulary.
    Source: arXiv 2505.16900.
    """
    base = base_model(model)
    check_flag("fused", fused)
    check_choice("eval_loss", eval_loss, EVALUATION_LOSSES)
    _check_loss(loss)
    if _model_loss(base) is not None:
        raise ValueError("model: got one with a PDLLoss, expected one without: call remove_pdl_loss(model) first")
    head = _head(base)
    forward, calls_loss_function = _forward_of(base)
    shift = _shifts(base, calls_loss_function)
    if loss.frequency is not None and loss.frequency.vocab_size != _rows(base, head):
        raise ValueError(
            f"loss: got counts of {loss.frequency.vocab_size} tokens, expected {_rows(base, head)}, the logits of "
            f"{type(base).__name__}"
        )
    if loss.frequency is not None and base.device.type != "meta":
        loss.to(base.device)
    base.loss_function = ModelLoss(loss, shift, eval_loss, fused)
    if fused:
        lazy_logits.record(head)
    _mark_forward(base, forward, calls_loss_function)
    return model


def remove_pdl_loss(model: Model) -> Model:
    """Restores a model's own loss, in place; returns the model. Raises ValueError for a model without a PDLLoss."""
    base = base_model(model)
    of_model = _model_loss(base)
    if of_model is None:
        raise ValueError("model: got one without a PDLLoss, expected one that apply_pdl_loss was called with")
    del base.__dict__["_loss_function"]
    del base.__dict__["forward"]
    if of_model.forward_before is not None:
        base.forward = of_model.forward_before
    if "accepts_loss_kwargs" in base.__dict__:
        del base.accepts_loss_kwargs
    lazy_logits.stop_recording(base)
    return model


class ModelLoss:
    """A model's `loss_function`; for use inside this package.

    Observers get each training call: its value, row statistics, targets, and a mask of the targets that count.
    """

    # Some compiled forwards of other packages read it.
    __name__ = "pdl_loss"

    def __init__(self, loss: pdl_ext.PDLLoss, shift: bool, eval_loss: str, fused: bool) -> None:
        self.loss = loss
        self.shift = shift
        self.eval_loss = eval_loss
        self.fused = fused
        self.was_called = False
        self.observers: list[Any] = []
        # The forward that other code had set on the model itself.
        self.forward_before: Any = None

    @contextlib.contextmanager
    def observed_by(self, observer: Any) -> Iterator[None]:
        """Passes the calls within a block to an observer's `add`."""
        self.observers.append(observer)
        try:
            yield
        finally:
            self.observers.remove(observer)

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: int | Tensor | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        loss = self.loss
        if ignore_index != loss.ignore_index:
            raise ValueError(f"ignore_index: got {ignore_index}, expected {loss.ignore_index}, that of the PDLLoss")
        self.was_called = True
        is_training = loss.training if _forward.is_training is None else _forward.is_training
        if loss.training != is_training:
            loss.train(is_training)
        frequency = None if torch.compiler.is_compiling() else loss.frequency
        if frequency is not None and frequency.counts.device != logits.device:
            loss.to(logits.device)
        targets = (labels if shift_labels is None else shift_labels).to(logits.device)
        is_observed = is_training and bool(self.observers)
        options: dict[str, Any] = {
            "shift": self.shift and shift_labels is None,
            "normalizer": _normalizer(num_items_in_batch, logits.device),
            "return_stats": is_observed,
        }
        of_logits: Any = loss
        of_hidden: Any = loss.linear
        if not is_training and self.eval_loss == "nll":
            options |= {"ignore_index": loss.ignore_index, "reduction": "token_mean"}
            of_logits, of_hidden = pdl_ext.functional.pdl_loss, pdl_ext.functional.linear_pdl_loss
        result = self._from_hidden_states(of_hidden, logits, targets, options)
        if result is None:
            made = logits.dense() if isinstance(logits, LazyLogits) else logits
            result = of_logits(made, targets, **options)
        if not is_observed:
            return result
        value, stats = result
        counted = targets != loss.ignore_index
        if options["shift"]:
            counted[..., 0] = False
        for observer in self.observers:
            observer.add(value, stats, targets, counted)
        return value

    def _from_hidden_states(self, of_hidden: Any, logits: Tensor, targets: Tensor, options: dict[str, Any]) -> Any:
        """The loss of logits that were not computed; None for other logits."""
        if not isinstance(logits, LazyLogits):
            if self.fused and not torch.compiler.is_compiling():
                _tell_once("the head is not a plain linear layer, or its weight is not available after its forward")
            return None
        transform = logits.transform()
        if transform is None:
            operation = logits.unknown or "a series of operations that is no scale with a softcap"
            _tell_once(f"the model applies an operation that is not recorded: {operation}")
            return None
        head, width = logits.head, transform.width
        weight, bias = head.weight, head.bias
        if width != weight.shape[0]:
            weight, bias = weight[:width], None if bias is None else bias[:width]
        of_model = {"softcap": transform.softcap, "logit_scale": transform.logit_scale}
        return of_hidden(head.hidden, weight, targets, bias=bias, **of_model, **options)


class _Seen:
    """Sums of a loss's row statistics over the calls since the last reading, on the device.

    buckets: int64 [V], the frequency bucket of each token, or None if nothing is counted.
    """

    def __init__(self, buckets: Tensor | None) -> None:
        self.buckets = buckets
        self.sums: Tensor | None = None

    def add(self, value: Tensor, stats: pdl_ext.RowStats, targets: Tensor, counted: Tensor) -> None:
        nll, weight = (torch.where(counted, of_row, 0.0).double() for of_row in (stats.nll, stats.weight))
        sums = [counted.sum().double(), nll.sum(), weight.sum(), (weight * weight).sum()]
        if self.buckets is not None:
            bucket = self.buckets.to(targets.device)[torch.where(counted, targets, 0).long()]
            for number in range(3):
                here = counted & (bucket == number)
                sums += [here.sum().double(), torch.where(here, nll, 0.0).sum()]
        added = torch.stack(sums)
        self.sums = added if self.sums is None else self.sums + added

    def read(self) -> dict[str, float]:
        """The statistics of the rows since the last reading; empty if there were none."""
        if self.sums is None:
            return {}
        rows, nll, weight, squares, *buckets = self.sums.tolist()
        self.sums = None
        if not rows:
            return {}
        logs = {"pdl/nll": nll / rows, "pdl/effective_sample": weight**2 / squares / rows if squares else 0.0}
        names = ("frequent", "medium", "rare")
        for name, count, of_bucket in zip(names, buckets[::2], buckets[1::2], strict=False):
            if count:
                logs[f"pdl/nll_{name}"] = of_bucket / count
        return logs


class PDLCallback(_transformers.TrainerCallback):
    """A Trainer's callback for a model with `apply_pdl_loss(model, loss)`: pass it in `callbacks`.

    - A training step that ends without a call of the loss raises RuntimeError: another loss was trained.
    - Each checkpoint holds the loss's counts and blend, and a resumed run continues with them.
    - The Trainer's logs get statistics of this rank's training targets. `pdl/nll` is their plain negative
      log-likelihood in nats, `pdl/effective_sample` is (sum w)^2 / (n sum w^2). `pdl/nll_frequent`, `pdl/nll_medium`
      and `pdl/nll_rare` are those of the buckets of `TokenFrequency.buckets`. The reporters of a Trainer's own
      `report_to` run before any callback and do not get them; they are in `state.log_history`.

    loss: the PDLLoss of the model. Raises TypeError for another object. When training begins it raises ValueError for a
    model without this loss, and for a Trainer's label_smoothing_factor. It raises FileNotFoundError for a checkpoint
    without counts.
    """

    def __init__(self, loss: pdl_ext.PDLLoss) -> None:
        if not isinstance(loss, pdl_ext.PDLLoss):
            raise TypeError(f"loss: got {type(loss).__name__}, expected a PDLLoss")
        self._loss = loss
        self._of_model: ModelLoss | None = None
        self._seen: _Seen | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        of_model = _model_loss(base_model(model))
        if of_model is None or of_model.loss is not self._loss:
            raise ValueError(
                "model: got one without this PDLLoss, expected apply_pdl_loss(model, loss) before the training"
            )
        if args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor: got {args.label_smoothing_factor}, expected 0, with which the Trainer calls "
                "the model's loss: use PDLLoss(label_smoothing=) instead"
            )
        self._of_model = of_model
        of_model.was_called = False
        if state.global_step > 0:
            self._restore(args, state.global_step)
        self._seen = _Seen(self._buckets())
        of_model.observers = [self._seen]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._of_model is not None and not self._of_model.was_called:
            raise RuntimeError(
                "PDLLoss: got no call in a training step, expected one for each batch. Something else computes the "
                "loss: the Trainer's compute_loss_func, Liger's fused loss, or TRL's own head. Turn that off"
            )
        if self._of_model is not None:
            self._of_model.was_called = False

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        loss = self._loss
        if loss.online and loss.sync_every is not None and loss.frequency is not None:
            loss.frequency.sync()
        if state.is_world_process_zero and (loss.frequency is not None or not loss.online):
            path = _checkpoint(args, state.global_step) / _FILE
            if not path.parent.is_dir():
                # save_total_limit has already deleted it, in favour of a former run with more steps.
                return
            partial = path.with_suffix(f".{os.getpid()}")
            torch.save(loss.state_dict(), partial)
            partial.replace(path)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self._seen is None or logs is None or "loss" not in logs:
            return
        told = self._seen.read()
        logs.update(told)
        if state.log_history:
            state.log_history[-1].update(told)
        if self._loss.online:
            self._seen.buckets = self._buckets()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._of_model is not None:
            self._of_model.observers = []
        self._of_model = self._seen = None

    def _buckets(self) -> Tensor | None:
        frequency = self._loss.frequency
        return None if frequency is None or not frequency.total else frequency.buckets()

    def _restore(self, args: Any, step: int) -> None:
        given = args.resume_from_checkpoint
        path = (Path(given) if isinstance(given, str) else _checkpoint(args, step)) / _FILE
        if path.exists():
            self._loss.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        elif not self._loss.online:
            warnings.warn(
                f"resume_from_checkpoint: {path} is missing, so that blend stays {self._loss.blend}", stacklevel=2
            )
        else:
            raise FileNotFoundError(
                f"resume_from_checkpoint: {path} is missing, so that the counts would begin anew. PDLCallback writes "
                "it if it was among the callbacks; set TrainingArguments(resume_from_checkpoint=) for a checkpoint in "
                "another folder"
            )


def _checkpoint(args: Any, step: int) -> Path:
    return Path(args.output_dir) / f"checkpoint-{step}"


def base_model(model: Any) -> Any:
    """The PreTrainedModel inside a user's model: itself, that of a PeftModel, or that inside a wrapper."""
    inner = model
    while isinstance(inner, nn.Module) and not isinstance(inner, _transformers.PreTrainedModel):
        # PeftModel, or DistributedDataParallel.
        get_base: Any = getattr(inner, "get_base_model", None)
        wrapped = getattr(inner, "module", None) if get_base is None else get_base()
        if wrapped is None or wrapped is inner:
            break
        inner = wrapped
    if not isinstance(inner, _transformers.PreTrainedModel):
        raise TypeError(
            f"model: got {type(model).__name__}, expected a transformers PreTrainedModel or a PeftModel of one"
        )
    return inner


def _model_loss(base: Any) -> ModelLoss | None:
    loss = base.__dict__.get("_loss_function")
    return loss if isinstance(loss, ModelLoss) else None


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, pdl_ext.PDLLoss):
        raise TypeError(f"loss: got {type(loss).__name__}, expected a PDLLoss")
    if loss.reduction not in ("mean", "token_mean"):
        raise ValueError(f"loss: got reduction {loss.reduction!r}, expected 'mean' or 'token_mean'")
    for name, default in (("shift", False), ("softcap", None), ("logit_scale", 1.0)):
        if getattr(loss, name) != default:
            raise ValueError(f"loss: got {name}={getattr(loss, name)}, expected {default}: the model decides it")


def _head(base: Any) -> nn.Module:
    head = base.get_output_embeddings()
    if head is None:
        raise ValueError(f"model: got {type(base).__name__}, expected a model with a language-modelling head")
    if hasattr(head, "modules_to_save"):
        # PEFT trains a copy.
        head = head.modules_to_save[head.active_adapters[0]]
    elif hasattr(head, "get_base_layer"):
        head = head.get_base_layer()
    return head


def _rows(base: Any, head: Any) -> int:
    # A sharded weight has the rows of one rank only.
    return int(getattr(head, "out_features", None) or base.config.get_text_config().vocab_size)


def _shifts(base: Any, calls_loss_function: bool) -> bool:
    """Whether position t predicts label t + 1, by the Trainer's own rule."""
    if getattr(base.config, "is_encoder_decoder", False):
        return False
    mapping = _losses.LOSS_MAPPING
    shifts: bool = mapping.get(base.loss_type, _losses.ForCausalLMLoss) is _losses.ForCausalLMLoss
    if shifts and not calls_loss_function:
        # Bart's decoder does not shift, Blip's does.
        raise ValueError(
            f"model: got {type(base).__name__}, whose forward does not call loss_function, expected one that calls it: "
            "it may or may not shift labels. Call loss_fn(model(...).logits, labels, shift=...) instead"
        )
    return shifts


def _forward_of(base: Any) -> tuple[Any, bool]:
    """A model's forward as a function, and whether it calls the model's loss_function."""
    # Other code may have set another forward on this model.
    own = base.__dict__.get("forward")
    forward = type(base).forward if own is None else own.__func__
    return forward, "loss_function" in inspect.unwrap(forward).__code__.co_names


def _mark_forward(base: Any, forward: Any, calls_loss_function: bool) -> None:
    """Wraps a model's forward with labels, so that its head records and its loss knows the mode."""
    names = list(inspect.signature(forward).parameters)[1:]
    if not calls_loss_function:
        # The loss then divides by num_items_in_batch, which the model's own loss would not do.
        base.accepts_loss_kwargs = True

    @functools.wraps(forward)
    def forward_with_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        if kwargs.get("labels") is None and kwargs.get("shift_labels") is None:
            return forward(self, **kwargs)
        with lazy_logits.recording(), _training(self.training):
            return forward(self, **kwargs) if calls_loss_function else _loss_beside(self, forward, kwargs)

    base.loss_function.forward_before = base.__dict__.get("forward")
    base.forward = types.MethodType(forward_with_loss, base)


def _loss_beside(base: Any, forward: Any, kwargs: dict[str, Any]) -> Any:
    """The outputs of a model whose forward computes its own loss, with this loss in its place."""
    labels = kwargs.pop("labels")
    items = kwargs.pop("num_items_in_batch", None)
    as_dict = kwargs.pop("return_dict", None)
    if as_dict is None:
        as_dict = base.config.return_dict
    given = any(kwargs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))
    # The model's own forward derives these from labels.
    if not given and hasattr(base, "prepare_decoder_input_ids_from_labels"):
        kwargs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=labels)
    outputs = forward(base, return_dict=True, **kwargs)
    loss = base.loss_function(outputs.logits, labels, num_items_in_batch=items)
    outputs = type(outputs)(**{**outputs, "loss": loss})
    return outputs if as_dict else outputs.to_tuple()


@contextlib.contextmanager
def _training(is_training: bool) -> Iterator[None]:
    before = _forward.is_training
    _forward.is_training = is_training
    try:
        yield
    finally:
        _forward.is_training = before


def _normalizer(items: Any, device: torch.device) -> Any:
    if items is None:
        return None
    if isinstance(items, Tensor):
        return items.to(device).reshape(-1)[0].clamp(min=1)
    return max(items, 1)


@functools.cache
def _tell_once(reason: str) -> None:
    warnings.warn(
        f"apply_pdl_loss: the logits are computed, since {reason}. The loss is correct, but uses memory for the logits",
        stacklevel=3,
    )
