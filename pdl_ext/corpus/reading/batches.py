"""Joins small batches of tokens to larger ones, which are worth a call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from pdl_ext.corpus.source import Batch, as_countable

__all__ = ["BATCH_TOKENS", "copied", "joined"]

# Few enough to stay in a core's cache, enough to outweigh the cost of a call.
BATCH_TOKENS = 2**16
# A limit that also holds for empty batches.
_HELD = 2**14


def joined(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same tokens in copies, each of one dtype and at most BATCH_TOKENS, unless a single batch has more."""
    held: list[Batch] = []
    size = 0
    for batch in batches:
        if held and (size + batch.tokens.size > BATCH_TOKENS or batch.tokens.dtype != held[0].tokens.dtype):
            yield _join(held)
            held, size = [], 0
        held.append(batch)
        size += batch.tokens.size
    if held:
        yield _join(held)


def copied(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same tokens, small batches joined. The given batches are views that are valid only until the next one."""
    held: list[Batch] = []
    size = 0
    for batch in batches:
        if batch.tokens.size >= BATCH_TOKENS:
            # It is counted before the next one is requested.
            yield batch
            continue
        held.append(Batch(batch.tokens.copy(), batch.is_target))
        size += batch.tokens.size
        if size >= BATCH_TOKENS or len(held) >= _HELD:
            yield from joined(held)
            held, size = [], 0
    yield from joined(held)


def _join(batches: list[Batch]) -> Batch:
    # A single batch is copied, too: its address may not be aligned.
    tokens = as_countable(np.concatenate([batch.tokens for batch in batches]))
    if all(batch.is_target is None for batch in batches):
        return Batch(tokens)
    every = (np.ones(b.tokens.size, np.bool_) if b.is_target is None else b.is_target for b in batches)
    return Batch(tokens, np.concatenate(list(every)))
