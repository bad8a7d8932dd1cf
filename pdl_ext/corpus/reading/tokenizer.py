"""Encodes texts to tokens, in batches of limited size."""

from __future__ import annotations

import contextlib
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np

from pdl_ext.corpus.reading.pretrained import errors_told_as, load_tokenizer
from pdl_ext.corpus.source import Batch, ReadOptions
from pdl_ext.storage.place import Place

__all__ = ["CHUNK_CHARACTERS", "MAX_TEXT_BYTES", "TextEncoder", "in_chunks"]

_Text = TypeVar("_Text")

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

    options.tokenizer: the path of the file; path: the file of the texts, for errors.
    Raises ValueError without a tokenizer or for a damaged one, ImportError if the library is missing. Warns of a
    tokenizer with more entries than options.vocab_size.
    """

    def __init__(self, options: ReadOptions, path: Place | None = None) -> None:
        self._prefix = "" if path is None else f"{path}: "
        if options.tokenizer is None:
            raise ValueError(
                f"{self._prefix}got text without a tokenizer, expected --tokenizer with a tokenizer.json, or with the "
                "folder of a transformers tokenizer"
            )
        if options.policy.learn is not None:
            raise ValueError(
                f"{self._prefix}got texts, and learn {options.policy.learn} (--learn), expected rows of JSON lines, "
                "Parquet or Arrow for it"
            )
        self._path = options.tokenizer
        self._tokenizer = load_tokenizer(options)
        self._special_tokens = options.policy.special_tokens
        self._shifted = options.policy.targets == "shifted"

    def batches(self, texts: Iterable[str]) -> Iterator[Batch]:
        """The tokens of the texts, one text or a thread's share of CHUNK_CHARACTERS at a time.

        Raises ValueError as `encode` does, and for a text of more than MAX_TEXT_BYTES characters.
        """
        for chunk in in_chunks(texts, len, self._prefix):
            yield self.encode(chunk)

    def encode(self, texts: list[str]) -> Batch:
        """The tokens of all texts, uint32. Raises ValueError for a text that the tokenizer refuses."""
        with errors_told_as(f"{self._prefix}cannot be encoded by {self._path}"):
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=self._special_tokens)
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


def in_chunks(texts: Iterable[_Text], characters: Callable[[_Text], int], prefix: str) -> Iterator[list[_Text]]:
    """Texts to encode together: a thread's share of CHUNK_CHARACTERS, or one text.

    characters: the number of them in a text. Raises ValueError, which begins with `prefix`, for a text of more than
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
                raise ValueError(f"{prefix}got a text of {number:,} characters, expected {MAX_TEXT_BYTES:,} at most")
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
