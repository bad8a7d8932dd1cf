"""The texts of the tasks, each example with its cluster."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import harness

from pdl_ext.cli.demo.data import DemoError, Example, verses

WORK = harness.ROOT / "build" / "evidence"
SOURCES, WORDNET, DEBIAN = WORK / "sources", "wordnet", "debian"

PARTS_OF_SPEECH = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}

# Families of one source in several versions, such as gcc-11 and gcc-12, are near duplicates.
_VERSION = re.compile(r"[-.\d]+$")
_NOT_DESCRIBED = re.compile(r"transitional|dummy package|debug(ging)? symbols|metapackage", re.IGNORECASE)
# The syntactic marker of an adjective.
_MARKER = re.compile(r"\([a-z]+\)$")


class Item(NamedTuple):
    """An example, and its cluster, which must not be divided: a book, a source package, a lemma."""

    cluster: str
    example: Example


def verse_items(sources: Path) -> list[Item]:
    """King James verses to the New Heart English Bible, by book."""
    # A verse's number is book, chapter and verse in three digits each.
    return [Item(f"book {number // 1_000_000}", example) for number, example in verses().items()]


def wordnet_items(sources: Path) -> list[Item]:
    """Word and part of speech to the first definition of WordNet, by lemma.

    The question for a synset is the first of its words whose most frequent sense it is; a synset without one is left
    out. So each definition occurs once, and each question has one answer.
    """
    folder = _found(sources / WORDNET)
    items = []
    for suffix, part in PARTS_OF_SPEECH.items():
        first_sense = dict(_first_senses(folder / f"index.{suffix}"))
        for offset, words, gloss in _synsets(folder / f"data.{suffix}"):
            word = next((word for word in words if first_sense.get(word.lower()) == offset), None)
            definition = gloss.partition('; "')[0].strip()
            if word is not None and definition:
                shown = word.replace("_", " ")
                items.append(Item(word.lower(), Example(f"Define the {part} “{shown}”.", definition)))
    return items


def _lines(path: Path) -> Iterator[str]:
    # The licence's lines begin with a space.
    return (line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith(" "))


def _first_senses(path: Path) -> Iterator[tuple[str, str]]:
    for line in _lines(path):
        fields = line.split()
        yield fields[0], fields[-int(fields[2])]


def _synsets(path: Path) -> Iterator[tuple[str, list[str], str]]:
    for line in _lines(path):
        data, _, gloss = line.partition(" | ")
        fields = data.split()
        yield fields[0], [_MARKER.sub("", word) for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]], gloss


def debian_items(sources: Path) -> list[Item]:
    """Long descriptions of Debian's packages to their synopses, by source package without its version."""
    folder = _found(sources / DEBIAN)
    source_of = {}
    for path in sorted(folder.glob("*.Packages")):
        for fields in _stanzas(path):
            source_of[fields["Package"]] = fields.get("Source", fields["Package"]).partition(" ")[0]
    items: dict[str, Item] = {}
    for path in sorted(folder.glob("*.Translation-en")):
        for fields in _stanzas(path):
            synopsis, _, text = fields["Description-en"].partition("\n")
            if fields["Package"] in source_of and text and not _NOT_DESCRIBED.search(synopsis):
                source = _VERSION.sub("", source_of[fields["Package"]])
                prompt = f"Summarise this software package in a few words:\n\n{_unfolded(text)}"
                items.setdefault(fields["Package"], Item(source, Example(prompt, synopsis.strip())))
    return list(items.values())


def _stanzas(path: Path) -> Iterator[dict[str, str]]:
    for stanza in path.read_text(encoding="utf-8").split("\n\n"):
        fields, name = {}, ""
        for line in stanza.splitlines():
            if line.startswith(" "):
                fields[name] += f"\n{line[1:]}"
            else:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
        if fields:
            yield fields


def _unfolded(text: str) -> str:
    # Lines that begin with a space are literal; a dot is an empty line.
    paragraphs = re.split(r"\n?^\.$\n?", text, flags=re.MULTILINE)
    return "\n".join(re.sub(r"\n(?! )", " ", paragraph) for paragraph in paragraphs if paragraph.strip())


def _found(folder: Path) -> Path:
    if not folder.is_dir():
        raise DemoError(f"{folder}: the texts of this task are not here; run: python -m evidence.fetch")
    return folder
