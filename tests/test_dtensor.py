"""DTensors that tensor parallelism shards over the vocabulary: loss and gradients of one process."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import uninitialized
from torch import nn

from pdl_ext import PDLLoss, functional

pytestmark = pytest.mark.slow

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("PyTorch without gloo", allow_module_level=True)

# Uneven over two ranks.
RANKS, BATCH, LENGTH, WIDTH, VOCAB = 2, 3, 8, 6, 37


class Model(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=bias)

    def body(self, inputs):
        return self.norm(self.down(torch.tanh(self.up(self.embedding(inputs)))))


def batch(seed=1):
    ids = torch.randint(VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))
    ids[0, 2] = -100
    return ids.clamp(min=0), ids


def from_hidden_states(model, inputs, targets, loss_fn):
    return loss_fn.linear(model.body(inputs), model.lm_head.weight, targets, bias=model.lm_head.bias)


def from_logits(model, inputs, targets, loss_fn):
    return loss_fn(model.lm_head(model.body(inputs)), targets)


def in_loss_parallel(model, inputs, targets, loss_fn):
    from torch.distributed.tensor.parallel import loss_parallel

    with loss_parallel():
        return from_logits(model, inputs, targets, loss_fn)


def compiled(model, inputs, targets, loss_fn):
    return torch.compile(from_hidden_states, backend="aot_eager")(model, inputs, targets, loss_fn)


def of_given_frequencies():
    return PDLLoss(torch.arange(VOCAB), alpha=0.5, reduction="token_mean", shift=True)


def of_learned_frequencies():
    return PDLLoss(alpha=0.5, shift=True)


# The way, whether activations are sharded over the sequence, whether there is a bias, and the loss.
WAYS = {
    "linear": (from_hidden_states, False, False, of_given_frequencies),
    "linear, sequence parallel": (from_hidden_states, True, False, of_given_frequencies),
    "linear with a bias": (from_hidden_states, False, True, of_given_frequencies),
    "linear, compiled": (compiled, False, False, of_given_frequencies),
    "linear, online": (from_hidden_states, False, False, of_learned_frequencies),
    "logits": (from_logits, False, False, of_given_frequencies),
    "logits, sequence parallel": (from_logits, True, True, of_given_frequencies),
    "logits, loss_parallel": (in_loss_parallel, False, False, of_given_frequencies),
}


def parallel(model, mesh, cut_sequence):
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    of_body = Shard(1) if cut_sequence else Replicate()
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=of_body),
        "up": ColwiseParallel(input_layouts=of_body),
        "down": RowwiseParallel(output_layouts=of_body, use_local_output=not cut_sequence),
        "lm_head": ColwiseParallel(input_layouts=of_body, output_layouts=Shard(-1), use_local_output=False),
    }
    if cut_sequence:
        plan["norm"] = SequenceParallel()
    return parallelize_module(model, mesh, plan)


def gradients(model, way):
    function, _, _, make_loss = WAYS[way]
    inputs, targets = batch()
    loss_fn = make_loss()
    loss = function(model, inputs, targets, loss_fn)
    assert type(loss) is torch.Tensor
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    whole = {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}
    return whole | {"loss": loss.detach(), "counts": loss_fn.frequency.counts}


def refusals(mesh):
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

    torch.manual_seed(0)
    hidden, targets = torch.randn(4, WIDTH), torch.arange(4)
    weight = torch.randn(VOCAB, WIDTH)
    cut = distribute_tensor(weight, mesh, [Shard(0)])
    square = init_device_mesh("cpu", (RANKS, 1))
    calls = {
        "columns": lambda: functional.linear_pdl_loss(hidden, distribute_tensor(weight, mesh, [Shard(1)]), targets),
        "whole": lambda: functional.linear_pdl_loss(hidden, distribute_tensor(weight, mesh, [Replicate()]), targets),
        "two dimensions": lambda: functional.linear_pdl_loss(
            hidden, distribute_tensor(weight, square, [Shard(0), Replicate()]), targets
        ),
        "a group, too": lambda: functional.linear_pdl_loss(hidden, cut, targets, process_group=dist.group.WORLD),
        "rows of logits": lambda: functional.pdl_loss(distribute_tensor(weight, mesh, [Shard(0)]), torch.arange(VOCAB)),
        "hidden alone": lambda: functional.linear_pdl_loss(
            DTensor.from_local(hidden, mesh, [Replicate()]), weight, targets
        ),
        "row_weight": lambda: functional.linear_pdl_loss(
            hidden, cut, targets, row_weight=DTensor.from_local(torch.ones(4), mesh, [Replicate()])
        ),
        "nothing on a rank": lambda: functional.linear_pdl_loss(
            hidden, distribute_tensor(weight[:1], mesh, [Shard(0)]), targets
        ),
        "other targets": lambda: functional.linear_pdl_loss(hidden, cut, targets + dist.get_rank()),
        # Of the same sum, and the same sum of places times ids.
        "moments of targets": lambda: functional.linear_pdl_loss(
            hidden, cut, torch.tensor([[5, 7, 7, 5], [7, 5, 5, 7]][dist.get_rank()])
        ),
        "other hidden states": lambda: functional.linear_pdl_loss(hidden + dist.get_rank(), cut, targets),
        "a whole bias": lambda: functional.linear_pdl_loss(hidden, cut, targets, bias=torch.zeros(VOCAB)),
        "more targets": lambda: functional.linear_pdl_loss(
            torch.zeros(dist.get_rank() + 1, WIDTH), cut, torch.zeros(dist.get_rank() + 1, dtype=torch.int64)
        ),
        "other targets of a group": lambda: functional.linear_pdl_loss(
            hidden, cut.to_local(), targets.flip(0) if dist.get_rank() else targets, process_group=dist.group.WORLD
        ),
        "synced": lambda: PDLLoss(vocab_size=VOCAB, sync_every=1).linear(hidden, cut, targets),
    }
    messages = {}
    for name, call in calls.items():
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        messages[name] = str(error.value)
    return messages


class WithLoss(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.loss_fn = of_given_frequencies()

    def forward(self, inputs, targets):
        return from_hidden_states(self.model, inputs, targets, self.loss_fn)


def two_dimensional(rank, init, folder):
    """Gradients of FSDP2 over tensor parallelism, with data of its own for each pair of ranks."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    uninitialized.fill()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2 * RANKS)
    try:
        mesh = init_device_mesh("cpu", (2, RANKS), mesh_dim_names=("data", "vocabulary"))
        model = WithLoss(parallel(Model(), mesh["vocabulary"], cut_sequence=False))
        fully_shard(model, mesh=mesh["data"])
        model(*batch(mesh["data"].get_local_rank())).backward()
        torch.save({name: grad.full_tensor() for name, grad in gradients_of(model)}, f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def gradients_of(model):
    return [(name, parameter.grad) for name, parameter in model.named_parameters()]


def unevenly_rounded(mesh):
    """The loss of hidden states that the ranks round differently."""
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.manual_seed(0)
    hidden, weight = torch.randn(40, WIDTH), torch.randn(VOCAB, WIDTH)
    rounded = hidden * (1 + 1e-2 * dist.get_rank())
    return functional.linear_pdl_loss(rounded, distribute_tensor(weight, mesh, [Shard(0)]), torch.arange(40) % VOCAB)


def worker(rank, init, folder):
    from torch.distributed.tensor import init_device_mesh

    uninitialized.fill()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=RANKS)
    try:
        mesh = init_device_mesh("cpu", (RANKS,))
        results = {
            way: gradients(parallel(Model(bias), mesh, cut_sequence), way)
            for way, (_, cut_sequence, bias, _) in WAYS.items()
        }
        results["refused"] = refusals(mesh)
        assert unevenly_rounded(mesh).isfinite()
        torch.save(results, f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(once):
    def make(folder):
        mp.spawn(worker, args=(f"file://{folder}/rendezvous", str(folder)), nprocs=RANKS)

    folder = once("dtensor", make)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("way", WAYS)
def test_loss_and_gradients_are_those_of_one_process(ranks, way):
    expected = gradients(Model(WAYS[way][2]), way)
    largest = max(float(value.abs().max()) for value in expected.values() if value.is_floating_point())
    for rank in ranks:
        assert rank[way].keys() == expected.keys()
        for name, value in expected.items():
            assert value.any()
            torch.testing.assert_close(rank[way][name], value, rtol=1e-5, atol=1e-6 * largest, msg=name)


def test_fsdp_over_tensor_parallelism(tmp_path):
    mp.spawn(two_dimensional, args=(f"file://{tmp_path}/rendezvous", str(tmp_path)), nprocs=2 * RANKS)
    model = WithLoss(Model())
    (sum(model(*batch(seed)) for seed in range(2)) / 2).backward()
    for rank in range(2 * RANKS):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, grad in gradients_of(model):
            assert grad.any()
            torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-6, msg=name)


