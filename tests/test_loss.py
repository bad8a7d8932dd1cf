"""PDLLoss: counting during training, weights of a given frequency, checkpoints, and training."""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import math
import pickle
import typing

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pdl_ext import PDLLoss, PowerLaw, TokenFrequency, functional, reference
from pdl_ext.options import DEFAULTS, LossKeywords
from pdl_ext.weighting import Adaptive, ClassBalanced, Face, Uniform

VOCAB = 31


@pytest.fixture
def batch(device):
    def make(seed=0, rows=12, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(rows, VOCAB, generator=generator).to(device, dtype)
        # Squared, so that small ids are frequent.
        targets = (torch.rand(rows, generator=generator) ** 2 * VOCAB).long().to(device)
        return logits, targets

    return make


def corpus_counts(device="cpu"):
    return (1000 / torch.arange(1, VOCAB + 1) ** 1.1).long().to(device)


class TestOnline:
    def test_counts_first_and_weighs_then(self, batch):
        loss_fn = PDLLoss(alpha=0.5)
        seen = None
        for seed in range(3):
            logits, targets = batch(seed)
            loss = loss_fn(logits, targets)
            counted = functional.count_tokens(targets, VOCAB)
            seen = counted if seen is None else seen + counted
            assert torch.equal(loss_fn.frequency.counts, seen)
            weights = functional.token_weights(seen, PowerLaw(alpha=0.5))
            assert torch.equal(loss, functional.pdl_loss(logits, targets, weights))

    def test_first_step_on_uniform_targets_is_cross_entropy(self, batch, device):
        logits, _ = batch(rows=VOCAB)
        targets = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0)).to(device)
        torch.testing.assert_close(PDLLoss()(logits, targets), F.cross_entropy(logits, targets), rtol=1e-6, atol=0)

    def test_first_step_on_other_targets_is_not_cross_entropy(self, batch):
        logits, targets = batch()
        assert len(targets.unique()) < len(targets)
        assert abs(PDLLoss()(logits, targets) - F.cross_entropy(logits, targets)) > 1e-3

    def test_eval_never_counts(self, batch):
        loss_fn = PDLLoss()
        loss_fn(*batch(0))
        counts = loss_fn.frequency.counts.clone()
        loss_fn.eval()
        logits, targets = batch(1)
        loss = loss_fn(logits, targets)
        assert torch.equal(loss_fn.frequency.counts, counts)
        expected = functional.pdl_loss(logits, targets, functional.token_weights(counts, PowerLaw()))
        assert torch.equal(loss, expected)
        loss_fn.train()
        loss_fn(logits, targets)
        assert loss_fn.frequency.total == counts.sum() + len(targets)

    def test_eval_before_any_training_is_cross_entropy(self, batch):
        logits, targets = batch()
        loss_fn = PDLLoss().eval()
        assert torch.equal(loss_fn(logits, targets), functional.pdl_loss(logits, targets))
        assert loss_fn.frequency.total == 0

    def test_vocab_size_from_the_first_logits(self, batch):
        loss_fn = PDLLoss()
        assert loss_fn.frequency is None
        loss_fn(*batch())
        assert loss_fn.frequency.vocab_size == VOCAB
        assert PDLLoss(vocab_size=VOCAB).frequency.vocab_size == VOCAB

    def test_ignored_targets_are_not_counted(self, batch):
        logits, targets = batch()
        targets[:5] = -100
        loss_fn = PDLLoss()
        loss_fn(logits, targets)
        assert loss_fn.frequency.total == 7
        assert loss_fn.frequency.ignored == 5

    def test_shift_counts_what_it_learns(self, batch):
        logits, targets = batch()
        logits, targets = logits.view(2, 6, VOCAB), targets.view(2, 6)
        loss_fn = PDLLoss(shift=True)
        loss = loss_fn(logits, targets)
        assert torch.equal(loss_fn.frequency.counts, functional.count_tokens(targets[:, 1:], VOCAB))
        unshifted = PDLLoss()(logits[:, :-1], targets[:, 1:])
        torch.testing.assert_close(loss, unshifted, rtol=1e-6, atol=0)

    def test_gradient_takes_the_weights_as_constants(self, batch):
        logits, targets = batch()
        leaf = logits.clone().requires_grad_()
        loss_fn = PDLLoss(alpha=0.5)
        loss_fn(leaf, targets).backward()
        weights = functional.token_weights(loss_fn.frequency.counts, PowerLaw(alpha=0.5))
        expected = logits.clone().requires_grad_()
        functional.pdl_loss(expected, targets, weights).backward()
        assert torch.equal(leaf.grad, expected.grad)
        assert leaf.grad.any()

    @pytest.mark.parametrize(
        "bad",
        [
            {"row_weight": torch.ones(5)},
            {"row_weight": torch.ones(12, dtype=torch.int64)},
            {"row_weight": 2.0},
            {"normalizer": -1.0},
            {"normalizer": torch.ones(2)},
            {"normalizer": "rows"},
            {"targets": torch.zeros(11, dtype=torch.int64)},
            {"targets": torch.zeros(12)},
            {"logits": torch.zeros(12, VOCAB + 1)},
            {"logits": torch.zeros(12, VOCAB, dtype=torch.int32)},
        ],
        ids=lambda bad: f"{next(iter(bad))}-{next(iter(bad.values()))!r:.30}",
    )
    def test_refused_input_changes_no_counts(self, bad):
        loss_fn = PDLLoss(vocab_size=VOCAB)
        good = {"logits": torch.zeros(12, VOCAB), "targets": torch.zeros(12, dtype=torch.int64)}
        loss_fn(**good)
        counts = loss_fn.frequency.counts.clone()
        with pytest.raises((TypeError, ValueError)):
            loss_fn(**{**good, **bad})
        assert torch.equal(loss_fn.frequency.counts, counts)
        assert loss_fn.frequency.ignored == 0

    @pytest.mark.parametrize("bad", [VOCAB, -1, -101, 2**40])
    @pytest.mark.parametrize("shift", [False, True])
    def test_refused_target_changes_no_counts(self, bad, shift):
        loss_fn = PDLLoss(vocab_size=VOCAB, shift=shift)
        targets = torch.tensor([1, 2, bad, 3])
        with pytest.raises(IndexError, match=rf"targets: got {bad} at position \[2\]"):
            loss_fn(torch.zeros(4, VOCAB), targets)
        assert not loss_fn.frequency.counts.any()
        assert loss_fn.frequency.out_of_range == 0


