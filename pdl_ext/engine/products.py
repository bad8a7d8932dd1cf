"""Matrix products into existing memory.

On a processor without instructions for 16-bit products PyTorch has only slow loops for them. There they are computed as
float32 products, one piece of the longest side at a time, so that the float32 copies stay small.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["product_into"]

# The elements of a piece's float32 copies and its product together.
_PIECE_ELEMENTS = 2**20


def product_into(result: Tensor, a: Tensor, b: Tensor, *, bias: Tensor | None = None, add: bool = False) -> None:
    """result = a @ b, or a @ b + bias, or result += a @ b; the sum is formed in result's dtype."""
    if not a.is_cuda and not _has_instructions(a.dtype):
        _by_float32(result, a, b, bias, add)
    elif result.dtype == a.dtype:
        if bias is not None:
            torch.addmm(bias, a, b, out=result)
        elif add:
            result.addmm_(a, b)
        else:
            torch.mm(a, b, out=result)
    # PyTorch supports a float32 summand of 16-bit products from 2.10 on.
    elif result.is_cuda and result.dtype == torch.float32:
        if add:
            torch.addmm(result, a, b, out_dtype=torch.float32, out=result)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=result)
    elif add:
        result += a @ b
    else:
        result.copy_(a @ b)


@functools.cache
def _has_instructions(dtype: torch.dtype) -> bool:
    """Whether products of this dtype on the CPU are faster than PyTorch's own loops."""
    ops = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype not in ops:
        return True
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, ops[dtype])())


# Into existing memory: autocast would turn other products into 16-bit ones again, and malloc would keep the memory of
# many pieces.
def _by_float32(result: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, add: bool) -> None:
    (m, k), n = a.shape, b.shape[1]
    longest = max(m, k, n)
    size = min(max(1, longest), max(1, _PIECE_ELEMENTS // max(1, m + k + n - longest)))
    pieces = [slice(first, min(first + size, longest)) for first in range(0, longest, size)]

    def memory(elements: int) -> Tensor:
        return a.new_empty(elements, dtype=torch.float32)

    if k == longest:
        of_a, of_b, total = memory(m * size), memory(size * n), memory(m * n).view(m, n).zero_()
        for piece in pieces:
            torch.addmm(total, _float32(a[:, piece], of_a), _float32(b[piece], of_b), out=total)
        _store(result, total, bias, add)
    elif n == longest:
        wide, of_b, of_product = _float32(a, memory(m * k)), memory(k * size), memory(m * size)
        for piece in pieces:
            product = of_product[: m * (piece.stop - piece.start)].view(m, piece.stop - piece.start)
            torch.mm(wide, _float32(b[:, piece], of_b), out=product)
            _store(result[:, piece], product, None if bias is None else bias[piece], add)
    else:
        wide, of_a, of_product = _float32(b, memory(k * n)), memory(size * k), memory(size * n)
        for piece in pieces:
            product = of_product[: (piece.stop - piece.start) * n].view(piece.stop - piece.start, n)
            torch.mm(_float32(a[piece], of_a), wide, out=product)
            _store(result[piece], product, bias, add)


def _store(result: Tensor, product: Tensor, bias: Tensor | None, add: bool) -> None:
    if bias is not None:
        product += bias
    if add:
        result += product
    else:
        result.copy_(product)


def _float32(matrix: Tensor, memory: Tensor) -> Tensor:
    """A copy in the given memory, in the order of the matrix's own elements, which is the fastest."""
    rows, columns = matrix.shape
    memory = memory[: rows * columns]
    if matrix.stride(0) < matrix.stride(1):
        return memory.view(columns, rows).t().copy_(matrix)
    return memory.view(rows, columns).copy_(matrix)
