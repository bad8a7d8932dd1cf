"""The tasks: their texts, their sizes, and the files with their examples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness

from evidence import sources
from evidence.sources import Item
from evidence.splits import first_that_fit, split
from pdl_ext.cli.demo.data import DemoError, Encoded, Example, encode

PARTS = ("training", "validation", "test")


@dataclass(frozen=True)
class Task:
    """A task, and the most tokens of a whole example and of its completion with the end token."""

    name: str
    title: str
    cluster: str
    read: Callable[[Path], list[Item]]
    tokens: int
    target_tokens: int
    sizes: dict[str, int] = field(default_factory=lambda: {"training": 2400, "validation": 300, "test": 800})


# From 20 books; their number, not that of the verses, determines the precision.
VERSES = {"training": 2400, "validation": 300, "test": 400}
# The shortest examples first.
TASKS = {
    task.name: task
    for task in (
        Task("wordnet", "WordNet: word to definition", "lemma", sources.wordnet_items, 80, 40),
        Task("debian", "Debian: description to synopsis", "source package", sources.debian_items, 192, 24),
        Task("kjv", "King James Version to New Heart English Bible", "book", sources.verse_items, 128, 64, VERSES),
    )
}


@dataclass(frozen=True)
class Examples:
    """The examples of a task for training and test.

    `digest` names the text: runs of different digests are not comparable.
    """

    task: Task
    digest: str
    items: list[Item]
    encoded: list[Encoded]
    part_of: dict[str, range]

    def of(self, part: str) -> list[Item]:
        return [self.items[index] for index in self.part_of[part]]


def load(task: Task, tokenizer: Any, work: Path, texts: Path = sources.SOURCES) -> Examples:
    """The examples of a task, from a file in `work`; a missing file is made from the texts.

    Raises DemoError if the texts are missing or too few.
    """
    path = work / task.name / "items.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        harness.write_whole(path, json.dumps(_chosen(task, tokenizer, texts), ensure_ascii=False, indent=0) + "\n")
    content = path.read_bytes()
    parts = json.loads(content)
    items = [
        Item(cluster, Example(prompt, completion)) for part in PARTS for cluster, prompt, completion in parts[part]
    ]
    ends = [sum(len(parts[before]) for before in PARTS[: index + 1]) for index in range(len(PARTS))]
    ranges = {part: range(end - len(parts[part]), end) for part, end in zip(PARTS, ends, strict=True)}
    encoded = encode([item.example for item in items], tokenizer)
    return Examples(task, hashlib.sha256(content).hexdigest()[:12], items, encoded, ranges)


def _chosen(task: Task, tokenizer: Any, texts: Path) -> dict[str, list[tuple[str, str, str]]]:
    def fits(items: Sequence[Item]) -> list[bool]:
        encoded = encode([item.example for item in items], tokenizer)
        return [len(one.ids) <= task.tokens and one.target_count <= task.target_tokens for one in encoded]

    parts = split(task.read(texts))
    chosen = {part: first_that_fit(parts[part], task.sizes[part], fits) for part in PARTS}
    for part, items in chosen.items():
        if len(items) < task.sizes[part]:
            raise DemoError(f"{task.name}: got {len(items)} examples for {part}, expected {task.sizes[part]}")
    return {part: [(item.cluster, *_texts(item.example)) for item in items] for part, items in chosen.items()}


def _texts(example: Example) -> tuple[str, str]:
    return example.prompt, example.completion