class TestGivenFrequency:
    def test_object_tensor_and_path_are_one(self, batch, device, tmp_path):
        frequency = TokenFrequency.from_counts(corpus_counts())
        frequency.save(tmp_path / "counts.safetensors")
        given = [frequency, corpus_counts(), tmp_path / "counts.safetensors", str(tmp_path / "counts.safetensors")]
        losses = [PDLLoss(each, alpha=0.5).to(device)(*batch()) for each in given]
        weights = functional.token_weights(corpus_counts(device), PowerLaw(alpha=0.5))
        for loss in losses:
            assert torch.equal(loss, functional.pdl_loss(*batch(), weights))

    def test_training_does_not_count(self, batch, device):
        loss_fn = PDLLoss(corpus_counts(device))
        loss_fn(*batch())
        assert torch.equal(loss_fn.frequency.counts, corpus_counts(device))

    def test_counts_tensor_is_copied(self):
        counts = corpus_counts()
        loss_fn = PDLLoss(counts)
        counts.zero_()
        assert torch.equal(loss_fn.frequency.counts, corpus_counts())

    def test_a_change_of_the_counts_is_noticed(self, batch, device):
        frequency = TokenFrequency.from_counts(corpus_counts(device))
        loss_fn = PDLLoss(frequency)
        before = loss_fn(*batch())
        frequency.update(torch.full((5000,), VOCAB - 1, device=device))
        weights = functional.token_weights(frequency.counts, PowerLaw())
        assert torch.equal(loss_fn(*batch()), functional.pdl_loss(*batch(), weights))
        assert not torch.equal(loss_fn(*batch()), before)

    def test_fixed_weights(self, batch, device):
        weighting = PowerLaw(fixed={0: 0.0, 3: 2.0})
        loss = PDLLoss(corpus_counts(device), weighting=weighting)(*batch())
        weights = functional.token_weights(corpus_counts(device), weighting)
        assert torch.equal(loss, functional.pdl_loss(*batch(), weights))

    def test_options_reach_the_function(self, batch, device):
        options = {
            "reduction": "token_mean",
            "label_smoothing": 0.1,
            "z_loss": 0.01,
            "softcap": 9.0,
            "logit_scale": 0.5,
        }
        logits, targets = batch()
        targets[::3] = 7
        row_weight = torch.rand(12, generator=torch.Generator().manual_seed(0)).to(device)
        loss_fn = PDLLoss(corpus_counts(device), ignore_index=7, **options)
        loss, stats = loss_fn(logits, targets, row_weight=row_weight, normalizer=3.0, return_stats=True)
        weights = functional.token_weights(corpus_counts(device), PowerLaw())
        expected, expected_stats = functional.pdl_loss(
            logits,
            targets,
            weights,
            row_weight=row_weight,
            normalizer=3.0,
            ignore_index=7,
            return_stats=True,
            **options,
        )
        assert torch.equal(loss, expected)
        for got, wanted in zip(stats, expected_stats, strict=True):
            assert torch.equal(got, wanted)

    def test_inplace_backward(self, batch, device):
        leaf = batch()[0].requires_grad_()
        logits = leaf * 1
        PDLLoss(corpus_counts(device), inplace_backward=True)(logits, batch()[1]).backward()
        assert torch.equal(logits.detach(), leaf.grad)
        assert leaf.grad.any()


