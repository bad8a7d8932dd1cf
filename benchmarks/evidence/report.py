"""Writes the tables, intervals and pictures of docs/evidence.md, only from the JSONs of the runs.

    python -m evidence.report [--check] [--device cuda]

The tables are between two marks of the page; the text before and after them stays.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import harness
import numpy as np

from evidence.arms import ARMS, CE, CURVES, DECODINGS, GREEDY, PDL, ZERO_SHOT
from evidence.bootstrap import Estimate, frontier, holm, verdict
from evidence.figures import Frontier, draw_frontiers
from evidence.results import (
    CHRF,
    NLL,
    OF_TARGETS,
    OF_TEXTS,
    PRECISION,
    RARE_F1,
    RECALL,
    ROUGE,
    WORDS,
    Measure,
    ResultError,
    Results,
    read,
)
from evidence.run import results_of
from evidence.runs import CURVE_SEEDS, RATES, planned
from evidence.tasks import TASKS

PAGE = harness.ROOT / "docs" / "evidence.md"
# Smaller differences count as none.
MARGINS = {RARE_F1.name: 2.0, CHRF.name: 0.5}
# Metrics of a whole run, by their keys in its JSON.
CORPUS = {
    "bleu": "BLEU",
    "distinct_2": "distinct-2",
    "self_bleu": "self-BLEU",
    "repetition": "repetition",
    "zipf_slope": "Zipf slope",
}
TRAINING = {"median_gradient_norm": "gradient norm", "mean_effective_share": "effective share of targets"}


def marks(device: str) -> tuple[str, str]:
    return f"<!-- evidence on {device}: begin -->", f"<!-- evidence on {device}: end -->"


def tables(all_results: Sequence[Results]) -> str:
    """Everything between the marks, as Markdown."""
    parts = [
        *_section("What is there", _counts(all_results)),
        *_section("H0: nll against cross-entropy, by alpha", _dose(all_results)),
        *_section("H1: PDL with alpha 0.5 against cross-entropy (primary)", _primary(all_results)),
        *_section("H2: PDL against the frontier of cross-entropy's decoders", _frontiers(all_results)),
        *_section(
            "H3: the task that the model knows best against the one that it knows least", _knowledge(all_results)
        ),
    ]
    for results in all_results:
        parts += _section(f"{_title(results)}: texts, means over seeds", _means(results, OF_TEXTS, "all", CORPUS))
        trained = _means(results, OF_TARGETS, "training", TRAINING)
        parts += _section(f"{_title(results)}: nll and training, means over seeds", trained)
        for of, measures in (("texts", OF_TEXTS), ("nll", OF_TARGETS)):
            parts += _section(f"{_title(results)}: {of}, difference to cross-entropy", _differences(results, measures))
        parts += _section(f"{_title(results)}: decoders, the first items of the test", _curve_table(results))
        parts += _section(f"{_title(results)}: cross-entropy's decoders, difference to greedy", _decoders(results))
        parts += _section(f"{_title(results)}: learning rates, loss on validation", _rates(results))
    return "\n".join(parts)


def _title(results: Results) -> str:
    return TASKS[results.task].title if results.task in TASKS else results.task


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"### {title}", "", *lines, ""] if lines else []


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    return [harness.table_line(head), harness.table_line(["---"] * len(head)), *map(harness.table_line, rows)]


def _interval(estimate: Estimate, digits: int = 2) -> str:
    low, high = estimate.interval
    return f"{estimate.value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _counts(all_results: Sequence[Results]) -> list[str]:
    rows = []
    for results in all_results:
        plan = [run for run in planned() if run.task == results.task and run.rate is None]
        done = [run for run in plan if run.seed in results.runs.get((run.arm, run.decoding), {})]
        # Runs of decoders have the first items only.
        of_runs = [run["items"]["cluster"] for seeds in results.runs.values() for run in seeds.values()]
        all_items = max(of_runs, key=len, default=[])
        whole = "complete" if len(done) == len(plan) else "**partial**"
        rows.append(
            [_title(results), f"{len(done)} of {len(plan)}", whole, str(len(all_items)), str(len(set(all_items)))]
        )
    return _table(["task", "runs", "", "test items", "clusters"], rows)


def _dose(all_results: Sequence[Results]) -> list[str]:
    rows = []
    for results in all_results:
        for arm in ("pdl-0.25", PDL, "pdl-1"):
            found = [results.difference(measure, arm, CE) for measure in OF_TARGETS]
            cells = [f"{_interval(one, 3)}, {verdict(one.interval)}" for one in found if one is not None]
            if cells:
                rows.append([_title(results), ARMS[arm].title, *cells])
    return _table(["task", "arm", "all targets", "frequent", "middle", "rare"], rows)


def _primary(all_results: Sequence[Results]) -> list[str]:
    tests = []
    for results in all_results:
        for measure, bound in ((RARE_F1, 0.0), (CHRF, -MARGINS[CHRF.name])):
            difference = results.difference(measure, PDL, CE)
            if difference is not None:
                tests.append((results, measure, bound, difference))
    adjusted = holm([difference.p_above(bound) for _, _, bound, difference in tests])
    rows = []
    for (results, measure, bound, difference), p in zip(tests, adjusted, strict=True):
        rows.append(
            [
                _title(results),
                f"{measure.name} > {bound:+g}",
                str(len(results.seeds((PDL, GREEDY.name), (CE, GREEDY.name)))),
                _interval(difference),
                f"{difference.p_above(bound):.4f}",
                f"{p:.4f}",
                "yes" if p < 0.05 else "no",
                verdict(difference.interval, MARGINS[measure.name]),
            ]
        )
    head = ["task", "tested", "seeds", "difference [95 %]", "p", "p after Holm", "shown", "difference to 0"]
    return _table(head, rows)


def _curve(results: Results, arm: str) -> tuple[list[tuple[str, str]], list[int]]:
    """The decodings of an arm, greedy first, and the seeds that all of them have."""
    keys = [(arm, decoding.name) for decoding in (GREEDY, *CURVES[arm])]
    return keys, results.seeds(*keys)


def curve_points(results: Results, arm: str) -> dict[str, tuple[Estimate, Estimate]]:
    """chrF++ and rare-word F1 by decoding, greedy first, over the seeds that all of them have; empty without any."""
    keys, seeds = _curve(results, arm)
    return {key[1]: _point(results, key, seeds) for key in keys} if seeds else {}


def _point(results: Results, key: tuple[str, str], seeds: Sequence[int]) -> tuple[Estimate, Estimate]:
    chrf, f1 = (results.estimate(measure, key, seeds, curve_items(results)) for measure in (CHRF, RARE_F1))
    return chrf, f1


def curve_items(results: Results) -> int:
    """The number of items in a point of a curve."""
    some = next(iter(next(iter(results.runs.values())).values()))
    return int(some["settings"]["curve_items"])


def _frontiers(all_results: Sequence[Results]) -> list[str]:
    rows = []
    for results in all_results:
        keys, _ = _curve(results, CE)
        for arm, kind in ((PDL, ""), ("pdl-0.25", ", exploratory")):
            seeds = results.seeds(*keys, (arm, GREEDY.name))
            if not seeds:
                continue
            chrf, f1 = _point(results, (arm, GREEDY.name), seeds)
            above = f1 - frontier([_point(results, key, seeds) for key in keys], chrf)
            found = verdict(above.interval, MARGINS[RARE_F1.name])
            rows.append([_title(results), f"{ARMS[arm].title}{kind}", str(len(seeds)), _interval(above), found])
    return _table(["task", "arm", "seeds", "rare-word F1 above the frontier [95 %]", ""], rows)


def _knowledge(all_results: Sequence[Results]) -> list[str]:
    """The effects on the tasks with the lowest and the highest zero-shot nll; seeds and items differ."""
    known = []
    for results in all_results:
        effect, before = results.difference(RARE_F1, PDL, CE), results.seeds((ZERO_SHOT, GREEDY.name))
        if effect is not None and before:
            nll = results.estimate(NLL, (ZERO_SHOT, GREEDY.name), before)
            known.append((nll.value, _title(results), effect))
    if len(known) < 2:
        return []
    known.sort(key=lambda one: one[0])
    best, least = known[0], known[-1]
    # Independent samples: one's draws are paired with the other's in another order.
    order = np.random.default_rng(1).permutation(len(least[2].draws))
    apart = Estimate(np.concatenate([[best[2].value - least[2].value], best[2].draws - least[2].draws[order]]))
    rows = [[title, f"{nll:.3f}", _interval(effect)] for nll, title, effect in known]
    head = ["task", "zero-shot nll", "rare-word F1, PDL 0.5 - cross-entropy [95 %]"]
    text = f"Best known less least known: {_interval(apart)}, {verdict(apart.interval, MARGINS[RARE_F1.name])}."
    return [*_table(head, rows), "", text]


def _greedy(results: Results) -> Iterator[tuple[str, list[int]]]:
    for arm in ARMS:
        seeds = results.seeds((arm, GREEDY.name))
        if seeds:
            yield arm, seeds


def _means(results: Results, measures: Sequence[Measure], part: str, of_run: Mapping[str, str]) -> list[str]:
    """A line for each arm: measures of items, and the metrics that each run's JSON has in `part`."""
    rows = []
    for arm, seeds in _greedy(results):
        runs = [results.runs[arm, GREEDY.name][seed] for seed in seeds]
        of_items = [results.estimate(measure, (arm, GREEDY.name), seeds).value for measure in measures]
        of_runs = [_mean([run[part].get(name) for run in runs]) for name in of_run]
        rows.append([ARMS[arm].title, str(len(seeds)), *map(_number, (*of_items, *of_runs))])
    return _table(["arm", "seeds", *(measure.name for measure in measures), *of_run.values()], rows)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _differences(results: Results, measures: Sequence[Measure]) -> list[str]:
    rows = []
    for arm in ARMS:
        common = results.seeds((arm, GREEDY.name), (CE, GREEDY.name))
        if arm == CE or not common:
            continue
        found = [(measure, results.difference(measure, arm, CE)) for measure in measures]
        cells = [_judged(measure, one) for measure, one in found if one is not None]
        rows.append([ARMS[arm].title, str(len(common)), *cells])
    return _table(["arm", "seeds", *(measure.name for measure in measures)], rows)


