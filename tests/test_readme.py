"""The README's Python snippets run, in order, in one namespace."""

import argparse
import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_snippets_run(tmp_path, monkeypatch):
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    snippets = [snippet for snippet in snippets if "Trainer" not in snippet]
    assert len(snippets) >= 5
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), namespace)
    assert namespace["logits"].grad.abs().sum() > 0
    assert float(namespace["plain_nll"]) == pytest.approx(float(namespace["stats"].nll.sum()) / (2 * 15), rel=1e-5)


def test_snippets_of_corpora_run(tmp_path, monkeypatch):
    page = (README.parent / "docs" / "corpora.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.bin").write_bytes(bytes([1, 0, 7, 0, 7, 0]))
    namespace = {}
    totals = []
    for snippet in snippets:
        exec(compile(snippet, "corpora.md", "exec"), namespace)
        totals.append(namespace["frequency"].total)
    assert namespace["loss_fn"].frequency.counts[:8].tolist() == [0, 0, 0, 0, 0, 0, 0, 2]
    assert totals == [2, 4 + 9 * 100, 1000]


def test_snippets_of_the_family_run():
    pytest.importorskip("transformers", reason="needs pdl_ext[demo]")
    page = (README.parent / "docs" / "family.md").read_text()
    namespace = {}
    for snippet in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(compile(snippet, "family.md", "exec"), namespace)
    scores = namespace["RareTokens"](namespace["frequency"], 0.5)(None, namespace["logits"])
    assert (scores - namespace["logits"])[0].diff().gt(0).all()
    assert_double_backward(**{name: namespace[name] for name in LEARNED_WEIGHTS})


LEARNED_WEIGHTS = ("weight_model", "theta", "read", "labels", "asked", "answers", "learning_rate")


def assert_double_backward(weight_model, theta, read, labels, asked, answers, learning_rate):
    import torch
    import torch.nn.functional as F

    loss = (weight_model(read).squeeze(1) * F.cross_entropy(read @ theta, labels, reduction="none")).mean()
    (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
    outer = F.cross_entropy(asked @ (theta - learning_rate * gradient), answers)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(outer, list(weight_model.parameters()))])
    got = torch.cat([parameter.grad.flatten() for parameter in weight_model.parameters()])
    # Together, since the small ones are small by cancellation.
    assert (got - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("name", ["formats.md", "options.md"])
def test_snippets_of_the_reference_run(name, tmp_path, monkeypatch):
    page = (README.parent / "docs" / name).read_text()
    monkeypatch.chdir(tmp_path)
    namespace = {}
    snippets = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, name, "exec"), namespace)


def test_documented_commands_exist():
    from pdl_ext.cli import count, show

    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    count.add_parser(subparsers)
    show.add_parser(subparsers)
    known = set(subparsers.choices["count"]._option_string_actions)
    page = (README.parent / "docs" / "corpora.md").read_text()
    documented = set(re.findall(r"`(--[a-z-]+)", page))
    assert documented <= known | set(subparsers.choices["show"]._option_string_actions)
    assert known - documented - {"--help", "-h", "-o", "--output", "--vocab-size", "--threads"} == set()