@pytest.mark.parametrize("given", [False, True], ids=["online", "given"])
def test_blend_set_while_training(batch, device, given):
    loss_fn = PDLLoss(corpus_counts(device) if given else None, vocab_size=VOCAB, weighting=PowerLaw(blend=0.0)).to(
        device
    )
    logits, targets = batch()
    assert torch.equal(loss_fn(logits, targets), functional.pdl_loss(logits, targets))
    for blend in (0.25, 1.0):
        loss_fn.blend = blend
        assert loss_fn.blend == blend
        loss = loss_fn(logits, targets)
        weights = functional.token_weights(loss_fn.frequency.counts, PowerLaw(blend=blend))
        assert torch.equal(loss, functional.pdl_loss(logits, targets, weights))


@pytest.mark.parametrize("blend", [-0.1, 1.1, float("nan"), "half"])
def test_blend_out_of_range_is_refused(blend):
    loss_fn = PDLLoss(vocab_size=VOCAB)
    with pytest.raises((TypeError, ValueError), match=r"blend: got .*, expected a number from"):
        loss_fn.blend = blend
    assert loss_fn.blend == 1


def test_refused_first_call_leaves_the_vocabulary_open():
    loss_fn = PDLLoss()
    with pytest.raises(IndexError, match="targets: got 11"):
        loss_fn(torch.zeros(1, 11), torch.tensor([11]))
    assert loss_fn(torch.zeros(1, 13), torch.tensor([12])).isfinite()


def test_option_changed_to_nonsense_is_refused_and_leaves_the_old_one():
    loss_fn = PDLLoss(vocab_size=VOCAB, label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing: got 2.0"):
        loss_fn.label_smoothing = 2.0
    assert loss_fn.label_smoothing == 0.1


def test_options_are_attributes_like_any_other():
    loss_fn = PDLLoss(softcap=30.0)
    names = set(LossKeywords.__annotations__)
    assert names <= set(dir(loss_fn))
    assert {name: getattr(PDLLoss, name) for name in names} == DEFAULTS
    assert {name: getattr(loss_fn, name) for name in names} == {**DEFAULTS, "softcap": 30.0}
    assert not hasattr(loss_fn, "softcaps")


def test_a_pickle_with_options_as_plain_attributes_loads():
    logits, targets = torch.randn(4, VOCAB), torch.tensor([1, 0, 2, 1])
    expected = PDLLoss(vocab_size=VOCAB, reduction="sum", label_smoothing=0.1)
    state = expected.__getstate__()
    options = state.pop("_options")
    state.update({name: getattr(options, name) for name in DEFAULTS})
    loaded = PDLLoss.__new__(PDLLoss)
    loaded.__setstate__(copy.deepcopy(state))
    assert loaded(logits, targets) == expected(logits, targets)
    loaded.reduction = "mean"
    assert loaded.reduction == "mean"


def test_what_pickles_and_tools_ask_for_is_public():
    stats = functional.pdl_loss(torch.zeros(2, 3), torch.tensor([0, 1]), return_stats=True)[1]
    for value in (PowerLaw(alpha=0.5), stats):
        kind = type(value)
        assert kind is getattr(importlib.import_module(kind.__module__), kind.__name__)
        assert not any(part in kind.__module__.split(".") for part in ("engine", "power_law"))
        with torch.serialization.safe_globals([kind]):
            saved = io.BytesIO()
            torch.save(value, saved)
            saved.seek(0)
            loaded = torch.load(saved, weights_only=True)
        assert type(loaded) is kind
    calls = (PDLLoss.forward, PDLLoss.linear)
    for function in (functional.pdl_loss, functional.linear_pdl_loss, reference.pdl_loss, PDLLoss.__init__, *calls):
        assert typing.get_type_hints(function)["options"]
        assert set(DEFAULTS) <= set(inspect.signature(function).parameters)


@pytest.mark.parametrize("is_linear", [False, True])
def test_options_of_a_call_are_those_of_a_loss_that_has_them(is_linear):
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 7, 8), torch.randn(50, 8)
    targets = torch.randint(0, 50, (3, 7))
    given = {"shift": True, "softcap": 2.0, "logit_scale": 0.5, "label_smoothing": 0.1, "reduction": "none"}

    def loss_of(loss_fn, **options):
        if is_linear:
            return loss_fn.linear(hidden, weight, targets, **options)
        return loss_fn(hidden @ weight.T, targets, **options)

    loss_fn, expected = PDLLoss(alpha=0.5), PDLLoss(alpha=0.5, **given)
    assert torch.equal(loss_of(loss_fn, **given), loss_of(expected))
    # They are of that call alone, by which it counts as well.
    assert (loss_fn.shift, loss_fn.softcap, loss_fn.reduction) == (False, None, "mean")
    assert torch.equal(loss_fn.frequency.counts, expected.frequency.counts)
    with pytest.raises(ValueError, match="softcap: got -1"):
        loss_of(loss_fn, softcap=-1.0)
    with pytest.raises(TypeError, match="ignore_index: got one in a call, expected none"):
        loss_of(loss_fn, ignore_index=0)
    with pytest.raises(TypeError, match=r"PDLLoss\(\) got an unexpected keyword argument 'softcup'"):
        loss_of(loss_fn, softcup=1.0)
    assert loss_fn.frequency.total == expected.frequency.total


