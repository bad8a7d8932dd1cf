"""The fused linear under FSDP2 on two gloo processes with different data, against one process that has both.

Each way that the error for a DTensor names gives the gradients of all parameters.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import uninitialized
from torch import nn

from pdl_ext import PDLLoss

pytestmark = pytest.mark.slow

VOCAB, WIDTH, RANKS, ROWS = 37, 8, 2, 24

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("PyTorch without gloo", allow_module_level=True)


def gathered_with_the_model(head):
    return head.weight


def unsharded(head):
    head.unshard()
    return head.weight


def averaged(head):
    from torch.distributed.tensor import Partial

    return head.weight.full_tensor(grad_placements=[Partial("avg")])


# Whether the classifier is a fully_shard unit of its own, and how its weight is handed over then.
WAYS = {
    "with the model": (False, gathered_with_the_model),
    "unshard": (True, unsharded),
    "full_tensor": (True, averaged),
}


class Model(nn.Module):
    def __init__(self, weight_of):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.loss = PDLLoss(torch.arange(VOCAB), alpha=0.5, reduction="token_mean")
        self.weight_of = weight_of

    def forward(self, inputs, targets):
        hidden = torch.tanh(self.body(self.embedding(inputs)))
        return self.loss.linear(hidden, self.weight_of(self.lm_head), targets)


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCAB, (2, ROWS), generator=generator)


def sharded_gradients(rank, way):
    from torch.distributed.fsdp import fully_shard

    own_unit, weight_of = WAYS[way]
    model = Model(weight_of)
    if own_unit:
        fully_shard(model.lm_head)
    fully_shard(model)
    inputs, targets = batch()
    part = slice(rank * ROWS // RANKS, (rank + 1) * ROWS // RANKS)
    model(inputs[part], targets[part]).backward()
    return {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}


def worker(rank, init, folder):
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=RANKS)
    try:
        results = {way: sharded_gradients(rank, way) for way in WAYS}
        results["memory is NaN"] = uninitialized.is_filled()
        model = Model(gathered_with_the_model)
        torch.distributed.fsdp.fully_shard(model.lm_head)
        torch.distributed.fsdp.fully_shard(model)
        # The classifier looks like one of tensor parallelism, whose ranks have the same rows.
        inputs, targets = batch()
        others = inputs.flip(0) if rank else inputs
        half = slice(rank * ROWS // RANKS, (rank + 1) * ROWS // RANKS)
        for case, rows in {"targets": (inputs[half], targets[half]), "hidden": (others, targets)}.items():
            with pytest.raises(ValueError, match=f"{case}: got others than another rank has") as error:
                model(*rows)
            results[case] = str(error.value)
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(once):
    def make(folder):
        mp.spawn(worker, args=(f"file://{folder}/rendezvous", str(folder)), nprocs=RANKS)

    folder = once("fsdp", make)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_one_process(ranks, way):
    single = Model(gathered_with_the_model)
    single(*batch()).backward()
    for rank in ranks:
        assert rank["memory is NaN"]
        for name, parameter in single.named_parameters():
            assert parameter.grad.any()
            torch.testing.assert_close(rank[way][name], parameter.grad, rtol=1e-5, atol=1e-7)


def test_a_sharded_classifier_is_refused_with_what_to_do(ranks):
    for rank, case in itertools.product(ranks, ("targets", "hidden")):
        for way in ("lm_head.unshard()", 'full_tensor(grad_placements=[Partial("avg")])', "in the model's forward"):
            assert way in rank[case]
