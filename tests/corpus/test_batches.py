"""Small batches that readers put together: the same tokens and targets, in few batches of one dtype each."""

import numpy as np
import pytest

from pdl_ext.corpus.reading import batches
from pdl_ext.corpus.source import Batch


@pytest.mark.parametrize(("most", "sizes"), [(1, [4, 0, 9, 2]), (6, [4, 9, 2]), (100, [15])])
def test_batches_are_as_large_as_they_may_be(monkeypatch, most, sizes):
    monkeypatch.setattr(batches, "BATCH_TOKENS", most)
    small = np.split(np.arange(15), [4, 4, 13])
    got = list(batches.joined(map(Batch, small)))
    assert [batch.tokens.size for batch in got] == sizes
    np.testing.assert_array_equal(np.concatenate([batch.tokens for batch in got]), np.arange(15))
    assert all(batch.is_target is None for batch in got)


def test_without_a_mask_all_of_a_batch_are_targets():
    (got,) = batches.joined([Batch(np.arange(2)), Batch(np.arange(3), np.array([False, True, False]))])
    np.testing.assert_array_equal(got.is_target, [True, True, False, True, False])


def test_dtypes_stay_apart_and_are_counted():
    arrays = [np.array([-100], np.int8), np.array([-7], np.int8), np.array([2**64 - 100], np.uint64)]
    got = [batch.tokens for batch in batches.joined(map(Batch, arrays))]
    assert [(tokens.dtype, tokens.tolist()) for tokens in got] == [(np.int32, [-100, -7]), (np.int64, [-100])]