@pytest.mark.parametrize("call", [PDLLoss, functional.pdl_loss, functional.linear_pdl_loss, reference.pdl_loss])
def test_unknown_keyword_is_named(call):
    tensors = (torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]))
    given = {PDLLoss: (), functional.linear_pdl_loss: tensors}.get(call, tensors[1:])
    with pytest.raises(TypeError, match=rf"{call.__name__}\(\) got an unexpected keyword argument 'labelsmoothing'"):
        call(*given, labelsmoothing=0.1)


def test_option_changed_while_training_holds_from_the_next_call():
    logits, targets = torch.randn(4, VOCAB), torch.tensor([1, 0, 2, 1])
    loss_fn = PDLLoss(vocab_size=VOCAB).eval()
    before = loss_fn(logits, targets)
    loss_fn.label_smoothing, loss_fn.ignore_index = 0.1, 2
    expected = PDLLoss(vocab_size=VOCAB, label_smoothing=0.1, ignore_index=2).eval()
    assert loss_fn(logits, targets) == expected(logits, targets) != before
    assert copy.deepcopy(loss_fn)(logits, targets) == expected(logits, targets)


def test_training_goes_on_after_a_first_call_in_inference_mode():
    loss_fn = PDLLoss().eval()
    with torch.inference_mode():
        loss_fn(torch.zeros(1, VOCAB), torch.tensor([1]))
    loss_fn.train()
    logits = torch.zeros(1, VOCAB, requires_grad=True)
    loss_fn(logits, torch.tensor([1])).backward()
    loss_fn.load_state_dict(PDLLoss(vocab_size=VOCAB).state_dict())
    assert loss_fn.frequency.total == 0