def _judged(measure: Measure, difference: Estimate) -> str:
    return f"{_interval(difference)}, {verdict(difference.interval, MARGINS.get(measure.name))}"


def _curve_table(results: Results) -> list[str]:
    measures = (CHRF, RARE_F1, PRECISION, RECALL, ROUGE, WORDS)
    rows = []
    for arm in CURVES:
        keys, seeds = _curve(results, arm)
        for key in keys if seeds else ():
            values = [results.estimate(measure, key, seeds, curve_items(results)).value for measure in measures]
            rows.append([ARMS[arm].title, key[1], *(f"{value:.2f}" for value in values)])
    return _table(["arm", "decoding", *(measure.name for measure in measures)], rows)


def _decoders(results: Results) -> list[str]:
    measures = (RARE_F1, PRECISION, RECALL, CHRF, ROUGE, WORDS)
    (greedy, *others), seeds = _curve(results, CE)
    rows = []
    for key in others if seeds else ():
        pairs = (
            [results.estimate(measure, one, seeds, curve_items(results)) for one in (key, greedy)]
            for measure in measures
        )
        rows.append(
            [key[1], *(_judged(measure, one - other) for measure, (one, other) in zip(measures, pairs, strict=True))]
        )
    return _table(["decoding", *(measure.name for measure in measures)], rows)


