"""The snippets of docs/frameworks.md: each trains like a loop over the logits of all rows in one process."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import socket
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import uninitialized
from snippets import run, snippets

pytestmark = pytest.mark.slow

tr = pytest.importorskip("transformers", reason="needs pdl_ext[transformers]")

import pdl_ext  # noqa: E402
from pdl_ext import PDLLoss, TokenFrequency  # noqa: E402
from pdl_ext.integrations.transformers import apply_pdl_loss  # noqa: E402

PAGE = "docs/frameworks.md"
RANKS, LEARNING_RATE = 2, 0.5


def model_batch_and_loss(**options):
    from test_transformers import V, batch, model_of

    counted = TokenFrequency(V)
    counted.update(batch(9, 64)["input_ids"])
    inputs = batch(3, 8)
    # Rows of different lengths: a mean of means is another number.
    for number, row in enumerate(inputs["labels"]):
        row[: 1 + number] = -100
    return model_of("llama"), inputs, PDLLoss(counted, alpha=0.25, **options)


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)


def weights_of(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def part_of(inputs, begin, end):
    return {name: value[begin:end] for name, value in inputs.items()}


def after_one_step():
    """Weights that one step on all rows leaves, and those before."""
    model, inputs, loss_fn = model_batch_and_loss(reduction="token_mean", shift=True)
    before = weights_of(model)
    labels = inputs.pop("labels")
    loss_fn(model(**inputs).logits, labels).backward()
    optimizer_of(model).step()
    return weights_of(model), before


def check_trained(found, expected=None, way=""):
    trained, before = after_one_step() if expected is None else expected
    largest = max(float((value - before[name]).abs().max()) for name, value in trained.items())
    assert largest > 1e-3
    assert found.keys() == trained.keys()
    for name, value in trained.items():
        assert float((found[name] - value).abs().max()) <= 2e-5 * largest, (way, name)


@pytest.mark.parametrize("page", ["README.md", PAGE])
def test_a_trainer(page, tmp_path, monkeypatch):
    model, _, _ = model_batch_and_loss()
    monkeypatch.chdir(tmp_path)
    quiet = {"max_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    quiet["logging_steps"] = 1
    ids = torch.arange(1, 9)
    namespace = {
        "model": model,
        "Trainer": tr.Trainer,
        "args": tr.TrainingArguments(output_dir=str(tmp_path), **quiet),
        "dataset": [{"input_ids": ids, "labels": ids}],
    }
    if page == PAGE:
        run(page, "transformers: a Trainer", namespace)
        assert namespace["frequency"].counts[2:9].tolist() == [1] * 7
    else:
        (snippet,) = (snippet for snippet in snippets(page) if "Trainer" in snippet)
        exec(compile(snippet, page, "exec"), namespace)
        namespace["trainer"].train()
    assert namespace["loss_fn"].frequency.counts[2:9].tolist() == [1] * 7
    assert namespace["trainer"].state.log_history[0]["pdl/nll"] > 0


def test_trl(tmp_path, monkeypatch):
    trl = pytest.importorskip("trl", reason="needs pdl_ext[trl]")
    from test_trl import rows, tokenizer

    model, _, _ = model_batch_and_loss()
    monkeypatch.chdir(tmp_path)
    before = weights_of(model)
    quiet = {"max_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no", "bf16": False}
    quiet["logging_steps"] = 1
    namespace = {
        "model": model,
        "sft_config": trl.SFTConfig(output_dir=str(tmp_path), **quiet),
        "dataset": rows(None),
        "tokenizer": tokenizer(),
    }
    run(PAGE, "TRL: supervised finetuning", namespace)
    assert not torch.equal(before["lm_head.weight"], model.lm_head.weight)
    assert namespace["trainer"].state.log_history[0]["pdl/nll"] > 0


def test_a_loop_of_your_own(tmp_path, monkeypatch):
    model, inputs, loss_fn = model_batch_and_loss()
    monkeypatch.chdir(tmp_path)
    loss_fn.frequency.save("counts.safetensors")
    micro_batches = [part_of(inputs, begin, begin + 2) for begin in range(0, 8, 2)]
    optimizer = optimizer_of(model)
    run(
        PAGE,
        "A loop of your own",
        {"pdl_ext": pdl_ext, "model": model, "batches": [micro_batches], "optimizer": optimizer},
    )
    check_trained(weights_of(model))


def lightning_trainer(folder, **options):
    lightning = pytest.importorskip("lightning", reason="needs lightning")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"accelerator": "cpu", "default_root_dir": str(folder), **quiet}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lightning, lightning.Trainer(**{**settings, **options})


def loader_of(inputs, size):
    """Batches of some rows each, in order."""
    rows = [{name: value[number] for name, value in inputs.items()} for number in range(8)]
    return torch.utils.data.DataLoader(rows, batch_size=size)


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path):
    lightning, trainer = lightning_trainer(tmp_path, max_epochs=1)
    model, inputs, _ = model_batch_and_loss()
    namespace = {"lightning": lightning, "pdl_ext": pdl_ext, "torch": torch}
    run(PAGE, "Lightning", namespace)

    class WithSGD(namespace["Finetuning"]):
        def configure_optimizers(self):
            return optimizer_of(self)

    module = WithSGD(model)
    trainer.fit(module, loader_of(inputs, 8), loader_of(inputs, 4))
    learned = inputs["labels"][:, 1:]
    counts = torch.bincount(learned[learned != -100], minlength=503)
    # Validation has counted nothing.
    assert torch.equal(module.loss_fn.frequency.counts, counts)
    assert 3 < float(trainer.callback_metrics["val_nll"]) < 30

    single, _, _ = model_batch_and_loss()
    loss_fn = PDLLoss(alpha=0.25, shift=True)
    before = weights_of(single)
    loss_fn(single(inputs["input_ids"]).logits, inputs["labels"]).backward()
    optimizer_of(single).step()
    check_trained(weights_of(module.model), (weights_of(single), before))

    # As the table says of accumulation.
    k, items = 2, int((learned != -100).sum())

    class Accumulated(WithSGD):
        def training_step(self, batch):
            logits = self.model(batch["input_ids"]).logits
            return self.loss_fn(logits, batch["labels"], normalizer=items / k)

    accumulated = Accumulated(model_batch_and_loss()[0])
    accumulated.loss_fn = model_batch_and_loss(shift=True)[2]
    lightning_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=k)[1].fit(accumulated, loader_of(inputs, 4))
    check_trained(weights_of(accumulated.model))

    trainer.save_checkpoint(tmp_path / "checkpoint.ckpt")
    _, again = lightning_trainer(tmp_path, max_epochs=2)
    resumed = WithSGD(model_batch_and_loss()[0])
    again.fit(
        resumed, loader_of(inputs, 8), loader_of(inputs, 4), ckpt_path=tmp_path / "checkpoint.ckpt", weights_only=False
    )
    assert torch.equal(resumed.loss_fn.frequency.counts, 2 * counts)


def lightning_in_ranks(rank, folder):
    """Learned counts of two ranks that train on batches of their own."""
    os.environ["TORCHELASTIC_RUN_ID"] = "1"
    lightning, trainer = lightning_trainer(
        folder, max_epochs=1, devices=RANKS, strategy="ddp", limit_val_batches=0, enable_checkpointing=False
    )
    model, inputs, _ = model_batch_and_loss()
    namespace = {"lightning": lightning, "pdl_ext": pdl_ext, "torch": torch}
    run(PAGE, "Lightning", namespace)
    module = namespace["Finetuning"](model)
    trainer.fit(module, loader_of(inputs, 2))
    return module.loss_fn.frequency.counts


def accelerate_in_ranks(rank):
    accelerate = pytest.importorskip("accelerate", reason="needs pdl_ext[transformers]")
    model, inputs, loss_fn = model_batch_and_loss()
    namespace = {
        "apply_pdl_loss": apply_pdl_loss,
        "model": model,
        "loss_fn": loss_fn,
        "Accelerator": functools.partial(accelerate.Accelerator, cpu=True),
        "GradientAccumulationPlugin": accelerate.utils.GradientAccumulationPlugin,
        "k": 2,
        "optimizer": optimizer_of(model),
        "loader": loader_of(inputs, 2),
    }
    run(PAGE, "Accelerate", namespace)
    return weights_of(model)


def fsdp_in_ranks(rank):
    from torch.distributed.fsdp import fully_shard

    model, inputs, loss_fn = model_batch_and_loss()
    namespace = {"apply_pdl_loss": apply_pdl_loss, "fully_shard": fully_shard, "dist": dist}
    namespace |= {"model": model, "loss_fn": loss_fn, "loader": [part_of(inputs, rank * 4, rank * 4 + 4)]}

    class Optimizer:
        """One of the sharded parameters, which there are only after the first lines."""

        def step(self):
            optimizer_of(model).step()

        def zero_grad(self):
            model.zero_grad()

    run(PAGE, "FSDP2 and DDP", {**namespace, "optimizer": Optimizer()})
    return {name: value.full_tensor() for name, value in weights_of(model).items()}


def tensor_parallel_in_ranks(rank):
    from torch.distributed.tensor import Shard, init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model, inputs, loss_fn = model_batch_and_loss(reduction="token_mean", shift=True)
    namespace = {"Shard": Shard, "ColwiseParallel": ColwiseParallel, "parallelize_module": parallelize_module}
    namespace |= {"model": model, "loss_fn": loss_fn, "batch": inputs, "mesh": init_device_mesh("cpu", (RANKS,))}
    run(PAGE, "Tensor parallel", namespace)
    optimizer_of(model).step()
    return {name: getattr(value, "full_tensor", lambda v=value: v)() for name, value in weights_of(model).items()}


def deepspeed_in_ranks(rank, stage):
    import ninja

    # Which compiles what it runs.
    os.environ["PATH"] = f"{ninja.BIN_DIR}{os.pathsep}{os.environ['PATH']}"
    deepspeed = importlib.import_module("deepspeed")
    deepspeed.init_distributed("gloo")
    model, inputs, loss_fn = model_batch_and_loss()
    names = [name for name, _ in model.named_parameters()]
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "SGD", "params": {"lr": LEARNING_RATE}},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 1e9,
    }
    namespace = {"apply_pdl_loss": apply_pdl_loss, "deepspeed": deepspeed, "model": model, "loss_fn": loss_fn}
    items = (inputs["labels"][:, 1:] != -100).sum()
    namespace |= {
        "config": config,
        "batch": part_of(inputs, rank * 4, rank * 4 + 4),
        "items": items,
        "k": 1,
        "n": RANKS,
    }
    run(PAGE, "DeepSpeed", namespace)
    found = {}
    for name, parameter in zip(names, namespace["engine"].module.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            found[name] = parameter.detach().clone()
    return found


def deepspeed_worker(rank, port, folder):
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        torch.save([deepspeed_in_ranks(rank, stage) for stage in (1, 2, 3)], f"{folder}/{rank}.pt")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# The next four are of `make frameworks`: their packages are large, and bind others.
def test_deepspeed_trains_what_one_process_does(tmp_path):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed: make frameworks")
    mp.spawn(deepspeed_worker, args=(free_port(), str(tmp_path)), nprocs=RANKS)
    for rank in range(RANKS):
        for stage, found in enumerate(torch.load(tmp_path / f"{rank}.pt"), 1):
            check_trained(found, way=f"stage {stage}")


@pytest.mark.parametrize("chunked", [False, True])
def test_torchtitan(chunked, tmp_path):
    losses = pytest.importorskip("torchtitan.components.loss", reason="needs torchtitan: make frameworks")
    model, inputs, loss_fn = model_batch_and_loss()
    loss_fn.frequency.save(tmp_path / "counts.safetensors")
    namespace = {"BaseLoss": losses.BaseLoss, "dataclass": dataclasses.dataclass, "pdl_ext": pdl_ext}
    run(PAGE, "torchtitan", namespace)
    config = namespace["PowerLawDecayLoss"].Config(frequency=str(tmp_path / "counts.safetensors"))
    labels = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    hidden = model.model(inputs["input_ids"]).last_hidden_state
    if chunked:
        loss = losses.ChunkedLossWrapper.Config(num_chunks=4, loss_fn=config).build(compile_config=None)
        loss.set_lm_head(model.lm_head)
        value, _ = loss(hidden, labels, (labels != -100).sum())
    else:
        value, _ = config.build(compile_config=None)(model.lm_head(hidden), labels, (labels != -100).sum())
    value.backward()
    optimizer_of(model).step()
    check_trained(weights_of(model))


def test_torchtune(tmp_path, monkeypatch):
    instantiate = pytest.importorskip("torchtune.config", reason="needs torchtune: make frameworks").instantiate
    omegaconf = pytest.importorskip("omegaconf", reason="needs torchtune: make frameworks")
    model, inputs, loss_fn = model_batch_and_loss()
    monkeypatch.chdir(tmp_path)
    loss_fn.frequency.save("counts.safetensors")
    (text,) = snippets(PAGE, "torchtune", "yaml")
    loss = instantiate(omegaconf.OmegaConf.create(text).loss)
    # As the recipes do.
    labels = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=loss.ignore_index).reshape(-1)
    tokens = (labels != loss.ignore_index).sum()
    logits = model(inputs["input_ids"]).logits
    (loss(logits.reshape(-1, logits.size(-1)), labels) * tokens).backward()
    for parameter in model.parameters():
        parameter.grad /= tokens
    optimizer_of(model).step()
    check_trained(weights_of(model))


def test_axolotl(tmp_path, monkeypatch):
    base = pytest.importorskip("axolotl.integrations.base", reason="needs axolotl: make frameworks")
    from test_transformers import trainer_of

    from pdl_ext.integrations.transformers import PDLCallback

    model, _, loss_fn = model_batch_and_loss()
    monkeypatch.chdir(tmp_path)
    loss_fn.frequency.save("counts.safetensors")
    namespace = {"BasePlugin": base.BasePlugin, "PDLCallback": PDLCallback, "pdl_ext": pdl_ext}
    namespace["apply_pdl_loss"] = apply_pdl_loss
    run(PAGE, "axolotl", namespace)
    plugin = namespace["PDLPlugin"]()
    plugin.post_model_load({}, model)
    trainer = trainer_of(model, tmp_path, callbacks=plugin.add_callbacks_pre_trainer({}, model))
    trainer.train()
    assert trainer.state.log_history[0]["pdl/nll"] > 0


WAYS = {"Accelerate": accelerate_in_ranks, "FSDP2 and DDP": fsdp_in_ranks, "Tensor parallel": tensor_parallel_in_ranks}


def worker(rank, port, folder):
    # A process of its own does not know the tests' folder.
    sys.path.insert(0, str(Path(__file__).parent))
    uninitialized.fill()
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo")
    try:
        results = {way: function(rank) for way, function in WAYS.items()}
        results["Lightning"] = lightning_in_ranks(rank, folder)
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_two_processes_train_what_one_does(tmp_path):
    pytest.importorskip("lightning", reason="needs lightning")
    mp.spawn(worker, args=(free_port(), str(tmp_path)), nprocs=RANKS)
    learned = model_batch_and_loss()[1]["labels"][:, 1:]
    for rank in range(RANKS):
        results = torch.load(tmp_path / f"{rank}.pt")
        # Both count what either learns.
        assert torch.equal(results.pop("Lightning"), torch.bincount(learned[learned != -100], minlength=503))
        assert results.keys() == WAYS.keys()
        for way in WAYS:
            check_trained(results[way], way=way)
