"""The division of examples into those for training, for the choice of the learning rate, and for tests."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence

from evidence.sources import Item
from pdl_ext.cli.demo.data import Example

# Shares of the clusters. Test comes first: its examples are left out of the other parts.
SHARES = {"test": 0.3, "validation": 0.1, "training": 0.6}
SEED = 0


def split(items: Sequence[Item]) -> dict[str, list[Item]]:
    """The items of each part, in an order that takes every cluster in turn.

    No cluster is in two parts. No prompt or completion of one part is in a later one, ignoring case and spaces.
    """
    generator = random.Random(SEED)
    clusters: dict[str, list[Item]] = {}
    for item in items:
        clusters.setdefault(item.cluster, []).append(item)
    names = sorted(clusters)
    generator.shuffle(names)
    taken: set[str] = set()
    parts: dict[str, list[Item]] = {}
    begin = 0.0
    for part, share in SHARES.items():
        end = begin + share * len(names)
        chosen = [clusters[name] for name in names[round(begin) : round(end)]]
        begin = end
        for cluster in chosen:
            generator.shuffle(cluster)
        fresh = [item for item in _in_turn(chosen) if not taken & _texts(item.example)]
        taken.update(*(_texts(item.example) for item in fresh))
        parts[part] = fresh
    return parts


def _in_turn(clusters: Sequence[Sequence[Item]]) -> Iterator[Item]:
    longest = max(map(len, clusters), default=0)
    return (cluster[turn] for turn in range(longest) for cluster in clusters if turn < len(cluster))


def _texts(example: Example) -> set[str]:
    return {" ".join(text.casefold().split()) for text in (example.prompt, example.completion)}


def first_that_fit(items: Iterable[Item], number: int, fits: Callable[[Sequence[Item]], list[bool]]) -> list[Item]:
    """The first `number` items that fit, checked in chunks; fewer if there are no more."""
    kept: list[Item] = []
    rest = iter(items)
    while len(kept) < number and (chunk := [item for item, _ in zip(rest, range(1000), strict=False)]):
        kept += [item for item, fit in zip(chunk, fits(chunk), strict=True) if fit]
    return kept[:number]