def _rates(results: Results) -> list[str]:
    rows = []
    for arm, losses in results.trials.items():
        used = "-"
        if set(losses) == set(RATES):
            best = min(RATES, key=losses.__getitem__)
            used = f"{best:g}, {'at the edge' if best in (min(RATES), max(RATES)) else 'not at the edge'}"
        rows.append([ARMS[arm].title, *(_number(losses.get(rate)) for rate in RATES), used])
    return _table(["arm", *(f"{rate:g}" for rate in RATES), "used"], rows)


def pictures(all_results: Sequence[Results]) -> list[Frontier]:
    """The pictures of each task with runs: every greedy arm, on the items and seeds of the curves."""
    drawn = []
    for results in all_results:
        arms = {
            ARMS[arm].title: tuple(one.value for one in _point(results, (arm, GREEDY.name), of_curves))
            for arm, seeds in _greedy(results)
            if (of_curves := [seed for seed in seeds if seed in CURVE_SEEDS])
        }
        curves = {}
        for arm in CURVES:
            points = {name: (x.value, y.value) for name, (x, y) in curve_points(results, arm).items()}
            for kind in ("offset", "temperature") if points else ():
                inside = [name for name in points if name.startswith(kind)]
                order = sorted([GREEDY.name, *inside], key=lambda name: _strength(name))
                curves[f"{ARMS[arm].title}, {kind}"] = [points[name] for name in order]
        drawn.append(Frontier(_title(results), arms, curves))
    return drawn


def _strength(decoding: str) -> float:
    return DECODINGS[decoding].offset + DECODINGS[decoding].temperature


def page_with(page: str, text: str, device: str) -> str:
    """The page with the text between its marks replaced; without marks they are added at its end."""
    begin, end = marks(device)
    if begin not in page:
        page = f"{page.rstrip()}\n\n{begin}\n{end}\n".lstrip()
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the page is that of the results")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--results", type=Path, help="the folder of the JSONs")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    folder = options.results or results_of(options.device)
    try:
        all_results = read(folder)
    except (OSError, ResultError) as error:
        print(f"evidence.report: error: {error}", file=sys.stderr)
        return 1
    before = options.page.read_text(encoding="utf-8") if options.page.exists() else ""
    after = page_with(before, tables(all_results), options.device)
    picture = options.page.with_name(f"evidence-{options.device}.png")
    if options.check:
        current = after == before and picture.exists()
        if not current:
            print(f"{options.page}: its tables are not those of {folder}: run python -m evidence.report")
        return int(not current)
    draw_frontiers(picture, pictures(all_results))
    harness.write_whole(options.page, after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
