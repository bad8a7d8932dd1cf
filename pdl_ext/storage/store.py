"""Object stores and servers through fsspec: listing, metadata, ranges and writing, each call with retries.

Credentials are left to the store, by fsspec's configuration and the environment. Credentials in addresses appear in no
name and no error.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import errno
import fnmatch
import functools
import glob
import random
import re
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any, TypeVar

from pdl_ext._optional import require

__all__ = ["EDGE_BYTES", "Store", "file_system", "redacted"]

T = TypeVar("T")

# The number of tries, with pauses that double from the first on: some seconds in all.
_TRIES = 7
_FIRST_PAUSE = 0.1
_SECONDS_A_TRY = 60.0
# The size of a file's beginning and end, which several readers look at before it is counted.
EDGE_BYTES = 2**16
_EDGES_BYTES = 2**24
_LISTED_AT_ONCE = 32
# fsspec names the package of a store, but not always as pip does.
_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
}
# The properties that distinguish an object from an earlier one of the same name: first those that listings have, then
# others.
_DIGESTS = ("ETag", "etag", "generation", "md5Hash", "blob_id", "xet_hash")
_OTHERS = ("Content-MD5", "Digest", "Last-Modified", "LastModified", "last_modified", "mtime", "updated", "created")
# Marks properties that came from the object itself, instead of a listing.
_ASKED = "asked by pdl_ext"
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, TypeError)
# The temporary ones of the statuses from 400 to 499.
_PASSING = (408, 425, 429)
_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^\s'\"<>)]*", re.IGNORECASE)
# The rest of a query after a URL with spaces or quotes in a longer text.
_QUERY = re.compile(r"[?#][^\s?]*=\S*")
# Outside of http a question mark belongs to a pattern or a name.
_SECRET = re.compile(r"[?#&][\w-]*(sig|token|secret|passw|key|credential|generation|version)[\w-]*=", re.IGNORECASE)
# For file systems that are not asynchronous: the number of requests at once.
_threads = functools.lru_cache(maxsize=1)(lambda: concurrent.futures.ThreadPoolExecutor(32, "pdl_ext.storage"))


def redacted(text: str) -> str:
    """A text without possible credentials in its URLs: users and passwords, queries, signatures.

    A text that is a single URL may contain any character.
    """
    if _URL.match(text):
        return _without_credentials(text)
    return _QUERY.sub("", _URL.sub(lambda url: _without_credentials(url[0]), text))


def _without_credentials(url: str) -> str:
    """The same for a URL, or for several chained ones."""
    return "::".join(map(_link_without_credentials, url.split("::")))


def _link_without_credentials(url: str) -> str:
    scheme, separator, rest = url.rpartition("://")
    if scheme.lower().startswith("http"):
        rest = re.split("[?#]", rest, maxsplit=1)[0]
    elif secret := _SECRET.search(rest):
        rest = rest[: max(rest.rfind(mark, 0, secret.start() + 1) for mark in "?#&")]
    host, slash, path = rest.partition("/")
    _, colon, port = host.partition(":")
    # A password may contain a slash.
    if colon and "@" in rest and not port.isdigit():
        rest = rest.rpartition("@")[2]
    else:
        rest = f"{host.rpartition('@')[2]}{slash}{path}"
    return f"{scheme}{separator}{rest}"


class Store:
    """A file system of fsspec's, and a cache of its listings.

    An object is identified by its key: its name in the file system itself, for http the URL.

    keeps: whether listings stay valid while this object exists. So a corpus is listed once.

    Methods raise OSError whose text has no credentials.
    """

    def __init__(self, file_system: Any, protocol: str, keeps: bool) -> None:
        self.protocol = protocol
        self.keeps = keeps
        self._fs = file_system
        self._lock = threading.Lock()
        self._infos: dict[str, dict[str, Any] | None] = {}
        self._children: dict[str, set[str]] = {}
        self._listed: list[str] = []
        self._edges: collections.OrderedDict[tuple[str, int], bytes] = collections.OrderedDict()
        self._edges_bytes = 0

    @property
    def is_http(self) -> bool:
        return self.protocol in ("http", "https")

    @property
    def _is_flat(self) -> bool:
        """Whether one call lists everything below a folder, with the objects' own properties, and raises on failure.

        Elsewhere fsspec leaves out folders that it cannot list.
        """
        return self.protocol in ("s3", "s3a", "gs", "gcs", "hf")

    def note_folder(self, key: str) -> None:
        """Records that a key is a folder, which on a server only the slash at its end shows."""
        self._infos[key] = {"type": "directory"}

    def url(self, key: str) -> str:
        """The name of an object in names and errors."""
        return redacted(key if "://" in key else f"{self.protocol}://{key.lstrip('/')}")

    def info(self, key: str) -> dict[str, Any] | None:
        """The properties of an object or a folder, None if there is neither."""
        with self._lock:
            if key in self._children:
                return {"type": "directory"}
            if key in self._infos:
                return self._infos[key]
            if any(key.startswith(f"{folder}/") for folder in self._listed):
                return None
        found = self._asked(key)
        if self.keeps:
            with self._lock:
                self._infos[key] = found
        return found

    def version(self, key: str, *, fresh: bool) -> tuple[int, str]:
        """The size of an object, and a text that differs between contents of this size; `fresh`: ask the store again.

        Raises OSError also if the object does not exist, or its server reports no size.
        """
        info = self._asked(key) if fresh else self.info(key)
        is_told = self._is_flat and info is not None and any(info.get(name) for name in _DIGESTS)
        if info is not None and not info.get(_ASKED) and not is_told:
            info = self._asked(key)
            if self.keeps:
                with self._lock:
                    self._infos[key] = info
        if info is None:
            raise FileNotFoundError(errno.ENOENT, "No such object")
        if info.get("type") == "directory":
            raise IsADirectoryError(errno.EISDIR, "Is a folder")
        if not isinstance(info.get("size"), int):
            raise OSError(errno.EIO, "its server reports no size")
        name = next((name for name in (*_DIGESTS, *_OTHERS) if info.get(name)), None)
        return info["size"], "" if name is None else f"{name} {info[name]}"

    def children(self, folder: str) -> list[str]:
        """The entries of a folder, sorted; everything below it is listed as well."""
        with self._lock:
            is_known = folder in self._children
        if not is_known:
            self._list(folder)
        with self._lock:
            return sorted(self._children.get(folder, ()))

    def below(self, folder: str) -> list[str]:
        """All objects in a folder and its subfolders, sorted."""
        found = []
        for child in self.children(folder):
            found += self.below(child) if self._is_folder(child) else [child]
        return found

    def matches(self, folder: str, pattern: list[str]) -> list[str]:
        """The objects and folders below a folder that match a pattern of names, by the rules of glob.glob."""
        first, *rest = pattern
        if first == "**":
            # It also matches no folder at all.
            found = self.matches(folder, rest) if rest else []
            for child in self.children(folder):
                if not child.rpartition("/")[2].startswith("."):
                    found += [] if rest else [child]
                    found += self.matches(child, pattern) if self._is_folder(child) else []
            return sorted(set(found))
        if glob.has_magic(first):
            keys = [key for key in self._level(folder) if _is_match(key.rpartition("/")[2], first)]
        else:
            keys = [f"{folder}/{first}"]
        if rest:
            return [match for key in keys if self._is_folder(key) for match in self.matches(key, rest)]
        return [key for key in keys if self.info(key) is not None]

    def fetch(self, key: str, start: int, stop: int) -> concurrent.futures.Future[bytes]:
        """The bytes of an object from start to stop, as a future; its result may raise OSError."""
        return self._submit(self._fetched(key, start, stop))

    def edge(self, key: str, start: int, stop: int) -> bytes:
        """The bytes of an object's beginning or end, kept for later calls."""
        with self._lock:
            if (key, start) in self._edges:
                self._edges.move_to_end((key, start))
                return self._edges[key, start]
        found = self._result(self.fetch(key, start, stop))
        if self.keeps:
            with self._lock:
                if (key, start) not in self._edges:
                    self._edges[key, start] = found
                    self._edges_bytes += len(found)
                while self._edges_bytes > _EDGES_BYTES:
                    self._edges_bytes -= len(self._edges.popitem(last=False)[1])
        return found

    def write(self, key: str, content: bytes) -> None:
        """Writes an object, completely or not at all."""
        if self.is_http:
            # Some servers answer as if they had written it.
            raise OSError(errno.EROFS, "A web server takes no files")
        self._call("pipe_file", key, content)

    def delete(self, key: str) -> None:
        """Deletes an object."""
        self._call("rm_file", key)

    def _is_folder(self, key: str) -> bool:
        info = self.info(key)
        return info is not None and info.get("type") == "directory"

    def _level(self, folder: str) -> list[str]:
        """The direct entries of a folder, sorted."""
        with self._lock:
            if folder in self._children:
                return sorted(self._children[folder])
        try:
            found = self._result(self._submit(self._entries(folder)))
        except FileNotFoundError:
            return []
        if self.keeps:
            with self._lock:
                self._infos.update(found)
        return sorted(found)

    def _list(self, folder: str) -> None:
        found = self._result(self._submit(self._all_below(folder) if self._is_flat else self._walked(folder)))
        with self._lock:
            self._children.setdefault(folder, set())
            for key, info in found.items():
                self._infos[key] = info
                while key != folder:
                    parent = key.rpartition("/")[0]
                    self._children.setdefault(parent, set()).add(key)
                    key = parent
            self._listed.append(folder)

    async def _all_below(self, folder: str) -> dict[str, dict[str, Any]]:
        await self._forget(None)
        found = await _tried(functools.partial(self._coroutine, "find", folder, detail=True), limited=False)
        return {
            key: info for key, info in _entries(folder, found.values(), self.is_http) if info["type"] != "directory"
        }

    async def _walked(self, folder: str) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        folders = [folder]
        while folders:
            some, folders = folders[:_LISTED_AT_ONCE], folders[_LISTED_AT_ONCE:]
            for entries in await asyncio.gather(*map(self._entries, some)):
                folders += [key for key, info in entries.items() if info["type"] == "directory"]
                found |= {key: info for key, info in entries.items() if info["type"] != "directory"}
        return found

    async def _entries(self, folder: str) -> dict[str, dict[str, Any]]:
        await self._forget(folder)
        address = f"{folder}/" if self.is_http else folder
        found = await _tried(functools.partial(self._coroutine, "ls", address, detail=True), limited=False)
        return dict(_entries(folder, found, self.is_http))

    async def _forget(self, key: str | None) -> None:
        """Drops the file system's own cache of listings. That of Hugging Face may contact its server for this."""
        if self._fs.async_impl:
            self._fs.invalidate_cache(key)
        else:
            await self._coroutine("invalidate_cache", key)

    def _asked(self, key: str) -> dict[str, Any] | None:
        try:
            info = self._result(self._submit(_tried(functools.partial(self._info_now, key))))
        except FileNotFoundError:
            return None
        return {**info, _ASKED: True}

    async def _info_now(self, key: str) -> Any:
        await self._forget(key)
        try:
            return await self._coroutine("info", key)
        except FileNotFoundError as error:
            # The file system of HTTP reports every failure as this error.
            if self.is_http and error.__cause__ is not None:
                raise error.__cause__ from None
            raise

    async def _fetched(self, key: str, start: int, stop: int) -> bytes:
        options: dict[str, Any] = {}
        if self.is_http:
            # Servers that compress their answers cannot serve ranges of them.
            options["headers"] = {**self._fs.kwargs.get("headers", {}), "Accept-Encoding": "identity"}

        async def once() -> bytes:
            content: bytes = await self._coroutine("cat_file", key, start=start, end=stop, **options)
            if len(content) < stop - start:
                raise EOFError(
                    f"ends at byte {start + len(content)}, expected {stop - start - len(content)} bytes more"
                )
            return content

        content = await _tried(once)
        if len(content) > stop - start:
            raise OSError(errno.EIO, f"got {len(content)} bytes for {stop - start}: its server supports no ranges")
        return content

    def _call(self, name: str, *arguments: Any) -> None:
        self._result(self._submit(_tried(functools.partial(self._coroutine, name, *arguments))))

    def _coroutine(self, name: str, *arguments: Any, **options: Any) -> Awaitable[Any]:
        """A call of a method of the file system, in fsspec's own event loop."""
        if self._fs.async_impl:
            # By fsspec's convention.
            return getattr(self._fs, f"_{name}")(*arguments, **options)
        if name == "cat_file":
            # It would read ahead on its own.
            options["cache_type"] = "none"
        call = functools.partial(getattr(self._fs, name), *arguments, **options)
        return asyncio.get_running_loop().run_in_executor(_threads(), call)

    def _submit(self, coroutine: Any) -> concurrent.futures.Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, require("fsspec.asyn", "remote").get_loop())

    def _result(self, future: concurrent.futures.Future[T]) -> T:
        try:
            return future.result()
        except (KeyboardInterrupt, SystemExit):
            future.cancel()
            raise


