"""Tokenizers: a file of the `tokenizers` library, on disk or in a store, or a folder of a transformers tokenizer."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeGuard

from pdl_ext._optional import require
from pdl_ext._printable import warn
from pdl_ext.corpus.source import ReadOptions, Stamp
from pdl_ext.storage.place import Place, RemotePath

__all__ = [
    "chat_template_digest",
    "errors_told_as",
    "load_pretrained",
    "load_tokenizer",
    "text_of_token",
    "tokenizer_digest",
    "tokenizer_stamps",
]

_Stamps = tuple[tuple[Place, Stamp], ...]

# The files that transformers may read for a tokenizer. They include the model's configuration, but no weights.
_SUFFIXES = (".json", ".jinja", ".txt", ".model")
# Otherwise each of several threads would load its own.
_loading = threading.Lock()


def tokenizer_stamps(path: Place) -> _Stamps:
    """The files of a tokenizer, with their present stamps.

    Raises ValueError for a file that cannot be read or is not a regular file. It also does for a folder without such
    files, and for a store's folder.
    """
    if isinstance(path, RemotePath):
        return ((path, _stamp_in_store(path)),)
    files = [path]
    if path.is_dir():
        found = [*path.glob("*"), *path.glob("additional_chat_templates/*")]
        files = sorted(file for file in found if file.suffix in _SUFFIXES and file.is_file())
        if not files:
            raise ValueError(f"{path}: got a folder without a tokenizer, expected one that save_pretrained wrote")
    try:
        return tuple((file, Stamp.of(file)) for file in files)
    except ValueError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise ValueError(
            f"{error}, expected a tokenizer.json, or a folder on disk that save_pretrained wrote: no hub is asked"
        ) from error


def _stamp_in_store(path: RemotePath) -> Stamp:
    try:
        return Stamp.of(path)
    except ValueError:
        # Checked only after an error: the stamp is needed for each part of a corpus.
        if path.is_dir():
            raise ValueError(
                f"{path}: got a folder in a store, expected a tokenizer.json there, or a folder on disk: copy it to one"
            ) from None
        raise


def load_tokenizer(options: ReadOptions) -> Any:
    """The `tokenizers` object of options.tokenizer, which is not None, without truncation, padding and dropout.

    Threads may share it.
    Raises ValueError for a damaged file or one of another kind, ImportError if the library is missing. Warns of a
    tokenizer with more entries than options.vocab_size.
    """
    assert options.tokenizer is not None
    stamps = tokenizer_stamps(options.tokenizer)
    with _loading:
        tokenizer = _load(options.tokenizer, stamps)
    entries = tokenizer.get_vocab_size(with_added_tokens=True)
    if entries > options.vocab_size:
        warn(
            f"{options.tokenizer}: has {entries} entries, and the vocabulary {options.vocab_size}: ids beyond it "
            "count as out of range"
        )
    return tokenizer


def load_pretrained(folder: Path) -> Any:
    """The transformers tokenizer of a folder. It runs no code of the folder and uses no network.

    Raises ValueError that names a folder which is damaged, holds no tokenizer, or holds one that is not a fast
    tokenizer. Raises ImportError if transformers or Jinja is missing.
    """
    return _load_pretrained(folder, tokenizer_stamps(folder))


def text_of_token(path: Place) -> Callable[[int], str]:
    """A function that returns the text of an id, by a tokenizer's file or folder.

    Raises ValueError for a damaged tokenizer or a file of another kind. The function raises it for an id that the
    tokenizer refuses.
    """
    tokenizer = _load(path, tokenizer_stamps(path))

    def text(token: int) -> str:
        with errors_told_as(f"{path}: cannot decode the id {token}"):
            return str(tokenizer.decode([token], skip_special_tokens=False))

    return text


def tokenizer_digest(path: Place) -> str:
    """A digest of a tokenizer, 32 hexadecimal digits: of its whole file, or of the tokenizer in a folder.

    The chat template is not part of it. Raises ValueError for a tokenizer that cannot be read.
    """
    if _is_folder(path):
        tokenizer = load_pretrained(path)
        special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
        return _digest((tokenizer.backend_tokenizer.to_str() + special).encode())
    try:
        return _digest(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error


def chat_template_digest(folder: Path) -> str | None:
    """A digest of the chat template of a folder's tokenizer, 32 hexadecimal digits; None without one.

    Raises ValueError as load_pretrained does.
    """
    template = load_pretrained(folder).chat_template
    return None if template is None else _digest(json.dumps(template, sort_keys=True).encode())


@contextlib.contextmanager
def errors_told_as(message: str, place: object = None) -> Iterator[None]:
    """Turns a library's errors into a ValueError that begins with a message, after a place if one is given."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        # The library raises no more specific error; when it panics, the error is not even an Exception.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        # A place may search for its line only now.
        raise ValueError(f"{'' if place is None else f'{place}: '}{message} ({reason})") from error


@functools.lru_cache(maxsize=1)
def _load(path: Place, stamps: _Stamps) -> Any:
    # Cached by its stamps, so that a replaced file is loaded again.
    if _is_folder(path):
        return _load_pretrained(path, stamps).backend_tokenizer
    tokenizers = require("tokenizers", "corpus")
    content = path.read_bytes() if isinstance(path, RemotePath) else None
    with errors_told_as(f"{path}: is damaged or not a file of the tokenizers library"):
        if content is None:
            return _plain(tokenizers.Tokenizer.from_file(str(path)))
        return _plain(tokenizers.Tokenizer.from_buffer(content))


@functools.lru_cache(maxsize=1)
def _load_pretrained(folder: Path, stamps: _Stamps) -> Any:
    transformers = require("transformers", "chat")
    # transformers needs it only when a template is used.
    require("jinja2", "chat")
    with errors_told_as(f"{folder}: is damaged or not a folder of a transformers tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"{folder}: got a {type(tokenizer).__name__}, expected a fast tokenizer, which has a tokenizer.json"
        )
    # As transformers does before each call.
    tokenizer.backend_tokenizer.encode_special_tokens = tokenizer.split_special_tokens
    _plain(tokenizer.backend_tokenizer)
    return tokenizer


def _plain(tokenizer: Any) -> Any:
    # The file may request these.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None
    return tokenizer


def _is_folder(path: Place) -> TypeGuard[Path]:
    return isinstance(path, Path) and path.is_dir()


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
