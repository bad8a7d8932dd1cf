"""Columns of Arrow record batches as batches of tokens, for Parquet, Arrow and Hugging Face datasets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pdl_ext._optional import require
from pdl_ext.corpus.reading.chats import are_chats, columns_to_learn
from pdl_ext.corpus.reading.supervised import SupervisedEncoder
from pdl_ext.corpus.reading.tokenizer import PlacedText, TextEncoder
from pdl_ext.corpus.source import Batch, ReadOptions, as_countable, as_signed, check_stated_dtype, count_dtype
from pdl_ext.storage.place import Place

__all__ = ["TEXT_COLUMN", "TOKEN_COLUMNS", "Columns", "Rows", "arrow_errors"]

# The columns that are read if none is named: the first of these that exists.
TOKEN_COLUMNS = ("input_ids", "tokens", "token_ids")
TEXT_COLUMN = "text"
# They fit into a core's cache while they are counted.
_BATCH_TOKENS = 2**18
_TEXTS = 64


class Rows(NamedTuple):
    """Some rows of a file: a record batch, the number of each row, and the origin of these numbers, for errors.

    end: the byte of the file at which they end, if it is read from front to back.
    """

    batch: Any
    numbers: Sequence[int] | NDArray[np.int64]
    place: str
    end: int | None = None


@contextlib.contextmanager
def arrow_errors(path: Place, format_name: str) -> Iterator[None]:
    """Turns pyarrow's errors for a damaged file into a ValueError that names it."""
    pa = require("pyarrow", "corpus")
    try:
        yield
    except (pa.ArrowException, OSError, MemoryError, OverflowError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: is damaged or not in the {format_name} format ({reason})") from error


class Columns:
    """The columns of a file that are read, and the conversion of their rows to batches.

    A column of tokens holds lists of integers, each a sequence, or one integer per row, without sequences. With
    options.tokenizer it may also hold texts. With options.policy.learn the columns are those of supervised finetuning.

    names: the columns read; dtype: of the tokens, a name in TOKEN_DTYPES, or "text".
    Raises ValueError that names the file, if a column is missing or has an unexpected type.
    """

    def __init__(self, path: Place, schema: Any, options: ReadOptions) -> None:
        self._path = path
        self._options = options
        self._policy = options.policy
        self._schema = schema
        for option in ("column", "mask", "skip_prompt"):
            self._check_is_one(option)
        self._supervised = None
        if self._policy.learn is not None:
            self._supervised = SupervisedEncoder(options, path)
            self.names, self.dtype = self._found_to_learn(), "text"
            return
        self._tokens = self._policy.column or self._found()
        kind, numbers = self._kind(self._tokens)
        if kind is None:
            raise ValueError(
                f"{path}: column {self._tokens!r} holds {self._type(self._tokens)}, expected lists of integers, "
                "integers or, with a tokenizer, strings"
            )
        self.names = [self._tokens]
        for name, numeric in ((self._policy.mask, ("integer", "bool")), (self._policy.skip_prompt, ("integer",))):
            if name is not None:
                self._check_beside_tokens(name, kind, numeric)
                self.names.append(name)
        if kind == "text":
            if options.tokenizer is None:
                raise ValueError(
                    f"{path}: column {self._tokens!r} holds text, expected a tokenizer for it (--tokenizer)"
                )
            self.dtype = "text"
        else:
            if numbers == "bool":
                raise ValueError(f"{path}: column {self._tokens!r} holds bool, expected integers")
            if kind == "flat" and self._policy.targets == "shifted":
                raise ValueError(
                    f"{path}: column {self._tokens!r} holds one token per row, without the beginnings of sequences: "
                    "expected lists of tokens for targets 'shifted'"
                )
            stated = str(_numbers(self._type(self._tokens)))
            check_stated_dtype(path, stated, options)
            self.dtype = count_dtype(stated)

    def batches(self, rows: Iterable[Rows]) -> Iterator[Batch]:
        """The tokens of record batches that have the columns `names`.

        Raises ValueError that names file, column and row: for nulls, and lists of different lengths in one row.
        """
        if self._supervised is not None:
            yield from self._supervised.batches(self._rows_to_learn(rows))
        elif self.dtype == "text":
            yield from TextEncoder(self._options, self._path).batches(self._texts(rows))
        else:
            for some in rows:
                yield from self._batches(some)

    def placed_batches(self, rows: Iterable[Rows]) -> Iterator[tuple[str, Batch]]:
        """The same, each batch of one row and with its place."""
        for some in rows:
            for row in range(some.batch.num_rows):
                alone = Rows(some.batch.slice(row, 1), some.numbers[row : row + 1], some.place)
                yield from ((f"{self._path}: {self._row(some, row)}", batch) for batch in self.batches([alone]))

    def _found(self) -> str:
        tokens = [name for name in TOKEN_COLUMNS if self._is_unique(name) and self._kind(name) == ("lists", "integer")]
        if (
            self._options.tokenizer is not None
            and self._is_unique(TEXT_COLUMN)
            and self._kind(TEXT_COLUMN)[0] == "text"
        ):
            return TEXT_COLUMN
        if not tokens:
            defaults = (*TOKEN_COLUMNS, TEXT_COLUMN)
            got = [f"{field.name} ({field.type})" if field.name in defaults else field.name for field in self._schema]
            flat = [name for name in TOKEN_COLUMNS if self._is_unique(name) and self._kind(name) == ("flat", "integer")]
            # Such a column may hold ids, or numbers of ids.
            named = f"--column {flat[0]} reads it as one id per row" if flat else "name another with --column"
            if are_chats(self._schema.names):
                named = "choose the targets by --learn"
            raise ValueError(
                f"{self._path}: got the columns {', '.join(got) or '(none)'}, expected lists of token ids in one of "
                f"{', '.join(TOKEN_COLUMNS)}, or {TEXT_COLUMN} with a tokenizer: {named}"
            )
        return tokens[0]

    def _found_to_learn(self) -> list[str]:
        names = columns_to_learn(list(filter(self._is_unique, self._schema.names)), self._options)
        if not names:
            raise ValueError(
                f"{self._path}: got the columns {', '.join(self._schema.names) or '(none)'}, expected those of chats, "
                f"or of prompts and completions, or text to learn all of, for learn {self._policy.learn} (--learn)"
            )
        return names

    def _check_is_one(self, option: str) -> None:
        name = getattr(self._policy, option)
        if name is not None and not self._is_unique(name):
            raise ValueError(
                f"{self._path}: has {len(self._schema.get_all_field_indices(name))} columns {name!r}, expected one: "
                f"there are {', '.join(self._schema.names) or 'none'} (--{option.replace('_', '-')})"
            )

    def _is_unique(self, name: str) -> bool:
        return len(self._schema.get_all_field_indices(name)) == 1

    def _type(self, name: str) -> Any:
        return self._schema.field(name).type

    def _kind(self, name: str) -> tuple[str | None, str | None]:
        """A column's kind, "lists", "flat" or "text", or None, and its numbers: "integer", "bool" or None."""
        types = require("pyarrow.types", "corpus")
        storage = _storage_type(self._type(name))
        if types.is_string(storage) or types.is_large_string(storage) or types.is_string_view(storage):
            return "text", None
        numbers = _numbers(storage)
        numeric = "integer" if types.is_integer(numbers) else "bool" if types.is_boolean(numbers) else None
        return (None, None) if numeric is None else ("flat" if numbers is storage else "lists", numeric)

    def _check_beside_tokens(self, name: str, kind: str, numeric: tuple[str, ...]) -> None:
        other = self._kind(name)
        if kind == "text" or other[0] != kind or other[1] not in numeric:
            raise ValueError(
                f"{self._path}: column {name!r} holds {self._type(name)} beside {self._tokens!r} with "
                f"{self._type(self._tokens)}, expected {' or '.join(numeric)} values, one per token id"
            )

    def _texts(self, rows: Iterable[Rows]) -> Iterator[PlacedText]:
        for some in rows:
            texts = self._array(some, self._tokens)
            for start in range(0, len(texts), _TEXTS):
                for row, text in enumerate(texts.slice(start, _TEXTS).to_pylist(), start):
                    yield PlacedText(f"{self._path}: {self._row(some, row)}", text)

    def _rows_to_learn(self, rows: Iterable[Rows]) -> Iterator[tuple[str, dict[str, Any]]]:
        for some in rows:
            columns = [self._valid(some, name) for name in self.names]
            for start in range(0, some.batch.num_rows, _TEXTS):
                lists = [column.slice(start, _TEXTS).to_pylist() for column in columns]
                for row, values in enumerate(zip(*lists, strict=True), start):
                    yield f"{self._path}: {self._row(some, row)}", dict(zip(self.names, values, strict=True))

    def _batches(self, rows: Rows) -> Iterator[Batch]:
        tokens, offsets = self._values(rows, self._tokens)
        is_target = None
        if self._policy.mask is not None:
            is_target = self._beside(rows, self._policy.mask, offsets) != 0
        if self._policy.skip_prompt is not None:
            labels = as_signed(self._beside(rows, self._policy.skip_prompt, offsets))
            is_answer = labels != self._policy.ignore_index
            is_target = is_answer if is_target is None else is_target & is_answer
        if self._policy.targets == "shifted" and offsets is not None:
            is_target = np.ones(tokens.size, np.bool_) if is_target is None else is_target
            is_target[offsets[:-1][np.diff(offsets) > 0]] = False
        for start in range(0, tokens.size, _BATCH_TOKENS):
            piece = slice(start, start + _BATCH_TOKENS)
            yield Batch(as_countable(tokens[piece]), None if is_target is None else is_target[piece])

    def _beside(self, rows: Rows, name: str, offsets: NDArray[np.int64] | None) -> NDArray[Any]:
        values, own = self._values(rows, name)
        if offsets is not None and own is not None and not np.array_equal(own, offsets):
            row = int(np.flatnonzero(own != offsets)[0]) - 1
            raise ValueError(
                f"{self._path}: column {name!r} has {own[row + 1] - own[row]} values in {self._row(rows, row)}, "
                f"expected {offsets[row + 1] - offsets[row]}, one per token of {self._tokens!r}"
            )
        return values

    def _values(self, rows: Rows, name: str) -> tuple[NDArray[Any], NDArray[np.int64] | None]:
        """The numbers of all rows, and the positions where rows begin and the last ends; None if rows are numbers."""
        pa = require("pyarrow", "corpus")
        array = self._array(rows, name)
        if pa.types.is_fixed_size_list(array.type):
            values, offsets = array.flatten(), np.arange(len(array) + 1) * array.type.list_size
        elif pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
            # flatten() respects a slice; the offsets do not.
            values, offsets = array.flatten(), array.offsets.to_numpy().astype(np.int64)
            offsets -= offsets[0]
        else:
            values, offsets = array, None
        if values.null_count:
            row = int(np.searchsorted(offsets, _first_null(values), side="right")) - 1
            raise ValueError(f"{self._path}: column {name!r} has a null in {self._row(rows, row)}, expected none")
        return values.to_numpy(zero_copy_only=not pa.types.is_boolean(values.type)), offsets

    def _array(self, rows: Rows, name: str) -> Any:
        pa = require("pyarrow", "corpus")
        array = self._valid(rows, name)
        while True:
            if isinstance(array.type, pa.BaseExtensionType):
                array = array.storage
            elif pa.types.is_dictionary(array.type):
                array = array.dictionary_decode()
            else:
                break
        if array.null_count:
            raise ValueError(
                f"{self._path}: column {name!r} is null in {self._row(rows, _first_null(array))}, expected no nulls"
            )
        return array

    def _valid(self, rows: Rows, name: str) -> Any:
        array = rows.batch.column(name)
        # Reading trusts the file: without this, a wrong offset would read memory of other objects.
        array.validate(full=True)
        return array

    def _row(self, rows: Rows, row: int) -> str:
        return f"row {int(rows.numbers[row])} of {rows.place}"


def _storage_type(type: Any) -> Any:
    """The stored type behind extension types and dictionaries."""
    pa = require("pyarrow", "corpus")
    while True:
        if isinstance(type, pa.BaseExtensionType):
            type = type.storage_type
        elif pa.types.is_dictionary(type):
            type = type.value_type
        else:
            return type


def _numbers(type: Any) -> Any:
    """The type of the elements of lists; of other types, themselves."""
    types = require("pyarrow.types", "corpus")
    type = _storage_type(type)
    is_list = types.is_list(type) or types.is_large_list(type) or types.is_fixed_size_list(type)
    return type.value_type if is_list else type


def _first_null(array: Any) -> int:
    return int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
