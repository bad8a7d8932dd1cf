"""Intervals and tests over seeds and clusters, from sums."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

NUMBER = 10_000


@functools.lru_cache(maxsize=8)
def multiplicities(seeds: int, clusters: int, number: int = NUMBER) -> tuple[np.ndarray, np.ndarray]:
    """How often each draw has each seed [number, seeds] and each cluster [number, clusters].

    Every seed saw the same clusters, so a draw selects its clusters once, for all its seeds.
    """
    generator = np.random.default_rng(0)
    return tuple(generator.multinomial(n, np.full(n, 1 / n), size=number).astype(float) for n in (seeds, clusters))


def draw(sums: np.ndarray, number: int = NUMBER) -> np.ndarray:
    """Sums [seeds, clusters, K] added over each draw's seeds and clusters: [1 + number, K]; draw 0 is all of them."""
    of_seeds, of_clusters = multiplicities(*sums.shape[:2], number)
    drawn = np.einsum("bs,bsk->bk", of_seeds, np.stack([of_clusters @ one for one in sums], axis=1))
    return np.concatenate([sums.sum(axis=(0, 1))[None], drawn])


@dataclass(frozen=True)
class Estimate:
    """A statistic of all the data, at index 0, and of each draw after it."""

    values: np.ndarray

    @property
    def value(self) -> float:
        return float(self.values[0])

    @property
    def draws(self) -> np.ndarray:
        return self.values[1:]

    def __sub__(self, other: Estimate) -> Estimate:
        """The difference of estimates from the same draws."""
        return Estimate(self.values - other.values)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval, by percentiles."""
        low, high = np.percentile(self.draws, [2.5, 97.5])
        return float(low), float(high)

    def p_above(self, bound: float) -> float:
        """One-sided: the share of draws at or below the bound, with one added to both counts."""
        return float((1 + (self.draws <= bound).sum()) / (1 + len(self.draws)))


def holm(p: Sequence[float]) -> list[float]:
    """The p-values adjusted for their number, in their order (Holm 1979)."""
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda index: p[index])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = largest
    return adjusted


def verdict(interval: tuple[float, float], margin: float | None = None) -> str:
    """An interval of a difference in a word or two."""
    low, high = interval
    if low > 0 or high < 0:
        return "higher" if low > 0 else "lower"
    if margin is not None and -margin <= low and high <= margin:
        return f"no difference within ±{margin:g}"
    return "inconclusive"


def frontier(points: Sequence[tuple[Estimate, Estimate]], x: Estimate) -> Estimate:
    """The largest y at x or beyond of the points (x, y), and of mixtures of two of them, in each draw.

    Beyond the last point it is that point's y, so a value there is compared with a point of smaller x.
    """
    pairs = [(one.values, other.values) for one, other in points]
    at = np.minimum(x.values, np.max([one for one, _ in pairs], axis=0))
    best = np.full(at.shape, -np.inf)
    for x_1, y_1 in pairs:
        best = np.where(x_1 >= at, np.maximum(best, y_1), best)
        for x_2, y_2 in pairs:
            between = (x_1 < at) & (at < x_2)
            share = (at - x_1) / np.where(between, x_2 - x_1, 1.0)
            best = np.where(between, np.maximum(best, y_1 + share * (y_2 - y_1)), best)
    return Estimate(best)


Statistic = Callable[[np.ndarray], np.ndarray]


def ratio(sums: np.ndarray) -> np.ndarray:
    """The quotient of the two numbers in [..., 2]."""
    return sums[..., 0] / sums[..., 1]


def f1(sums: np.ndarray) -> np.ndarray:
    """F1 in percent, from [..., 3]: words in references, in texts, in both; 0 without any."""
    total = sums[..., 0] + sums[..., 1]
    return 200 * sums[..., 2] / np.where(total > 0, total, 1)


def precision(sums: np.ndarray) -> np.ndarray:
    """Likewise, the share of the texts' words that are in the references."""
    return 100 * sums[..., 2] / np.maximum(sums[..., 1], 1)


def recall(sums: np.ndarray) -> np.ndarray:
    """Likewise, the share of the references' words that are in the texts."""
    return 100 * sums[..., 2] / np.maximum(sums[..., 0], 1)