class TestWeightings:
    @pytest.mark.parametrize("weighting", [Adaptive(), ClassBalanced(0.99), Face(blend=0.5), Uniform(fixed={3: 0.5})])
    def test_weighs_as_the_weighting_says(self, batch, device, weighting):
        loss_fn = PDLLoss(corpus_counts(device), weighting=weighting)
        logits, targets = batch()
        for counts in (corpus_counts(device), corpus_counts(device).flip(0)):
            loss_fn.frequency = TokenFrequency.from_counts(counts)
            expected = functional.pdl_loss(logits, targets, functional.token_weights(counts, weighting))
            assert torch.equal(loss_fn(logits, targets), expected)

    @pytest.mark.parametrize("weighting", [Adaptive(), ClassBalanced(0.9), Face()])
    def test_learns_online(self, batch, weighting):
        logits, targets = batch()
        expected = functional.token_weights(functional.count_tokens(targets, VOCAB), weighting)
        assert torch.equal(
            PDLLoss(weighting=weighting)(logits, targets), functional.pdl_loss(logits, targets, expected)
        )

    @pytest.mark.parametrize("given", [{}, {"vocab_size": VOCAB}, {"frequency": corpus_counts()}], ids=str)
    def test_uniform_counts_nothing_and_is_cross_entropy(self, batch, device, given):
        loss_fn = PDLLoss(weighting=Uniform(), **given).to(device)
        before = {name: value.clone() for name, value in loss_fn.state_dict().items()}
        logits, targets = batch()
        torch.testing.assert_close(loss_fn(logits, targets), F.cross_entropy(logits, targets), rtol=1e-6, atol=0)
        assert loss_fn(logits, targets, return_stats=True)[1].weight.tolist() == [1.0] * len(targets)
        after = loss_fn.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in after.items())
        loss_fn.load_state_dict(after)
        if given:
            with pytest.raises(ValueError, match="logits: got a vocabulary of 5"):
                loss_fn(torch.zeros(2, 5, device=device), torch.zeros(2, dtype=torch.int64, device=device))

    def test_uniform_with_fixed_weights(self, batch):
        logits, targets = batch()
        loss_fn = PDLLoss(weighting=Uniform(fixed={0: 0.25, 30: 4.0}))
        weights = torch.ones(VOCAB, device=logits.device)
        weights[0], weights[30] = 0.25, 4.0
        for loss in (loss_fn, loss_fn.eval()):
            assert torch.equal(loss(logits, targets), functional.pdl_loss(logits, targets, weights))
        assert loss_fn.frequency is None

    @pytest.mark.devices("cpu", "cuda")
    def test_a_compiled_loss_sees_fixed_weights_that_come_later(self, batch):
        loss_fn = PDLLoss(weighting=Uniform())
        torch._dynamo.reset()
        compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
        compiled(*batch())
        loss_fn.weighting = Uniform(fixed={0: 2.0})
        torch.testing.assert_close(compiled(*batch()), loss_fn(*batch()), rtol=1e-6, atol=0)

    def test_a_fixed_weight_outside_the_vocabulary_counts_nothing(self, batch):
        loss_fn = PDLLoss(weighting=PowerLaw(fixed={50: 1.0}))
        with pytest.raises(ValueError, match="fixed: got token id 50"):
            loss_fn(*batch())
        assert loss_fn.frequency is None

    def test_uniform_takes_no_sync(self):
        with pytest.raises(ValueError, match=r"sync_every: got 2 with weighting=Uniform\(.*, expected None"):
            PDLLoss(weighting=Uniform(), sync_every=2)


