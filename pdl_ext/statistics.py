"""Statistics of counts, and of the weights of a weighting over them, to choose a weighting by."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pdl_ext.frequency import TokenFrequency
from pdl_ext.weighting import PowerLaw, Weighting

__all__ = [
    "MOST_FREQUENT",
    "WeightStatistics",
    "alpha_statistics",
    "log_spaced_ranks",
    "weight_statistics",
    "zipf_slope",
]

# How many of the most frequent types the statistics sum up; in text these are mostly function words.
MOST_FREQUENT = 100


@dataclass(frozen=True)
class WeightStatistics:
    """The weights w of a weighting over a corpus with counts n.

    Where nothing was counted, effective_fraction, mass_of_most_frequent and weight_of_rarest_seen are NaN.

    Attributes:
        effective_fraction: (sum n w)^2 / (N sum n w^2), the share of an unweighted sample that has the same variance.
        mass_of_most_frequent: the share of sum n w that the MOST_FREQUENT most frequent types have.
        weight_of_most_frequent: the weight of the most frequent type.
        weight_of_rarest_seen: the weight of the rarest type that was seen.
        largest: the largest weight of any type, seen or not.
    """

    weighting: Weighting
    effective_fraction: float
    mass_of_most_frequent: float
    weight_of_most_frequent: float
    weight_of_rarest_seen: float
    largest: float


def alpha_statistics(frequency: TokenFrequency, alpha: float) -> WeightStatistics:
    """The statistics of PowerLaw with this exponent, its other options at their defaults.

    Raises TypeError or ValueError for an alpha that PowerLaw does not accept.
    """
    return weight_statistics(frequency, PowerLaw(alpha=alpha))


def weight_statistics(frequency: TokenFrequency, weighting: Weighting) -> WeightStatistics:
    """The statistics of a weighting over a corpus."""
    weights = weighting.weights(frequency).double()
    order = torch.argsort(frequency.counts, descending=True, stable=True)
    counts, weights = frequency.counts[order].double(), weights[order]
    seen = counts > 0
    mass = counts * weights
    squares = mass * weights
    total = mass.sum()
    return WeightStatistics(
        weighting=weighting,
        effective_fraction=float(total**2 / (counts.sum() * squares.sum())),
        mass_of_most_frequent=float(mass[:MOST_FREQUENT].sum() / total),
        weight_of_most_frequent=float(weights[0]),
        weight_of_rarest_seen=float(weights[seen][-1]) if bool(seen.any()) else math.nan,
        largest=float(weights.max()),
    )


def zipf_slope(counts: torch.Tensor) -> float | None:
    """The slope of log count over log rank: -1 is Zipf's law. None with fewer than two types seen.

    counts: int64 [V]. Least squares over ranks that are evenly spaced in their logarithm, since almost all ranks are in
    the last decade.
    """
    seen = torch.sort(counts[counts > 0], descending=True).values.double()
    if seen.numel() < 2:
        return None
    ranks = log_spaced_ranks(seen.numel(), 200)
    x, y = (ranks + 1).double().log(), seen[ranks].log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def log_spaced_ranks(types: int, number: int) -> torch.Tensor:
    """About `number` ranks from 0 to types - 1, both included, with evenly spaced logarithms: int64."""
    exact = torch.logspace(0, math.log10(types), number, dtype=torch.float64, device="cpu") - 1
    return torch.unique(exact.round().long().clamp(0, types - 1))
