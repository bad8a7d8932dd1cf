"""The weightings against the reference in float64, and properties of their formulas."""

from __future__ import annotations

import dataclasses
import functools
import math
import pickle

import pytest
import torch

from pdl_ext import PowerLaw, TokenFrequency, functional, reference
from pdl_ext.weighting import Adaptive, ClassBalanced, Face, Uniform, Weighting

SETTINGS = [
    {},
    {"alpha": 0.0},
    {"alpha": 0.25},
    {"alpha": 1.5},
    {"alpha": 3.0, "smoothing": 0.1},
    {"epsilon": 1e-3},
    {"epsilon": 0.0},
    {"smoothing": 0.0},
    {"smoothing": 10.0},
    {"relative": False},
    {"normalize": "types"},
    {"normalize": "none"},
    {"max_weight": 50.0, "normalize": "none"},
    {"max_weight": 5000.0},
    {"max_weight": math.inf},
    {"blend": 0.3},
    {"blend": 0.0},
    {"fixed": {0: 0.0, 4: 2.5}},
    {"fixed": {0: 1.0}, "blend": 0.5, "normalize": "types"},
    {"alpha": 4.0, "relative": False, "normalize": "none"},  # weights down to 1e-24
    {"alpha": 0.5, "relative": False, "smoothing": 0.0, "epsilon": 1e-7, "normalize": "types", "max_weight": 3.0},
]


