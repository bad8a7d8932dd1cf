"""The numbers of a demo, as a JSON-like dictionary and as text to read."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from pdl_ext.cli.demo import evaluate
from pdl_ext.cli.demo.cost import TIMED_STEPS, StepCost
from pdl_ext.cli.demo.evaluate import RareWords, Task, TokenScores
from pdl_ext.cli.demo.train import FUSED, UNFUSED, Training

SHARES = (0.80, 0.15, 0.05)
GROUPS = ("all target tokens", "frequent: first 80 %", "middle: next 15 %", "rare: last 5 %")
SHOWN = 3


def nll_report(scores: dict[str, TokenScores], ce: str, pdl: str, bucket_of_token: np.ndarray) -> dict[str, Any]:
    """Unweighted NLL by run, for all target tokens and by frequency bucket (lists in the order of ``groups``).

    ``pdl_minus_ce`` is the difference of the runs that ``ce`` and ``pdl`` name, with its 95 % bootstrap interval.
    """
    buckets = len(SHARES)
    mean = {name: evaluate.bucket_means(value, bucket_of_token, buckets) for name, value in scores.items()}
    bucket = bucket_of_token[scores[ce].token]
    chosen = [np.ones(len(bucket), dtype=bool), *(bucket == index for index in range(buckets))]
    return {
        "groups": list(GROUPS),
        "tokens": [int(group.sum()) for group in chosen],
        "mean": mean,
        "pdl_minus_ce": [None if a is None or b is None else a - b for a, b in zip(mean[pdl], mean[ce], strict=True)],
        "pdl_minus_ce_95": [evaluate.difference_interval(scores[pdl], scores[ce], group) for group in chosen],
    }


def generation_report(
    tasks: Sequence[Task], generations: dict[str, list[str]], training_completions: Iterable[str]
) -> dict[str, Any]:
    """Rare-word recall and precision, distinct-1 and -2 and length by run and for the references, and all texts.

    Common words are the most frequent words that together cover 95 % of the words of the training completions. All
    other words are rare.
    """
    common = evaluate.common_words(training_completions)
    references, prompts = [task.reference for task in tasks], [task.prompt for task in tasks]

    def measures(texts: list[str]) -> dict[str, Any]:
        return {
            "rare_words": _rare(evaluate.rare_words(references, texts, common)),
            "rare_words_not_in_prompt": _rare(evaluate.rare_words(references, texts, common, prompts)),
            "distinct_1": evaluate.distinct(texts, 1),
            "distinct_2": evaluate.distinct(texts, 2),
            "words_per_text": sum(len(evaluate.words(text)) for text in texts) / len(texts),
        }

    return {
        "common_words": len(common),
        "reference": measures(references),
        "runs": {name: measures(texts) for name, texts in generations.items()},
        "texts": [
            {"prompt": task.prompt, "reference": task.reference}
            | {"generated": {name: texts[index] for name, texts in generations.items()}}
            for index, task in enumerate(tasks)
        ],
    }


def _rare(result: RareWords) -> dict[str, float | None]:
    return {
        "in_references": result.reference,
        "in_generations": result.generated,
        "in_both": result.matched,
        "recall": result.recall,
        "precision": result.precision,
    }


def training_report(trainings: dict[str, Training]) -> dict[str, Any]:
    """Loss of every step and speed of each run; a run's first step is left out of the speed."""
    return {
        name: {
            "tokens_per_second": result.tokens / result.seconds,
            "target_tokens_per_second": result.target_tokens / result.seconds,
            "seconds_timed": result.seconds,
            "losses": result.losses,
        }
        for name, result in trainings.items()
    }


def step_report(costs: dict[str, StepCost]) -> dict[str, Any]:
    """Seconds and peak bytes (None if not measured) of forward and backward with each path of the PDL loss."""
    return {name: {"seconds": cost.seconds, "peak_bytes": cost.peak_bytes} for name, cost in costs.items()}


def summary(report: dict[str, Any]) -> str:
    """The report as text: some generations, the tables, and the result of the comparison, better or worse."""
    parts = (_examples, _table, _step_table, _verdict, _notes)
    return "\n\n".join("\n".join(part(report)) for part in parts)


def _examples(report: dict[str, Any]) -> list[str]:
    lines = ["", "Greedy generations (all of them are in report.json)"]
    width = max(len(name) for name in (*report["runs"], "reference"))
    for text in report["generation"]["texts"][:SHOWN]:
        entries = {"prompt": text["prompt"], "reference": text["reference"], **text["generated"]}
        lines.append("")
        for name, value in entries.items():
            shown = textwrap.shorten(value, 400, placeholder=" ...")
            indent = " " * (width + 4)
            lines.append(textwrap.fill(f"  {name:<{width}}  {shown}", 118, subsequent_indent=indent))
    return lines


