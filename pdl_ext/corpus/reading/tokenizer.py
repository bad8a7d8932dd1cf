"""From texts to tokens, through a file of the `tokenizers` library."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from pdl_ext._optional import require
from pdl_ext.corpus.source import Batch, ReadOptions, Stamp
from pdl_ext.storage.place import Place, RemotePath

__all__ = ["CHUNK_CHARACTERS", "MAX_TEXT_BYTES", "TextEncoder", "text_of_token"]

# A text is encoded at once, and the tokenizers library takes 110 times its size in memory for it.
MAX_TEXT_BYTES = 2**24
# Of texts that are encoded at once, by all threads together: enough of them for the library's own threads, which one
# compressed file depends on, and no more, since it takes 100 to 200 bytes for each character of those that it is at,
# and a kilobyte for each text, which stands for some characters more.
CHUNK_CHARACTERS = 2**18
_CHARACTERS_PER_TEXT = 8

_lock = threading.Lock()
# Or each of several threads would load one for itself.
_loading = threading.Lock()
_threads_encoding = 0


class TextEncoder:
    """Encodes texts as in training: neither truncated nor padded, with special tokens if the policy has them.

    Without dropout, by which a text would have other tokens each time.

    With policy.targets "shifted" the first token of each text, which may be a special one, is no target. Threads may
    share it.

    options.tokenizer: the path of the file; path: the file that the texts come from, which errors name.
    Raises ValueError without a tokenizer or for one that is damaged, ImportError if the library is missing; warns of
    one with more entries than options.vocab_size.
    """

    def __init__(self, options: ReadOptions, path: Place | None = None) -> None:
        self._prefix = "" if path is None else f"{path}: "
        if options.tokenizer is None:
            raise ValueError(f"{self._prefix}got text without a tokenizer, expected --tokenizer with a tokenizer.json")
        self._path = options.tokenizer
        with _loading:
            self._tokenizer = _load(options.tokenizer, Stamp.of(options.tokenizer))
        self._special_tokens = options.policy.special_tokens
        self._shifted = options.policy.targets == "shifted"
        entries = self._tokenizer.get_vocab_size(with_added_tokens=True)
        if entries > options.vocab_size:
            warnings.warn(
                f"{options.tokenizer}: has {entries} entries, and the vocabulary {options.vocab_size}: ids beyond it "
                "count as out of range",
                stacklevel=2,
            )

    def batches(self, texts: Iterable[str]) -> Iterator[Batch]:
        """The tokens of the texts, a thread's share of CHUNK_CHARACTERS or one text at a time.

        Raises ValueError as `encode` does, and for a text of more than MAX_TEXT_BYTES characters.
        """
        chunk: list[str] = []
        characters = 0
        # Of the first one: other threads may be about to begin.
        most = CHUNK_CHARACTERS // 16
        with _one_more_encodes():
            for text in texts:
                if len(text) > MAX_TEXT_BYTES:
                    raise ValueError(
                        f"{self._prefix}got a text of {len(text):,} characters, expected {MAX_TEXT_BYTES:,} at most"
                    )
                size = len(text) + _CHARACTERS_PER_TEXT
                if chunk and characters + size > most:
                    yield self.encode(chunk)
                    chunk, characters = [], 0
                    most = CHUNK_CHARACTERS // _threads_encoding
                chunk.append(text)
                characters += size
            if chunk:
                yield self.encode(chunk)

    def encode(self, texts: list[str]) -> Batch:
        """The tokens of all texts, uint32. Raises ValueError for a text that the tokenizer refuses."""
        with _errors_told_as(f"{self._prefix}cannot be encoded by {self._path}"):
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


def text_of_token(path: Place) -> Callable[[int], str]:
    """What gives the text of an id by a tokenizer's file.

    Raises ValueError for a file that is damaged or none of them, and later for an id that it refuses.
    """
    tokenizer = _load(path, Stamp.of(path))

    def text(token: int) -> str:
        with _errors_told_as(f"{path}: cannot decode the id {token}"):
            return str(tokenizer.decode([token], skip_special_tokens=False))

    return text


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


@contextlib.contextmanager
def _errors_told_as(message: str) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        # The library raises nothing more special, and where it panics not even an Exception.
        raise ValueError(f"{message} ({error})") from error


@functools.lru_cache(maxsize=1)
def _load(path: Place, stamp: Stamp) -> Any:
    # By its stamp, so that a file which was replaced is loaded again.
    tokenizers = require("tokenizers", "corpus")
    with _errors_told_as(f"{path}: is damaged or no file of the tokenizers library"):
        if isinstance(path, RemotePath):
            tokenizer = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        else:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
    # The file may ask for these.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None
    return tokenizer
