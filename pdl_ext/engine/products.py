"""Matrix products into memory that exists.

A processor may have no instructions for 16-bit products, and PyTorch then has but slow loops for them. There they are
made of float32 ones, a piece of the longest side at a time, so that float32 copies stay small.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["product_into"]

# Of a piece's float32 copies and its product together.
_PIECE_ELEMENTS = 2**22


def product_into(result: Tensor, a: Tensor, b: Tensor, *, bias: Tensor | None = None, add: bool = False) -> None:
    """result = a @ b, or a @ b + bias, or result += a @ b, where the sum is formed in result's dtype."""
    if not a.is_cuda and not _has_instructions(a.dtype):
        _by_float32(result, a, b, bias, add)
    elif result.dtype == a.dtype:
        if bias is not None:
            torch.addmm(bias, a, b, out=result)
        elif add:
            result.addmm_(a, b)
        else:
            torch.mm(a, b, out=result)
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
    """Whether products of the dtype on the CPU take more than PyTorch's own loops."""
    ops = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype not in ops:
        return True
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, ops[dtype])())


# Into memory at hand: autocast would make other products 16-bit ones again.
def _by_float32(result: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, add: bool) -> None:
    (m, k), n = a.shape, b.shape[1]
    longest = max(m, k, n)
    size = max(1, _PIECE_ELEMENTS // max(1, m + k + n - longest))
    pieces = [slice(first, min(first + size, longest)) for first in range(0, longest, size)]
    if k == longest:
        total = a.new_zeros((m, n), dtype=torch.float32)
        for piece in pieces:
            torch.addmm(total, _float32(a[:, piece]), _float32(b[piece]), out=total)
        _store(result, total, bias, add)
    elif n == longest:
        wide = _float32(a)
        for piece in pieces:
            product = a.new_empty((m, piece.stop - piece.start), dtype=torch.float32)
            torch.mm(wide, _float32(b[:, piece]), out=product)
            _store(result[:, piece], product, None if bias is None else bias[piece], add)
    else:
        wide = _float32(b)
        for piece in pieces:
            product = a.new_empty((piece.stop - piece.start, n), dtype=torch.float32)
            torch.mm(_float32(a[piece]), wide, out=product)
            _store(result[piece], product, bias, add)


def _store(result: Tensor, product: Tensor, bias: Tensor | None, add: bool) -> None:
    if bias is not None:
        product += bias
    if add:
        result += product
    else:
        result.copy_(product)


def _float32(matrix: Tensor) -> Tensor:
    """A copy whose elements lie in the order of the matrix's own, which is the fastest to make."""
    return matrix.t().float().t() if matrix.stride(0) < matrix.stride(1) else matrix.float()
