"""Tokens for files with columns, and the expected counts of such a file."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pdl_ext import TokenFrequency
from pdl_ext.corpus import TargetPolicy, count_corpus

VOCAB = 200


def sequences(number: int, seed: int = 0, dtype: str = "int32", longest: int = 40) -> list[np.ndarray]:
    """Sequences of ids from 0 to VOCAB, which is out of range, of which some are empty; ids that int8 holds in that."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, longest, number)
    high = min(VOCAB, np.iinfo(dtype).max)
    return [generator.integers(0, high + 1, length).astype(dtype) for length in lengths]


def joined(arrays) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *(np.asarray(array).astype(np.int64) for array in arrays)])


def count(path, *, targets="all", mask=None, skip_prompt=None, column=None, **options) -> TokenFrequency:
    policy = TargetPolicy(targets=targets, mask=mask, skip_prompt=skip_prompt, column=column)
    return count_corpus([path], VOCAB, policy=policy, threads=1, **options)


def assert_counts(frequency: TokenFrequency, targets: np.ndarray, tokens: int) -> None:
    """Asserts that exactly `targets` were counted of so many tokens."""
    known = targets[targets < VOCAB]
    np.testing.assert_array_equal(frequency.counts.numpy(), np.bincount(known, minlength=VOCAB))
    assert int(frequency.out_of_range) == targets.size - known.size
    assert int(frequency.ignored) == tokens - targets.size


def check_damaged(read: Callable[[], object], name: str) -> None:
    """Asserts that reading raises at most a ValueError that names the file."""
    error = None
    try:
        read()
    except ValueError as raised:
        error = raised
    assert error is None or name in str(error)
