"""JSON lines: one object per line, with a text for the tokenizer or a list of token ids."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdl_ext.corpus.reading.batches import joined
from pdl_ext.corpus.reading.chats import are_chats
from pdl_ext.corpus.reading.columns import TEXT_COLUMN, TOKEN_COLUMNS
from pdl_ext.corpus.reading.compression import compression_of
from pdl_ext.corpus.reading.lines import Line, LinePlace, LineSource, has_suffix
from pdl_ext.corpus.reading.supervised import SupervisedEncoder
from pdl_ext.corpus.reading.tokenizer import PlacedText, TextEncoder
from pdl_ext.corpus.source import Batch, Format, Part, ReadOptions, Source
from pdl_ext.storage.place import Place

__all__ = ["FORMAT"]

_KINDS = {str: "a string", int: "an integer", float: "a float", bool: "a boolean", type(None): "null", list: "a list"}


class _JsonLinesSource(LineSource):
    """policy.column names the key of a line's text or ids. Blank lines are skipped.

    policy.mask, policy.skip_prompt: keys of lists with one entry per token, for ids only. policy.learn: lines are rows
    of supervised finetuning instead.
    """

    def __init__(self, path: Place, options: ReadOptions) -> None:
        super().__init__("jsonl", path)
        self._options = options
        self._policy = options.policy
        # The first of these that a line has is used.
        self._columns: tuple[str, ...] = (*TOKEN_COLUMNS, TEXT_COLUMN)
        if options.policy.column is not None:
            self._columns = (options.policy.column,)
        elif options.tokenizer is not None:
            self._columns = (TEXT_COLUMN, *TOKEN_COLUMNS)
        self._supervised = None if options.policy.learn is None else SupervisedEncoder(options, path)
        if self._supervised is None and self._begins_with_ids():
            self.dtype = "int64"

    def parts(self, size: int) -> Iterator[Part]:
        if self._policy.packing != "wrapped":
            yield from super().parts(size)
        elif self.size:
            # The beginning of a sequence depends on all lines before it.
            yield Part(0, self.size, self.size)

    def batches(self, part: Part) -> Iterator[Batch]:
        lines = self._filled_lines(part)
        if self._supervised is not None:
            yield from self._supervised.batches((self.place(line.offset), self._record(line)) for line in lines)
            return
        items = map(self._item, lines)
        # Except in unusual files, all lines of a file are of one kind.
        for is_text, run in itertools.groupby(items, lambda item: isinstance(item, PlacedText)):
            batches = self._encoder.batches if is_text else joined
            yield from batches(run)

    def placed_batches(self, part: Part) -> Iterator[tuple[object, Batch]]:
        for line in self._filled_lines(part):
            place = self.place(line.offset)
            if self._supervised is not None:
                yield from ((place, batch) for batch in self._supervised.batches([(place, self._record(line))]))
            else:
                item = self._item(line)
                yield place, item if isinstance(item, Batch) else self._encoder.encode([item])

    def _filled_lines(self, part: Part) -> Iterator[Line]:
        return (line for line in self.lines(part) if line.content.strip())

    def _begins_with_ids(self) -> bool:
        # Damage is an error where it is read.
        with contextlib.suppress(ValueError):
            first = next(self._filled_lines(Part(0, self.size, self.size)), None)
            return first is not None and isinstance(self._item(first), Batch)
        return False

    @functools.cached_property
    def _encoder(self) -> TextEncoder:
        return TextEncoder(self._options, self.path)

    def _record(self, line: Line) -> dict[str, Any]:
        place = self.place(line.offset)
        text = self.decode(line)
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            # The line in the error is always the first.
            reason = f"{error.msg}: character {error.pos}" if isinstance(error, json.JSONDecodeError) else error
            raise ValueError(f"{place}: is not a line of JSON ({reason}), expected one object per line") from error
        if not isinstance(record, dict):
            raise ValueError(f"{place}: got {_kind(record)}, expected an object")
        return record

    def _item(self, line: Line) -> Any:
        """The content of a line: a text, or a batch of tokens."""
        place = self.place(line.offset)
        record = self._record(line)
        there = [name for name in self._columns if name in record]
        # Other programs may use these names differently, such as for a number of tokens.
        column = next((name for name in there if _may_be_read(record[name])), next(iter(there), None))
        if column is None:
            remedy = "choose the targets by --learn" if are_chats(record) else "name another with --column"
            raise ValueError(
                f"{place}: has none of {', '.join(map(repr, self._columns))}, but {_names(record)}: {remedy}"
            )
        value = _value(record, column, place)
        if isinstance(value, str):
            self._check_text(value, column, place)
            return PlacedText(place, value)
        return self._tokens(record, column, place)

    def _check_text(self, text: str, column: str, place: LinePlace) -> None:
        for name in ("mask", "skip_prompt"):
            if getattr(self._policy, name) is not None:
                raise ValueError(
                    f"{place}: got a string as {column!r}, expected token ids, which {name} is aligned with"
                )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            # JSON can escape half of a surrogate pair.
            raise ValueError(f"{place}: {column!r} is not Unicode text ({error.reason})") from error

    def _tokens(self, record: dict[str, Any], column: str, place: LinePlace) -> Batch:
        ids = _integers(record, column, {int}, place, "a string or a list of integers")
        is_target = np.ones(ids.size, np.bool_)
        if self._policy.targets == "shifted":
            is_target[:1] = False
        for name, no_target in ((self._policy.mask, 0), (self._policy.skip_prompt, self._policy.ignore_index)):
            if name is not None:
                marks = _integers(record, name, {int, bool}, place, "a list of integers")
                if marks.size != ids.size:
                    raise ValueError(
                        f"{place}: got {marks.size} entries of {name!r}, expected {ids.size}, one per token of "
                        f"{column!r}"
                    )
                is_target &= marks != no_target
        return Batch(ids, is_target)


def _value(record: dict[str, Any], name: str, place: LinePlace) -> Any:
    if name not in record:
        raise ValueError(f"{place}: has no {name!r}, but {_names(record)}")
    return record[name]


def _may_be_read(value: Any) -> bool:
    """Whether a column holds text or ids. A null does not rule a column out."""
    if isinstance(value, list):
        return not value or value[0] is None or type(value[0]) is int
    return value is None or isinstance(value, str)


def _names(record: dict[str, Any]) -> str:
    return ", ".join(map(repr, itertools.islice(record, 10))) or "nothing"


def _integers(
    record: dict[str, Any], name: str, types: set[type], place: LinePlace, expected: str
) -> NDArray[np.int64]:
    values = _value(record, name, place)
    if not isinstance(values, list):
        raise ValueError(f"{place}: {name!r} is {_kind(values)}, expected {expected}")
    if not types.issuperset(map(type, values)):
        wrong = next(value for value in values if type(value) not in types)
        raise ValueError(f"{place}: {name!r} is a list with {_kind(wrong)} in it, expected {expected}")
    try:
        return np.array(values, np.int64)
    except OverflowError as error:
        raise ValueError(f"{place}: {name!r} has an integer in it that does not fit into 64 bits") from error


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "an object")


def _open(path: Place, options: ReadOptions) -> list[Source]:
    return [_JsonLinesSource(path, options)]


def _recognises(path: Place, head: bytes) -> bool:
    if has_suffix(path, ".jsonl", ".ndjson"):
        return True
    # Other JSON is rarely compressed; uncompressed, it may be an array.
    is_compressed = compression_of(path) is not None
    return has_suffix(path, ".json") and (is_compressed or head.startswith((b"{", b"\xef\xbb\xbf{")))


FORMAT = Format("jsonl", _open, _recognises)
