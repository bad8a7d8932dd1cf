"""Examples for finetuning: their sources, and their conversion to token ids, batches and labels."""

from __future__ import annotations

import importlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pdl_ext.cli.demo.extra import EXTRA_REQUIREMENT
from pdl_ext.cli.progress import steps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
INSTRUCTION = "Rewrite this verse in modern English:\n\n"

# The packages lost the line breaks of poetry and joined the words around them: "of integrity,but wickedness".
_LOST_LINE_BREAK = re.compile(r"[,;:.?!][^\W\d_]")
# The number of batches whose examples are sorted by length together. It saves most padding and keeps the order random.
_WINDOW = 8


class DemoError(Exception):
    """A problem that the user can solve; the message says what it is and how to solve it."""


@dataclass(frozen=True)
class Example:
    """A prompt, possibly empty, and the completion that the model learns."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example: the first ``context`` are given, and the others are targets."""

    ids: list[int]
    context: int

    @property
    def target_count(self) -> int:
        return len(self.ids) - self.context


def verses() -> dict[int, Example]:
    """Return King James verses as prompts with the same verses of the New Heart English Bible as completions.

    About 25,000 pairs by pythonbible's number of the verse, book * 1_000_000 + chapter * 1000 + verse, in the order of
    the books. Verses whose line breaks the packages lost are left out.
    Raises DemoError if the pythonbible packages are missing.
    """
    try:
        kjv, nheb = (
            importlib.import_module(f"pythonbible_{name}.plain_text_readers_bible").bible for name in ("kjv", "nheb")
        )
    except ImportError as error:
        raise DemoError(f"the verses are not installed ({error}); run: {EXTRA_REQUIREMENT}") from error
    pairs = {}
    for verse, start in nheb.verse_start_indices.items():
        if verse not in kjv.verse_start_indices:
            continue
        old = kjv.scripture_content[kjv.verse_start_indices[verse] : kjv.verse_end_indices[verse]].strip()
        new = nheb.scripture_content[start : nheb.verse_end_indices[verse]].strip()
        if old and new and not _LOST_LINE_BREAK.search(new):
            # Brackets mark the words that the translators added, in italics in print.
            pairs[verse] = Example(INSTRUCTION + old.replace("[", "").replace("]", ""), new)
    return pairs


def read_text(path: Path) -> list[Example]:
    """Read a UTF-8 file of one example a line, or of JSON lines with ``prompt`` and ``completion``.

    It is read as JSON lines if its name ends in .jsonl or its first line that is not blank begins with ``{``. Blank
    lines are skipped. Raises DemoError, with file and line number, for a missing or empty file and a malformed line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DemoError(f"{path}: cannot be read: {error.strerror}") from error
    lines: list[tuple[int, str]] = []
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise DemoError(f"{path}, line {number}: not UTF-8 text: {error.reason} at byte {error.start}") from error
        if line:
            lines.append((number, line))
    if not lines:
        raise DemoError(f"{path}: got an empty file, expected text")
    if path.suffix == ".jsonl" or lines[0][1].startswith("{"):
        return [_parse_json_line(path, number, line) for number, line in lines]
    return [Example("", line) for _, line in lines]


def _parse_json_line(path: Path, number: int, line: str) -> Example:
    where = f"{path}, line {number}"
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DemoError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(record, dict):
        raise DemoError(f"{where}: expected a JSON object with prompt and completion, got {type(record).__name__}")
    for key in ("prompt", "completion"):
        if key not in record:
            raise DemoError(f"{where}: {key!r} is missing")
        if not isinstance(record[key], str):
            raise DemoError(f"{where}: {key!r} must be a string, got {type(record[key]).__name__}")
    if not record["completion"].strip():
        raise DemoError(f"{where}: 'completion' is empty")
    return Example(record["prompt"].strip(), record["completion"].strip())


def encode(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Tokenise examples in the model's chat format, without a system message.

    With a prompt, ``<bos>user\\n{prompt}<eos>\\n<bos>assistant\\n`` is context and ``{completion}<eos>`` are targets.
    Without one, ``<bos>`` alone is context, so that the first token of the text is a target as well.
    """

    def ids_of(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    encoded = []
    for start in steps(range(0, len(examples), 1000), "tokenise", "k examples"):
        chunk = examples[start : start + 1000]
        contexts = ids_of([f"{bos}user\n{e.prompt}{eos}\n{bos}assistant\n" if e.prompt else bos for e in chunk])
        completions = ids_of([e.completion for e in chunk])
        for context, completion in zip(contexts, completions, strict=True):
            encoded.append(Encoded([*context, *completion, tokenizer.eos_token_id], len(context)))
    return encoded


def split(count: int, held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """Shuffle ``range(count)`` and return (training, held-out) indices, the latter ``held_out`` of them."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order[held_out:], order[:held_out]


def training_batches(lengths: Sequence[int], batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """Draw ``steps`` batches of ``batch_size`` indices into ``lengths``: shuffled epochs, similar lengths together."""
    generator = random.Random(seed)
    stream: list[int] = []
    while len(stream) < steps * batch_size:
        epoch = list(range(len(lengths)))
        generator.shuffle(epoch)
        stream += epoch
    batches: list[list[int]] = []
    for start in range(0, steps * batch_size, _WINDOW * batch_size):
        stop = min(start + _WINDOW * batch_size, steps * batch_size)
        window = sorted(stream[start:stop], key=lambda index: lengths[index])
        sorted_batches = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        generator.shuffle(sorted_batches)
        batches += sorted_batches
    return batches


def collate(examples: Sequence[Encoded], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad on the right and return (ids, labels), both int64 [batch, longest]; labels ignore context and padding."""
    longest = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), longest), pad_id)
    labels = torch.full((len(examples), longest), IGNORE_INDEX)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        labels[row, example.context : length] = torch.tensor(example.ids[example.context :])
    return ids, labels


def pad_left(prompts: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad prompts on the left, as generation needs, and return (ids, attention mask), both int64 [batch, longest]."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask
