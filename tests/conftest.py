"""The devices of the tests, the standard by which every kernel is measured, and the inputs for it.

A test with the argument `device` runs on each of three devices. These are "cpu"; "emulated", the CUDA kernels run on
the CPU by cuda_emulator; and "cuda" if there is a card. `@pytest.mark.devices(...)` selects fewer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import gc
import math
import os
import shutil
import zlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import cuda_emulator
import pytest
import torch
import uninitialized
from torch import Tensor

from pdl_ext import functional, reference
from pdl_ext.engine import ops


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan():
    # The state since the first import, unless a test has changed it.
    uninitialized.fill()


@pytest.fixture
def little_garbage():
    """Excludes objects from before the test from garbage collection: searching all imported modules takes a second."""
    gc.freeze()
    yield
    gc.unfreeze()


@contextlib.contextmanager
def turn(alone: bool):
    """Waits while another process tests alone; with `alone`, until no other process tests at all."""
    folder = cuda_emulator.ROOT / "build"
    folder.mkdir(exist_ok=True)
    with open(folder / "gate", "w") as gate, open(folder / "room", "w") as room:
        # A process that waits for the room holds the gate, so that later ones cannot overtake it.
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make): a folder filled by make(folder), in the first of pytest-xdist's processes that needs it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def folder_of(name: str, make: Callable[[Path], None]) -> Path:
        folder, made = root / name, root / f"{name}.made"
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return folder_of


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    # Only pytest-xdist runs several processes.
    several = hasattr(item.config, "workerinput")
    with turn(item.get_closest_marker("serial") is not None) if several else contextlib.nullcontext():
        return (yield)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    # At the end: until then no process waits for another.
    items.sort(key=lambda item: item.get_closest_marker("serial") is not None)


def pytest_report_header():
    """The tested versions of the integrated packages."""
    found = []
    for name in ("torch", "transformers", "accelerate", "trl", "peft", "lightning", "ray"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return f"packages: {', '.join(found)}"


def missing_cuda() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device"
    return "" if ops._C.cuda_architectures() else "built without CUDA"


def pytest_generate_tests(metafunc):
    if "device_name" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("devices")
        names = marker.args if marker else ("cpu", "emulated", "cuda")
        metafunc.parametrize("device_name", [name for name in names if name != "cuda" or not missing_cuda()])


@pytest.fixture
def device(device_name, request, monkeypatch):
    if device_name != "emulated":
        yield torch.device(device_name)
        return
    monkeypatch.setattr(ops, "compiled", cuda_emulator.load())
    # Another order of the threads for each test, the same in every run.
    monkeypatch.setenv("PDL_EXT_EMULATOR_SEED", str(zlib.crc32(request.node.name.encode()) % 2**31))
    yield torch.device("cpu")


@pytest.fixture
def guarded(device):
    """Copies a tensor to a place without memory after (or before) it; on a card only compute-sanitizer would notice."""

    def copy(tensor: Tensor, at_end: bool = True) -> Tensor:
        return tensor.to(device) if device.type == "cuda" else cuda_emulator.guarded(tensor, at_end)

    return copy


@pytest.fixture
def cuda():
    if missing_cuda():
        pytest.skip(missing_cuda())
    return torch.device("cuda")


@dataclasses.dataclass
class Case:
    """The tensors of one call: `view` turns the leaf into the logits, so that layouts share the comparison."""

    leaf: Tensor
    targets: Tensor
    token_weight: Tensor | None = None
    row_weight: Tensor | None = None
    view: Callable[[Tensor], Tensor] = lambda leaf: leaf

    def run(self, function: Callable, dtype: torch.dtype | None = None, **options) -> dict[str, Tensor]:
        """The loss, its gradients under a random upstream gradient and, on request, the stats; in `dtype`."""
        leaf = self.leaf.detach().to(dtype or self.leaf.dtype).clone().requires_grad_()
        row_weight = None
        if self.row_weight is not None:
            row_weight = self.row_weight.detach().to(dtype or self.row_weight.dtype).clone().requires_grad_()
        result = function(self.view(leaf), self.targets, self.token_weight, row_weight=row_weight, **options)
        loss, stats = result if options.get("return_stats") else (result, None)
        generator = torch.Generator().manual_seed(17)
        upstream = torch.randn(loss.shape, generator=generator).to(loss) + 0.1
        loss.backward(upstream)
        results = {"loss": loss.detach(), "grad_logits": leaf.grad}
        if row_weight is not None:
            results["grad_row_weight"] = row_weight.grad
        if stats is not None:
            results.update(nll=stats.nll, weight=stats.weight, lse=stats.lse, entropy=stats.entropy)
        return results

    def size_of_mean_gradient(self, normalizer=None, **options) -> Tensor:
        """The size of the terms that cancel in the gradient of a row weight under reduction "mean"."""
        options.update(reduction="sum", return_stats=True)
        summed = self.run(reference.pdl_loss, torch.float64, **options)
        return summed["grad_row_weight"].abs() / float(summed["weight"].sum() if normalizer is None else normalizer)


def relative_error(got: Tensor, truth: Tensor, size: Tensor) -> float:
    if got.numel() == 0:
        return 0.0
    error = (got.double() - truth).abs() / size
    # Equal infinities are equal; every other infinity or NaN is an error that no tolerance covers.
    return float(torch.where(got == truth, 0.0, error).nan_to_num(nan=torch.inf).max())


@pytest.fixture
def assert_accurate():
    """Asserts that a result is not zero, and at most twice as wrong as plain PyTorch's, plus an epsilon of its dtype.

    Errors are relative to `size`, by default the result itself. An entry that is small beside its row because its terms
    cancel is measured by the row's median entry.
    """

    def check(got: Tensor, plain: Tensor, truth: Tensor, name: str = "result", size: Tensor | None = None) -> None:
        assert got.shape == truth.shape, name
        truth = truth.double()
        if size is None:
            size = truth.abs()
            if size.dim() > 0 and size.numel() > 0:
                size = torch.maximum(size, size.median(-1, keepdim=True).values)
        limits = torch.finfo(got.dtype)
        size = size.double().clamp(min=limits.tiny)
        # There is no wider dtype to measure float64 with: the difference is the rounding of both sides.
        roundings = 1000 if got.dtype == torch.float64 else 1
        tolerance = 2 * relative_error(plain, truth, size) + roundings * limits.eps
        error = relative_error(got, truth, size)
        assert error <= tolerance, f"{name}: relative error {error:.3g}, allowed {tolerance:.3g}"
        if bool((truth.abs() > limits.tiny).any()):
            zeros = relative_error(torch.zeros_like(truth), truth, size)
            assert zeros > tolerance, f"{name}: zeros would pass"

    return check


def at_targets(case: Case, shift: bool, ignore_index: int) -> Tensor:
    """A mask of the targets' logits."""
    targets = torch.nn.functional.pad(case.targets[..., 1:], (0, 1), value=ignore_index) if shift else case.targets
    ids = torch.arange(case.leaf.shape[-1], device=targets.device)
    return (targets.unsqueeze(-1) == ids) & (targets != ignore_index).unsqueeze(-1)


