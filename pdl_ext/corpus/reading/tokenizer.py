"""Encodes texts to tokens, in batches of limited size."""

from __future__ import annotations

import contextlib
import functools
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from pdl_ext.corpus.reading.pretrained import errors_told_as, load_tokenizer
from pdl_ext.corpus.source import Batch, ReadOptions
from pdl_ext.storage.place import Place

__all__ = ["CHUNK_CHARACTERS", "MAX_TEXT_BYTES", "PlacedText", "TextEncoder", "encoded", "in_chunks"]


class PlacedText(NamedTuple):
    """A text with its place, which errors print: it may look for its line only then."""

    place: object
    text: str


class _Placed(Protocol):
    @property
    def place(self) -> object: ...


_Text = TypeVar("_Text", bound=_Placed)

# A text is encoded as a whole, for which the tokenizers library takes 110 times its size in memory.
MAX_TEXT_BYTES = 2**24
# The characters that all threads together encode at a time. They are enough for the library's own threads, on which the
# speed of a single compressed file depends. More would cost memory: each character takes 100 to 200 bytes, and each
# text a kilobyte. So a text counts as some characters more.
CHUNK_CHARACTERS = 2**18
_CHARACTERS_PER_TEXT = 8

_lock = threading.Lock()
_threads_encoding = 0


class TextEncoder:
    """Encodes texts as in training: neither truncated nor padded, with special tokens if the policy has them.

    There is no dropout, which would give a text different tokens each time.

    With policy.targets "shifted" the first token of each text, possibly a special one, is not a target. Threads may
    share it.

    options.tokenizer: the path of the file; path: the file of the texts, for errors before there are any.
    Raises ValueError without a tokenizer or for a damaged one, ImportError if the library is missing. Warns of a
    tokenizer with more entries than options.vocab_size.
    """

    def __init__(self, options: ReadOptions, path: Place | None = None) -> None:
        prefix = "" if path is None else f"{path}: "
        if options.tokenizer is None:
            raise ValueError(
                f"{prefix}got text without a tokenizer, expected --tokenizer with a tokenizer.json, or with the "
                "folder of a transformers tokenizer"
            )
        if options.policy.learn is not None:
            raise ValueError(
                f"{prefix}got texts, and learn {options.policy.learn} (--learn), expected rows of JSON lines, "
                "Parquet or Arrow for it"
            )
        self._path = options.tokenizer
        self._tokenizer = load_tokenizer(options)
        self._special_tokens = options.policy.special_tokens
        self._shifted = options.policy.targets == "shifted"

    def batches(self, texts: Iterable[PlacedText]) -> Iterator[Batch]:
        """The tokens of the texts, one text or a thread's share of CHUNK_CHARACTERS at a time.

        Raises ValueError as `encode` does, and for a text of more than MAX_TEXT_BYTES characters, by its place.
        """
        for chunk in in_chunks(texts, lambda text: len(text.text)):
            yield self.encode(chunk)

    def encode(self, texts: list[PlacedText]) -> Batch:
        """The tokens of all texts, uint32. Raises ValueError that names the place of a text that is refused."""
        encode = functools.partial(self._tokenizer.encode_batch_fast, add_special_tokens=self._special_tokens)
        encodings = encoded(texts, encode, self._path)
        ids = array("I")
        for encoding in encodings:
            ids += array("I", encoding.ids)
        tokens = np.asarray(ids, np.uint32)
        is_target = None
        if self._shifted:
            lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
            is_target = np.ones(tokens.size, np.bool_)
            is_target[(np.cumsum(lengths) - lengths)[lengths > 0]] = False
        return Batch(tokens, is_target)


def encoded(texts: list[PlacedText], encode: Callable[[list[str]], list[Any]], tokenizer: Place) -> list[Any]:
    """The encodings of texts, computed at once. Raises ValueError that names the place of the first text that fails."""
    refused = f"cannot be encoded by {tokenizer}"
    try:
        with errors_told_as(f"one of {len(texts)} texts from here on {refused}", texts[0].place if texts else None):
            return encode([text for _, text in texts])
    except ValueError:
        # The library does not tell which.
        for place, text in texts:
            with errors_told_as(refused, place):
                encode([text])
        raise


def in_chunks(texts: Iterable[_Text], characters: Callable[[_Text], int]) -> Iterator[list[_Text]]:
    """Texts to encode together: a thread's share of CHUNK_CHARACTERS, or one text.

    characters: the number of them in a text. Raises ValueError that names the place of a text of more than
    MAX_TEXT_BYTES.
    """
    chunk: list[_Text] = []
    total = 0
    # The limit of the first chunk: other threads may be about to begin.
    most = CHUNK_CHARACTERS // 16
    with _one_more_encodes():
        for text in texts:
            number = characters(text)
            if number > MAX_TEXT_BYTES:
                raise ValueError(
                    f"{text.place}: got a text of {number:,} characters, expected {MAX_TEXT_BYTES:,} at most"
                )
            size = number + _CHARACTERS_PER_TEXT
            if chunk and total + size > most:
                yield chunk
                chunk, total = [], 0
                most = CHUNK_CHARACTERS // _threads_encoding
            chunk.append(text)
            total += size
        if chunk:
            yield chunk


@contextlib.contextmanager
def _one_more_encodes() -> Iterator[None]:
    global _threads_encoding
    with _lock:
        _threads_encoding += 1
    try:
        yield
    finally:
        with _lock:
            _threads_encoding -= 1
