"""The loss of hidden states under a classifier, in slabs of logits: [N, V] is never held in memory.

A slab is memory for some of the logits: those of a chunk of rows, or of a tile of columns. One product makes the logits
of a chunk, and the fused kernel turns them into their own gradient in place. Two products turn that into the gradients
of the hidden states and of the classifier. The latter is a sum over chunks. It is formed in place if the classifier is
float32 or wider, and in a float32 buffer on CUDA. On the CPU such a buffer would be the largest thing in memory. There,
for more than two chunks in 16 bits, the logits are computed a second time, in tiles. Each tile yields its rows of the
classifier's gradient at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pdl_ext._checks import is_batch_of_gradients
from pdl_ext.engine import ops
from pdl_ext.engine.autograd import Results, divided_by_mean, gradients_of, row_weight_gradient, scaled_copy
from pdl_ext.engine.ops import LossInputs, SavedRows, accumulator_dtype, loss_outputs
from pdl_ext.engine.products import product_into
from pdl_ext.engine.vocabulary import VocabularyShard, loss_forward, sum_over_ranks
from pdl_ext.options import LossOptions

__all__ = ["ACCUMULATE", "Settings", "linear_weighted_loss"]

ACCUMULATE = ("float32", "weight")

# Fewer rows make the matrix product slow, and more do not make it faster.
_LEAST_ROWS, _MOST_ROWS = 128, 4096
_LEAST_COLUMNS = 2048
_MAX_CHUNK_BYTES = {"cuda": 512 * 10**6, "cpu": 64 * 10**6}
# Dropping the ignored rows makes the host wait for the device. It must save a millisecond or more to be worth it.
_FLOP_WORTH_WAITING = 10**12
# Adding two chunks in 16 bits costs one more rounding. Adding many loses small terms.
_MOST_ROUNDED = 2
# Ignored rows are dropped if their share is at least this.
_WORTH_DROPPING = 1 / 16
# Rows of the slab start at multiples of this, for fast matrix products.
_ALIGNMENT = 64


class Settings(NamedTuple):
    """Settings of the computation.

    dtype: of the products. max_chunk_bytes: the size of the largest slab. accumulate_float32: whether sums over slabs
    are float32. drop_ignored: whether ignored rows may be dropped.
    """

    dtype: torch.dtype
    max_chunk_bytes: int | None
    accumulate_float32: bool
    drop_ignored: bool


def _row_stride(columns: int) -> int:
    return -(-columns // _ALIGNMENT) * _ALIGNMENT


def _ranges(total: int, most: int, multiple: int) -> list[tuple[int, int]]:
    """The ranges that divide 0 to total: equal where possible, at most `most` long, multiples of `multiple`."""
    if total == 0:
        return []
    most = max(multiple, most // multiple * multiple)
    count = -(-total // most)
    size = -(-total // (count * multiple)) * multiple
    return [(begin, min(begin + size, total)) for begin in range(0, total, size)]


class _Problem:
    """The rows that count, the classifier and the options of one call; it allocates slabs of logits."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        inputs: LossInputs,
        options: LossOptions,
        settings: Settings,
        shard: VocabularyShard,
    ) -> None:
        self.n = inputs.targets.shape[0]
        self.kept = None
        if settings.drop_ignored:
            self.kept = _kept_rows(inputs.targets, options.ignore_index, hidden.shape[1] * shard.vocab_size)
        self.all_hidden = hidden
        if self.kept is not None:
            hidden, inputs = hidden[self.kept], inputs.of_rows(self.kept)
        self.hidden = _without_gaps(hidden.to(settings.dtype))
        self.weight = _without_gaps(weight.to(settings.dtype))
        self.bias = None if bias is None else bias.to(settings.dtype)
        self.inputs = inputs
        self.options = options
        self.settings = settings
        self.shard = shard
        limit = settings.max_chunk_bytes
        if limit is None:
            limit = _MAX_CHUNK_BYTES.get(hidden.device.type, _MAX_CHUNK_BYTES["cuda"])
        elements = limit // settings.dtype.itemsize
        n = inputs.targets.shape[0]
        # The same on every rank, since each chunk is reduced over the ranks.
        self.chunks = _ranges(n, min(_MOST_ROWS, elements // _row_stride(shard.largest_width)), _LEAST_ROWS)
        # The tiles of columns, and the rows of each: all rows, if enough columns then remain.
        whole = -(-n // _LEAST_ROWS) * _LEAST_ROWS
        self.tiles = [] if self.adds_up else _ranges(shard.width, max(_LEAST_COLUMNS, elements // whole), _ALIGNMENT)
        self.chunks_of_tile: list[tuple[int, int]] = []
        needed = 0 if n == 0 else self.chunks[0][1] * _row_stride(shard.width)
        if self.tiles:
            columns = _row_stride(self.tiles[0][1])
            self.chunks_of_tile = _ranges(n, elements // columns, _LEAST_ROWS)
            needed = max(needed, self.chunks_of_tile[0][1] * columns)
        # Memory that is never written to is not allocated physically.
        self.memory = self.hidden.new_empty(needed)
        # The rows and columns of the last slab whose padding was zeroed; kernels and products do not write to padding.
        self._zeroed = (0, 0)

    @property
    def sums_in_float32(self) -> bool:
        """Whether 16-bit gradients of the classifier are summed in a separate float32 buffer."""
        return self.hidden.is_cuda and len(self.chunks) > 1 and self.settings.accumulate_float32

    @property
    def adds_up(self) -> bool:
        """Whether the classifier's gradient is a sum over chunks of rows, instead of tiles of columns."""
        return (
            self.sums_in_float32
            or len(self.chunks) <= _MOST_ROUNDED
            or self.settings.dtype.itemsize >= 4
            or not self.settings.accumulate_float32
        )

    def slab(self, rows: int, columns: int) -> Tensor:
        """A slab, in memory that the next one reuses, with zeros between its rows."""
        stride = _row_stride(columns)
        padded = self.memory[: rows * stride].view(rows, stride)
        if columns != self._zeroed[1] or rows > self._zeroed[0]:
            # oneDNN's 16-bit products read past the end of a row and multiply by 0, which for NaN or infinity gives
            # NaN.
            padded[:, columns:].zero_()
            self._zeroed = (rows, columns)
        return padded[:, :columns]

    def inputs_of(self, begin: int, end: int) -> LossInputs:
        """The inputs of a chunk of rows."""
        return self.inputs.of_rows(slice(begin, end))

    def logits_into(self, slab: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> None:
        bias = None if self.bias is None else self.bias[slice(*columns)]
        product_into(slab, self.hidden[slice(*rows)], self.weight[slice(*columns)].t(), bias=bias)

    def slabs_of_chunks(self) -> Iterator[tuple[int, int, Tensor]]:
        """Each chunk of rows and its logits."""
        for begin, end in self.chunks:
            slab = self.slab(end - begin, self.shard.width)
            self.logits_into(slab, (begin, end), (0, self.shard.width))
            yield begin, end, slab

    def gradient_over(
        self,
        slab: Tensor,
        chunk: tuple[int, int],
        grad_loss: Tensor,
        saved_rows: Tensor,
        factors: Tensor,
        first: int = 0,
    ) -> None:
        """Overwrites logits, whose first column is `first`, by their gradient."""
        begin, end = chunk
        inputs = self.inputs_of(begin, end)
        offset = inputs.logit_offset
        class_weight = self.shard.columns_of(inputs.token_weight) if self.options.smooths_by_class else None
        columns = slice(first, first + slab.shape[1])
        ops.compiled.loss_backward_(
            grad_loss[begin:end] if grad_loss.dim() else grad_loss,
            slab,
            inputs.targets,
            saved_rows[:, begin:end].contiguous(),
            factors,
            None if class_weight is None else class_weight[columns],
            inputs.row_weight,
            None if offset is None else offset[columns],
            self.options.packed,
            self.shard.first_id + first,
            self.shard.vocab_size,
        )

    def restore(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Expands values whose last dimension is over the rows that count, to all rows."""
        if self.kept is None:
            return values
        result = values.new_full((*values.shape[:-1], self.n), fill)
        result[..., self.kept] = values
        return result


def _without_gaps(matrix: Tensor) -> Tensor:
    """The matrix, or a copy of it if a product on the CPU might read beyond its elements: see `_Problem.slab`."""
    if matrix.device.type != "cpu" or matrix.dtype.itemsize > 2:
        return matrix
    (rows, columns), (of_row, of_column) = matrix.shape, matrix.stride()
    gaps = (of_column == 1 and of_row > columns) or (of_row == 1 and of_column > rows)
    return matrix.contiguous() if gaps else matrix


def _kept_rows(targets: Tensor, ignore_index: int, flop_of_row: int) -> Tensor | None:
    """The rows that are not ignored, if dropping the others is worth it; None for all."""
    n = targets.shape[0]
    if targets.is_cuda and (6 * n * flop_of_row < _FLOP_WORTH_WAITING or torch.cuda.is_current_stream_capturing()):
        return None
    kept = (targets != ignore_index).nonzero().squeeze(1)
    return kept if n - kept.shape[0] > _WORTH_DROPPING * n else None


class _Gradients:
    """The gradients of hidden states, classifier and bias, computed chunk by chunk; None where not needed."""

    def __init__(
        self, problem: _Problem, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
    ) -> None:
        self.problem = problem
        self.hidden = problem.hidden.new_empty(problem.hidden.shape, dtype=hidden.dtype) if needs[0] else None
        self.weight = weight.new_empty(weight.shape) if needs[1] else None
        wide = accumulator_dtype(problem.settings.dtype)
        self.bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needs[2] else None
        self.sum = self.weight
        if self.weight is not None and self.weight.dtype.itemsize < 4 and problem.sums_in_float32:
            self.sum = torch.empty_like(self.weight, dtype=torch.float32)
        if self.sum is not None and not problem.chunks:
            self.sum.zero_()

    def add(self, begin: int, end: int, slab: Tensor) -> None:
        """Adds the gradient of the logits of some rows."""
        if self.hidden is not None:
            product_into(self.hidden[begin:end], slab, self.problem.weight)
        if self.bias is not None:
            self.bias += slab.sum(0, dtype=self.bias.dtype)
        if self.sum is not None and self.problem.adds_up:
            product_into(self.sum, slab.t(), self.problem.hidden[begin:end], add=begin > 0)

    def add_tiles(self, grad_loss: Tensor, saved_rows: Tensor, factors: Tensor) -> None:
        """Computes the classifier's gradient from tiles of columns, unless it is a sum over chunks of rows."""
        problem = self.problem
        if self.weight is None or not problem.tiles:
            return
        chunks = problem.chunks_of_tile
        total = None
        if len(chunks) > 1:
            widest = problem.tiles[0][1]
            total = problem.hidden.new_empty((widest, problem.hidden.shape[1]), dtype=torch.float32)
        for first, last in problem.tiles:
            result = self.weight[first:last] if total is None else total[: last - first]
            for begin, end in chunks:
                slab = problem.slab(end - begin, last - first)
                problem.logits_into(slab, (begin, end), (first, last))
                problem.gradient_over(slab, (begin, end), grad_loss, saved_rows, factors, first)
                product_into(result, slab.t(), problem.hidden[begin:end], add=begin > 0)
            if total is not None:
                self.weight[first:last] = result

    def finish(self, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of all rows, the classifier and the bias; empty where not needed."""
        absent = self.problem.all_hidden
        hidden, weight = self.hidden, self.weight
        if hidden is not None:
            hidden = sum_over_ranks(hidden, self.problem.shard.group)
            if self.problem.kept is not None:
                whole = torch.zeros_like(self.problem.all_hidden, memory_format=torch.contiguous_format)
                hidden = whole.index_copy_(0, self.problem.kept, hidden)
        if weight is not None and self.sum is not weight:
            assert self.sum is not None
            weight.copy_(self.sum)
        of_bias = None if self.bias is None or bias is None else self.bias.to(bias.dtype)
        return tuple(absent.new_empty(0) if x is None else x for x in (hidden, weight, of_bias))  # type: ignore[return-value]


# Ops, so that torch.compile calls them instead of unrolling the chunks or keeping several slabs. Their last arguments
# are the fields of Settings and VocabularyShard, in order.
@torch.library.custom_op("pdl_ext::linear_loss_forward", mutates_args=())
def linear_loss_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: list[bool],
    targets: Tensor,
    token_weight: Tensor | None,
    row_weight: Tensor | None,
    logit_offset: Tensor | None,
    normalizer: Tensor | None,
    options: list[float],
    stats: bool,
    dtype: torch.dtype,
    max_chunk_bytes: int | None,
    accumulate_float32: bool,
    drop_ignored: bool,
    first_id: int,
    width: int,
    vocab_size: int,
    largest_width: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss_forward's results, and those gradients of hidden, weight and bias that `needs` selects.

    They are for an upstream gradient of 1, or of the modulation's mean, which is known only after the last chunk.
    """
    inputs = LossInputs(targets, token_weight, row_weight, logit_offset, normalizer)
    settings = Settings(dtype, max_chunk_bytes, accumulate_float32, drop_ignored)
    shard = VocabularyShard(first_id, width, vocab_size, largest_width, group)
    unnormalized = LossOptions.unpacked(options).unnormalized
    problem = _Problem(hidden, weight, bias, inputs, unnormalized, settings, shard)
    gradients = _Gradients(problem, hidden, weight, bias, needs)
    wide = accumulator_dtype(dtype)
    n = problem.inputs.targets.shape[0]
    saved_rows = hidden.new_empty((len(SavedRows._fields), n), dtype=wide)
    predicted = targets.new_empty((n if stats else 0,), dtype=torch.int64)
    divisors = _divisors(problem, wide)
    one = hidden.new_ones((), dtype=wide)
    factors = None
    for begin, end, slab in problem.slabs_of_chunks():
        given = problem.inputs_of(begin, end)._replace(normalizer=divisors)
        if any(needs) and not group:
            _, found, factors, chosen = ops.compiled.loss_and_gradient_(slab, slab, *given, unnormalized.packed, stats)
        else:
            _, found, factors, chosen = loss_forward(slab, given, unnormalized.packed, stats, shard)
        saved_rows[:, begin:end] = found
        if stats:
            predicted[begin:end] = chosen
        if any(needs):
            if group:
                problem.gradient_over(slab, (begin, end), one, saved_rows, factors)
            gradients.add(begin, end, slab)
    if factors is not None:
        gradients.add_tiles(one, saved_rows, factors)
    saved_rows = problem.restore(saved_rows)
    loss, factors = ops.compiled.reduce_rows(saved_rows, targets, row_weight, normalizer, options)
    return loss, saved_rows, factors, problem.restore(predicted, -1) if stats else predicted, *gradients.finish(bias)


@linear_loss_forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: list[bool],
    targets: Tensor,
    token_weight: Tensor | None,
    row_weight: Tensor | None,
    logit_offset: Tensor | None,
    normalizer: Tensor | None,
    options: list[float],
    stats: bool,
    dtype: torch.dtype,
    *_: Any,
) -> tuple[Tensor, ...]:
    logits = hidden.new_empty((targets.shape[0], weight.shape[0]), dtype=dtype)
    return (*loss_outputs(logits, options, stats), *_fake_gradients(hidden, weight, bias, needs))


def _fake_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]) -> tuple[Tensor, ...]:
    return tuple(
        hidden.new_empty(0) if x is None or not need else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x, need in zip((hidden, weight, bias), needs, strict=True)
    )


def _divisors(problem: _Problem, wide: torch.dtype) -> Tensor | None:
    """The denominators of the whole batch, which the first chunk's gradient already needs."""
    inputs, reduction = problem.inputs, problem.options.reduction
    targets, row_weight = inputs.targets, inputs.row_weight
    if inputs.normalizer is not None or reduction in ("none", "sum"):
        return inputs.normalizer
    counted = targets != problem.options.ignore_index
    count = counted.sum(dtype=torch.float64)
    if reduction == "token_mean":
        return torch.stack((count, count)).to(wide)
    valid = counted & (targets >= 0) & (targets < problem.shard.vocab_size)
    weights = torch.where(valid, inputs.weights_of_rows(valid), torch.nan).to(wide)
    if row_weight is not None:
        weights = weights.to(wide) * row_weight
    return torch.stack((torch.where(counted, weights, 0.0).sum(dtype=torch.float64), count)).to(wide)


@torch.library.custom_op("pdl_ext::linear_loss_backward", mutates_args=())
def linear_loss_backward(
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: list[bool],
    targets: Tensor,
    saved_rows: Tensor,
    factors: Tensor,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    logit_offset: Tensor | None,
    options: list[float],
    dtype: torch.dtype,
    max_chunk_bytes: int | None,
    accumulate_float32: bool,
    drop_ignored: bool,
    first_id: int,
    width: int,
    vocab_size: int,
    largest_width: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Those gradients of hidden, weight and bias that `needs` selects, from logits that are computed again."""
    inputs = LossInputs(targets, token_weight=class_weight, row_weight=row_weight, logit_offset=logit_offset)
    settings = Settings(dtype, max_chunk_bytes, accumulate_float32, drop_ignored)
    shard = VocabularyShard(first_id, width, vocab_size, largest_width, group)
    problem = _Problem(hidden, weight, bias, inputs, LossOptions.unpacked(options), settings, shard)
    gradients = _Gradients(problem, hidden, weight, bias, needs)
    if problem.kept is not None:
        saved_rows = saved_rows[:, problem.kept]
        grad_loss = grad_loss[problem.kept] if grad_loss.dim() else grad_loss
    for begin, end, slab in problem.slabs_of_chunks():
        problem.gradient_over(slab, (begin, end), grad_loss, saved_rows, factors)
        gradients.add(begin, end, slab)
    gradients.add_tiles(grad_loss, saved_rows, factors)
    return gradients.finish(bias)


@linear_loss_backward.register_fake
def _(
    grad_loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool], *_: Any
) -> tuple[Tensor, ...]:
    return _fake_gradients(hidden, weight, bias, needs)


class LinearLoss(torch.autograd.Function):
    """The gradients of the ops: computed in forward for a scalar reduction, otherwise in backward.

    Returns the loss, and with `stats` also the saved rows and predictions.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        row_weight: Tensor | None,
        inputs: LossInputs,
        class_weight: Tensor | None,
        options: list[float],
        stats: bool,
        settings: Settings,
        shard: VocabularyShard,
        at_once: bool,
        is_normalized: bool,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        *needs, _of_row_weight = ctx.needs_input_grad[:4]
        ctx.at_once = at_once
        computed = needs if at_once else _NO_GRADIENTS
        loss, saved_rows, factors, predicted, *gradients = torch.ops.pdl_ext.linear_loss_forward(
            hidden, weight, bias, computed, *inputs, options, stats, *settings, *shard
        )
        ctx.set_materialize_grads(False)
        ctx.options, ctx.settings, ctx.shard = options, settings, shard
        ctx.is_normalized = is_normalized
        saved = gradients if at_once else (inputs.targets, class_weight, inputs.logit_offset)
        ctx.save_for_backward(hidden, weight, bias, row_weight, saved_rows, factors, *saved)
        if not stats:
            return loss
        ctx.mark_non_differentiable(saved_rows, predicted)
        return loss, saved_rows, predicted

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return gradients_of(ctx, 4, grad_loss, _linear_gradients)


_NO_GRADIENTS = [False] * 3


def _linear_gradients(
    ctx: Any, saved_tensors: tuple[Tensor, ...], grad_loss: Tensor, once: bool
) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, row_weight, saved_rows, factors, *saved = saved_tensors
    *needs, of_row_weight = ctx.needs_input_grad[:4]
    grad_row_weight = row_weight_gradient(grad_loss, saved_rows, factors) if of_row_weight else None
    if not any(needs):
        return None, None, None, grad_row_weight
    if ctx.at_once:
        if ctx.is_normalized:
            grad_loss = divided_by_mean(grad_loss, factors)
        gradients = [
            _scaled(gradient, grad_loss) if need else None for gradient, need in zip(saved, needs, strict=True)
        ]
        return *gradients, grad_row_weight
    targets, class_weight, logit_offset = saved
    computed = torch.ops.pdl_ext.linear_loss_backward(
        grad_loss,
        hidden,
        weight,
        bias,
        needs,
        targets,
        saved_rows,
        factors,
        class_weight,
        row_weight,
        logit_offset,
        ctx.options,
        *ctx.settings,
        *ctx.shard,
    )
    gradients = [gradient if need else None for gradient, need in zip(computed, needs, strict=True)]
    return *gradients, grad_row_weight


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient * factor; in place, if nobody can ask for the gradient again."""
    # PyTorch batches no op that writes to its inputs.
    if torch.compiler.is_compiling() or is_batch_of_gradients(factor):
        return scaled_copy(gradient, factor)
    if torch._C._autograd._get_current_graph_task_keep_graph():
        gradient = gradient.clone()
    if gradient.numel() > 0:
        ops.compiled.scale_(gradient.view(-1, gradient.shape[-1]), factor)
    return gradient


def linear_weighted_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inputs: LossInputs,
    options: LossOptions,
    stats: bool,
    settings: Settings,
    shard: VocabularyShard,
) -> Results:
    """The loss of hidden [N, H] under weight [V, H] and bias, with its gradients.

    With `stats` also saved rows and predictions.
    """
    row_weight = inputs.row_weight
    if not torch.is_grad_enabled() or not any(
        x is not None and x.requires_grad for x in (hidden, weight, bias, row_weight)
    ):
        loss, saved_rows, _factors, predicted, *_ = torch.ops.pdl_ext.linear_loss_forward(
            hidden, weight, bias, _NO_GRADIENTS, *inputs, options.packed, stats, *settings, *shard
        )
        return (loss, saved_rows, predicted) if stats else (loss, None, None)
    # In forward a vector of upstream gradients is unknown, and a float16 gradient may underflow without the loss scale.
    wanted = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    half = torch.float16 in (settings.dtype, *(x.dtype for x in wanted))
    # The mean of a modulation is known only after the z-loss was added to a chunk's gradient, which it must not divide.
    is_normalized = options.unnormalized is not options
    at_once = options.reduction != "none" and not half and not (is_normalized and options.z_loss > 0)
    class_weight = inputs.token_weight if options.smooths_by_class else None
    how = (options.packed, stats, settings, shard, at_once, is_normalized)
    result = LinearLoss.apply(hidden, weight, bias, row_weight, inputs, class_weight, *how)
    return result if stats else (result, None, None)
