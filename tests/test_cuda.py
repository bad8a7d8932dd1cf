"""Behaviour of CUDA devices only: NaN instead of an error, streams, graphs, several devices, inputs beyond 32 bits."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from computed import computed

from pdl_ext import PDLLoss, PowerLaw, TokenFrequency, functional, reference
from pdl_ext.engine import host_stream


def need_memory(gibibytes):
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gibibytes * 2**30:
        pytest.skip(f"needs {gibibytes} GiB of free device memory")


def loss_and_gradient(logits, targets, **options):
    """The loss and gradient of a leaf with the values of `logits`, which belongs to the current stream."""
    leaf = logits.detach().clone().requires_grad_()
    loss = functional.pdl_loss(leaf, targets, **options)
    loss.backward(torch.ones_like(loss))
    return loss.detach(), leaf.grad


def assert_equal(got, expected):
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
        assert bool(other.any())


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


class TestGraphs:
    def test_step_of_the_loss(self, cuda):
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

    def test_upstream_gradients_that_change_between_replays(self, cuda):
        # A module's expected gradient is on the device: each replay checks whether it guessed right.
        loss_fn = PDLLoss(torch.ones(1009, dtype=torch.int64, device=cuda))
        logits = torch.randn(16, 1009, device=cuda, requires_grad=True)
        targets = torch.randint(1009, (16,), device=cuda)
        scale = torch.ones((), device=cuda)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            (scale * loss_fn(logits, targets)).backward()
        torch.cuda.current_stream().wait_stream(side)
        logits.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            (scale * loss_fn(logits, targets)).backward()
        for factor in (1.0, 0.25, 0.25, 8.0, 1.0):
            scale.fill_(factor)
            graph.replay()
            leaf = logits.detach().clone().requires_grad_()
            (scale * copy.deepcopy(loss_fn)(leaf, targets)).backward()
            assert torch.equal(logits.grad, leaf.grad)
            assert loss_fn._last_upstream.on(logits.device, torch.float32) == factor

    @pytest.mark.parametrize("inplace_backward", [False, True], ids=["out_of_place", "inplace"])
    @pytest.mark.parametrize("optimizer_name", ["sgd", "adamw"])
    def test_whole_training_step(self, cuda, optimizer_name, inplace_backward):
        """Model, online loss, gradients and optimizer in one graph: its replays equal the same eager steps."""
        vocab_size, rows = 1009, 64

        def make_optimizer(model):
            if optimizer_name == "adamw":
                return torch.optim.AdamW(model.parameters(), lr=1e-2, capturable=True)
            return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, foreach=True)

        def step(model, loss_fn, optimizer, tokens, targets):
            loss = loss_fn(model(tokens), targets)
            loss.backward()
            optimizer.step()
            return loss

        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(vocab_size, 32), torch.nn.Linear(32, vocab_size)).to(cuda)
        loss_fn = PDLLoss(vocab_size=vocab_size, alpha=0.5, inplace_backward=inplace_backward).to(cuda)
        optimizer = make_optimizer(model)
        tokens = torch.randint(vocab_size, (rows,), device=cuda)
        targets = torch.randint(vocab_size, (rows,), device=cuda)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                optimizer.zero_grad(set_to_none=True)
                step(model, loss_fn, optimizer, tokens, targets)
        torch.cuda.current_stream().wait_stream(side)
        optimizer.zero_grad(set_to_none=True)

        twin, twin_loss_fn = copy.deepcopy(model), copy.deepcopy(loss_fn)
        twin_optimizer = make_optimizer(twin)
        twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = step(model, loss_fn, optimizer, tokens, targets)

        generator = torch.Generator(cuda).manual_seed(1)
        before = [parameter.detach().clone() for parameter in twin.parameters()]
        for turn in range(4):
            tokens.copy_(torch.randint(vocab_size, (rows,), device=cuda, generator=generator))
            targets.copy_(torch.randint(vocab_size, (rows,), device=cuda, generator=generator))
            targets[turn] = -100
            if turn == 2:  # a graph reads the blend, it does not remember it
                loss_fn.blend = twin_loss_fn.blend = 0.5
            graph.replay()
            twin_optimizer.zero_grad(set_to_none=True)
            expected = step(twin, twin_loss_fn, twin_optimizer, tokens, targets)
            # cuBLAS may choose another algorithm under capture.
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
            for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-6)
                torch.testing.assert_close(parameter, other, rtol=1e-3, atol=1e-4)
        assert torch.equal(loss_fn.frequency.counts, twin_loss_fn.frequency.counts)
        assert loss_fn.frequency.total == 3 * rows + 4 * (rows - 1)
        assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.fixture
def nccl_group(cuda, tmp_path):
    if not dist.is_available() or not dist.is_nccl_available():
        pytest.skip("PyTorch without NCCL")
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("fused", [False, True], ids=["logits", "linear"])
class TestVocabularyParallel:
    """A group of one rank, which exchanges and sums as a larger one does."""

    @staticmethod
    def step(fused, hidden, weight, targets, group):
        if fused:
            loss = functional.linear_pdl_loss(hidden, weight, targets, process_group=group)
        else:
            loss = functional.pdl_loss(hidden @ weight.t(), targets, process_group=group)
        return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]

    @staticmethod
    def make(cuda):
        hidden = torch.randn(300, 32, device=cuda, requires_grad=True)
        weight = torch.randn(1009, 32, device=cuda, requires_grad=True)
        return hidden, weight, torch.randint(1009, (300,), device=cuda)

    def test_second_call_does_not_wait_for_the_device(self, cuda, nccl_group, fused):
        given = self.make(cuda)
        expected = self.step(fused, *given, None)
        self.step(fused, *given, nccl_group)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = self.step(fused, *given, nccl_group)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)

    def test_step_in_a_graph(self, cuda, nccl_group, fused):
        hidden, weight, targets = self.make(cuda)
        self.step(fused, hidden, weight, targets, None)
        refused = pytest.raises(RuntimeError, match="expected one before the capture")
        with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
            # Otherwise the graph would be empty, and PyTorch warns of that.
            hidden.sum()
            self.step(fused, hidden, weight, targets, nccl_group)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.step(fused, hidden, weight, targets, nccl_group)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = self.step(fused, hidden, weight, targets, nccl_group)
        for _ in range(3):
            with torch.no_grad():
                hidden.normal_()
                targets.random_(1009)
            graph.replay()
            for one, other in zip(found, self.step(fused, hidden, weight, targets, None), strict=True):
                assert other.any()
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


class TestStreams:
    def test_current_stream_is_honoured(self, cuda):
        """The inputs are written on a side stream after a while: kernels on another stream would read old values."""
        vocab_size, law = 5003, PowerLaw(alpha=0.5)
        source = torch.randn(64, vocab_size, device=cuda)
        ids = torch.randint(vocab_size, (64,), device=cuda)
        logits, targets = torch.empty_like(source).requires_grad_(), torch.empty_like(ids)
        side = torch.cuda.Stream()

        def forget_inputs():
            torch.cuda.synchronize()
            with torch.no_grad():
                logits.zero_()
                targets.fill_(-100)
            torch.cuda.synchronize()

        def work():
            with torch.no_grad():
                logits.copy_(source)
                targets.copy_(ids)
            loss = functional.pdl_loss(logits, targets)
            (gradient,) = torch.autograd.grad(loss, logits)
            counts = functional.count_tokens(targets, vocab_size)
            return loss.detach(), gradient, counts, functional.token_weights(counts, law)

        # The first round loads the kernels and gathers memory, which may wait for the device.
        for cycles in (1, 200_000_000):
            forget_inputs()
            with torch.cuda.stream(side):
                torch.cuda._sleep(cycles)
                results = work()
        assert not side.query(), "the device was not busy for long enough"
        side.synchronize()
        counts = reference.count_tokens(ids, vocab_size)
        assert_equal(results, (*loss_and_gradient(source, ids), counts, functional.token_weights(counts, law)))

    def test_two_streams_at_once(self, cuda):
        need_memory(4)
        vocab_size = 128_256
        generator = torch.Generator(cuda).manual_seed(0)
        inputs = [
            (
                torch.randn(1024, vocab_size, device=cuda, generator=generator, dtype=torch.bfloat16),
                torch.randint(vocab_size, (1024,), device=cuda, generator=generator),
            )
            for _ in range(2)
        ]
        expected = [loss_and_gradient(*one, reduction="none") for one in inputs]
        expected_counts = [functional.count_tokens(targets, vocab_size) for _, targets in inputs]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        results = [[], []]
        for _ in range(3):
            for stream, one, mine in zip(streams, inputs, results, strict=True):
                with torch.cuda.stream(stream):
                    counts = functional.count_tokens(one[1], vocab_size)
                    mine.append((*loss_and_gradient(*one, reduction="none"), counts))
        torch.cuda.synchronize()
        for mine, one, counts in zip(results, expected, expected_counts, strict=True):
            for got in mine:
                assert_equal(got, (*one, counts))


@pytest.mark.parametrize("dtype", ["uint16", "int64"])
def test_counting_from_host_memory(cuda, dtype):
    # More than three parts, so that each buffer is used again, and a last one that is not whole.
    count = 3 * host_stream.PART_BYTES // np.dtype(dtype).itemsize + 12345
    ids = np.random.default_rng(0).integers(0, 50_000, count).astype(dtype)
    expected = np.bincount(ids, minlength=60_000)
    frequency = TokenFrequency(60_000).to(cuda)
    for _ in range(2):
        frequency.update(ids)
    assert torch.equal(frequency.counts.cpu(), torch.from_numpy(2 * expected))


@pytest.mark.parametrize(
    ("dtype", "vocab_size"),
    [
        (torch.uint16, 60_000),
        (torch.int32, 60_000),
        (torch.int64, 60_000),
        (torch.int32, 600_000),  # eight blocks with all shared memory that a card has, and ids beyond their counters
    ],
    ids=str,
)
def test_counting_on_chip(cuda, dtype, vocab_size):
    # More than two tokens for each counter of all multiprocessors, whose shared memory is at most 227 KiB.
    count = 2 * torch.cuda.get_device_properties(cuda).multi_processor_count * 227 * 256 + 3
    ids = torch.rand(count, device=cuda) ** 2 * (vocab_size + 4)
    tokens = ids.to(torch.int64)
    tokens[::9] = 3
    frequency = TokenFrequency(vocab_size, ignore_index=3).to(cuda)
    # Not at an aligned address.
    frequency.update(tokens.to(dtype)[1:])
    expected = torch.bincount(tokens[1:], minlength=vocab_size + 4)
    assert frequency.ignored == expected[3]
    expected[3] = 0
    assert torch.equal(frequency.counts, expected[:vocab_size])
    assert frequency.out_of_range == expected[vocab_size:].sum()
    assert frequency.counts[vocab_size - 1000 :].any()


def test_second_device(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(33, 5003, generator=generator)
    targets = torch.randint(5003, (33,), generator=generator)
    law = PowerLaw(alpha=0.5)
    results = []
    with torch.cuda.device(0):
        for device in ("cuda:0", "cuda:1"):
            counts = functional.count_tokens(targets.to(device), 5003)
            weights = functional.token_weights(counts, law)
            loss_fn = PDLLoss(TokenFrequency.from_counts(counts), weighting=law)
            leaf = logits.to(device).requires_grad_()
            loss = loss_fn(leaf, targets.to(device))
            loss.backward()
            results.append((counts, weights, loss, leaf.grad))
            assert all(str(tensor.device) == device for tensor in results[-1])
            assert torch.cuda.current_device() == 0
    for first, second in zip(*results, strict=True):
        # The devices may be of different kinds.
        torch.testing.assert_close(second.cpu(), first.cpu(), rtol=1e-5, atol=1e-8)


class TestBeyond32Bits:
    @pytest.mark.parametrize("inplace_backward", [False, True], ids=["out_of_place", "inplace"])
    @pytest.mark.parametrize("vocab_size", [131_072, 50_257])
    @pytest.mark.parametrize("power", [31, 32])
    def test_logits(self, cuda, power, vocab_size, inplace_backward):
        rows = 2**power // vocab_size + 8
        # The logits, their gradient, and a few vectors of a number a row.
        need_memory((1 if inplace_backward else 2) * 2 * rows * vocab_size / 2**30 + 1)
        logits = torch.zeros(rows, vocab_size, device=cuda, dtype=torch.bfloat16)
        # The first and the last row, and those around 2^31 and 2^32 elements.
        edges = [at // vocab_size + shift for at in (2**31, 2**32) for shift in (-1, 0, 1)]
        special = sorted({0, *(edge for edge in edges if edge < rows), rows - 1})
        generator = torch.Generator(cuda).manual_seed(0)
        for row in special:
            logits[row].normal_(generator=generator)
        targets = torch.randint(vocab_size, (rows,), device=cuda, generator=generator)
        alone = torch.stack([logits[row] for row in special])
        expected_loss, expected_gradient = loss_and_gradient(alone, targets[special], reduction="none")

        with torch.no_grad():
            forward_alone = functional.pdl_loss(logits, targets, reduction="none")
        logits.requires_grad_()
        loss = functional.pdl_loss(computed(logits), targets, reduction="none", inplace_backward=inplace_backward)
        (gradient,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
        assert (gradient.data_ptr() == logits.data_ptr()) == inplace_backward
        loss = loss.detach()
        assert torch.equal(loss, forward_alone)
        # A row that lies elsewhere may be summed in another order.
        torch.testing.assert_close(loss[special], expected_loss, rtol=1e-5, atol=0.0)
        for row, expected_row in zip(special, expected_gradient, strict=True):
            torch.testing.assert_close(gradient[row], expected_row, rtol=2**-7, atol=1e-9)
        assert expected_gradient.any(-1).all()

        # All other rows are zeros, so their losses are log V, and their gradients 1 / V but at the target.
        others = torch.ones(rows, dtype=torch.bool, device=cuda)
        others[special] = False
        log_of_size = torch.full_like(loss[others], vocab_size).log()
        torch.testing.assert_close(loss[others], log_of_size, rtol=1e-5, atol=0.0)
        for shift, expected in ((0, 1 / vocab_size - 1), (1, 1 / vocab_size)):
            columns = ((targets + shift) % vocab_size).unsqueeze(1)
            # In parts, so that what is tested here is not PyTorch's own indexing.
            parts = zip(gradient.split(4096), columns.split(4096), strict=True)
            values = torch.cat([part.gather(1, column).squeeze(1) for part, column in parts])[others].float()
            torch.testing.assert_close(values, torch.full_like(values, expected), rtol=2**-7, atol=0.0)

    @pytest.mark.parametrize("vocab_size", [131_072, 50_257])
    @pytest.mark.parametrize("power", [31, 32])
    def test_logits_at_once(self, cuda, power, vocab_size):
        rows = 2**power // vocab_size + 8
        need_memory(2 * rows * vocab_size / 2**30 + 1)
        logits = torch.zeros(rows, vocab_size, device=cuda, dtype=torch.bfloat16)
        special = [0, 2**31 // vocab_size, rows - 1]
        generator = torch.Generator(cuda).manual_seed(0)
        for row in special:
            logits[row].normal_(generator=generator)
        targets = torch.randint(vocab_size, (rows,), device=cuda, generator=generator)
        alone = torch.stack([logits[row] for row in special])
        expected_losses, expected_gradient = loss_and_gradient(alone, targets[special], reduction="none")
        logits.requires_grad_()
        loss = functional.pdl_loss(computed(logits), targets, reduction="sum", inplace_backward=True)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.data_ptr() == logits.data_ptr()
        # All other rows are zeros, so their losses are log V, and their gradients 1 / V but at the target.
        expected = expected_losses.double().sum() + (rows - len(special)) * math.log(vocab_size)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0.0)
        for row, expected_row in zip(special, expected_gradient, strict=True):
            torch.testing.assert_close(gradient[row], expected_row, rtol=2**-7, atol=1e-9)
        others = torch.ones(rows, dtype=torch.bool, device=cuda)
        others[special] = False
        for part, columns in zip(gradient.split(4096), targets.split(4096), strict=True):
            here = others[: len(part)]
            others = others[len(part) :]
            at_target = part.gather(1, columns.unsqueeze(1)).squeeze(1)[here].float()
            torch.testing.assert_close(at_target, torch.full_like(at_target, 1 / vocab_size - 1), rtol=2**-7, atol=0.0)
            beside = part.gather(1, ((columns + 1) % vocab_size).unsqueeze(1)).squeeze(1)[here].float()
            torch.testing.assert_close(beside, torch.full_like(beside, 1 / vocab_size), rtol=2**-7, atol=0.0)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16], ids=["uint8", "uint16"])
    def test_tokens(self, cuda, dtype):
        count, vocab_size = 2**31 + 1001, 200 if dtype == torch.uint8 else 30_000
        need_memory(count * dtype.itemsize / 2**30 + 4)
        signed = {torch.uint8: torch.uint8, torch.uint16: torch.int16}[dtype]
        tokens = torch.empty(count, dtype=signed, device=cuda).random_(generator=torch.Generator(cuda).manual_seed(0))
        tokens[-1000:] = 7
        frequency = TokenFrequency(vocab_size, ignore_index=9).to(cuda)
        frequency.update(tokens.view(dtype))
        expected = torch.zeros(int(tokens.max()) + 1, dtype=torch.int64, device=cuda)
        for part in tokens.split(2**28):
            expected += torch.bincount(part, minlength=len(expected))
        assert int(frequency.ignored) == int(expected[9])
        assert int(frequency.out_of_range) == int(expected[vocab_size:].sum()) > 0
        expected[9] = 0
        assert torch.equal(frequency.counts, expected[:vocab_size])
        assert int(frequency.counts.sum() + frequency.ignored + frequency.out_of_range) == count