def _table(report: dict[str, Any]) -> list[str]:
    runs, nll, generation = report["runs"], report["nll"], report["generation"]
    rows = [["Held out: unweighted NLL, nats a token", "tokens", *runs, "PDL - CE [95 % interval]"]]
    for index, group in enumerate(nll["groups"]):
        interval = nll["pdl_minus_ce_95"][index]
        between = f" [{interval[0]:+.3f}, {interval[1]:+.3f}]" if interval else ""
        rows.append(
            [
                f"  {group}",
                f"{nll['tokens'][index]:,}",
                *(_number(nll["mean"][name][index]) for name in runs),
                _number(nll["pdl_minus_ce"][index], "+.3f") + between,
            ]
        )
    rows.append([f"Greedy generations for {len(generation['texts'])} held-out examples", "reference", *runs, ""])
    for key, label in (("rare_words", "rare words"), ("rare_words_not_in_prompt", "  those not in the prompt")):
        for measure in ("recall", "precision"):
            cells = [_percent(generation["runs"][name][key][measure]) for name in runs]
            total = generation["reference"][key]["in_references"] if measure == "recall" else ""
            rows.append([f"  {label}: {measure}", f"{total} words" if total != "" else "", *cells, ""])
    for key, label in (("distinct_1", "distinct-1"), ("distinct_2", "distinct-2"), ("words_per_text", "words a text")):
        spec = ".1f" if key == "words_per_text" else ".3f"
        cells = [_number(entry[key], spec) for entry in (generation["reference"], *generation["runs"].values())]
        rows.append([f"  {label}", *cells, ""])
    speed = [f"{report['training'][name]['tokens_per_second']:,.0f}" for name in runs[1:]]
    rows.append(["Training: tokens a second, prompts included", "", "", *speed, ""])

    return _aligned(rows)


def _step_table(report: dict[str, Any]) -> list[str]:
    trained = UNFUSED if report["settings"]["unfused"] else FUSED
    labels = {FUSED: "from hidden states, logits not held", UNFUSED: "from the logits (--unfused)"}
    rows = [["A PDL step: forward and backward", "seconds", "peak memory beyond the weights"]]
    for name, label in labels.items():
        cost = report["pdl_step"][name]
        peak = "not measured" if cost["peak_bytes"] is None else f"{cost['peak_bytes'] / 1e6:,.0f} MB"
        used = ", as trained here" if name == trained else ""
        rows.append([f"  {name}: {label}{used}", f"{cost['seconds']:.3g}", peak])
    return [
        *_aligned(rows),
        f"  ({TIMED_STEPS} steps of each, in turns on the same batches, before training: median time, largest peak)",
    ]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _verdict(report: dict[str, Any]) -> list[str]:
    nll = report["nll"]
    worse: list[str] = []
    better: list[str] = []
    unclear: list[str] = []
    for group, difference, interval in zip(nll["groups"], nll["pdl_minus_ce"], nll["pdl_minus_ce_95"], strict=True):
        if difference is None:
            continue
        entry = f"{group} ({difference:+.3f})"
        if interval is None or interval[0] <= 0 <= interval[1]:
            unclear.append(entry)
        else:
            (worse if difference > 0 else better).append(entry)
    lines = [
        f"Held-out NLL, PDL {verdict} than cross-entropy: {'; '.join(entries)}."
        for verdict, entries in (("WORSE", worse), ("better", better))
        if entries
    ]
    if unclear:
        lines.append(f"Held-out NLL, no difference beyond chance (95 % interval holds 0): {'; '.join(unclear)}.")
    if any(entry.startswith(GROUPS[0]) for entry in worse):
        lines.append("A worse overall NLL is the price by design: PDL moves probability from frequent to rare tokens.")
    ce, pdl = (report["generation"]["runs"][name] for name in report["runs"][1:])
    for key, label in (("rare_words", "rare words"), ("rare_words_not_in_prompt", "rare words not in the prompt")):
        before, after = ce[key], pdl[key]
        if after["in_references"]:
            gained = after["in_both"] - before["in_both"]
            lines.append(
                f"Generations, {label}: PDL has {after['in_both']} of {after['in_references']}, "
                f"cross-entropy {before['in_both']} ({gained:+d})."
            )
    return lines


def _notes(report: dict[str, Any]) -> list[str]:
    settings = report["settings"]
    return [
        f"Model: {report['model']}. Text: {report['text']}.",
        f"{settings['steps']} steps of {settings['batch_size']} examples, seed {settings['seed']}, "
        f"{settings['device']}: a short run on one seed, so small differences in the generations mean little.",
        "Evidence from two tasks (docs/evidence.md): the NLL of rare tokens falls, and that of all rises. At alpha "
        "0.25 F1 of rare words rose on one.",
    ]


def _number(value: float | None, spec: str = ".3f") -> str:
    return "-" if value is None else format(value, spec)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