def counts_of_a_corpus(vocab_size, device="cpu"):
    counts = (1e6 / torch.arange(1, vocab_size + 1) ** 1.3).long()
    counts[vocab_size // 2 :: 3] = 0
    return counts.to(device)


def assert_weights_match(counts, weighting):
    got = functional.token_weights(counts, weighting)
    expected = reference.token_weights(counts, weighting)
    assert got.dtype == torch.float32
    assert got.device == counts.device
    # One rounding to float32 of a float64 result.
    torch.testing.assert_close(got.double(), expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_options_match_reference(device, settings):
    assert_weights_match(counts_of_a_corpus(1009, device), PowerLaw(**settings))


@pytest.mark.parametrize(
    "vocab_size",
    [
        5,  # a hand's worth
        4097,  # two parts of the thread pool, the second of one entry
        50257,  # GPT-2
        128256,  # LLaMA 3
        270_001,  # CUDA: some threads have one entry beside a pair
    ],
)
def test_sizes_match_reference(device, vocab_size):
    assert_weights_match(counts_of_a_corpus(vocab_size, device), PowerLaw(alpha=0.7))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_zero_counts_match_reference(device, settings):
    assert_weights_match(torch.zeros(11, dtype=torch.int64, device=device), PowerLaw(**settings))


def test_huge_counts_match_reference(device):
    # A corpus of 2^50 tokens: float32 counts would lose the small ones.
    assert_weights_match(torch.tensor([2**50, 2**33, 1, 0], device=device), PowerLaw())


def test_noncontiguous_counts(device):
    counts = counts_of_a_corpus(20, device)
    expected = functional.token_weights(counts[::2].contiguous(), PowerLaw())
    assert torch.equal(functional.token_weights(counts[::2], PowerLaw()), expected)


def test_by_hand(device):
    counts = torch.tensor([3, 1, 0], device=device)
    # f = (n + 1) / (4 + 3), w = 1 / f = [7/4, 7/2, 7]; mean over the corpus (3 * 7/4 + 7/2) / 4 = 35/16.
    weights = functional.token_weights(counts, PowerLaw(epsilon=0.0))
    torch.testing.assert_close(weights, torch.tensor([0.8, 1.6, 3.2], device=device))


@pytest.mark.parametrize("alpha", [0.25, 1.0, 1.5])
def test_zero_counts_weigh_the_same(device, alpha):
    weights = functional.token_weights(torch.zeros(101, dtype=torch.int64, device=device), PowerLaw(alpha=alpha))
    assert torch.equal(weights, torch.ones_like(weights))


def test_an_unseen_token_weighs_like_one_seen_smoothing_times(device):
    counts = torch.tensor([100, 2, 0], device=device)
    unseen = functional.token_weights(counts, PowerLaw(smoothing=2.0, normalize="none"))[2]
    shifted = functional.token_weights(counts + 2, PowerLaw(smoothing=0.0, normalize="none"))[2]
    assert unseen == shifted


@pytest.mark.parametrize("alpha", [0.25, 1.0, 1.5])
def test_mean_weight_is_one(device, alpha):
    counts = counts_of_a_corpus(1009, device)
    corpus = functional.token_weights(counts, PowerLaw(alpha=alpha)).double()
    assert float((corpus * counts).sum() / counts.sum()) == pytest.approx(1, rel=1e-6)
    types = functional.token_weights(counts, PowerLaw(alpha=alpha, normalize="types")).double()
    assert float(types.mean()) == pytest.approx(1, rel=1e-6)
    # Blending with 1 keeps it.
    blended = functional.token_weights(counts, PowerLaw(alpha=alpha, blend=0.4)).double()
    assert float((blended * counts).sum() / counts.sum()) == pytest.approx(1, rel=1e-6)


def test_mean_of_the_free_tokens_is_one_beside_fixed_ones(device):
    counts = torch.tensor([50, 30, 20, 7], device=device)
    weights = functional.token_weights(counts, PowerLaw(fixed={0: 9.0})).double()
    assert weights[0] == 9
    assert float((weights * counts)[1:].sum() / counts[1:].sum()) == pytest.approx(1, rel=1e-6)


def test_rarer_tokens_weigh_more(device):
    counts = torch.arange(50, 0, -1, device=device)
    assert (functional.token_weights(counts, PowerLaw(alpha=0.5)).diff() > 0).all()


def test_max_weight_limits(device):
    counts = counts_of_a_corpus(101, device)
    free = functional.token_weights(counts, PowerLaw(normalize="none"))
    limited = functional.token_weights(counts, PowerLaw(normalize="none", max_weight=100.0))
    assert free.max() > 100
    assert torch.equal(limited, free.clamp(max=100))


def test_weights_of_a_frequency(device):
    counts = counts_of_a_corpus(101, device)
    frequency = TokenFrequency.from_counts(counts)
    assert torch.equal(PowerLaw().weights(frequency), functional.token_weights(counts, PowerLaw()))


def test_reference_settings():
    settings = PowerLaw.reference()
    assert (settings.alpha, settings.epsilon, settings.smoothing) == (1.0, 1e-7, 0.0)
    assert (settings.relative, settings.normalize, settings.max_weight) == (False, "none", None)
    weights = functional.token_weights(torch.tensor([4, 0]), settings)
    torch.testing.assert_close(weights, torch.tensor([0.25, 1e7]))


def test_frozen_and_hashable():
    weighting = PowerLaw(alpha=0.5, fixed={1: 2.0})
    with pytest.raises(dataclasses.FrozenInstanceError):
        weighting.alpha = 1.0
    assert hash(weighting) == hash(PowerLaw(alpha=0.5, fixed={1: 2.0}))
    assert weighting == PowerLaw(alpha=0.5, fixed={1: 2.0})
    assert len({weighting, PowerLaw(alpha=0.5, fixed={1: 2.0}), PowerLaw(alpha=0.6)}) == 2
    assert dataclasses.replace(weighting, alpha=1.5).alpha == 1.5
    pickled = pickle.dumps(weighting, protocol=2)
    assert pickle.loads(pickled) == weighting
    # As it was named when all of it was one file.
    assert b"cpdl_ext.weighting\nPowerLaw\n" in pickled


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -0.5}, r"alpha: got -0.5, expected a number from 0 to 10000"),
        ({"alpha": math.nan}, r"alpha: got nan, expected a number from"),
        ({"alpha": math.inf}, r"alpha: got inf, expected a number from"),
        ({"alpha": "1"}, r"alpha: got '1' of type str, expected a number from"),
        ({"alpha": True}, r"alpha: got True of type bool, expected a number from"),
        ({"epsilon": -1e-9}, r"epsilon: got -1e-09, expected 0 or a number from"),
        ({"epsilon": 0.0, "smoothing": 0.0}, r"epsilon: got 0 with smoothing 0, expected one of them > 0"),
        ({"smoothing": -1}, r"smoothing: got -1, expected 0 or a number from"),
        ({"normalize": "mean"}, r"normalize: got 'mean', expected one of \['corpus', 'none', 'types'\]"),
        ({"max_weight": 0.0}, r"max_weight: got 0.0, expected a number > 0"),
        ({"blend": 1.5}, r"blend: got 1.5, expected a number from 0 to 1"),
        ({"blend": -0.1}, r"blend: got -0.1, expected a number from 0 to 1"),
        ({"fixed": {-1: 1.0}}, r"fixed: got -1, expected token ids that are ints >= 0"),
        ({"fixed": {"eos": 1.0}}, r"fixed: got 'eos', expected token ids that are ints >= 0"),
        ({"fixed": {2: -1.0}}, r"fixed\[2\]: got -1.0, expected a finite number >= 0"),
        ({"fixed": None}, r"fixed: got NoneType, expected a mapping"),
        ({"relative": "no"}, r"relative: got 'no', expected True or False"),
        ({"normalize": ["types"]}, r"normalize: got \['types'\], expected one of"),
        ({"fixed": {2: math.inf}}, r"fixed\[2\]: got inf, expected a finite number"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        PowerLaw(**settings)


def test_alpha_zero_needs_neither_epsilon_nor_smoothing(device):
    weighting = PowerLaw(alpha=0.0, epsilon=0.0, smoothing=0.0)
    weights = functional.token_weights(torch.tensor([3, 0], device=device), weighting)
    assert weights.tolist() == [1.0, 1.0]


def test_fixed_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="fixed: got token id 7, expected ids below the vocabulary size 7"):
        functional.token_weights(torch.ones(7, dtype=torch.int64), PowerLaw(fixed={7: 1.0}))


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        ([1, 2], TypeError, "counts: got list, expected an int64 tensor"),
        (torch.ones(3), TypeError, "counts: got dtype torch.float32, expected int64"),
        (torch.ones(2, 2, dtype=torch.int64), ValueError, r"counts: got shape \[2, 2\], expected \[V\]"),
        (torch.ones(0, dtype=torch.int64), ValueError, r"counts: got shape \[0\], expected \[V\] with V >= 1"),
        (torch.tensor([3, -1]), ValueError, "counts: got a negative count"),
        (torch.tensor([2**62] * 4), ValueError, r"counts: got counts whose sum is past 2\^63"),
    ],
    ids=["list", "dtype", "matrix", "empty", "negative", "sum"],
)
def test_bad_counts_are_refused(counts, error, message):
    with pytest.raises(error, match=message):
        functional.token_weights(counts, PowerLaw())


