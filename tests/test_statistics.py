"""Statistics of counts, against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from pdl_ext import TokenFrequency
from pdl_ext.statistics import alpha_statistics, log_spaced_ranks, weight_statistics, zipf_slope
from pdl_ext.weighting import Adaptive, Face


def frequency_of(*counts):
    return TokenFrequency.from_counts(torch.tensor(counts))


def test_alpha_zero_weighs_nothing():
    statistics = alpha_statistics(frequency_of(5, 0, 3), 0.0)
    assert statistics.effective_fraction == pytest.approx(1.0)
    assert statistics.mass_of_most_frequent == pytest.approx(1.0)
    assert (statistics.weight_of_most_frequent, statistics.weight_of_rarest_seen, statistics.largest) == (1.0, 1.0, 1.0)


def test_alpha_one_by_hand():
    # Smoothed frequencies 8/14, 4/14, 2/14: weights in proportion to 1 : 2 : 4, over the counts 7, 3, 1.
    statistics = alpha_statistics(frequency_of(3, 7, 1), 1.0)
    mean = (7 * 1 + 3 * 2 + 1 * 4) / 11
    assert statistics.weight_of_most_frequent == pytest.approx(1 / mean, rel=1e-5)
    assert statistics.largest == statistics.weight_of_rarest_seen == pytest.approx(4 / mean, rel=1e-5)
    assert statistics.effective_fraction == pytest.approx(17**2 / (11 * (7 + 3 * 4 + 16)), rel=1e-5)


def test_the_rarest_seen_is_not_the_never_seen():
    statistics = alpha_statistics(frequency_of(9, 1, 0), 1.0)
    assert statistics.largest == pytest.approx(2 * statistics.weight_of_rarest_seen, rel=1e-5)


@pytest.mark.parametrize("alpha", [50.0, 1000.0])
def test_a_never_seen_type_of_the_largest_weight_has_no_mass(alpha):
    statistics = alpha_statistics(frequency_of(0, 7, 0), alpha)
    assert statistics.largest == torch.finfo(torch.float32).max
    assert (statistics.effective_fraction, statistics.mass_of_most_frequent) == pytest.approx((1.0, 1.0))


def test_two_types_by_hand():
    assert zipf_slope(torch.tensor([2, 0, 8])) == pytest.approx(-2.0)


def test_the_mass_is_that_of_a_hundred_types():
    # With alpha 1 and large counts each type has the same mass.
    counts = torch.arange(1000, 0, -1) * 10**9
    assert alpha_statistics(TokenFrequency.from_counts(counts), 1.0).mass_of_most_frequent == pytest.approx(
        0.1, rel=1e-3
    )


def test_nothing_counted():
    statistics = alpha_statistics(TokenFrequency(3), 0.5)
    assert math.isnan(statistics.effective_fraction)
    assert math.isnan(statistics.weight_of_rarest_seen)
    assert statistics.largest == 1.0
    assert zipf_slope(torch.zeros(3, dtype=torch.int64)) is None


def test_a_vocabulary_of_one():
    assert alpha_statistics(frequency_of(4), 0.5).effective_fraction == pytest.approx(1.0)
    assert zipf_slope(torch.tensor([4])) is None


@pytest.mark.parametrize("exponent", [-1.0, -0.7, 0.0])
def test_zipf_slope(exponent):
    ranks = torch.arange(1, 5001, dtype=torch.float64)
    counts = (1e12 * ranks**exponent).long()[torch.randperm(5000)]
    assert zipf_slope(counts) == pytest.approx(exponent, abs=1e-6)


def test_log_spaced_ranks():
    for types in (1, 2, 3, 100, 262144):
        ranks = log_spaced_ranks(types, 200)
        assert (ranks[0], ranks[-1]) == (0, types - 1)
        assert (ranks.diff() > 0).all()
        assert len(ranks) <= 200


def test_another_weighting_by_hand():
    # Face weighs 1 - n / 6: 1/2, 0, 5/6, and 1 for what was never seen.
    statistics = weight_statistics(frequency_of(3, 6, 1, 0), Face(normalize="none"))
    assert statistics.weight_of_most_frequent == 0.0
    assert statistics.weight_of_rarest_seen == pytest.approx(5 / 6)
    assert statistics.largest == 1.0
    mass, squares = 3 / 2 + 5 / 6, 3 / 4 + 25 / 36
    assert statistics.effective_fraction == pytest.approx(mass**2 / (10 * squares), rel=1e-5)


def test_the_rarest_seen_need_not_weigh_most():
    statistics = weight_statistics(frequency_of(1000, 300, 100, 50, 20, 1), Adaptive("chi2", normalize="none"))
    assert statistics.weight_of_rarest_seen < statistics.largest
