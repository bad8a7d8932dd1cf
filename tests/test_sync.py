"""TokenFrequency.sync and PDLLoss(sync_every=) over three gloo processes, against one that sees all batches."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import uninitialized
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pdl_ext import PDLLoss, TokenFrequency, functional

VOCAB, RANKS, ROWS, STEPS = 23, 3, 40, 6
NAMES = ("counts", "ignored", "out_of_range", "seen")
# broadcast_buffers, sync_every, options of the loss
MODELS = {
    "each step": (True, 1, {"vocab_size": VOCAB}),
    "each second step": (True, 2, {}),
    "each third step": (True, 3, {"vocab_size": VOCAB}),
    "no_broadcast": (False, 2, {"vocab_size": VOCAB}),
    "alone": (True, None, {"vocab_size": VOCAB}),
    "alone_no_broadcast": (False, None, {"vocab_size": VOCAB}),
}

needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="PyTorch without gloo")


def tokens_of(rank, step, low=-2):
    """A batch, with ids out of range (not for targets: low=0) and ignored ones."""
    generator = torch.Generator().manual_seed(100 * rank + step)
    tokens = torch.randint(low, VOCAB + (2 if low else 0), (ROWS + 7 * rank,), generator=generator)
    tokens[: 3 + rank] = -100
    return tokens


def counted(*batches, counts=None):
    """The counts of one process that sees all batches."""
    frequency = TokenFrequency(VOCAB) if counts is None else TokenFrequency.from_counts(counts)
    for batch in batches:
        frequency.update(batch)
    return values_of(frequency)


def values_of(frequency):
    return [*frequency.counts.tolist(), int(frequency.ignored), int(frequency.out_of_range), int(frequency.seen)]


def corpus_counts():
    # Past the whole numbers of float64.
    return 2**54 // torch.arange(1, VOCAB + 1) + 1


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, 4)
        self.head = nn.Linear(4, VOCAB)
        self.loss = PDLLoss(alpha=0.5, **options)

    def forward(self, targets):
        hidden = self.embedding(targets.clamp(min=0))
        return self.loss(self.head(hidden), targets)


def weights_of(loss):
    """The weight of every id that the loss uses."""
    loss.eval()
    _, stats = loss(torch.zeros(VOCAB, VOCAB), torch.arange(VOCAB), return_stats=True)
    loss.train()
    return stats.weight.tolist()


def train(model, rank, steps):
    seen = []
    for step in steps:
        model(tokens_of(rank, step, low=0)).backward()
        loss = model.module.loss
        seen.append((values_of(loss.frequency), weights_of(loss)))
    return seen


def manual_syncs(rank, results):
    calls = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (calls.append(args[0].numel()), all_reduce(*args, **kwargs))[1]
    frequency = TokenFrequency(VOCAB)
    # As many updates as the rank's number, so that the first has none; then the other way round.
    for step in range(rank):
        frequency.update(tokens_of(rank, step))
    frequency.sync()
    results["first"] = values_of(frequency)
    for step in range(rank, 2):
        frequency.update(tokens_of(rank, step))
    results["between"] = values_of(frequency)
    frequency.sync()
    results["second"] = values_of(frequency)
    frequency.sync()
    frequency.sync()
    results["idle"] = values_of(frequency)
    dist.all_reduce = all_reduce
    results["calls"] = calls


def kinds_of_update(rank, results):
    frequency = TokenFrequency.from_counts(corpus_counts())
    frequency.update(tokens_of(rank, 0))
    frequency.update(tokens_of(rank, 1).numpy())
    frequency.update(tokens_of(rank, 2, low=0), strict=True)
    other = TokenFrequency(VOCAB)
    other.update(tokens_of(rank, 3))
    frequency.merge(other)
    try:
        frequency.update(torch.tensor([1, VOCAB]), strict=True)
    except IndexError as error:
        results["strict"] = str(error)
    frequency.sync()
    results["kinds"] = values_of(frequency)


def loaded(rank, folder, results):
    before = TokenFrequency.from_counts(corpus_counts())
    if rank == 0:
        before.save(f"{folder}/counts.safetensors")
    dist.barrier()
    from_file, from_state = TokenFrequency.load(f"{folder}/counts.safetensors"), TokenFrequency(VOCAB)
    from_state.update(tokens_of(rank, 5))
    # What is loaded replaces what was counted.
    from_state.load_state_dict(before.state_dict())
    for name, frequency in (("file", from_file), ("state", from_state)):
        frequency.update(tokens_of(rank, 0))
        frequency.sync()
        results[f"loaded from {name}"] = values_of(frequency)


def copies(rank, results):
    frequency = TokenFrequency(VOCAB)
    frequency.update(tokens_of(rank, 0))
    frequency.sync()
    with torch.inference_mode():
        frequency.update(tokens_of(rank, 1))
    frequency.update(tokens_of(rank, 2))
    for name, copied in (("deepcopy", copy.deepcopy(frequency)), ("pickle", pickle.loads(pickle.dumps(frequency)))):
        copied.sync()
        results[name] = values_of(copied)
    frequency.half().sync()
    results["half"] = values_of(frequency)


def sync_after_all_reduce(rank, results):
    frequency = TokenFrequency.from_counts(corpus_counts())
    frequency.update(tokens_of(rank, 0))
    frequency.all_reduce()
    results["all_reduce"] = values_of(frequency)
    frequency.update(tokens_of(rank, 1))
    frequency.sync()
    results["sync after all_reduce"] = values_of(frequency)


def groups(rank, results):
    pair = dist.new_group([1, 2])
    frequency = TokenFrequency(VOCAB)
    frequency.update(tokens_of(rank, 0))
    try:
        for step in (1, 2):
            frequency.sync(pair)
            frequency.update(tokens_of(rank, step))
        frequency.sync(pair)
    except TypeError as error:
        results["outside"] = str(error)
    results["pair"] = values_of(frequency)

    other = TokenFrequency(VOCAB + (rank == 2))
    other.update(torch.tensor([rank]))
    messages = []
    for _ in range(2):
        try:
            other.sync()
        except ValueError as error:
            messages.append(str(error))
    results["vocabularies"] = messages, values_of(other)


def first_weights(rank, results):
    targets = tokens_of(rank, 0, low=0)
    _, stats = PDLLoss(alpha=0.5, sync_every=1)(torch.zeros(len(targets), VOCAB), targets, return_stats=True)
    results["first weights"] = stats.weight


# In a function: a process group that DistributedDataParallel is the last to release can hang at its end.
def models(rank, results):
    for name, (broadcast, every, options) in MODELS.items():
        model = DistributedDataParallel(Model(sync_every=every, **options), broadcast_buffers=broadcast)
        results[name] = train(model, rank, range(STEPS))


def resumed(rank, folder, results):
    def wrapped(device="cpu"):
        with torch.device(device):
            model = Model(vocab_size=VOCAB, sync_every=2)
        return model

    first = wrapped()
    train(DistributedDataParallel(first), rank, range(3))
    first.loss.frequency.sync()
    if rank == 0:
        torch.save(first.state_dict(), f"{folder}/after.pt")
    train(DistributedDataParallel(first), rank, [3, 4])
    if rank == 0:
        torch.save(first.state_dict(), f"{folder}/between.pt")
    dist.barrier()
    for name, device in (("after", "meta"), ("between", "cpu")):
        second = wrapped(device)
        if device == "meta":
            second.to_empty(device="cpu")
        second.load_state_dict(torch.load(f"{folder}/{name}.pt"))
        results[f"saved {name}"] = values_of(second.loss.frequency)
        results[f"resumed {name}"] = train(DistributedDataParallel(second), rank, [4, 5])
    # Only the first rank loads, and DDP broadcasts that when it is made.
    third = wrapped()
    if rank == 0:
        third.load_state_dict(torch.load(f"{folder}/after.pt"))
    results["resumed by rank 0"] = train(DistributedDataParallel(third), rank, [4, 5])


def worker(rank, init, folder):
    uninitialized.fill()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=RANKS)
    try:
        results = {}
        manual_syncs(rank, results)
        kinds_of_update(rank, results)
        loaded(rank, folder, results)
        copies(rank, results)
        sync_after_all_reduce(rank, results)
        groups(rank, results)
        first_weights(rank, results)
        models(rank, results)
        resumed(rank, folder, results)
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(once):
    def make(folder):
        mp.spawn(worker, args=(f"file://{folder}/rendezvous", str(folder)), nprocs=RANKS)

    folder = once("sync", make)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def batches_of(ranks_and_steps, low=-2):
    return [tokens_of(rank, step, low) for rank, step in ranks_and_steps]


def of_all_ranks(*steps):
    return [(rank, step) for rank in range(RANKS) for step in steps]


def global_counts(steps, counts=None):
    return counted(*batches_of(of_all_ranks(*steps), low=0), counts=counts)


@pytest.mark.slow
@needs_gloo
class TestFrequency:
    def test_ranks_with_different_numbers_of_updates(self, ranks):
        first = counted(*batches_of((rank, step) for rank in range(RANKS) for step in range(rank)))
        second = counted(*batches_of(of_all_ranks(0, 1)))
        assert [result["first"] for result in ranks] == [first] * RANKS
        assert [result["second"] for result in ranks] == [second] * RANKS
        assert sum(second[:-1]) == second[-1] == sum(2 * len(tokens_of(rank, 0)) for rank in range(RANKS))
        # The last rank had nothing more to count, and none saw yet what another did.
        assert ranks[2]["between"] == first
        assert len({tuple(result["between"]) for result in ranks}) == RANKS

    def test_sync_without_updates_changes_nothing(self, ranks):
        for result in ranks:
            assert result["idle"] == result["second"]

    def test_vocabularies_are_compared_once(self, ranks):
        for result in ranks:
            assert result["calls"] == [4, *[VOCAB + 3] * 4]

    def test_every_kind_of_update(self, ranks):
        expected = counted(
            *batches_of(of_all_ranks(0, 1, 3)), *batches_of(of_all_ranks(2), low=0), counts=corpus_counts()
        )
        for result in ranks:
            assert result["kinds"] == expected
            assert result["strict"].startswith(f"tokens: got {VOCAB} at flattened position 1, expected")

    def test_loaded_counts_are_counted_once(self, ranks):
        expected = counted(*batches_of(of_all_ranks(0)), counts=corpus_counts())
        for result in ranks:
            assert result["loaded from file"] == expected
            assert result["loaded from state"] == expected

    @pytest.mark.parametrize("name", ["deepcopy", "pickle", "half"])
    def test_copies_know_what_is_their_own(self, ranks, name):
        expected = counted(*batches_of(of_all_ranks(0, 1, 2)))
        assert [result[name] for result in ranks] == [expected] * RANKS

    def test_sync_goes_on_from_all_reduce(self, ranks):
        counts = RANKS * corpus_counts()
        for result in ranks:
            assert result["all_reduce"] == counted(*batches_of(of_all_ranks(0)), counts=counts)
            assert result["sync after all_reduce"] == counted(*batches_of(of_all_ranks(0, 1)), counts=counts)

    def test_group(self, ranks):
        expected = counted(*batches_of((rank, step) for rank in (1, 2) for step in range(3)))
        assert [result["pair"] for result in ranks[1:]] == [expected] * 2
        assert ranks[0]["pair"] == counted(tokens_of(0, 0))
        assert ranks[0]["outside"].startswith("group: got ")
        assert ranks[0]["outside"].endswith("expected a ProcessGroup that this rank is in, or None")

    def test_different_vocabularies(self, ranks):
        message = f"vocab_size: got {VOCAB} to {VOCAB + 1} over the ranks, expected the same on all"
        for rank, result in enumerate(ranks):
            messages, values = result["vocabularies"]
            assert messages == [message] * 2
            assert values.index(1) == rank
            assert sum(values[:-1]) == values[-1] == 1

    def test_without_a_process_group_it_does_nothing(self):
        frequency = TokenFrequency(VOCAB)
        frequency.update(tokens_of(0, 0))
        frequency.sync()
        assert values_of(frequency) == counted(tokens_of(0, 0))

    def test_no_process_group(self):
        for call in (TokenFrequency(VOCAB).sync, TokenFrequency(VOCAB).all_reduce):
            with pytest.raises(
                TypeError, match="group: got str, expected a ProcessGroup that this rank is in, or None"
            ):
                call("ranks")

    def test_nothing_of_it_is_in_the_state(self):
        frequency = TokenFrequency.from_counts(corpus_counts())
        frequency.update(tokens_of(0, 0))
        assert list(frequency.state_dict()) == list(NAMES)
        assert [name for name, _ in frequency.named_buffers()] == list(NAMES)


@pytest.mark.slow
@needs_gloo
class TestLoss:
    @pytest.mark.parametrize("name", [name for name, (_, every, _) in MODELS.items() if every])
    def test_part_of_a_distributed_model(self, ranks, name):
        every = MODELS[name][1]
        for done in range(every, STEPS + 1, every):
            seen = [result[name][done - 1] for result in ranks]
            expected = global_counts(range(done))
            assert [values for values, _ in seen] == [expected] * RANKS, f"after {done} steps"
            weighting = PDLLoss(alpha=0.5).weighting
            weights = functional.token_weights(torch.tensor(expected[:VOCAB]), weighting).tolist()
            assert [weights_of_rank for _, weights_of_rank in seen] == [weights] * RANKS

    def test_a_call_weighs_by_what_it_has_synced(self, ranks):
        counts = torch.tensor(global_counts([0])[:VOCAB])
        weights = functional.token_weights(counts, PDLLoss(alpha=0.5).weighting)
        for rank, result in enumerate(ranks):
            targets = tokens_of(rank, 0, low=0)
            expected = torch.where(targets == -100, 0.0, weights[targets.clamp(min=0)])
            assert torch.equal(result["first weights"], expected)

    @pytest.mark.parametrize("name", ["each third step", "no_broadcast"])
    def test_between_two_syncs_ranks_count_for_themselves(self, ranks, name):
        assert ranks[0][name][0][0] == counted(tokens_of(0, 0, low=0))
        assert len({tuple(result[name][0][0]) for result in ranks}) == RANKS

    def test_without_sync_every_counts_are_not_those_of_all(self, ranks):
        for name in ("alone", "alone_no_broadcast"):
            assert all(result[name][-1][0] != global_counts(range(STEPS)) for result in ranks)

    def test_saved_after_a_sync(self, ranks):
        for result in ranks:
            assert result["saved after"] == global_counts(range(3))
            # Two calls after loading, wherever the count of calls stood before.
            assert result["resumed after"][0][0] != global_counts([0, 1, 2, 4])
            assert result["resumed after"][1][0] == global_counts([0, 1, 2, 4, 5])

    def test_rank_0_loads_for_all(self, ranks):
        for result in ranks:
            assert result["resumed by rank 0"][1][0] == global_counts([0, 1, 2, 4, 5])

    def test_saved_between_two_syncs(self, ranks):
        # The state of rank 0 has what that rank has counted, and restores exactly; nothing of it is counted twice.
        saved = counted(*batches_of(of_all_ranks(0, 1, 2, 3), low=0), tokens_of(0, 4, low=0))
        expected = counted(*batches_of(of_all_ranks(0, 1, 2, 3, 4, 5), low=0), tokens_of(0, 4, low=0))
        for result in ranks:
            assert result["saved between"] == saved
            assert result["resumed between"][1][0] == expected


def test_one_process_trains_as_without():
    synced, alone = PDLLoss(sync_every=2), PDLLoss()
    for seed in range(4):
        logits = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(seed))
        targets = tokens_of(0, seed, low=0)
        assert torch.equal(synced(logits, targets), alone(logits, targets))
    assert values_of(synced.frequency) == values_of(alone.frequency)


def test_training_calls_are_counted(monkeypatch):
    totals = []
    monkeypatch.setattr(TokenFrequency, "sync", lambda frequency: totals.append(frequency.total))
    loss_fn = PDLLoss(vocab_size=5, sync_every=3)
    hidden, head, targets = torch.randn(4, 2), torch.randn(5, 2), torch.tensor([0, 1, 1, 4])
    for _ in range(2):
        loss_fn(hidden @ head.T, targets)
        loss_fn.eval()(hidden @ head.T, targets)
        loss_fn.train().linear(hidden, head, targets)
        with pytest.raises(IndexError):
            loss_fn(hidden @ head.T, targets + 1)
        loss_fn(hidden @ head.T, targets)
    # After the third call's targets are counted.
    assert totals == [12, 24]
    loss_fn(hidden @ head.T, targets)
    loss_fn.load_state_dict(loss_fn.state_dict())
    for _ in range(2):
        loss_fn(hidden @ head.T, targets)
    assert len(totals) == 2
    loss_fn(hidden @ head.T, targets)
    assert len(totals) == 3


@pytest.mark.slow
def test_compiled_loss_leaves_the_graph(monkeypatch):
    totals = []
    monkeypatch.setattr(TokenFrequency, "sync", lambda frequency: totals.append(frequency.total))
    torch._dynamo.reset()
    eager, wrapped = (PDLLoss(vocab_size=VOCAB, sync_every=2) for _ in range(2))
    compiled = torch.compile(wrapped, backend="aot_eager")
    for seed in range(4):
        logits = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(seed))
        targets = tokens_of(0, seed, low=0)
        torch.testing.assert_close(compiled(logits, targets), eager(logits, targets), rtol=1e-6, atol=0)
    assert totals == [74, 74, 148, 148]
    assert torch.equal(wrapped.frequency._own, eager.frequency._own)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(wrapped, backend="aot_eager", fullgraph=True)(logits, targets)


class TestWarning:
    """An online loss on several ranks that each count for themselves warns, once."""

    @pytest.fixture(autouse=True)
    def four_ranks(self, monkeypatch):
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda group=None: 4)
        monkeypatch.setattr(dist, "get_rank", lambda group=None: 0)

    def call(self, loss):
        for _ in range(2):
            loss(torch.zeros(3, VOCAB), torch.arange(3))

    def test_once(self):
        with pytest.warns(UserWarning, match=r"online on 4 ranks.*sync_every=k.*count ahead.*for itself") as caught:
            self.call(PDLLoss(vocab_size=VOCAB))
        assert len(caught) == 1
        assert caught[0].filename == __file__

    def test_traced(self):
        torch._dynamo.reset()
        with pytest.warns(UserWarning, match="online on 4 ranks"):
            self.call(torch.compile(PDLLoss(vocab_size=VOCAB), backend="eager", fullgraph=True))

    @pytest.mark.parametrize("silent", ["eval", "given", "synced", "rank", "alone"])
    def test_not(self, silent, monkeypatch):
        loss = PDLLoss(torch.ones(VOCAB, dtype=torch.int64)) if silent == "given" else PDLLoss(vocab_size=VOCAB)
        if silent == "eval":
            loss.eval()
        elif silent == "synced":
            loss.sync_every = 5
        elif silent == "rank":
            monkeypatch.setattr(dist, "get_rank", lambda group=None: 1)
        elif silent == "alone":
            monkeypatch.setattr(dist, "get_world_size", lambda group=None: 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.call(loss)


@pytest.mark.parametrize("sync_every", [0, -1, 2.0, True, "2"])
def test_sync_every_out_of_range(sync_every):
    with pytest.raises(ValueError, match=r"sync_every: got .*, expected None or an int from 1 to 2\^31 - 1"):
        PDLLoss(sync_every=sync_every)


def test_sync_every_of_a_given_frequency():
    with pytest.raises(ValueError, match="sync_every: got 2 with a given frequency, expected None"):
        PDLLoss(torch.ones(3, dtype=torch.int64), sync_every=2)


def test_vocabulary_parallel(tmp_path):
    loss_fn = PDLLoss(vocab_size=5, sync_every=1)
    hidden, head, targets = torch.randn(4, 2), torch.randn(5, 2), torch.tensor([0, 1, 1, 4])
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        for call in (
            lambda group: loss_fn(hidden @ head.T, targets, process_group=group),
            lambda group: loss_fn.linear(hidden, head, targets, process_group=group),
        ):
            with pytest.raises(ValueError, match="process_group: got one with sync_every, expected either"):
                call(dist.group.WORLD)
    finally:
        dist.destroy_process_group()
    assert loss_fn.frequency.tokens_seen == 0


def test_all_reduce_without_a_process_group_changes_nothing():
    frequency = TokenFrequency(3)
    frequency.update(torch.tensor([0, 2, 2]))
    frequency.all_reduce()
    assert frequency.counts.tolist() == [1, 0, 2]
    with pytest.raises(TypeError, match="group: got object, expected a ProcessGroup"):
        frequency.all_reduce(object())
