"""Numbers of any kind: NumPy's are accepted, with the same meaning."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from pdl_ext import PDLLoss, PowerLaw, TokenFrequency, functional
from pdl_ext.provenance import TargetPolicy

VOCAB = 9
COUNTS = torch.arange(VOCAB) + 1
LOGITS = torch.randn(2, 3, VOCAB, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([[1, 8, 2], [4, 2, 0]])
FLOATS = (np.float16, np.float32, np.float64, np.longdouble, Fraction)
INTEGERS = (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [*FLOATS, *INTEGERS])
def test_options_that_are_numbers(kind):
    # Exact in all of them.
    one = kind(1)
    for options in (
        {"label_smoothing": one},
        {"z_loss": one},
        {"softcap": one},
        {"logit_scale": one},
        {"normalizer": one},
    ):
        plain = {name: 1.0 for name in options}
        assert torch.equal(
            functional.pdl_loss(LOGITS, TARGETS, **options), functional.pdl_loss(LOGITS, TARGETS, **plain)
        )
        if "normalizer" not in options:
            assert torch.equal(PDLLoss(COUNTS, **options)(LOGITS, TARGETS), PDLLoss(COUNTS, **plain)(LOGITS, TARGETS))
    for name in ("alpha", "epsilon", "smoothing", "max_weight", "blend"):
        weighting = PowerLaw(**{name: one})
        assert weighting == PowerLaw(**{name: 1.0})
        assert type(getattr(weighting, name)) is float
    assert PowerLaw(fixed={2: one}).fixed == {2: 1.0}
    loss = PDLLoss(COUNTS, alpha=kind(2), epsilon=one)
    assert loss.weighting == PowerLaw(alpha=2.0, epsilon=1.0)
    loss.blend = kind(0)
    assert loss.blend == 0.0


@pytest.mark.parametrize("kind", INTEGERS)
def test_options_that_are_integers(kind):
    loss = functional.pdl_loss(LOGITS, TARGETS, ignore_index=2)
    assert torch.equal(functional.pdl_loss(LOGITS, TARGETS, ignore_index=kind(2)), loss)
    hidden, weight = torch.ones(2, 3, 4), torch.ones(VOCAB, 4)
    functional.linear_pdl_loss(hidden, weight, TARGETS, ignore_index=kind(2), max_chunk_bytes=kind(100))
    assert functional.count_tokens(TARGETS, kind(VOCAB), ignore_index=kind(2)).tolist() == [1, 1, 0, 0, 1, 0, 0, 0, 1]
    frequency = TokenFrequency(kind(VOCAB), ignore_index=kind(2))
    assert (type(frequency.vocab_size), type(frequency.ignore_index)) == (int, int)
    online = PDLLoss(vocab_size=kind(VOCAB), ignore_index=kind(2), sync_every=kind(3))
    online(LOGITS, TARGETS)
    assert online.frequency.counts.sum() == 4
    assert PowerLaw(fixed={kind(2): 0.5}) == PowerLaw(fixed={2: 0.5})
    assert functional.token_weights(COUNTS, PowerLaw(fixed={kind(2): 0.5}))[2] == 0.5
    assert TargetPolicy(ignore_index=kind(2)) == TargetPolicy(ignore_index=2)


@pytest.mark.parametrize("wrong", [True, np.True_, "1", 1j, None, torch.ones(()), [1.0]], ids=repr)
def test_what_is_no_number(wrong):
    with pytest.raises(TypeError, match="label_smoothing: got"):
        functional.pdl_loss(LOGITS, TARGETS, label_smoothing=wrong)
    with pytest.raises(TypeError, match="alpha: got"):
        PowerLaw(alpha=wrong)
    with pytest.raises(ValueError, match="ignore_index: got"):
        functional.pdl_loss(LOGITS, TARGETS, ignore_index=wrong)


def test_a_mapping_of_fixed_weights_is_copied():
    fixed = {2: 0.5}
    weighting = PowerLaw(fixed=fixed)
    fixed[2] = 7.0
    assert weighting.fixed == {2: 0.5}


@pytest.mark.parametrize("zero", [0, 0.0, np.int64(0), torch.zeros(()), torch.zeros((), dtype=torch.int64)], ids=repr)
@pytest.mark.parametrize("reduction", ["mean", "token_mean"])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_a_normalizer_of_zero(zero, reduction, z_loss):
    """The number of labels of a micro-batch that is all masked: nothing to learn, and no NaN."""
    options = {"normalizer": zero, "reduction": reduction, "z_loss": z_loss}
    logits = LOGITS.clone().requires_grad_()
    loss = functional.pdl_loss(logits, TARGETS, **options)
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()
    hidden = torch.ones(2, 3, 4, requires_grad=True)
    loss = functional.linear_pdl_loss(hidden, torch.randn(VOCAB, 4), TARGETS, **options)
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
    all_masked = functional.pdl_loss(LOGITS, torch.full_like(TARGETS, -100), **options)
    assert all_masked == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_normalizer_past_float32(dtype):
    loss = functional.pdl_loss(LOGITS.to(dtype), TARGETS, normalizer=1e300)
    assert loss == functional.pdl_loss(LOGITS.to(dtype), TARGETS, normalizer=torch.tensor(1e300, dtype=torch.float64))


def test_a_symbolic_normalizer():
    class Module(torch.nn.Module):
        def forward(self, logits, targets):
            return functional.pdl_loss(logits, targets, normalizer=logits.shape[0])

    rows = torch.export.Dim("rows", min=2, max=100)
    arguments = (LOGITS.reshape(6, VOCAB), TARGETS.reshape(6))
    exported = torch.export.export(Module(), arguments, dynamic_shapes=({0: rows}, {0: rows}))
    for n in (6, 4):
        logits, targets = (argument[:n] for argument in arguments)
        torch.testing.assert_close(
            exported.module()(logits, targets), functional.pdl_loss(logits, targets, normalizer=n), rtol=1e-6, atol=0
        )


EXTREMES = [
    torch.tensor([10**15, 10**15 - 1, 3, 1, 0]),
    torch.tensor([2**62, 1, 0, 0, 2**40]),
    torch.tensor([0, 0, 7, 0, 0]),
    torch.zeros(5, dtype=torch.int64),
]


OPTIONS = {
    "alpha": (1e-300, 30.0, 1e4),
    "epsilon": (0.0, 1e-100, 1e18),
    "smoothing": (1e-100, 1.0, 1e18),
    "normalize": ("corpus", "types", "none"),
    "max_weight": (None, 1e-300, 1e300),
}
# A third of all combinations, in which any four of the options meet in every way.
LAWS = [
    {name: values[place] for (name, values), place in zip(OPTIONS.items(), places, strict=True)}
    for places in itertools.product(range(3), repeat=len(OPTIONS))
    if sum(places) % 3 == 0
]


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("law", LAWS, ids=lambda law: "-".join(map(str, law.values())))
def test_weights_are_finite(device, law, relative):
    weighting = PowerLaw(relative=relative, **law)
    for counts in EXTREMES:
        weights = functional.token_weights(counts.to(device), weighting)
        assert weights.isfinite().all(), counts
        assert (weights >= 0).all()
        # A mean of 1 is one of weights that are not all 0.
        if law["normalize"] == "corpus" and counts.any():
            assert weights[counts.to(device) > 0].any()


def test_weights_at_an_extreme_by_hand(device):
    # 10^15 and one less: (1 - 1e-15)^-30 is 1 + 3e-14, so both weigh 1, and what is rarer takes no part in the mean.
    counts = torch.tensor([10**15, 10**15 - 1], device=device)
    weights = functional.token_weights(counts, PowerLaw(30.0, 0.0, smoothing=0.5))
    torch.testing.assert_close(weights, torch.ones(2, device=device), rtol=1e-6, atol=0)
    # Of two that are seen as often, and one never: its weight is past float32.
    weights = functional.token_weights(torch.tensor([10**15, 10**15, 0], device=device), PowerLaw(30.0, 0.0))
    assert weights.tolist() == [1.0, 1.0, torch.finfo(torch.float32).max]


@pytest.mark.devices("emulated", "cuda")
def test_counts_that_are_none_give_no_number(device):
    # Checking them would stop the stream.
    weights = PowerLaw().table(torch.tensor([5, -1, 3], device=device), None, None)
    assert weights.isnan().all()
    for wrong in ([2**62] * 3, [2**62, 2**62, 0]):
        weights = PowerLaw().table(torch.tensor(wrong, device=device), None, None)
        assert weights.isnan().all()


@pytest.mark.parametrize(
    ("load", "message"),
    [
        ([3, -1], "counts: got a negative count, expected all >= 0"),
        ([2**62] * 2, r"counts: got counts whose sum is past 2\^63, expected an int64 sum"),
        ([2**63 - 1, 1], r"counts: got counts whose sum is past 2\^63, expected an int64 sum"),
    ],
)
def test_counts_that_are_none_are_refused_where_they_come_in(load, message):
    counts = torch.tensor(load)
    for take in (TokenFrequency.from_counts, PDLLoss, lambda c: functional.token_weights(c, PowerLaw())):
        with pytest.raises(ValueError, match=message):
            take(counts)
    frequency = TokenFrequency(2)
    state = {**frequency.state_dict(), "counts": counts}
    with pytest.raises(RuntimeError, match=message):
        frequency.load_state_dict(state)
    loss = PDLLoss(vocab_size=2)
    with pytest.raises(RuntimeError, match=message):
        loss.load_state_dict({**loss.state_dict(), "frequency.counts": counts})
    assert not frequency.counts.any()
    assert math.isfinite(float(loss(torch.zeros(1, 2), torch.tensor([1]))))


def test_a_sum_just_below_the_limit_is_taken():
    for counts in ([2**63 - 1], [2**63 - 513, 256, 256]):
        frequency = TokenFrequency.from_counts(torch.tensor(counts))
        assert frequency.total == 2**63 - 1
        assert functional.token_weights(frequency.counts, PowerLaw()).isfinite().all()


@pytest.mark.parametrize("assign", [False, True])
def test_counts_of_another_dtype_are_not_loaded(assign):
    frequency = TokenFrequency(2)
    state = {**frequency.state_dict(), "counts": torch.ones(2, dtype=torch.bfloat16)}
    with pytest.raises(RuntimeError, match=r"counts: got dtype torch\.bfloat16, expected int64"):
        frequency.load_state_dict(state, assign=assign)
    assert frequency.counts.dtype == torch.int64


SPARSE = {
    "coo": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor([x[0], x[1]], layout=torch.jagged),
    "nested and strided": lambda x: torch.nested.nested_tensor([x[0], x[1]]),
}


@pytest.mark.parametrize("kind", SPARSE)
def test_tensors_that_are_not_dense(kind):
    logits = SPARSE[kind](LOGITS[:, 0].clone())
    targets = TARGETS[:, 0]
    hidden, weight = torch.ones(2, VOCAB), torch.ones(4, VOCAB)
    with pytest.raises(TypeError, match=r"logits: got (layout|a nested tensor).*, expected a dense tensor"):
        functional.pdl_loss(logits, targets)
    with pytest.raises(TypeError, match=r"hidden: got (layout|a nested tensor).*, expected a dense tensor"):
        functional.linear_pdl_loss(logits, weight, targets)
    with pytest.raises(TypeError, match=r"weight: got (layout|a nested tensor).*, expected a dense tensor"):
        functional.linear_pdl_loss(hidden, logits, targets)
    if kind != "mkldnn":
        ids = SPARSE[kind](torch.ones(2, VOCAB, dtype=torch.int64))
        for name, call in {
            "targets": lambda: functional.pdl_loss(LOGITS[:, 0], ids),
            "tokens": lambda: functional.count_tokens(ids, VOCAB),
            "counts": lambda: functional.token_weights(ids, PowerLaw()),
        }.items():
            with pytest.raises(TypeError, match=rf"{name}: got (layout|a nested tensor).*, expected a dense tensor"):
                call()


@pytest.mark.parametrize(
    "scripted",
    [
        functional.pdl_loss,
        functional.linear_pdl_loss,
        functional.token_weights,
        functional.count_tokens,
        PDLLoss(vocab_size=VOCAB),
        TokenFrequency(VOCAB),
        torch.nn.Sequential(torch.nn.Linear(3, VOCAB), PDLLoss(vocab_size=VOCAB)),
    ],
    ids=lambda scripted: getattr(scripted, "__name__", type(scripted).__name__),
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_script_is_refused(scripted):
    with pytest.raises(TypeError, match=r"pdl_ext: torch\.jit\.script is not supported, expected torch\.compile"):
        torch.jit.script(scripted)
