"""PDL in transformers' models on two gloo processes with different data, against one process that has both."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import uninitialized
from torch import nn

pytestmark = pytest.mark.slow

for package in ("transformers", "accelerate"):
    pytest.importorskip(package, reason="needs pdl_ext[transformers]")
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("PyTorch without gloo", allow_module_level=True)

from pdl_ext import PDLLoss, TokenFrequency  # noqa: E402
from pdl_ext.integrations.lazy_logits import LazyLogits  # noqa: E402
from pdl_ext.integrations.transformers import PDLCallback, apply_pdl_loss  # noqa: E402

RANKS = 2
# Whether the head is a unit of its own, whether the loss is applied before, and whether the logits are made.
UNITS = {
    "llama, root": (False, True, False),
    "llama, root, applied after": (False, False, False),
    "llama tied, root": (False, True, False),
    "llama, own unit": (True, True, True),
    "llama, own unit, applied after": (True, False, True),
}


TRAINED = ("given", "online")
# transformers' Trainer takes the second.
REPLICATED = {"plain": {}, "unused": {"find_unused_parameters": True}, "static": {"static_graph": True}}


def model_and_batch(name, rows=8):
    from test_transformers import batch, model_of

    counted = TokenFrequency(503)
    counted.update(batch(9, 64)["input_ids"])
    return model_of(name), batch(3, rows), PDLLoss(counted, alpha=0.5)


def sharded_step(rank, case):
    from torch.distributed.fsdp import fully_shard

    own_unit, applied_before, is_made = UNITS[case]
    model, inputs, loss_fn = model_and_batch(case.split(",")[0])
    if applied_before:
        apply_pdl_loss(model, loss_fn)
    if own_unit:
        fully_shard(model.lm_head)
    fully_shard(model)
    if not applied_before:
        apply_pdl_loss(model, loss_fn)
    items = int((inputs["labels"][:, 1:] != -100).sum())
    part = slice(rank * 4, rank * 4 + 4)
    # Gradients are averaged over ranks.
    outputs = model(**{name: value[part] for name, value in inputs.items()}, num_items_in_batch=items / RANKS)
    outputs.loss.backward()
    assert (type(outputs.logits) is not LazyLogits or outputs.logits.made is not None) == is_made
    return {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}


def replicated_step(rank, options):
    """Gradients where the logits are a part of what is trained, and whether anybody made them before."""
    model, inputs, loss_fn = model_and_batch("llama")
    apply_pdl_loss(model, loss_fn)
    if dist.is_initialized():
        model = nn.parallel.DistributedDataParallel(model, **options)
        inputs = {name: value[rank * 4 : rank * 4 + 4] for name, value in inputs.items()}
    outputs = model(**inputs, num_items_in_batch=30 if dist.is_initialized() else 60)
    is_made = outputs.logits.made is not None
    (outputs.loss + 10 * outputs.logits.square().mean()).backward()
    gradients = {name.removeprefix("module."): value.grad for name, value in model.named_parameters()}
    return gradients, is_made


def trained(case, folder, size):
    from test_transformers import trainer_of

    model, _, loss_fn = model_and_batch("llama")
    if case == "online":
        loss_fn = PDLLoss(alpha=0.5, vocab_size=503, sync_every=1)
    apply_pdl_loss(model, loss_fn)
    trainer = trainer_of(
        model, folder, callbacks=[PDLCallback(loss_fn)], per_device_train_batch_size=size, optim="sgd", max_steps=2
    )
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer.train()
    moved = {name: value.detach() - before[name] for name, value in model.named_parameters()}
    return moved | {"counts": loss_fn.frequency.counts}


def worker(rank, port, folder):
    # A process of its own does not know the tests' folder.
    sys.path.insert(0, str(Path(__file__).parent))
    uninitialized.fill()
    torch.set_num_threads(1)
    # As torchrun does, for the Trainer.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo")
    try:
        results = {case: sharded_step(rank, case) for case in UNITS}
        results |= {case: replicated_step(rank, options) for case, options in REPLICATED.items()}
        results |= {case: trained(case, f"{folder}/trainer", 4) for case in TRAINED}
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(once):
    def make(folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.spawn(worker, args=(port, str(folder)), nprocs=RANKS)

    folder = once("transformers", make)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def check_same(found, expected, tolerance):
    largest = max(float(value.abs().max()) for value in expected.values())
    assert found.keys() == expected.keys()
    assert largest > 0
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) <= tolerance * largest, name


@pytest.mark.parametrize("case", UNITS)
def test_fully_sharded_gradients_are_those_of_one_process(case, ranks):
    model, inputs, loss_fn = model_and_batch(case.split(",")[0])
    apply_pdl_loss(model, loss_fn)
    items = int((inputs["labels"][:, 1:] != -100).sum())
    model(**inputs, num_items_in_batch=items).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for rank in ranks:
        check_same(rank[case], expected, 2e-5)


@pytest.mark.parametrize("case", REPLICATED)
def test_replicas_make_no_logits_that_nobody_reads(case, ranks):
    expected, _ = replicated_step(0, {})
    for rank in ranks:
        gradients, is_made = rank[case]
        assert not is_made
        check_same(gradients, expected, 2e-5)


@pytest.mark.parametrize("case", TRAINED)
def test_a_trainer_on_two_processes_is_one_with_batches_of_both(case, ranks, tmp_path):
    expected = trained(case, str(tmp_path), 8)
    counts = expected.pop("counts")
    for rank in ranks:
        assert torch.equal(rank[case].pop("counts"), counts)
        check_same(rank[case], expected, 2e-4)
