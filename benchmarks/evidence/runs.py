"""The runs: their definition, their files, and the order in which they matter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from evidence.arms import ARMS, CE, CURVES, GREEDY, PDL, SHUFFLED, ZERO_SHOT
from evidence.tasks import TASKS

RATES = (1e-4, 3e-4, 1e-3)
RATE_ARMS, RATE_SEED = (CE, PDL), 0
# Curves need many generations; their seeds are those that every arm has.
CURVE_SEEDS = range(3)


@dataclass(frozen=True)
class Run:
    """A training, or an existing one, and its measurements.

    With a `rate` it is a trial of this learning rate, of which only the validation loss is used. Without, the rate is
    the one chosen by the trials.
    """

    task: str
    arm: str
    seed: int
    decoding: str = GREEDY.name
    rate: float | None = None

    @property
    def name(self) -> str:
        if self.rate is not None:
            return f"rate/{self.arm}-{self.rate:g}"
        decoding = "" if self.decoding == GREEDY.name else f"-{self.decoding}"
        return f"{self.arm}{decoding}-seed{self.seed}"

    @property
    def kind(self) -> str:
        """Runs of one kind and task take the same time."""
        if self.rate is not None:
            return "rate"
        if self.arm == ZERO_SHOT:
            return "zero-shot"
        return "training" if self.decoding == GREEDY.name else "decoding"

    def file(self, results: Path) -> Path:
        return results / self.task / f"{self.name}.json"


def trials(task: str, arm: str) -> list[Run]:
    """The trials by which an arm's learning rate is chosen."""
    return [Run(task, arm, RATE_SEED, rate=rate) for rate in RATES]


def planned(tasks: Sequence[str] = tuple(TASKS)) -> list[Run]:
    """All runs, the most important first; every run comes after those that it needs."""
    # The first two tasks are enough for a page; then the third is as important as they were.
    first, rest = list(tasks[:2]), list(tasks[2:])
    return [run for group in (first, *([name] for name in rest)) for run in _of_group(group)]


def _of_group(tasks: Sequence[str]) -> Iterator[Run]:
    for task in tasks:
        yield Run(task, ZERO_SHOT, 0)
        for arm in RATE_ARMS:
            yield from trials(task, arm)
    primary = (CE, PDL, SHUFFLED)
    for seed in ARMS[CE].seeds:
        for task in tasks:
            yield from (Run(task, arm, seed) for arm in primary)
    for seed in CURVE_SEEDS:
        for task in tasks:
            yield from (Run(task, arm, seed, decoding.name) for arm in CURVES for decoding in CURVES[arm])
        for task in tasks:
            yield from (
                Run(task, name, seed)
                for name, arm in ARMS.items()
                if name not in (*primary, ZERO_SHOT) and seed in arm.seeds
            )