REFUSED = {
    "columns": r"weight: got a DTensor with placements \[Shard\(dim=1\)\], expected .*\[Shard\(0\)\]\. With FSDP2",
    "whole": r"weight: got a DTensor with placements \[Replicate\(\)\]",
    "two dimensions": r"weight: got a DTensor with placements \[Shard\(dim=0\), Replicate\(\)\]",
    "a group, too": "process_group: got one with a DTensor as weight",
    "rows of logits": r"logits: got a DTensor with placements \[Shard\(dim=0\)\], .*\[Shard\(1\)\]\. redistribute",
    "hidden alone": r"hidden: got a DTensor, expected a plain tensor, as full_tensor\(\) gives",
    "row_weight": "row_weight: got a DTensor, expected a plain tensor",
    "nothing on a rank": "weight: got a vocabulary of 1 over 2 ranks",
    "other targets": r"targets: got others than another rank has, .* a DTensor's mesh.*With FSDP2",
    "moments of targets": "targets: got others than another rank has",
    "other hidden states": r"hidden: got others than another rank has, .* a DTensor's mesh.*With FSDP2",
    "a whole bias": r"bias: got shape \[37\], expected \[(19|18)\], this rank's rows of the classifier, or a DTensor",
    "more targets": "targets: got others than another rank has",
    "other targets of a group": "targets: got others than another rank has, .* process group",
    "synced": "process_group: got one with sync_every",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_cut_over_the_vocabulary_is_refused_on_every_rank(ranks, case):
    for rank in ranks:
        assert re.search(REFUSED[case], rank["refused"][case]), rank["refused"][case]