class TestWeightDrop:
    def test_drops_weights_of_some_rows(self, batch, device):
        logits, targets = batch(rows=400)
        row_weight = torch.linspace(0.5, 2.0, 400, device=device)
        targets[::7] = -100
        loss_fn = PDLLoss(corpus_counts(device), weight_drop=0.3, reduction="none")
        torch.manual_seed(0)
        first, second = (loss_fn(logits, targets, row_weight=row_weight, return_stats=True)[1] for _ in range(2))
        torch.manual_seed(0)
        losses, again = loss_fn(logits, targets, row_weight=row_weight, return_stats=True)
        assert torch.equal(first.weight, again.weight)
        assert not torch.equal(first.weight, second.weight)
        weights = functional.token_weights(loss_fn.frequency.counts, PowerLaw())[targets.clamp(min=0)]
        dropped = first.weight == row_weight
        counted = targets != -100
        assert 0.2 < dropped[counted].float().mean() < 0.4
        expected = torch.where(counted, torch.where(dropped, row_weight, weights * row_weight), 0.0)
        torch.testing.assert_close(first.weight, expected)
        torch.testing.assert_close(losses, expected * again.nll)

    @pytest.mark.parametrize(("share", "dropped"), [(0.0, False), (1.0, True)])
    def test_none_and_all(self, batch, device, share, dropped):
        logits, targets = batch()
        loss = PDLLoss(corpus_counts(device), weight_drop=share)(logits, targets)
        plain = PDLLoss(weighting=Uniform())(logits, targets)
        assert torch.allclose(loss, plain) == dropped

    def test_evaluation_drops_nothing(self, batch, device):
        logits, targets = batch()
        loss_fn = PDLLoss(corpus_counts(device), weight_drop=1.0).eval()
        assert torch.equal(loss_fn(logits, targets), PDLLoss(corpus_counts(device))(logits, targets))

    @pytest.mark.parametrize("linear", [False, True])
    def test_shift_and_gradient(self, batch, device, linear):
        logits, targets = batch(rows=40)
        logits, targets = logits.view(4, 10, VOCAB), targets.view(4, 10)
        leaf = logits.clone().requires_grad_()
        loss_fn = PDLLoss(corpus_counts(device), weight_drop=0.5, shift=True)
        if linear:
            loss, stats = loss_fn.linear(leaf, torch.eye(VOCAB, device=device), targets, return_stats=True)
        else:
            loss, stats = loss_fn(leaf, targets, return_stats=True)
        loss.backward()
        assert not stats.weight[:, 0].any()
        assert 0 < (stats.weight[:, 1:] == 1).sum() < 36
        other = logits.clone().requires_grad_()
        reference.pdl_loss(other, targets, row_weight=stats.weight, shift=True).backward()
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-7)
        assert leaf.grad.any()

    @pytest.mark.devices("cpu")
    def test_out_of_range_is_told_as_ever(self, batch):
        logits, targets = batch()
        targets[3] = VOCAB
        with pytest.raises(IndexError, match=r"targets: got 31 at position \[3\]"):
            PDLLoss(corpus_counts(), weight_drop=0.5)(logits, targets)

    @pytest.mark.devices("cpu", "cuda")
    def test_compiles(self, batch, device):
        logits, targets = batch()
        loss_fn = PDLLoss(corpus_counts(device), weight_drop=1.0)
        compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(logits, targets), loss_fn(logits, targets), rtol=1e-6, atol=0)

    @pytest.mark.parametrize(
        ("share", "message"),
        [
            (1.5, r"weight_drop: got 1.5, expected a number from 0 to 1"),
            ("half", "weight_drop: got 'half' of type str"),
        ],
    )
    def test_bad_shares_are_refused(self, share, message):
        with pytest.raises((TypeError, ValueError), match=message):
            PDLLoss(weight_drop=share)
        with pytest.raises((TypeError, ValueError), match=message):
            PDLLoss().weight_drop = share

    def test_older_pickles_drop_nothing(self):
        loss_fn = PDLLoss(corpus_counts(), weight_drop=0.5)
        state = loss_fn.__dict__ | {"online": False}
        older = PDLLoss.__new__(PDLLoss)
        older.__setstate__({name: value for name, value in state.items() if name not in ("_weight_drop", "_is_given")})
        assert older.weight_drop == 0.0
        assert not older.online


class TestLogitOffset:
    @pytest.mark.parametrize("linear", [False, True])
    def test_reaches_the_function(self, batch, device, linear):
        logits, targets = batch()
        offset = torch.randn(VOCAB, generator=torch.Generator().manual_seed(5)).to(device)
        loss_fn = PDLLoss(corpus_counts(device))
        weights = functional.token_weights(corpus_counts(device), PowerLaw())
        expected = functional.pdl_loss(logits, targets, weights, logit_offset=offset)
        if linear:
            loss = loss_fn.linear(logits, torch.eye(VOCAB, device=device), targets, logit_offset=offset)
        else:
            loss = loss_fn(logits, targets, logit_offset=offset)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)

    def test_a_bad_one_counts_nothing(self, batch):
        logits, targets = batch()
        loss_fn = PDLLoss(vocab_size=VOCAB)
        with pytest.raises(ValueError, match=r"logit_offset: got shape \[3\], expected \[31\]"):
            loss_fn(logits, targets, logit_offset=torch.zeros(3))
        assert loss_fn.frequency.total == 0