def file_system(url: str) -> tuple[Any, str, str]:
    """fsspec's file system for a URL, the object's key in it, and the protocol.

    Raises ImportError that names a missing package, ValueError for a URL that no file system supports.
    """
    protocol = url.partition("://")[0].lower()
    core = require("fsspec.core", "remote")
    options: dict[str, Any] = {}
    if protocol in ("s3", "s3a"):
        # By default 10, and further requests would wait. This module does all retries.
        given = require("fsspec.config", "remote").conf.get(protocol, {}).get("config_kwargs", {})
        options["config_kwargs"] = {"max_pool_connections": 128, "retries": {"max_attempts": 1}, **given}
    try:
        found, key = core.url_to_fs(url, **options)
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        remedy = f'run `pip install "pdl_ext[remote]" {package}`' if package else redacted(str(error))
        raise ImportError(f"{package or 'a package'} is not installed, for {protocol}:// URLs: {remedy}") from None
    except Exception as error:
        # Some file systems connect immediately.
        raise ValueError(f"{redacted(url)}: cannot be opened ({_told(error).strerror})") from None
    return found, _key(key) or key, protocol


def _key(name: str) -> str:
    return name.rstrip("/")


def _entries(folder: str, listed: Iterable[dict[str, Any]], of_a_page: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """The entries of a listing below a folder: keys and properties.

    of_a_page: whether the entries are links of a web page.
    """
    for info in listed:
        key = _key(info["name"])
        name = key.removeprefix(f"{folder}/")
        # This leaves out objects that only mark a folder, and links of a page to itself in another order.
        is_mark = info["name"].endswith("/") and info.get("type") != "directory"
        is_order = of_a_page and name.startswith(("?", "#"))
        if name != key and not is_mark and not is_order:
            yield key, info


def _is_match(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) and name.startswith(".") <= pattern.startswith(".")


async def _tried(call: Callable[[], Awaitable[T]], *, limited: bool = True) -> T:
    """The result of a call, which is repeated if that may help. Raises OSError without credentials in its text."""
    for number in range(_TRIES):
        try:
            return await asyncio.wait_for(call(), _SECONDS_A_TRY if limited else None)
        except Exception as error:
            if number == _TRIES - 1 or _is_permanent(error):
                raise _told(error) from None
        await asyncio.sleep(_FIRST_PAUSE * 2**number * random.uniform(0.5, 1))
    raise AssertionError


def _is_permanent(error: Exception) -> bool:
    status = _status(error)
    refused = status is not None and 400 <= status < 500 and status not in _PASSING
    return refused or isinstance(error, _PERMANENT) or "Credential" in type(error).__name__


def _status(error: BaseException | None) -> int | None:
    """The HTTP status of an error, or of one of its causes."""
    while error is not None:
        for status in (getattr(error, "status", None), getattr(getattr(error, "response", None), "status_code", None)):
            if isinstance(status, int):
                return status
        error = error.__cause__
    return None


def _told(error: Exception) -> OSError:
    """An error as OSError, without credentials in its text."""
    status = _status(error)
    text = redacted((str(error).splitlines() or [""])[0]) or "no answer in time"
    reason = text if isinstance(error, EOFError) else f"{type(error).__name__}: {text}"
    is_missing = isinstance(error, (FileNotFoundError, NotADirectoryError)) and status is None
    if is_missing or status in (404, 410):
        return FileNotFoundError(errno.ENOENT, reason)
    if status in (401, 403) or isinstance(error, PermissionError) or "Credential" in type(error).__name__:
        return PermissionError(errno.EACCES, f"{reason}; credentials are taken from the store's own configuration")
    return OSError(errno.EIO, reason)
