"""The same input gives the same bits: the order of every sum is independent of the schedule."""

from __future__ import annotations

import itertools

import cuda_emulator
import pytest
import torch

from pdl_ext import PowerLaw, functional


@pytest.mark.devices("emulated")
def test_results_do_not_depend_on_the_order_of_threads(make_case, monkeypatch):
    case = make_case((5,), 4097, row_weight=True)
    counts = torch.arange(3000) % 7
    results = []
    for seed in range(8):
        monkeypatch.setenv("PDL_EXT_EMULATOR_SEED", str(seed))
        result = case.run(functional.pdl_loss, label_smoothing=0.1, z_loss=0.1, return_stats=True)
        result["weights"] = functional.token_weights(counts, PowerLaw())
        result["counts"] = functional.count_tokens(case.targets.clamp(min=0).repeat(999), 4097)
        results.append(result)
    for result in results[1:]:
        for name in result:
            assert torch.equal(result[name], results[0][name]), name
    assert results[0]["grad_logits"].any()


@pytest.mark.devices("emulated")
def test_sums_of_a_block_follow_one_another(device, monkeypatch):
    given = torch.randint(1000, (9, 256)).double()
    for seed in range(8):
        monkeypatch.setenv("PDL_EXT_EMULATOR_SEED", str(seed))
        sums = torch.zeros(9, dtype=torch.float64)
        assert cuda_emulator.launch("sums_of_block", sums, given, n=9, grid=1, block=256) == ""
        assert torch.equal(sums, given.sum(dim=1))


@pytest.mark.devices("emulated")
def test_a_smaller_block_adds_up_in_the_order_of_a_larger_one(device, monkeypatch):
    given = torch.randn(512, dtype=torch.float64) * torch.logspace(-9, 9, 512, dtype=torch.float64)
    sums = set()
    for seed, block in itertools.product(range(4), (512, 256, 128, 32)):
        monkeypatch.setenv("PDL_EXT_EMULATOR_SEED", str(seed))
        result = torch.zeros(1, dtype=torch.float64)
        assert cuda_emulator.launch("sum_of_threads", result, given, n=512, grid=1, block=block) == ""
        sums.add(result.item())
    assert len(sums) == 1
    torch.testing.assert_close(sums.pop(), given.sum().item())


@pytest.mark.devices("cpu", "cuda")
def test_results_are_bitwise_repeatable(make_case, device):
    case = make_case((64,), 50257, torch.bfloat16, row_weight=True)
    first, second = (case.run(functional.pdl_loss) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name])
