"""Places of files: paths on disk, and URLs that fsspec supports, with those methods of pathlib that readers call."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import io
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from pdl_ext.storage.ranges import RangedFile
from pdl_ext.storage.store import EDGE_BYTES, Store, file_system, redacted

__all__ = [
    "Place",
    "RemotePath",
    "absolute_name",
    "address",
    "beside",
    "check_path",
    "is_file",
    "is_folder",
    "is_there",
    "on_disk",
    "place",
    "real_name",
]

# At least two letters, since a single one is a drive on Windows.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


class RemotePath:
    """The URL of an object, or of a folder of objects.

    Methods behave like those of pathlib.Path. Reading methods raise FileNotFoundError for an object that does not
    exist, and ValueError that names the URL if a store fails. An object that may not be seen is neither a file nor a
    folder. Credentials in the URL appear in no name and no error.
    """

    def __init__(self, store: Store, key: str) -> None:
        self._store = store
        self._key = key

    def __str__(self) -> str:
        return self._store.url(self._key)

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self.address == other.address

    def __hash__(self) -> int:
        return hash(self.address)

    def __lt__(self, other: RemotePath) -> bool:
        return self.address < other.address

    @property
    def protocol(self) -> str:
        """The part of the URL before "://"."""
        return self._store.protocol

    @property
    def address(self) -> str:
        """The URL with its credentials: for opening it only, never to be shown or stored."""
        return self._key if "://" in self._key else f"{self._store.protocol}://{self._key.lstrip('/')}"

    @property
    def _path(self) -> str:
        """The key without a query."""
        return self._key.partition("?")[0] if self._store.is_http else self._key

    @property
    def name(self) -> str:
        return self._path.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self._store, self._path.rpartition("/")[0])

    def with_name(self, name: str) -> RemotePath:
        return self.parent / name

    def with_suffix(self, suffix: str) -> RemotePath:
        return self.with_name(PurePosixPath(self.name).with_suffix(suffix).name)

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self._store, f"{self._path}/{name}")

    def relative_to(self, folder: RemotePath) -> PurePosixPath:
        return PurePosixPath(self._path.removeprefix(f"{folder._path}/"))

    def exists(self) -> bool:
        """Raises ValueError also for an object that may not be seen."""
        with self._told():
            return self._store.info(self._key) is not None

    def is_file(self) -> bool:
        return self._kind() == "file"

    def is_dir(self) -> bool:
        return self._kind() == "directory"

    def iterdir(self) -> Iterator[RemotePath]:
        with self._told():
            children = self._store.children(self._key)
        return (RemotePath(self._store, key) for key in children)

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """The matches of a pattern in this folder."""
        try:
            with self._told():
                keys = self._store.matches(self._path, pattern.split("/"))
        except FileNotFoundError:
            keys = []
        return (RemotePath(self._store, key) for key in keys)

    def matches(self) -> list[RemotePath]:
        """The matches of this path as a pattern, sorted."""
        *parts, name = self._path.split("/")
        first = next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts))
        return list(RemotePath(self._store, "/".join(parts[:first])).glob("/".join([*parts[first:], name])))

    def rglob(self, pattern: str) -> Iterator[RemotePath]:
        """The objects in this folder and its subfolders whose names match."""
        with self._told():
            below = self._store.below(self._key)
        paths = (RemotePath(self._store, key) for key in below)
        return (path for path in paths if fnmatch.fnmatchcase(path.name, pattern))

    def version(self, *, fresh: bool) -> tuple[int, str]:
        """The size, and a text that differs between contents of this size; `fresh`: ask the store again."""
        with self._told():
            return self._store.version(self._key, fresh=fresh)

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Opens the object for reading bytes, the only mode."""
        if mode != "rb":
            raise ValueError(f"mode: got {mode!r}, expected 'rb'")
        return io.BufferedReader(self.ranges(), EDGE_BYTES)

    def ranges(self) -> RangedFile:
        """An unbuffered file, which reads by position and ahead."""
        return RangedFile(self._store, self._key, self.version(fresh=False)[0], str(self))

    def read_bytes(self) -> bytes:
        with self.ranges() as file:
            return file.readall()

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, content: bytes) -> None:
        """Writes the object in one piece. Raises OSError that names it if the store refuses."""
        try:
            self._store.write(self._key, content)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; not written: {self}") from error

    def unlink(self, missing_ok: bool = False) -> None:
        """Raises OSError that names the object."""
        try:
            self._store.delete(self._key)
        except FileNotFoundError:
            if not missing_ok:
                raise
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; not deleted: {self}") from error

    def _kind(self) -> str | None:
        try:
            info = self._store.info(self._key)
        except PermissionError:
            # Stores answer so for an object that does not exist, unless one may list the folder.
            return None
        except OSError as error:
            raise ValueError(f"{self}: cannot be read ({error.strerror})") from error
        return None if info is None else str(info.get("type"))

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(error.errno, error.strerror, str(self)) from error
        except OSError as error:
            raise ValueError(f"{self}: cannot be read ({error.strerror})") from error


