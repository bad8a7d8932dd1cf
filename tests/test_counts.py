"""The table of counts: its layout, which all layers share, and the counts that it refuses."""

from __future__ import annotations

import pytest
import torch

from pdl_ext import TokenFrequency
from pdl_ext.counts import CountTable
from pdl_ext.engine import ops


def table(counts, ignored, out_of_range, seen):
    return CountTable(*map(torch.tensor, (counts, ignored, out_of_range, seen)))


def numbers(of):
    return [part.tolist() for part in of]


def test_every_layer_has_the_same_four_in_the_same_order():
    frequency = TokenFrequency(3)
    arguments = [argument.name for argument in ops.compiled.count_tokens_.default._schema.arguments]
    assert arguments[:4] == list(CountTable._fields)
    assert [name for name, _ in frequency.named_buffers()] == list(CountTable._fields)
    assert all(mine is buffer for mine, buffer in zip(frequency.table, frequency.buffers(), strict=True))


def test_packed_and_back():
    packed = table([5, 6], 1, 2, 14).packed()
    assert packed.tolist() == [5, 6, 1, 2, 14]
    assert len(packed) == CountTable.packed_size(2)
    views = CountTable.unpacked(packed)
    views.add(torch.tensor([0, -100, 9, 9, 1, 1]), ignore_index=-100)
    assert numbers(views) == [[6, 8], 2, 4, 20]
    assert packed.tolist() == [6, 8, 2, 4, 20]


def test_a_packed_copy_is_a_copy():
    of = table([5, 6], 1, 2, 14)
    of.packed().zero_()
    assert numbers(of) == [[5, 6], 1, 2, 14]


def test_merge_copy_and_ignore():
    of, other = table([5, 6], 1, 2, 14), table([10, 20], 30, 40, 100)
    of.merge(other)
    assert numbers(of) == [[15, 26], 31, 42, 114]
    of.ignore(3)
    assert numbers(of) == [[15, 26], 34, 42, 117]
    of.copy_(other)
    of.ignore(1)
    assert numbers(of) == [[10, 20], 31, 40, 101]
    assert numbers(other) == [[10, 20], 30, 40, 100]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (([5, 6], 1, 2, 14), ""),
        (([5, 6], 1, 2, 13), "mine: got 14 tokens counted, ignored and out of range, expected the 13 seen"),
        (([5, 6], 1, 2, 15), "mine: got 14 tokens counted, ignored and out of range, expected the 15 seen"),
        (([-5, 16], 1, 2, 14), "mine: got a negative count"),
        (([5, 6], -1, 4, 14), "mine: got a negative count"),
        (([5, 6], 4, -1, 14), "mine: got a negative count"),
        (([2**62, 2**62], 0, 0, -(2**63)), "mine: got counts whose sum is past 2^63"),
    ],
)
def test_the_law(numbers, message):
    if not message:
        table(*numbers).check_conserved("mine")
        return
    with pytest.raises(ValueError, match="^" + message.replace("^", r"\^")):
        table(*numbers).check_conserved("mine")
