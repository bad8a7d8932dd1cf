"""Two gloo processes against one: summed counts, a training run under DDP, and buffers that DDP broadcasts."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import uninitialized
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pdl_ext import PDLLoss, TokenFrequency
from pdl_ext.provenance import Provenance, Shard, TargetPolicy

pytestmark = pytest.mark.slow

VOCAB, WIDTH, RANKS, STEPS = 37, 8, 2, 3

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("PyTorch without gloo", allow_module_level=True)


class ModelWithLoss(nn.Module):
    """The loss is a submodule, so that DDP broadcasts its counts."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.loss = PDLLoss(corpus_counts(), alpha=0.7, **options)

    def forward(self, inputs, targets, normalizer=None):
        return self.loss(self.head(self.embedding(inputs)), targets, normalizer=normalizer)


def corpus_counts():
    # Past the whole numbers of float32 and past int32.
    return 2**33 // torch.arange(1, VOCAB + 1) + 1


def batches():
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randint(VOCAB, (STEPS, 24), generator=generator)
    targets = torch.randint(VOCAB, (STEPS, 24), generator=generator)
    # Ranks with different numbers of rows, and in the last step one with nothing to learn.
    targets[:, 2:7] = -100
    targets[-1, :12] = -100
    return inputs, targets


def sum_of_weights(loss, targets):
    return loss.weighting.weights(loss.frequency)[targets[targets != -100]].sum()


def train(model, loss, part, normalizer_of):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for inputs, targets in zip(*batches(), strict=True):
        inputs, targets = inputs[part], targets[part]
        value = model(inputs, targets, normalizer=normalizer_of(loss, targets))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def reduced_over_ranks(quantity):
    # DDP averages gradients over ranks, so each rank divides by the mean of the ranks' quantities.
    def normalizer(loss, targets):
        total = quantity(loss, targets)
        dist.all_reduce(total)
        return total / RANKS

    return normalizer


def row_count(loss, targets):
    return (targets != -100).sum().float()


# In a function: a process group that DistributedDataParallel is the last to release can hang at its end.
def train_under_ddp(rank, reduction, quantity, training=True):
    model = ModelWithLoss(reduction=reduction)
    # In eval mode the gradient is left to backward.
    model.loss.train(training)
    if rank == 1:
        # Rank 0's broadcast must arrive completely.
        model.loss.frequency.counts.zero_()
        model.loss.refresh()
    wrapped = DistributedDataParallel(model)
    model.loss.refresh()
    losses = train(wrapped, model.loss, slice(12 * rank, 12 * (rank + 1)), reduced_over_ranks(quantity))
    return {"losses": losses, "state": {name: value.clone() for name, value in model.state_dict().items()}}


def worker(rank, init, folder):
    uninitialized.fill()
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=RANKS)
    try:
        quantities = {"mean": sum_of_weights, "token_mean": row_count}
        results = {reduction: train_under_ddp(rank, reduction, quantity) for reduction, quantity in quantities.items()}
        results["two_calls"] = train_under_ddp(rank, "mean", sum_of_weights, training=False)
        count(rank, results)
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def count(rank, results):
    frequency = TokenFrequency(VOCAB)
    frequency.update(tokens_of_rank(rank))
    frequency.counts[0] += 2**40
    frequency.all_reduce()
    results["counted"] = frequency.state_dict()
    try:
        TokenFrequency(VOCAB + rank).all_reduce()
    except ValueError as error:
        results["error"] = str(error)
    results["provenances"] = provenances(rank)


def provenances(rank):
    """After all_reduce: where each rank has a shard of its own, the last one alone, both the same."""
    shards = [Shard(name, 1024, name * 32, "raw", "uint16") for name in "ab"]
    results = []
    for shard in (shards[rank], shards[1] if rank == RANKS - 1 else None, shards[0]):
        frequency = TokenFrequency(VOCAB)
        frequency.update(torch.arange(10))
        frequency.provenance = shard and Provenance((shard,), 10, TargetPolicy(), None, "0")
        try:
            frequency.all_reduce()
        except ValueError as error:
            results.append((str(error), frequency.tokens_seen))
            frequency.all_reduce(allow_overlap=True)
        results.append((frequency.provenance.tokens, [one.name for one in frequency.provenance.shards]))
    return results


def tokens_of_rank(rank):
    return torch.randint(-1, VOCAB + 2, (500 + rank,), generator=torch.Generator().manual_seed(rank))


@pytest.fixture(scope="module")
def results(once):
    def make(folder):
        mp.spawn(worker, args=(f"file://{folder}/rendezvous", str(folder)), nprocs=RANKS)

    folder = once("distributed", make)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def test_ddp_equals_one_process_on_the_joined_batch(results):
    for reduction, quantity in (("mean", sum_of_weights), ("token_mean", row_count)):
        single = ModelWithLoss(reduction=reduction)
        before = {name: value.clone() for name, value in single.state_dict().items()}
        losses = train(single, single.loss, slice(None), quantity)
        ranks = [result[reduction] for result in results]
        joined = torch.tensor([rank["losses"] for rank in ranks]).mean(0)
        torch.testing.assert_close(joined, torch.tensor(losses), rtol=1e-5, atol=0)
        for name, value in single.state_dict().items():
            for rank in ranks:
                torch.testing.assert_close(rank["state"][name], value, rtol=1e-4, atol=1e-6)
        assert not torch.equal(before["head.weight"], single.head.weight)
        for rank in ranks:
            assert rank["state"]["loss.frequency.counts"].dtype == torch.int64
            assert torch.equal(rank["state"]["loss.frequency.counts"], corpus_counts())


def test_ddp_takes_the_same_gradient_from_one_call_as_from_two(results):
    for result in results:
        assert result["two_calls"]["losses"] == result["mean"]["losses"]
        for name, value in result["mean"]["state"].items():
            assert torch.equal(result["two_calls"]["state"][name], value)


def test_all_reduce_equals_merging(results):
    expected = TokenFrequency(VOCAB)
    for rank in range(RANKS):
        expected.update(tokens_of_rank(rank))
        expected.counts[0] += 2**40
    for result in results:
        for name, value in expected.state_dict().items():
            assert torch.equal(result["counted"][name], value)
        assert result["error"] == f"vocab_size: got {VOCAB} to {VOCAB + 1} over the ranks, expected the same on all"
        *of_parts, (message, unchanged), of_same = result["provenances"]
        assert of_parts == [(20, ["a", "b"]), (10, ["b"])]
        assert "rank 1 of the group: a: got the same content as a" in message
        assert unchanged == 10
        assert of_same == (20, ["a", "a"])