Place: TypeAlias = Path | RemotePath


def check_path(name: str, value: Any) -> None:
    """Raises TypeError unless value is a path, ValueError for an empty one and for one with a null character."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}, expected a path")
    if not os.fspath(value):
        raise ValueError(f"{name}: got an empty name, expected a path")
    if "\0" in os.fspath(value):
        raise ValueError(f"{name}: got {os.fspath(value)!r}, which has a null character, expected a path")


def place(argument: str, name: str | os.PathLike[str], stores: dict[Any, Store] | None = None) -> Place:
    """The place that an argument names: a URL, as fsspec supports them, or a path.

    stores: the stores of a corpus, by their file systems, which keep what they have listed; a new one is added.
    Raises TypeError or ValueError that names the argument unless it is either, ImportError that names a missing
    package.
    """
    check_path(argument, name)
    text = os.fspath(name)
    if not is_url(text):
        return Path(name)
    if text.lower().startswith("file://"):
        return Path(text[len("file://") :])
    opened, key, protocol = file_system(text)
    _check_is_told_by_name(argument, text, opened, key, protocol)
    store = Store(opened, protocol, keeps=stores is not None)
    if stores is not None:
        store = stores.setdefault(opened, store)
    if store.is_http and text.partition("?")[0].endswith("/"):
        store.note_folder(key)
    return RemotePath(store, key)


def _check_is_told_by_name(argument: str, text: str, opened: Any, key: str, protocol: str) -> None:
    """Raises ValueError for a URL that bucket and name do not identify: one of two such objects would be left out."""
    name = key if "://" in key else f"{protocol}://{key.lstrip('/')}"
    try:
        again, key_again, _ = file_system(name)
    except ValueError:
        again = key_again = None
    if again is not opened or key_again != key:
        raise ValueError(
            f"{argument}: got {redacted(text)}, expected a URL that its bucket and name identify: no chained "
            "URLs, and hosts, accounts and users set by fsspec's configuration"
        )


def is_url(name: str) -> bool:
    """Whether a name is a URL rather than a path."""
    return _URL.match(name) is not None


def is_file(path: Place) -> bool:
    """Whether the path is a file; False for a name that no file can have."""
    return path.is_file() if isinstance(path, RemotePath) else os.path.isfile(path)


def is_folder(path: Place) -> bool:
    """Whether the path is a folder; False for a name that no folder can have."""
    return path.is_dir() if isinstance(path, RemotePath) else os.path.isdir(path)


def is_there(path: Place) -> bool:
    """Whether anything exists there now, including a link to a missing file."""
    if not isinstance(path, RemotePath):
        return os.path.lexists(path)
    try:
        path.version(fresh=True)
    except FileNotFoundError:
        return False
    return True


def beside(path: Place, name: str) -> str:
    """The path of a name relative to a file's folder; the name itself if it is a URL or absolute."""
    if is_url(name) or os.path.isabs(name):
        return name
    return f"{path.parent.address}/{name}" if isinstance(path, RemotePath) else os.path.join(path.parent, name)


def address(path: Place) -> str:
    """The text from which `place` makes this place. Not to be shown."""
    return path.address if isinstance(path, RemotePath) else os.fspath(path)


def absolute_name(path: Place) -> str:
    """The same text for two spellings of one path. Not to be shown."""
    return path.address if isinstance(path, RemotePath) else os.path.abspath(path)


def real_name(path: Place) -> str:
    """The same text for two paths to one file, links included. Not to be shown."""
    return path.address if isinstance(path, RemotePath) else os.path.realpath(path)


@contextlib.contextmanager
def on_disk(path: Place) -> Iterator[Path]:
    """A file on disk with the same content: the file itself, or a copy that is deleted at the end."""
    if not isinstance(path, RemotePath):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_bytes(path.read_bytes())
        yield copy