def test_bad_weighting_is_refused():
    with pytest.raises(TypeError, match="weighting: got float, expected a Weighting, such as PowerLaw"):
        functional.token_weights(torch.ones(3, dtype=torch.int64), 0.5)


# The others of the family.

FAMILY = [
    Uniform,
    Adaptive,
    functools.partial(Adaptive, form="chi2"),
    functools.partial(Adaptive, T=40.0),
    ClassBalanced,
    functools.partial(ClassBalanced, beta=0.0),
    functools.partial(ClassBalanced, beta=0.9999),
    Face,
]
SHARED = [
    {},
    {"normalize": "types"},
    {"normalize": "none"},
    {"normalize": "none", "max_weight": 0.5},
    {"max_weight": 1.3},
    {"blend": 0.3},
    {"blend": 0.0},
    {"fixed": {0: 0.0, 4: 2.5}},
    {"fixed": {0: 1.0}, "blend": 0.5, "normalize": "types"},
    {"fixed": dict.fromkeys(range(7), 3.0)},
]
CORPORA = {
    "a corpus": counts_of_a_corpus(1009),
    "nothing counted": torch.zeros(7, dtype=torch.int64),
    "one type": torch.tensor([0, 0, 0, 5, 0, 0, 0]),
    "equal counts": torch.full((7,), 3),
    "huge counts": torch.tensor([2**50, 2**33, 1, 0, 2, 2**50, 0]),
}


@pytest.mark.parametrize("counts", CORPORA.values(), ids=CORPORA)
@pytest.mark.parametrize("shared", SHARED, ids=str)
@pytest.mark.parametrize("make", FAMILY, ids=lambda make: repr(make()).partition(", normalize")[0])
def test_family_matches_reference(make, shared, counts):
    assert_weights_match(counts, make(**shared))


def test_uniform_is_one(device):
    assert functional.token_weights(torch.tensor([3, 0, 9], device=device), Uniform()).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("form", "g"),
    [("exp", lambda x: math.exp(-1.75 * x)), ("chi2", lambda x: x**2 * math.exp(-1.75 * x))],
    ids=["exp", "chi2"],
)
def test_adaptive_as_published(form, g):
    # The dictionary of the published code: what occurs, by count, behind four special tokens, which weigh 1.
    dictionary = [900, 400, 50, 20, 3, 1]
    median = dictionary[len(dictionary) // 2]
    of_g = [g(count / median) for count in dictionary]
    expected = [value / max(of_g) * (math.e - 1) + 1 for value in of_g]
    counts = torch.tensor([0, 0, 0, 0, *dictionary])
    weighting = Adaptive(form, normalize="none", fixed=dict.fromkeys(range(4), 1.0))
    weights = functional.token_weights(counts, weighting)
    torch.testing.assert_close(weights, torch.tensor([1.0, 1.0, 1.0, 1.0, *expected]))
    assert weights[4:].min() >= 1
    assert weights.max() == pytest.approx(math.e)


def test_adaptive_of_the_never_seen():
    weights = functional.token_weights(torch.tensor([8, 2, 0]), Adaptive(normalize="none"))
    assert weights[2] == weights[1] == pytest.approx(math.e)
    assert functional.token_weights(torch.tensor([8, 2, 0]), Adaptive("chi2", normalize="none"))[2] == 1


def test_class_balanced_by_hand():
    weights = functional.token_weights(torch.tensor([1, 2, 0]), ClassBalanced(0.9, normalize="none"))
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.1 / 0.19, 1.0]))