class TestLogitAdjustment:
    def log_frequency(self, counts):
        return torch.log((counts.double() + 1) / (counts.sum() + VOCAB)).float()

    @pytest.mark.parametrize("weighting", [None, Uniform()], ids=["power law", "uniform"])
    @pytest.mark.parametrize("given", [False, True])
    def test_adds_the_log_frequency(self, batch, device, given, weighting):
        logits, targets = batch()
        offset = torch.linspace(-1, 1, VOCAB, device=device)
        counts = corpus_counts(device)
        loss_fn = PDLLoss(counts if given else None, weighting=weighting, logit_adjustment=0.7)
        for step in range(1, 3):
            if not given:
                counts = functional.count_tokens(targets.repeat(step), VOCAB)
            weights = functional.token_weights(counts, weighting or PowerLaw())
            adjusted = logits + 0.7 * self.log_frequency(counts)
            extra = offset if step == 2 else None
            loss = loss_fn(logits, targets, logit_offset=extra)
            expected = reference.pdl_loss(adjusted if extra is None else adjusted + extra, targets, weights)
            torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)

    def test_changes_are_noticed(self, batch, device):
        logits, targets = batch()
        loss_fn = PDLLoss(corpus_counts(device), weighting=Uniform(), logit_adjustment=1.0)
        first = loss_fn(logits, targets)
        assert torch.equal(loss_fn(logits, targets), first)
        loss_fn.logit_adjustment = -0.5
        fresh = PDLLoss(corpus_counts(device), weighting=Uniform(), logit_adjustment=-0.5)
        assert torch.equal(loss_fn(logits, targets), fresh(logits, targets))
        loss_fn.frequency.update(torch.full((900,), 5, device=device))
        changed = PDLLoss(loss_fn.frequency.counts, weighting=Uniform(), logit_adjustment=-0.5)
        assert torch.equal(loss_fn(logits, targets), changed(logits, targets))
        assert not torch.equal(loss_fn(logits, targets), fresh(logits, targets))
        # As one that PyTorch does not see.
        loss_fn.frequency.counts.data[3] += 1000
        loss_fn.refresh()
        changed = PDLLoss(loss_fn.frequency.counts, weighting=Uniform(), logit_adjustment=-0.5)
        assert torch.equal(loss_fn(logits, targets), changed(logits, targets))

    @pytest.mark.devices("cpu", "cuda")
    def test_compiles(self, batch, device):
        logits, targets = batch()
        loss_fn = PDLLoss(corpus_counts(device), logit_adjustment=1.0)
        compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(logits, targets), loss_fn(logits, targets), rtol=1e-6, atol=0)

    def test_decoding_undoes_it(self, batch, device):
        logits, targets = batch()
        frequency = TokenFrequency.from_counts(corpus_counts(device))
        decoded = logits + functional.decoding_offset(frequency, 1.0)
        loss = PDLLoss(frequency, weighting=Uniform(), logit_adjustment=1.0)(decoded, targets)
        torch.testing.assert_close(loss, F.cross_entropy(logits, targets), rtol=1e-5, atol=0)

    @pytest.mark.parametrize("value", [math.nan, 1e5, "1"])
    def test_bad_ones_are_refused(self, value):
        with pytest.raises(
            (TypeError, ValueError), match=r"logit_adjustment: got .*, expected a number from -10000 to 10"
        ):
            PDLLoss(logit_adjustment=value)
        with pytest.raises((TypeError, ValueError), match="logit_adjustment: got"):
            PDLLoss().logit_adjustment = value

    @pytest.mark.parametrize("changed", [{"logit_adjustment": 1.0}, {"weighting": PowerLaw()}], ids=str)
    @pytest.mark.parametrize("vocab_size", [None, VOCAB])
    def test_a_loss_learns_as_soon_as_it_needs_counts(self, batch, changed, vocab_size):
        loss_fn = PDLLoss(weighting=Uniform(), vocab_size=vocab_size)
        assert not loss_fn.online
        loss_fn(*batch())
        for name, value in changed.items():
            setattr(loss_fn, name, value)
        assert loss_fn.online
        fresh = PDLLoss(**{"weighting": Uniform(), **changed})
        assert torch.equal(loss_fn(*batch()), fresh(*batch()))
        assert loss_fn.frequency.total == len(batch()[1])

    @pytest.mark.parametrize("linear", [False, True])
    @pytest.mark.parametrize("given", [False, True])
    def test_two_calls_and_one_backward(self, batch, device, given, linear):
        counts = corpus_counts(device)
        loss_fn = PDLLoss(counts if given else None, logit_adjustment=1.0, reduction="none")
        leaf = batch()[0].requires_grad_()
        eye = torch.eye(VOCAB, device=device)

        def loss(seed):
            targets = batch(seed)[1]
            return (loss_fn.linear(leaf, eye, targets) if linear else loss_fn(leaf, targets)).sum()

        first = loss(0)
        (expected,) = torch.autograd.grad(first, leaf, retain_graph=True)
        second = loss(1)
        loss_fn.blend, loss_fn.logit_adjustment = 0.5, 0.3
        loss_fn.refresh()
        (got,) = torch.autograd.grad(first, leaf)
        torch.testing.assert_close(got, expected)
        assert torch.autograd.grad(second, leaf)[0].any()


