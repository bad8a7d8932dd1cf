"""Products into existing memory: their results, and that 16-bit ones never use PyTorch's loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pdl_ext.engine import products

HALVES = [torch.bfloat16, torch.float16]
# Rows, inner side and columns, each the longest once, and none.
SHAPES = [(300, 40, 50), (40, 300, 50), (40, 50, 300), (7, 7, 7), (3, 0, 5), (0, 4, 5), (1, 200, 1)]


@pytest.fixture(params=["by instructions", "by float32", "by float32 in pieces"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(products, "_has_instructions", lambda dtype: request.param == "by instructions")
    if request.param == "by float32 in pieces":
        # The last piece is shorter than the others.
        monkeypatch.setattr(products, "_PIECE_ELEMENTS", 64 * 90)
    return request.param


def layouts(matrix: Tensor) -> list[Tensor]:
    """Copies of the matrix by rows, by columns, and with memory between its rows."""
    rows, columns = matrix.shape
    wider = matrix.new_zeros((rows, columns + 24))
    wider[:, :columns] = matrix
    return [matrix.clone(), matrix.t().clone(memory_format=torch.contiguous_format).t(), wider[:, :columns]]


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def near(result: Tensor, exact: Tensor, terms: Tensor) -> None:
    """Within a rounding of the result plus some float32 roundings of the sum of its terms."""
    limit = torch.finfo(result.dtype).eps * exact.abs() + 4e-6 * terms + torch.finfo(result.dtype).tiny
    worst = ((result.double() - exact).abs() / limit).max().item() if result.numel() else 0.0
    assert worst <= 1, worst


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["product", "bias", "sum", "wide", "wide sum"])
def test_is_the_product_rounded_once(way, dtype, shape, kind):
    m, k, n = shape
    a, b, bias = draw(m, k, dtype=dtype), draw(k, n, dtype=dtype), draw(n, dtype=dtype)
    before = draw(m, n, dtype=torch.float32 if "wide" in kind else dtype)
    for left in layouts(a):
        for right in layouts(b):
            for result in layouts(before):
                exact, terms = a.double() @ b.double(), a.double().abs() @ b.double().abs()
                options = {}
                if kind == "bias":
                    exact, terms = exact + bias.double(), terms + bias.double().abs()
                    options = {"bias": bias}
                elif "sum" in kind:
                    exact, terms = exact + before.double(), terms + before.double().abs()
                    options = {"add": True}
                products.product_into(result, left, right, **options)
                if way != "by instructions":
                    near(result, exact, terms)
                else:
                    # Some processors round the product before they add.
                    near(result, exact, terms * (1 + 2e5 * torch.finfo(dtype).eps))


class _NoLoops(TorchDispatchMode):
    """Fails at a product of 16-bit numbers."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            assert not any(isinstance(x, Tensor) and x.dtype in HALVES for x in arguments), function
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_takes_no_slow_loop(monkeypatch, shape, dtype, autocast):
    m, k, n = shape
    a, b = draw(m, k, dtype=dtype), draw(k, n, dtype=dtype)
    result = torch.empty(m, n, dtype=dtype)
    monkeypatch.setattr(products, "_has_instructions", lambda dtype: False)
    with torch.autocast("cpu", dtype, enabled=autocast), _NoLoops():
        products.product_into(result, a, b)
    near(result, a.double() @ b.double(), a.double().abs() @ b.double().abs())
    monkeypatch.setattr(products, "_has_instructions", lambda dtype: True)
    with pytest.raises(AssertionError), _NoLoops():
        products.product_into(result, a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_numbers_are_as_pytorch_has_them(dtype):
    assert products._has_instructions(dtype)
    a, b = draw(20, 30, dtype=dtype), draw(30, 40, dtype=dtype)
    result = torch.empty(20, 40, dtype=dtype)
    products.product_into(result, a, b)
    assert result.equal(a @ b)


def test_float32_copies_are_small(monkeypatch):
    """Of each piece."""
    monkeypatch.setattr(products, "_PIECE_ELEMENTS", 10_000)
    sizes = []

    class _Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            if isinstance(result, Tensor) and result.dtype == torch.float32:
                sizes.append(result.numel())
            return result

    for m, k, n in SHAPES[:3]:
        a, b = draw(m, k, dtype=torch.bfloat16), draw(k, n, dtype=torch.bfloat16)
        result = torch.empty(m, n, dtype=torch.bfloat16)
        with _Sizes():
            products._by_float32(result, a, b, None, False)
    assert 0 < max(sizes) <= 10_000
