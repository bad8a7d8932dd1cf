"""Logits and classifiers that are sharded along the vocabulary: the same loss and gradients as on one rank."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import uninitialized
from torch.utils._python_dispatch import TorchDispatchMode

from pdl_ext import PDLLoss, functional, reference
from pdl_ext.engine import linear, ops, vocabulary
from pdl_ext.engine.call import LinearLossCall, LossCall
from pdl_ext.modulation import EAFT, AntiFocal, Focal, MiLe
from pdl_ext.options import REDUCTIONS, LossOptions

ROWS, HIDDEN, VOCAB = 37, 12, 101
# So uneven that one rank alone would choose other chunks than the next; one rank has a single id.
WIDTHS = {2: [20, 81], 4: [22, 1, 70, 8]}
OPTIONS = {
    "plain": {},
    "none": {"reduction": "none"},
    "everything": {
        "reduction": "token_mean",
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "softcap": 15.0,
        "logit_scale": 0.7,
        "offset": True,
        "modulation": Focal(),
    },
    "by_class": {
        "label_smoothing": 0.2,
        "label_smoothing_weight": "class",
        "modulation": MiLe(2.0),
        "logit_scale": 0.7,
    },
    "unweighted": {"label_smoothing": 0.2, "label_smoothing_weight": "none", "modulation": EAFT(), "z_loss": 0.01},
    "anti_focal": {"modulation": AntiFocal(2.0, 0.5), "label_smoothing": 0.1},
    # A shared offset of the logits must cancel nothing.
    "large_offset": {"label_smoothing": 0.1, "offset": 1000.0},
}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("options", ["plain", "everything", "by class"])
@pytest.mark.parametrize("vocab_size", [101, 40_000])  # a share a row, and several for few rows
def test_gradient_of_a_shard_is_a_shard_of_the_gradient(make_case, vocab_size, options, overwrite):
    case = make_case((3,), vocab_size, row_weight=True)
    offset = torch.linspace(-1, 1, vocab_size, device=case.leaf.device) if options != "plain" else None
    everything = {"label_smoothing": 0.1, "z_loss": 0.01, "logit_scale": 0.7, "softcap": 15.0}
    asked = LossOptions(**everything if options != "plain" else {})
    class_weight = None
    if options == "by class":
        asked, class_weight = dataclasses.replace(asked, label_smoothing_weight="class"), case.token_weight
    packed = asked.packed
    loss, saved_rows, factors, _ = ops.compiled.loss_forward(
        case.leaf, case.targets, case.token_weight, case.row_weight, offset, None, packed, False
    )
    upstream = torch.full_like(loss, 1.5)
    whole = ops.compiled.loss_backward(
        upstream,
        case.leaf,
        case.targets,
        saved_rows,
        factors,
        class_weight,
        case.row_weight,
        offset,
        packed,
        0,
        vocab_size,
    )
    assert whole[0].all()
    # Each target is the first or last column of a shard, or in another one.
    cuts = sorted(
        {0, vocab_size, *(int(t) for t in case.targets if t > 0), *(int(t) + 1 for t in case.targets if t >= 0)}
    )
    for first, last in itertools.pairwise(cuts):
        shard = case.leaf[:, first:last].clone()
        of_columns = [None if table is None else table[first:last].clone() for table in (class_weight, offset)]
        given = (upstream, shard, case.targets, saved_rows, factors, of_columns[0], case.row_weight, of_columns[1])
        given += (packed, first, vocab_size)
        if overwrite:
            ops.compiled.loss_backward_(*given)
        else:
            shard = ops.compiled.loss_backward(*given)
        torch.testing.assert_close(shard, whole[:, first:last], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("target", [-7, 101, 2**31 - 1])
@pytest.mark.parametrize("first", [0, 50])
def test_target_outside_the_whole_vocabulary_makes_its_row_nan(make_case, device_name, target, first):
    case = make_case((3,), 101, ignored=False)
    packed = LossOptions().packed
    loss, saved_rows, factors, _ = ops.compiled.loss_forward(
        case.leaf, case.targets, None, None, None, None, packed, False
    )
    case.targets[1] = target
    if device_name != "cpu":
        # Forward's results for such a row.
        saved_rows[:, 1] = torch.nan
    gradient = ops.compiled.loss_backward(
        loss, case.leaf[:, first:].clone(), case.targets, saved_rows, factors, None, None, None, packed, first, 101
    )
    assert gradient[1].isnan().all()
    assert gradient[[0, 2]].isfinite().all()


@pytest.mark.parametrize("normalizer", [None, [2.5, 3.5]])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [0, 5, 1500])
def test_rows_alone_reduce_to_the_loss(make_case, rows, reduction, normalizer):
    case = make_case((rows,), 9, row_weight=True)
    if normalizer is not None:
        normalizer = torch.tensor(normalizer, device=case.leaf.device)
    packed = LossOptions(reduction=reduction, label_smoothing=0.1, z_loss=0.01).packed
    loss, saved_rows, factors, _ = ops.compiled.loss_forward(
        case.leaf, case.targets, case.token_weight, case.row_weight, None, normalizer, packed, False
    )
    got = ops.compiled.reduce_rows(saved_rows, case.targets, case.row_weight, normalizer, packed)
    assert torch.equal(got[0], loss)
    assert torch.equal(got[1], factors)
    if normalizer is not None and reduction in ("mean", "token_mean"):
        torch.testing.assert_close(factors, torch.tensor([1 / 2.5, 1 / 3.5, 0.0, 1.0, 1.0], device=factors.device))
    assert rows == 0 or loss.any()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1},
        {"label_smoothing": 0.1, "label_smoothing_weight": "none"},
        {"label_smoothing": 0.1, "label_smoothing_weight": "class"},
    ],
    ids=["plain", "target", "none", "class"],
)
@pytest.mark.parametrize("modulation", [Focal(1.5), MiLe(1.5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [0, 5, 300])
def test_rows_whose_statistics_were_merged_are_completed(make_case, rows, dtype, modulation, options):
    case = make_case((rows,), 9, dtype, ignored=False)
    options = LossOptions(**options, modulation=modulation)

    def saved_rows(options):
        given = (case.leaf, case.targets, case.token_weight, None, None, None, options.packed, True)
        return ops.compiled.loss_forward(*given)[1]

    expected = saved_rows(options)
    # With a smoothing of 1, ce is the mean of lse - z, each times the weight of its class.
    of_class = "class" if options.smooths_by_class else "none"
    merged = saved_rows(dataclasses.replace(options, label_smoothing=1.0, label_smoothing_weight=of_class))
    ops.SavedRows.of(merged).modulation.fill_(torch.nan)
    ops.compiled.complete_rows_(merged, options.packed, 9)
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=0)


def make_inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype)
    bias = torch.randn(VOCAB, generator=generator).to(dtype)
    # Two equal largest logits in some rows: the first must be predicted.
    weight[90], bias[90] = weight[5], bias[5]
    targets = torch.randint(VOCAB, (ROWS,), generator=generator)
    targets[::5] = -100
    token_weight = 0.2 + torch.rand(VOCAB, generator=generator)
    row_weight = 0.3 + torch.rand(ROWS, generator=generator)
    return hidden, weight, bias, targets, token_weight, row_weight


def options_of(name):
    options = dict(OPTIONS[name])
    offset = options.pop("offset", None)
    if offset is not None:
        noise = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3))
        options["logit_offset"] = noise + (0.0 if offset is True else offset)
    return options


def upstream_of(loss):
    return (torch.randn(loss.shape, generator=torch.Generator().manual_seed(1)) + 0.1).to(loss)


def run(fused, part, name, dtype, group=None, function=None):
    """Loss, statistics and gradients; of the classifier, those of the columns in `part`."""
    hidden, weight, bias, targets, token_weight, row_weight = make_inputs(dtype)
    hidden.requires_grad_(), row_weight.requires_grad_()
    weight, bias = weight[part].clone().requires_grad_(), bias[part].clone().requires_grad_()
    options = {"row_weight": row_weight, "return_stats": True, **options_of(name)}
    if group is not None:
        options["process_group"] = group
    if fused:
        # Several slabs.
        limit = {} if function is not None else {"max_chunk_bytes": 8 * 128 * dtype.itemsize}
        function = function or functional.linear_pdl_loss
        loss, stats = function(hidden, weight, targets, token_weight, bias=bias, **limit, **options)
    else:
        logits = F.linear(hidden, weight, bias)
        loss, stats = (function or functional.pdl_loss)(logits, targets, token_weight, **options)
    loss.backward(upstream_of(loss))
    results = {"loss": loss.detach(), **stats._asdict(), "grad_weight": weight.grad, "grad_bias": bias.grad}
    results["grad_row_weight"] = row_weight.grad
    # Without fusion each rank has the gradient through its own logits only, which the caller adds up.
    results["grad_hidden" if fused or group is None else "part_of_grad_hidden"] = hidden.grad
    return results


def worker(rank, init, folder, world):
    uninitialized.fill()
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world)
    torch.set_num_threads(1)
    try:
        linear._LEAST_ROWS = 8
        widths = WIDTHS[world]
        part = slice(sum(widths[:rank]), sum(widths[: rank + 1]))
        group = dist.group.WORLD
        results = {
            (fused, name, dtype): run(fused, part, name, DTYPES[dtype], group)
            for fused in (False, True)
            for name in OPTIONS
            for dtype in DTYPES
        }
        results["online"] = online(part, group)
        results["dropped"] = dropped(rank, part, group)
        results["errors"] = errors(part, group)
        results["masked"] = masked(rank, group)
        torch.save(results, f"{folder}/{rank}.pt")
        # Otherwise a rank may find that the others have ended.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def online(part, group=None):
    """Losses of an online module over two steps of both ways."""
    hidden, weight, bias, targets, *_ = make_inputs(torch.float64)
    loss_fn = PDLLoss()
    losses = []
    for _ in range(2):
        losses.append(loss_fn.linear(hidden, weight[part], targets, bias[part], process_group=group))
        losses.append(loss_fn(F.linear(hidden, weight[part], bias[part]), targets, process_group=group))
    return {"losses": torch.stack(losses), "counts": loss_fn.frequency.counts}


def dropped(rank, part, group):
    """Weights of rows of a loss that drops some, on ranks whose generators differ."""
    torch.manual_seed(rank)
    hidden, weight, bias, targets, *_ = make_inputs(torch.float32)
    loss_fn = PDLLoss(torch.arange(VOCAB), weight_drop=0.5)
    _, stats = loss_fn(F.linear(hidden, weight[part], bias[part]), targets, process_group=group, return_stats=True)
    return stats.weight


def errors(part, group):
    hidden, weight, _, targets, *_ = make_inputs(torch.float32)
    targets[3] = VOCAB
    messages = []
    for call in (
        lambda: functional.linear_pdl_loss(hidden, weight[part], targets, process_group=group),
        lambda: functional.pdl_loss(F.linear(hidden, weight[part]), targets, process_group=group),
        lambda: functional.pdl_loss(F.linear(hidden, weight[part]), targets, torch.ones(7), process_group=group),
    ):
        with pytest.raises((IndexError, ValueError)) as error:
            call()
        messages.append(str(error.value))
    return messages


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, once):
    """The results of each rank of a group of 2 and of 4."""

    def make(folder):
        mp.spawn(worker, args=(f"file://{folder}/rendezvous", str(folder), request.param), nprocs=request.param)

    folder = once(f"vocabulary-{request.param}", make)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


def whole(results):
    """The results of the ranks as one: columns side by side, parts added up, the rest the same on every rank."""
    joined = {}
    for name in results[0]:
        values = [result[name] for result in results]
        if name in ("grad_weight", "grad_bias"):
            joined[name] = torch.cat(values)
        elif name == "part_of_grad_hidden":
            joined["grad_hidden"] = torch.stack(values).sum(0)
        else:
            assert all(torch.equal(value, values[0]) for value in values), name
            joined[name] = values[0]
    return joined


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("fused", [False, True], ids=["logits", "linear"])
def test_ranks_find_what_one_does(ranks, fused, name, dtype):
    got = whole([result[fused, name, dtype] for result in ranks])
    if dtype == "bfloat16":
        expected = run(fused, slice(None), name, DTYPES[dtype])
        tolerance = 0.02
    else:
        function = reference.linear_pdl_loss if fused else reference.pdl_loss
        expected = run(fused, slice(None), name, torch.float64, function=function)
        # The offset of 1000 is a rounding of 6e-5 in float32 logits.
        tolerance = {"float64": 1e-6, "float32": 1e-3 if name == "large_offset" else 2e-5}[dtype]
    assert got.keys() == expected.keys()
    assert torch.equal(got.pop("predicted"), expected.pop("predicted"))
    for key, value in expected.items():
        error = (got[key].double() - value.double()).norm() / value.double().norm()
        assert error < tolerance, f"{key}: {error}"


@pytest.mark.slow
def test_online_counts_once_on_every_rank(ranks):
    expected = online(slice(None))
    for result in ranks:
        torch.testing.assert_close(result["online"]["losses"], expected["losses"])
        assert torch.equal(result["online"]["counts"], expected["counts"])


@pytest.mark.slow
def test_ranks_drop_the_same_weights(ranks):
    weights = ranks[0]["dropped"]
    assert all(torch.equal(result["dropped"], weights) for result in ranks)
    counted = make_inputs(torch.float32)[3] != -100
    assert 0 < (weights[counted] == 1).sum() < counted.sum()


@pytest.mark.slow
def test_every_rank_refuses_what_one_does(ranks):
    for result in ranks:
        linear, logits, table = result["errors"]
        assert (
            linear
            == logits
            == f"targets: got {VOCAB} at position [3], expected 0 <= id < {VOCAB} or ignore_index (-100)"
        )
        assert table == f"token_weight: got shape [7], expected [{VOCAB}], the logits' vocabulary"


@pytest.mark.slow
def test_masked_shards_and_targets(ranks):
    expected = reference.pdl_loss(masked_logits(), MASKED_TARGETS, reduction="none")
    assert expected[1] == 0 < expected[0]
    for result in ranks:
        loss, predicted = result["masked"]
        torch.testing.assert_close(loss[:2], expected[:2])
        # Nothing is left of the third row, and no number may stand for it.
        assert not loss[2].isfinite()
        assert predicted.tolist() == [1, 4, -1]


MASKED_TARGETS = torch.tensor([1, 4, 2])


def masked_logits():
    """Three rows: some ids masked, a whole shard and all but the target, everything."""
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[0, 1] += 3
    logits[0, 2:4] = -torch.inf
    logits[1, :4] = logits[1, 5] = -torch.inf
    logits[2] = -torch.inf
    return logits


def masked(rank, group):
    logits = masked_logits()
    width = 6 // dist.get_world_size(group)
    # The last rank has what is left over.
    part = slice(width * rank, 6 if rank == dist.get_world_size(group) - 1 else width * (rank + 1))
    loss, stats = functional.pdl_loss(
        logits[:, part], MASKED_TARGETS, reduction="none", return_stats=True, process_group=group
    )
    return loss, stats.predicted


class NothingIsRead(TorchDispatchMode):
    """Fails if the host reads a tensor, for which it would wait for a card."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert op not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), op
        return op(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_exchange_is_read():
    def fail(*_):
        raise AssertionError("a tensor is read")

    with pytest.MonkeyPatch.context() as patch:
        # They bypass the dispatcher.
        for name in ("tolist", "cpu", "numpy"):
            patch.setattr(torch.Tensor, name, fail)
        yield


@contextlib.contextmanager
def nothing_is_read():
    with no_exchange_is_read(), NothingIsRead():
        yield


@contextlib.contextmanager
def capture():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        yield


# Of rows in another number of slabs, for which the first rank's width tells nothing.
FIRST, SMALLER = [20, 81], [20, 60]
WAYS = [
    (fused, {"reduction": reduction, "ignore_index": ignore_index, "token_weight": table})
    for fused in (False, True)
    for reduction in ("mean", "none")
    for ignore_index in (-100, -1)
    for table in (False, True)
]


def step(fused, options, widths, rank=None, group=None, seed=0, other_target=0):
    """Loss, nll and gradients of what a seed makes; of the classifier, those of this rank's columns."""
    hidden, weight, bias, targets, token_weight, row_weight = make_inputs(torch.float32)
    ignored = targets == -100
    targets = (targets + seed) % 60
    targets[1] = (targets[1] + other_target) % 60
    options = {**options, "process_group": group, "row_weight": row_weight.requires_grad_(), "return_stats": True}
    targets[ignored] = options.get("ignore_index", -100)
    token_weight = token_weight[: sum(widths)] if options.pop("token_weight", False) else None
    part = slice(0, sum(widths)) if rank is None else slice(sum(widths[:rank]), sum(widths[: rank + 1]))
    hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    if fused:
        limit = 8 * 128 * 4
        loss, stats = functional.linear_pdl_loss(
            hidden, weight[part], targets, token_weight, bias=bias[part], max_chunk_bytes=limit, **options
        )
    else:
        loss, stats = functional.pdl_loss(F.linear(hidden, weight[part], bias[part]), targets, token_weight, **options)
    loss.backward(upstream_of(loss))
    return [loss.detach(), stats.nll, weight.grad[part], bias.grad[part], row_weight.grad, hidden.grad]


def are_nan(results):
    return all(bool(result.isnan().all()) for result in results)


def message_of(error, function, *arguments, **options):
    with pytest.raises(error) as raised:
        function(*arguments, **options)
    return str(raised.value)


def card_worker(rank, init, folder):
    """Ranks whose tensors must not be waited for, as on a card."""
    uninitialized.fill()
    torch.set_num_threads(1)
    linear._LEAST_ROWS = 8
    vocabulary._is_host = lambda device: False
    # On a card nothing checks ids, and few rows are not worth waiting for their number.
    LossCall._check_ids = lambda self: None
    LinearLossCall._check_ids = lambda self: None
    linear._kept_rows = lambda *_: None
    torch.cuda.is_current_stream_capturing = lambda: False
    found = {}
    # Two groups after each other, of the same name.
    for name, use in (("first", first_group), ("second", second_group)):
        dist.init_process_group("gloo", init_method=f"{init}_{name}", rank=rank, world_size=2)
        try:
            found[name] = {"name": dist.group.WORLD.group_name, **use(rank, dist.group.WORLD)}
            dist.barrier()
        finally:
            dist.destroy_process_group()
    torch.save(found, f"{folder}/{rank}.pt")


def first_group(rank, group):
    plain = WAYS[0][1]
    given = (False, plain, FIRST, rank, group)
    found = {"other targets": message_of(ValueError, step, *given, other_target=rank)}
    with capture():
        found["captured"] = message_of(RuntimeError, step, *given)
    with torch.inference_mode():
        functional.pdl_loss(torch.zeros(2, FIRST[rank]), torch.zeros(2, dtype=torch.int64), process_group=group)
    # The widths tell the size that a table has.
    with capture(), nothing_is_read():
        found["steps"] = [[step(*way, FIRST, rank, group, seed) for seed in range(2)] for way in WAYS]
        others = [step(*way, FIRST, rank, group, other_target=rank) for way in WAYS]
        found["after"] = step(*given)
    assert all(map(are_nan, others))
    # The first rank knows its width, and the other one does not.
    for way in WAYS:
        with nothing_is_read() if rank == 0 and not way[1]["token_weight"] else contextlib.nullcontext():
            results = step(*way, SMALLER, rank, group)
        # A table's size tells it.
        assert bool(results[0].isfinite().all()) if way[1]["token_weight"] else are_nan(results)
    with nothing_is_read():
        weighted = {**plain, "token_weight": True}
        found["smaller"] = step(False, weighted, SMALLER, rank, group)
        found["larger"] = step(*given)
    return found


def second_group(rank, group):
    found = {"smaller": step(*WAYS[0], SMALLER, rank, group)}
    with nothing_is_read():
        found["again"] = step(*WAYS[0], SMALLER, rank, group)
    found["online"] = online_after_one_call(rank, group)
    compiled = torch.compile(step, backend="aot_eager")
    with no_exchange_is_read():
        found["compiled"] = compiled(*WAYS[0], SMALLER, rank, group)
        assert are_nan(compiled(*WAYS[0], SMALLER, rank, group, other_target=rank))
    found["hidden"] = with_other_hidden_states(rank)
    return found


def online_after_one_call(rank, group):
    """Losses of a module that learns the vocabulary's size in its first call."""
    loss_fn, logits, targets = PDLLoss(), torch.zeros(3, [7, 5][rank]), torch.arange(3)
    losses = [loss_fn(logits, targets, process_group=group)]
    with no_exchange_is_read():
        losses.append(loss_fn(logits, targets, process_group=group))
    return torch.stack(losses)


def with_other_hidden_states(rank):
    """Losses of a DTensor's rows: of the same hidden states, and of others."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    hidden, weight, _, targets, *_ = make_inputs(torch.float32)
    cut = distribute_tensor(weight, init_device_mesh("cpu", (2,)), [Shard(0)])
    losses = [functional.linear_pdl_loss(hidden, cut, targets)]
    with no_exchange_is_read():
        losses.append(functional.linear_pdl_loss(hidden, cut, targets))
        losses.append(functional.linear_pdl_loss(hidden + rank, cut, targets))
    return torch.stack(losses)


@pytest.fixture(scope="module")
def cards(once):
    def make(folder):
        mp.spawn(card_worker, args=(f"file://{folder}/rendezvous", str(folder)), nprocs=2)

    folder = once("cards", make)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def assert_step(results, *given, **options):
    """Asserts that the ranks' results are those of one rank."""
    expected = step(*given, **options)
    loss, nll, _, _, of_row_weight, of_hidden = range(6)
    for index, value in enumerate(expected):
        values = [result[index] for result in results]
        if index in (loss, nll, of_row_weight) or (index == of_hidden and given[0]):
            assert torch.equal(*values)
            got = values[0]
        else:
            got = sum(values) if index == of_hidden else torch.cat(values)
        assert value.any()
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_card_is_waited_for_in_the_first_call_only(cards):
    first, second = ([rank[name] for rank in cards] for name in ("first", "second"))
    for index, way in enumerate(WAYS):
        for seed in range(2):
            assert_step([rank["steps"][index][seed] for rank in first], *way, FIRST, seed=seed)
    assert_step([rank["after"] for rank in first], *WAYS[0], FIRST)
    assert_step([rank["larger"] for rank in first], *WAYS[0], FIRST)
    for name in ("smaller", "again", "compiled"):
        assert_step([rank[name] for rank in second], *WAYS[0], SMALLER)
    weighted = {**WAYS[0][1], "token_weight": True}
    assert_step([rank["smaller"] for rank in first], False, weighted, SMALLER)
    assert cards[0]["first"]["name"] == cards[0]["second"]["name"]
    for rank in second:
        assert rank["online"].isfinite().all()
        assert rank["hidden"].isnan().tolist() == [False, False, True]


@pytest.mark.slow
def test_what_a_first_call_on_a_card_refuses(cards):
    for rank, width in zip(cards, FIRST, strict=True):
        assert "targets: got others than another rank has" in rank["first"]["other targets"]
        assert f"process_group: got a first call with {width} columns under the capture" in rank["first"]["captured"]