class TestState:
    # Past float32's and bfloat16's whole numbers, and past int32.
    COUNTS = torch.tensor([2**40 + 1, 2**24 + 1, 257, 0])

    @pytest.mark.parametrize("target", ["fresh", "sized", "given"])
    def test_round_trip_is_exact(self, batch, device, target):
        trained = PDLLoss(alpha=0.5).to(device)
        for seed in range(3):
            trained(*batch(seed))
        trained.blend = 0.7
        saved = trained.state_dict()
        arguments = {
            "fresh": {},
            "sized": {"vocab_size": VOCAB},
            "given": {"frequency": torch.ones(VOCAB, dtype=torch.int64)},
        }[target]
        restored = PDLLoss(**arguments, alpha=0.5).to(device)
        assert restored.load_state_dict(saved)
        assert restored.blend == trained.blend
        for name, value in restored.state_dict().items():
            assert torch.equal(value, saved[name]), name
        assert torch.equal(restored.eval()(*batch(3)), trained.eval()(*batch(3)))

    def test_kill_and_resume(self, batch, device, tmp_path):
        def model_and_loss():
            torch.manual_seed(1)
            model = nn.ModuleDict({"net": nn.Linear(VOCAB, VOCAB), "loss": PDLLoss()}).to(device)
            return model, torch.optim.AdamW(model.parameters(), lr=0.1)

        def step(model, optimizer, seed):
            inputs, targets = batch(seed)
            loss = model["loss"](model["net"](inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        model, optimizer = model_and_loss()
        for seed in range(3):
            step(model, optimizer, seed)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
        expected = [step(model, optimizer, seed) for seed in (3, 4)]

        resumed, resumed_optimizer = model_and_loss()
        checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        resumed.load_state_dict(checkpoint["model"])
        resumed_optimizer.load_state_dict(checkpoint["optimizer"])
        assert resumed["loss"].frequency.total == 36
        assert [step(resumed, resumed_optimizer, seed) for seed in (3, 4)] == expected
        assert torch.equal(resumed["loss"].frequency.counts, model["loss"].frequency.counts)

    @pytest.mark.parametrize("given", [False, True], ids=["online", "given"])
    @pytest.mark.parametrize(
        "convert",
        [
            lambda module: module.half(),
            lambda module: module.to(torch.bfloat16),
            lambda module: module.double(),
            lambda module: module.float(),
            copy.deepcopy,
            lambda module: pickle.loads(pickle.dumps(module)),
        ],
        ids=["half", "bfloat16", "double", "float", "deepcopy", "pickle"],
    )
    def test_conversions_keep_counts_and_weights(self, device, convert, given):
        weighting = PowerLaw(alpha=0.3, blend=0.1, fixed={2: 0.3})
        loss_fn = PDLLoss(self.COUNTS if given else None, vocab_size=4, weighting=weighting)
        loss_fn.frequency.counts.copy_(self.COUNTS)
        loss_fn = loss_fn.to(device).eval()
        logits, targets = torch.randn(6, 4, device=device), torch.tensor([0, 1, 2, 3, 3, 0], device=device)
        before = loss_fn(logits, targets)
        converted = convert(nn.Sequential(loss_fn))[0]
        assert converted.frequency.counts.dtype == torch.int64
        assert torch.equal(converted.frequency.counts.cpu(), self.COUNTS)
        assert torch.equal(converted(logits, targets), before)

    def test_whole_module_through_torch_save(self, batch):
        loss_fn = PDLLoss()
        loss_fn(torch.randn(4, VOCAB), torch.tensor([1, 2, 2, 3]))
        buffer = io.BytesIO()
        torch.save(loss_fn, buffer)
        buffer.seek(0)
        restored = torch.load(buffer, weights_only=False)
        assert torch.equal(restored.frequency.counts, loss_fn.frequency.counts)

    def test_another_vocabulary_is_refused(self, batch):
        trained = PDLLoss(vocab_size=5)
        with pytest.raises(RuntimeError, match="size mismatch"):
            PDLLoss(vocab_size=6).load_state_dict(trained.state_dict())

    def test_nothing_of_it_is_a_parameter(self, batch):
        loss_fn = PDLLoss()
        loss_fn(torch.randn(4, VOCAB), torch.tensor([1, 2, 2, 3]))
        assert not list(loss_fn.parameters())
        assert "alpha=1.0" in repr(loss_fn)


@pytest.mark.devices("cpu", "cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ten_line_training_loop(device, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCAB, 16), nn.Linear(16, VOCAB)).to(device, dtype)
    loss_fn = PDLLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    tokens = (torch.rand(256, device=device) ** 2 * VOCAB).long()
    losses = []
    for _ in range(40):
        loss = loss_fn(model(tokens), (tokens * 3 + 1) % VOCAB)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
