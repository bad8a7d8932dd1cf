"""The table of token counts, and the conservation law that every table obeys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pdl_ext._checks import check_dense, is_traced, names_of, refuse_transforms
from pdl_ext.engine import ops

__all__ = ["TOKEN_DTYPES", "CountTable", "check_count_values", "check_counts", "log_probabilities"]

TOKEN_DTYPES = (torch.uint8, torch.uint16, torch.int32, torch.uint32, torch.int64)


class CountTable(NamedTuple):
    """Counts of tokens, which methods write to: int64 tensors on one device.

    counts: [V], how often each id occurs; ignored, out_of_range, seen: one element each. `seen` is the number of all
    tokens given. The conservation law: counts.sum() + ignored + out_of_range == seen.
    Packed, a table is one int64 [V + 3]: the counts, then the others in this order. The struct of
    csrc/histogram_arguments.h has the same names.
    """

    counts: Tensor
    ignored: Tensor
    out_of_range: Tensor
    seen: Tensor

    @staticmethod
    def packed_size(vocab_size: int) -> int:
        """The number of elements of a packed table."""
        return vocab_size + 3

    @classmethod
    def zeros(cls, vocab_size: int, device: torch.device) -> CountTable:
        """An empty table; its counts have memory of their own."""
        counts = torch.zeros(vocab_size, dtype=torch.int64, device=device)
        return cls(counts, *torch.zeros(3, dtype=torch.int64, device=device).unbind())

    @classmethod
    def unpacked(cls, packed: Tensor) -> CountTable:
        """A table that is a view of a packed one."""
        return cls(packed[:-3], packed[-3], packed[-2], packed[-1])

    def packed(self) -> Tensor:
        """A packed copy."""
        return torch.cat([total.reshape(-1) for total in self])

    def add(self, tokens: Tensor, *, ignore_index: int, strict: bool = False, alone: bool = False) -> None:
        """Counts tokens: any shape, a dtype of TOKEN_DTYPES, on the table's device.

        Several threads may call it at once; each call is counted completely. With `strict` (CPU only) an id out of
        range raises IndexError before anything is changed. With `alone` (CPU only) the caller guarantees that no other
        thread uses this table. The call then runs on its thread only, whatever number of threads PyTorch has.
        Raises TypeError or ValueError for tokens of another dtype, layout or device.
        """
        if not isinstance(tokens, Tensor):
            raise TypeError(f"tokens: got {type(tokens).__name__}, expected a tensor")
        check_dense("tokens", tokens)
        refuse_transforms(tokens)
        if tokens.dtype not in TOKEN_DTYPES:
            raise TypeError(f"tokens: got dtype {tokens.dtype}, expected one of {names_of(TOKEN_DTYPES)}")
        if tokens.device != self.counts.device:
            raise ValueError(f"tokens: got device {tokens.device}, expected {self.counts.device}, where the counts are")
        ops.compiled.count_tokens_(*self, tokens.contiguous(), ignore_index, strict, alone)
        if not alone and not torch.compiler.is_compiling() and not self.counts.is_inference():
            # PyTorch does this only for its own ops.
            torch.autograd.graph.increment_version(self.counts)

    def ignore(self, number: int) -> None:
        """Counts this number of tokens as ignored."""
        self.ignored.add_(number)
        self.seen.add_(number)

    def merge(self, other: CountTable) -> None:
        """Adds another table of the same vocabulary and device."""
        for mine, theirs in zip(self, other, strict=True):
            mine.add_(theirs)

    def copy_(self, other: CountTable) -> None:
        """Copies the numbers of another table of the same vocabulary."""
        for mine, theirs in zip(self, other, strict=True):
            mine.copy_(theirs)

    def check_conserved(self, name: str) -> None:
        """Raises ValueError for a table that breaks the law, or that has a negative number or a sum of 2^63 or more.

        Waits for the device.
        """
        parts = self[:-1]
        check_count_values(name, torch.cat([part.reshape(-1) for part in parts]))
        in_all = sum(int(part.sum()) for part in parts)
        if in_all != int(self.seen):
            raise ValueError(
                f"{name}: got {in_all} tokens counted, ignored and out of range, expected the {int(self.seen)} seen: "
                "they were changed other than by counting (from_counts takes any counts)"
            )


def log_probabilities(counts: Tensor) -> Tensor:
    """log ((n + 1) / (N + V)) of counts n, float32 [V]. The smoothing keeps it finite for types never seen."""
    n = counts.double()
    return ((n + 1) / (n.sum() + n.shape[0])).log().to(torch.float32)


def check_counts(counts: Tensor) -> None:
    """Raises TypeError or ValueError unless these are int64 [V] counts. Their values are checked on the CPU only."""
    if not isinstance(counts, Tensor):
        raise TypeError(f"counts: got {type(counts).__name__}, expected an int64 tensor of shape [V]")
    check_dense("counts", counts)
    refuse_transforms(counts)
    if counts.dtype != torch.int64:
        raise TypeError(f"counts: got dtype {counts.dtype}, expected int64")
    if counts.dim() != 1 or counts.shape[0] == 0:
        raise ValueError(f"counts: got shape {list(counts.shape)}, expected [V] with V >= 1")
    # On CUDA this check would wait for the device, and a tracer has no values.
    if counts.device.type == "cpu" and not is_traced():
        check_count_values("counts", counts)


def check_count_values(name: str, counts: Tensor) -> None:
    """Raises ValueError for a negative count, or a sum of 2^63 or more. Waits for the device."""
    if bool((counts < 0).any()):
        raise ValueError(f"{name}: got a negative count, expected all >= 0")
    # Summed in halves: the sum itself may overflow int64, and float64 is too coarse.
    high, low = (int(half.sum()) for half in (counts >> 32, counts & 0xFFFFFFFF))
    if (high << 32) + low >= 2**63:
        raise ValueError(f"{name}: got counts whose sum is past 2^63, expected an int64 sum")
