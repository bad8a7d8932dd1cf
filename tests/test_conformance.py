"""The conformance suite: pdl_ext is right everywhere, and every case finds some wrong implementation."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks" / "conformance"))

import cases
import ways
from cases import CASES, Way
from verdicts import ABSENT, RIGHT, of_all, verdict, verdicts

ROOT = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("conformance", ROOT / "benchmarks" / "conformance" / "__main__.py")
conformance = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(conformance)

OURS = [way for way in ways.ways(torch.device("cpu")) if way.name.startswith("pdl_ext")]
OF_ONE_PROCESS = [way for way in OURS if way.ranks == 1]
OF_RANKS = [way for way in OURS if way.ranks > 1]


def assert_right(found):
    said = [said for said in found.values() if said != ABSENT]
    assert set(said) == {RIGHT}, found
    assert len(said) >= 30


@pytest.mark.parametrize("way", OF_ONE_PROCESS, ids=lambda way: way.name)
def test_pdl_ext_is_right(way):
    assert_right({case.name: verdict(way, case) for case in CASES})


@pytest.mark.slow
@pytest.mark.parametrize("way", OF_RANKS, ids=lambda way: way.name)
def test_pdl_ext_is_right_over_ranks(way):
    assert_right(verdicts(way, torch.device("cpu")))


def test_ranks_are_right_if_all_are():
    wrong, error = "**no**: the loss is nan", "**error**: ValueError"
    assert of_all([RIGHT, RIGHT]) == RIGHT
    assert of_all([RIGHT, wrong]) == of_all([wrong, RIGHT]) == of_all([ABSENT, wrong]) == wrong
    assert of_all([RIGHT, wrong, error]) == wrong
    assert of_all([ABSENT, ABSENT]) == ABSENT


def of_two_ranks(scores, task):
    """Wrong on the second rank in "mean", an error there in the sums, and the end of its process in the means."""
    loss = ways._pdl_ext_of_ranks(scores, task)
    if dist.get_rank() == 0:
        return loss
    if task.weight is None:
        return loss * 1.01
    if task.reduction == "sum":
        raise ValueError("of rank 1")
    if task.reduction == "mean":
        os._exit(3)
    return loss


@pytest.mark.slow
def test_a_fault_of_one_rank_is_found_and_the_next_case_is_judged():
    found = verdicts(Way("faulty", True, of_two_ranks, ranks=2), torch.device("cpu"), cases=4)
    wrong, ended, error, right = found.values()
    assert wrong.startswith("**no**: the loss has a relative error of 0.01")
    # Which rank is heard first is open: the one that ended, or the one that lost it.
    assert ended.startswith("**error**: ")
    assert error == "**error**: ValueError: of rank 1"
    assert right == RIGHT


def without_a_gradient(scores, task):
    return right(scores, task).detach() + 0 * sum(score.where(score.isfinite(), 0).sum() for score in scores)


def of_one(scores, task):
    shape = task.targets.shape if task.reduction == "none" else ()
    return torch.ones(shape) + 0 * sum(score.where(score.isfinite(), 0).sum() for score in scores)


def undefined(scores, task):
    loss = right(scores, task)
    return loss if bool((task.targets != task.ignore_index).any()) else loss * torch.nan


class Frozen(torch.autograd.Function):
    """Its gradient has no graph."""

    @staticmethod
    def forward(ctx, task, *scores):
        with torch.enable_grad():
            leaves = [score.detach().requires_grad_() for score in scores]
            loss = right(leaves, task)
            ctx.gradients = torch.autograd.grad(loss.sum(), leaves)
        return loss.detach()

    @staticmethod
    def backward(ctx, upstream):
        return None, *(gradient * upstream.sum() for gradient in ctx.gradients)


def frozen(scores, task):
    return Frozen.apply(task, *scores)


def overwriting(scores, task):
    loss = right(scores, task)
    scores[0].data.zero_()
    return loss


def noisy(scores, task):
    return right(scores, task) * (1 + 1e-6 * torch.rand(()))


def right(scores, task):
    return OF_ONE_PROCESS[0 if len(scores) == 1 else -1].loss(scores, task)


WRONG = (without_a_gradient, of_one, undefined, frozen, overwriting, noisy)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_finds_a_wrong_implementation(case):
    kinds = (True, False) if case.of_logits is None else (case.of_logits,)
    for of_logits in kinds:
        found = [verdict(Way(loss.__name__, of_logits, loss), case) for loss in WRONG]
        assert any(said.startswith("**no**") for said in found), found


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        (
            "weighted mean, divided by the sum of weights",
            lambda s, t: right(s, cases.Task(t.targets, t.weight, "sum")) / 24,
        ),
        ("weighted sum", lambda s, t: right(s, cases.Task(t.targets, None, "sum"))),
        # A bug of a published library: all rows scaled by the first upstream gradient.
        ("weighted loss of each row, an upstream gradient for each row", lambda s, t: FirstUpstream.apply(*s, t)),
    ],
)
def test_a_common_fault_is_found(name, loss):
    (case,) = (case for case in CASES if case.name == name)
    assert verdict(Way("faulty", True, loss), case).startswith("**no**")


class FirstUpstream(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, task):
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            losses = right([leaf], task)
            (ctx.gradient,) = torch.autograd.grad(losses.sum(), leaf)
        return losses.detach()

    @staticmethod
    def backward(ctx, upstream):
        return ctx.gradient * upstream[0], None


def test_the_page_has_every_case(capsys, tmp_path):
    page = (ROOT / "docs" / "conformance.md").read_text()
    table = page.split(conformance.BEGIN)[1].split(conformance.END)[0]
    names = re.findall(r"^\| (.+?) \|", table, flags=re.MULTILINE)
    assert names[1 : len(CASES) + 1] == [case.name for case in CASES]
    # It is written where it was.
    copy = tmp_path / "page.md"
    copy.write_text(page)
    assert conformance.main(["--only", "pdl_ext, in place", "--device", "cpu", "--output", str(copy)]) == 0
    assert "| case | pdl_ext, in place |" in copy.read_text()
    assert copy.read_text().split(conformance.BEGIN)[0] == page.split(conformance.BEGIN)[0]
    assert copy.read_text().split(conformance.END)[1] == page.split(conformance.END)[1]
    assert "| case | pdl_ext, in place |" in capsys.readouterr().out
