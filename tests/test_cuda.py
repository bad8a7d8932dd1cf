"""What only a CUDA device does: NaN instead of an error, no waiting for the host, CUDA graphs, large inputs."""

from __future__ import annotations

import pytest
import torch

from pdl_ext import PDLLoss, functional


@pytest.mark.parametrize("bad", [257, -1, 2**40])
def test_bad_target_is_nan_in_its_row_only(cuda, bad):
    logits = torch.randn(5, 257, device=cuda, requires_grad=True)
    targets = torch.tensor([0, bad, 256, -100, 7], device=cuda)
    loss, stats = functional.pdl_loss(logits, targets, reduction="none", return_stats=True)
    assert loss.isnan().tolist() == [False, True, False, False, False]
    assert stats.nll.isnan().tolist() == [False, True, False, False, False]
    loss[[0, 2, 3, 4]].sum().backward(retain_graph=True)
    assert logits.grad[[0, 2, 4]].any(-1).all()
    logits.grad = None
    loss.backward(torch.ones_like(loss))
    assert logits.grad[1].isnan().all()
    assert logits.grad[[0, 2, 3, 4]].isfinite().all()
    assert functional.pdl_loss(logits, targets).isnan()


def test_bad_target_while_counting(cuda):
    loss_fn = PDLLoss(vocab_size=5).to(cuda)
    loss = loss_fn(torch.zeros(3, 5, device=cuda), torch.tensor([1, 9, 1], device=cuda))
    assert loss.isnan()
    assert loss_fn.frequency.counts.tolist() == [0, 2, 0, 0, 0]
    assert loss_fn.frequency.out_of_range == 1


def test_a_step_does_not_wait_for_the_device(cuda):
    loss_fn = PDLLoss(vocab_size=1009).to(cuda)
    logits = torch.randn(16, 1009, device=cuda, requires_grad=True)
    targets = torch.randint(1009, (16,), device=cuda)
    loss_fn(logits, targets).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_fn(logits, targets, row_weight=torch.ones(16, device=cuda), normalizer=3.0).backward()
        loss_fn.blend = 0.5
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_step_in_a_cuda_graph(cuda):
    eager, captured = PDLLoss(vocab_size=1009).to(cuda), PDLLoss(vocab_size=1009).to(cuda)
    logits = torch.randn(16, 1009, device=cuda, requires_grad=True)
    targets = torch.randint(1009, (16,), device=cuda)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        captured(logits, targets).backward()
    torch.cuda.current_stream().wait_stream(side)
    captured.frequency.counts.zero_()
    logits.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = captured(logits, targets)
        loss.backward()
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            logits.normal_()
            targets.random_(1009)
        graph.replay()
        leaf = logits.detach().clone().requires_grad_()
        expected = eager(leaf, targets)
        expected.backward()
        assert torch.equal(loss, expected)
        assert torch.equal(logits.grad, leaf.grad)
        assert leaf.grad.any()
    assert torch.equal(captured.frequency.counts, eager.frequency.counts)


def test_results_are_bitwise_repeatable(make_case, device):
    case = make_case((64,), 50257, torch.bfloat16, row_weight=True)
    first, second = (case.run(functional.pdl_loss) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name])


def test_more_than_two_to_the_31_logits(cuda):
    rows, vocab_size = 16_500, 131_072
    if torch.cuda.get_device_properties(cuda).total_memory < 12 * 2**30:
        pytest.skip("needs 12 GiB of device memory")
    logits = torch.zeros(rows, vocab_size, device=cuda, dtype=torch.bfloat16)
    logits[-1].normal_()
    targets = torch.zeros(rows, dtype=torch.int64, device=cuda)
    last = logits[-1:].clone().requires_grad_()
    functional.pdl_loss(last, targets[-1:], reduction="sum").backward()
    logits.requires_grad_()
    functional.pdl_loss(logits, targets, reduction="sum").backward()
    assert torch.equal(logits.grad[-1:], last.grad)
    assert last.grad.any()