@pytest.fixture
def assert_matches(assert_accurate):
    """Asserts that a call agrees with the reference in float64: loss, gradients, and stats if asked for."""

    def check(case: Case, *, inplace_backward: bool = False, **options) -> dict[str, Tensor]:
        got = case.run(functional.pdl_loss, inplace_backward=inplace_backward, **options)
        truth = case.run(reference.pdl_loss, torch.float64, **options)
        plain = case.run(reference.pdl_loss, **options)
        for name in truth:
            if name == "grad_logits" and case.leaf.shape[:-1] == case.targets.shape and case.leaf.dim() > 1:
                # p_y - 1 cancels where p_y is near 1; this must not excuse errors of other entries.
                target = at_targets(case, options.get("shift", False), options.get("ignore_index", -100))
                for part, mask in (("at targets", target), ("off targets", ~target)):
                    values = (torch.where(mask, gradient[name], 0.0) for gradient in (got, plain, truth))
                    assert_accurate(*values, f"{name} {part}")
            elif name == "grad_row_weight" and options.get("reduction", "mean") == "mean":
                # d/dw of a weighted mean is a difference from that mean, and the terms set the size of the rounding.
                size = (truth[name].abs() + case.size_of_mean_gradient(**options)).expand_as(truth[name])
                assert_accurate(got[name], plain[name], truth[name], name, size)
            elif name == "entropy":
                # A difference of sums over the vocabulary, whose range is log V.
                size = torch.full_like(truth[name], math.log(case.leaf.shape[-1]))
                assert_accurate(got[name], plain[name], truth[name], name, size)
            else:
                assert_accurate(got[name], plain[name], truth[name], name)
        return got

    return check


@pytest.fixture
def make_case(device):
    """Builds inputs: `shape` of the targets, logits flat or peaked (p_y near 1 at some rows, near 0 at others).

    In float64, whose standard is not more precise than itself, peaked p_y stays away from 1.
    """

    def make(
        shape: tuple[int, ...],
        vocab_size: int,
        dtype: torch.dtype = torch.float32,
        *,
        peaked: bool = False,
        token_weight: bool = True,
        row_weight: bool = False,
        ignored: bool = True,
        seed: int = 0,
    ) -> Case:
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(*shape, vocab_size, generator=generator) * (6 if peaked else 0.5)
        targets = torch.randint(vocab_size, shape, generator=generator)
        rows = targets.numel()
        if peaked:
            boosted = torch.arange(rows).reshape(shape) % 2 == 0
            logits.scatter_add_(
                -1, targets.unsqueeze(-1), ((8.0 if dtype == torch.float64 else 18.0) * boosted).unsqueeze(-1)
            )
        if ignored and rows > 2:
            targets.view(-1)[1::4] = -100
        weights = 0.2 + 3 * torch.rand(vocab_size, generator=generator) if token_weight else None
        factors = 0.3 + torch.rand(shape, generator=generator) if row_weight else None
        case = Case(logits.to(dtype), targets, weights, factors)
        for name in ("leaf", "targets", "token_weight", "row_weight"):
            value = getattr(case, name)
            setattr(case, name, None if value is None else value.to(device))
        return case

    return make
