"""The rows' losses become their sum in one order, whoever adds them up: reduce_rows, or the kernels of a whole call."""

from __future__ import annotations

import pytest
import torch

from pdl_ext.engine import ops
from pdl_ext.modulation import MiLe
from pdl_ext.options import LossOptions

PLAIN = {"z_loss": 0.01}
NORMALIZED = {**PLAIN, "modulation": MiLe()}
SHAPES = [
    (0, 9),
    (1, 9),
    (5, 4097),  # CUDA: a block of 256 threads a row
    (600, 5),  # CUDA: more rows than threads that add them up, by blocks of 128 threads
    (3, 40009),  # CUDA: clusters
]


@pytest.fixture(params=["1", "4"], ids=["in_turn", "side_by_side"])
def at_once(request, monkeypatch):
    """Blocks of the emulator run one after another, or several at once."""
    monkeypatch.setenv("PDL_EXT_EMULATOR_AT_ONCE", request.param)


def assert_reduced(loss, saved_rows, factors, case, normalizer, packed):
    got = ops.compiled.reduce_rows(saved_rows, case.targets, case.row_weight, normalizer, packed)
    assert torch.equal(got[0], loss)
    assert torch.equal(got[1], factors)
    assert len(case.targets) < 2 or (loss.isfinite().all() and loss.any())


@pytest.mark.devices("emulated", "cuda")
@pytest.mark.parametrize("options", [PLAIN, NORMALIZED], ids=["plain", "normalized"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(("rows", "vocab_size"), SHAPES)
@pytest.mark.usefixtures("at_once")
def test_two_calls(make_case, rows, vocab_size, reduction, options):
    case = make_case((rows,), vocab_size, row_weight=True)
    packed = LossOptions(reduction=reduction, **options).packed
    # The second one finds what the first has left.
    for _ in range(2):
        loss, saved_rows, factors, _ = ops.compiled.loss_forward(
            case.leaf, case.targets, case.token_weight, case.row_weight, None, None, packed, False
        )
        assert_reduced(loss, saved_rows, factors, case, None, packed)


@pytest.mark.devices("emulated", "cuda")
@pytest.mark.parametrize(("reduction", "normalizer"), [("sum", None), ("mean", None), ("token_mean", [2.5, 3.5])])
@pytest.mark.parametrize(("rows", "vocab_size"), SHAPES)
@pytest.mark.usefixtures("at_once")
def test_one_call(make_case, rows, vocab_size, reduction, normalizer):
    case = make_case((rows,), vocab_size, row_weight=True)
    if normalizer is not None:
        normalizer = torch.tensor(normalizer, device=case.leaf.device)
    packed = LossOptions(reduction=reduction, **PLAIN).packed
    for _ in range(2):
        loss, saved_rows, factors, *_ = ops.compiled.loss_and_gradient(
            case.leaf, case.targets, case.token_weight, case.row_weight, None, normalizer, None, packed, False
        )
        assert_reduced(loss, saved_rows, factors, case, normalizer, packed)


@pytest.mark.devices("emulated")
@pytest.mark.parametrize(("card", "dtype"), [("sm_75", torch.float32), ("sm_90", torch.float64)], ids=str)
@pytest.mark.usefixtures("at_once")
def test_rows_from_l2(make_case, monkeypatch, card, dtype):
    # Fewer of them are under way than there are, so that a block has several.
    monkeypatch.setenv("PDL_EXT_EMULATOR_DEVICE", card)
    case = make_case((6,), 262144 if dtype == torch.float64 else 150001, dtype, row_weight=True)
    case.row_weight = case.row_weight.to(dtype)
    packed = LossOptions(**PLAIN).packed
    for seed in range(60):
        monkeypatch.setenv("PDL_EXT_EMULATOR_SEED", str(seed))
        loss, saved_rows, factors, *_ = ops.compiled.loss_and_gradient(
            case.leaf, case.targets, case.token_weight, case.row_weight, None, None, None, packed, False
        )
        assert_reduced(loss, saved_rows, factors, case, None, packed)


@pytest.mark.devices("emulated", "cuda")
def test_more_rows_than_are_loaded_at_once(make_case):
    # Two of float64 by each of 512 threads, or of as many as a smaller block stands for.
    case = make_case((1300,), 5, torch.float64, row_weight=True)
    case.row_weight = case.row_weight.double()
    packed = LossOptions().packed
    arguments = (case.leaf, case.targets, case.token_weight, case.row_weight, None, None)
    for loss, saved_rows, factors, *_ in (
        ops.compiled.loss_forward(*arguments, packed, False),
        ops.compiled.loss_and_gradient(*arguments, None, packed, False),
    ):
        assert_reduced(loss, saved_rows, factors, case, None, packed)