def test_class_balanced_is_exact_close_to_one():
    weights = functional.token_weights(torch.tensor([4, 1000]), ClassBalanced(1 - 2.0**-50, normalize="none"))
    torch.testing.assert_close(weights, torch.tensor([0.25, 0.001]))


def test_face_by_hand():
    # 1 - [5, 3, 0] / 5, divided by their mean over the types.
    weights = functional.token_weights(torch.tensor([5, 3, 0]), Face(normalize="types"))
    torch.testing.assert_close(weights, torch.tensor([0.0, 0.4, 1.0]) * 3 / 1.4)


@pytest.mark.parametrize("make", FAMILY, ids=lambda make: repr(make()).partition(", normalize")[0])
def test_family_is_kept_by_value(make):
    weighting = make(fixed={1: 2.0})
    assert weighting == make(fixed={1: 2.0})
    assert hash(weighting) == hash(make(fixed={1: 2.0}))
    assert weighting != make(fixed={1: 3.0})
    assert weighting != PowerLaw(fixed={1: 2.0})
    assert pickle.loads(pickle.dumps(weighting)) == weighting
    assert type(weighting).__module__ == "pdl_ext.weighting"
    with pytest.raises(dataclasses.FrozenInstanceError):
        weighting.blend = 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Adaptive("linear"), r"form: got 'linear', expected one of \['chi2', 'exp'\]"),
        (lambda: Adaptive(T=0), "T: got 0, expected a finite number > 0"),
        (lambda: Adaptive(T=math.nan), "T: got nan, expected a finite number > 0"),
        (lambda: ClassBalanced(1.0), r"beta: got 1.0, expected a number from 0 to below 1"),
        (lambda: ClassBalanced(-0.1), r"beta: got -0.1, expected a number from 0 to below 1"),
        (lambda: Face(max_weight=0.0), "max_weight: got 0.0, expected a number > 0"),
        (lambda: Uniform(blend=2.0), r"blend: got 2.0, expected a number from 0 to 1"),
        (lambda: Weighting(normalize="mean"), "normalize: got 'mean', expected one of"),
    ],
)
def test_bad_settings_of_the_family_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_counts_that_none_can_be_give_no_plausible_weight():
    # As CUDA's ops get them, which do not look at the numbers.
    for counts in (torch.tensor([3, -1]), torch.tensor([2**62, 2**62])):
        assert Face().table(counts, None, None).isnan().any()


@dataclasses.dataclass(frozen=True)
class SquareRoot(Weighting):
    def raw(self, counts):
        return counts.double().clamp(min=1).rsqrt()


def test_a_weighting_of_ones_own():
    weights = functional.token_weights(torch.tensor([4, 1, 0]), SquareRoot(normalize="none", fixed={2: 0.0}))
    assert weights.tolist() == [0.5, 1.0, 0.0]
    assert_weights_match(counts_of_a_corpus(101), SquareRoot(blend=0.5))


def test_a_weight_that_is_infinite_for_the_never_seen():
    @dataclasses.dataclass(frozen=True)
    class Infinite(Weighting):
        def raw(self, counts):
            return counts.double().rsqrt()

    weights = functional.token_weights(torch.tensor([4, 1, 0]), Infinite())
    # Of the five tokens counted the mean is 3/5.
    torch.testing.assert_close(weights, torch.tensor([0.5 / 0.6, 1 / 0.6, torch.finfo(torch.float32).max]))
    assert_weights_match(torch.tensor([4, 1, 0]), Infinite())


@pytest.mark.parametrize("settings", [{}, {"alpha": 0.5, "relative": False}, {"smoothing": 0.0, "normalize": "types"}])
def test_the_power_law_by_the_base(settings):
    counts = counts_of_a_corpus(1009)
    weighting = PowerLaw(**settings)
    by_base = Weighting.table(weighting, counts, None, None)
    torch.testing.assert_close(by_base, functional.token_weights(counts, weighting), rtol=3e-7, atol=0)


def test_the_base_alone_is_no_weighting():
    with pytest.raises(TypeError, match="weighting: got Weighting, expected a Weighting, such as PowerLaw"):
        functional.token_weights(torch.ones(3, dtype=torch.int64), Weighting())
