"""The JSONs of the runs, as the sums over clusters from which the report computes everything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evidence.arms import GREEDY
from evidence.bootstrap import Estimate, Statistic, draw, f1, precision, ratio, recall


class ResultError(Exception):
    """JSONs that cannot be compared, or are not those of a run; the message says which and why."""


@dataclass(frozen=True)
class Measure:
    """A number computed from sums over items: `columns` converts a run's items to an array [items, K]."""

    name: str
    columns: Any
    statistic: Statistic


def _nll(bucket: int | None) -> Measure:
    def columns(items: dict[str, Any]) -> np.ndarray:
        both = np.stack([np.asarray(items["nll"], float), np.asarray(items["targets"], float)], axis=-1)
        return both.sum(axis=1) if bucket is None else both[:, bucket]

    name = "nll" if bucket is None else f"nll, {('frequent', 'middle', 'rare')[bucket]}"
    return Measure(name, columns, ratio)


def _mean(name: str, key: str) -> Measure:
    return Measure(
        name, lambda items: np.stack([np.asarray(items[key], float), np.ones(len(items[key]))], axis=-1), ratio
    )


def _rare(name: str, key: str, statistic: Statistic) -> Measure:
    return Measure(name, lambda items: np.asarray(items[key], float), statistic)


NLL = _nll(None)
NLL_BUCKETS = tuple(map(_nll, range(3)))
RARE_F1 = _rare("rare-word F1", "rare", f1)
PRECISION, RECALL = _rare("precision", "rare", precision), _rare("recall", "rare", recall)
NEW_F1 = _rare("F1 of words not in the prompt", "rare_new", f1)
CHRF, ROUGE = _mean("chrF++", "chrf"), _mean("ROUGE-L", "rouge_l")
WORDS = _mean("words", "words")
OF_TARGETS = (NLL, *NLL_BUCKETS)
OF_TEXTS = (RARE_F1, PRECISION, RECALL, NEW_F1, CHRF, ROUGE, WORDS)


@dataclass(frozen=True)
class Results:
    """The runs of one task and device: `runs[arm, decoding][seed]` is a run's JSON."""

    task: str
    runs: dict[tuple[str, str], dict[int, dict[str, Any]]]
    trials: dict[str, dict[float, float]]

    def seeds(self, *keys: tuple[str, str]) -> list[int]:
        """The seeds that all of these have."""
        return sorted(set.intersection(*(set(self.runs.get(key, {})) for key in keys)))

    def estimate(
        self, measure: Measure, key: tuple[str, str], seeds: Sequence[int], items: int | None = None
    ) -> Estimate:
        """A measure of an arm and decoding over seeds, of the first `items` items or of all.

        Estimates of equal seeds and items have the same draws, so that their difference is a paired one.
        """
        sums = []
        for seed in seeds:
            of_items = {name: values[:items] for name, values in self.runs[key][seed]["items"].items()}
            clusters = sorted(set(of_items["cluster"]))
            place = np.array([clusters.index(cluster) for cluster in of_items["cluster"]])
            columns = measure.columns(of_items)
            total = np.zeros((len(clusters), columns.shape[1]))
            np.add.at(total, place, columns)
            sums.append(total)
        return Estimate(measure.statistic(draw(np.stack(sums))))

    def difference(self, measure: Measure, arm: str, baseline: str) -> Estimate | None:
        """A measure of an arm minus that of another, both greedy, over their common seeds; None without any."""
        keys = (arm, GREEDY.name), (baseline, GREEDY.name)
        seeds = self.seeds(*keys)
        if not seeds:
            return None
        first, second = (self.estimate(measure, key, seeds) for key in keys)
        return first - second


def read(folder: Path) -> list[Results]:
    """The results of each task in the folder, in the order of their names.

    Raises OSError for a folder that cannot be read. Raises ResultError without runs, or if those of a task have
    different texts or settings.
    """
    found = [_of_task(path) for path in sorted(folder.iterdir()) if path.is_dir()]
    if not found:
        raise ResultError(f"{folder}: there are no runs; make some by python -m evidence.plan --budget 90m")
    return found


def _of_task(folder: Path) -> Results:
    runs: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    trials: dict[str, dict[float, float]] = {}
    first: tuple[Path, tuple[Any, ...]] | None = None
    for path in sorted(folder.rglob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            run, same = content["run"], (content["digest"], content["settings"])
            if run["trial"]:
                trials.setdefault(run["arm"], {})[run["rate"]] = content["validation_loss"]
            else:
                runs.setdefault((run["arm"], run["decoding"]), {})[run["seed"]] = content
        except (ValueError, KeyError, TypeError) as error:
            raise ResultError(f"{path}: no JSON of a run: {error!r}") from error
        first = first or (path, same)
        if same != first[1]:
            raise ResultError(f"{path}: got {same}, expected {first[1]} as in {first[0]}")
    return Results(folder.name, runs, trials)
