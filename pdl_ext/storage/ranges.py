"""An object of a store, read as a file. Consecutive reads make it fetch several ranges ahead at a time."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import io
import threading
from collections.abc import Iterator
from typing import NamedTuple

from pdl_ext.storage.store import EDGE_BYTES, Store

__all__ = ["RangedFile"]

# At 100 MB/s a connection one range takes 42 ms, about a store's latency. Several at once hide both.
_RANGE_BYTES = 2**22
_MOST_AHEAD = 8
# Over all open files, which bounds the memory.
_ALL_AHEAD = 16
# Positions in one file that are read in turn, as the columns of a file are.
_STREAMS = 4

_lock = threading.Lock()
_open_files = 0


class _Range(NamedTuple):
    start: int
    stop: int
    content: concurrent.futures.Future[bytes]


class _Stream:
    """Consecutive ranges from the position that is read next.

    begin and end: of the ranges. stop: nothing is fetched from there on. in_a_row: how many bytes of the stream were
    read consecutively.
    """

    def __init__(self, begin: int, stop: int, in_a_row: int) -> None:
        self.ranges: collections.deque[_Range] = collections.deque()
        self.end = begin
        self.stop = stop
        self.in_a_row = in_a_row

    @property
    def begin(self) -> int:
        return self.ranges[0].start if self.ranges else self.end

    def close(self) -> None:
        for part in self.ranges:
            part.content.cancel()
        self.ranges.clear()


class RangedFile(io.RawIOBase):
    """An object of `size` bytes, opened for one reading thread.

    After consecutive reads it fetches as many bytes ahead as were read. The limit is eight ranges of 4 MiB, and less if
    many files are open. Raises ValueError that names the object if it cannot be fetched or ends before its size.

    name: the object's name in errors.
    """

    def __init__(self, store: Store, key: str, size: int, name: str) -> None:
        global _open_files
        super().__init__()
        self._store, self._key, self._size, self._name = store, key, size, name
        self._streams: list[_Stream] = []
        self._position = 0
        with _lock:
            _open_files += 1

    def close(self) -> None:
        global _open_files
        if not self.closed:
            with _lock:
                _open_files -= 1
            for stream in self._streams:
                stream.close()
        super().close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: object) -> int:
        with memoryview(buffer) as view, view.cast("B") as octets:  # type: ignore[arg-type]
            got = self.read_at(octets, self._position)
        self._position += got
        return got

    def read_ahead(self, start: int, stop: int) -> None:
        """Fetches the bytes from start to stop, which will be read consecutively, as far ahead as allowed."""
        stop = min(stop, self._size)
        if self._store.keeps and stop <= EDGE_BYTES:
            return
        stream = _Stream(start, stop, _RANGE_BYTES * _MOST_AHEAD)
        self._keep(stream)
        self._fetch_ahead(stream, start, start)

    def read_at(self, view: memoryview, offset: int) -> int:
        """Fills a buffer from an offset on, up to the object's end; returns the number of bytes."""
        stop = min(offset + len(view), self._size)
        if offset >= stop:
            return 0
        edge = self._edge(offset, stop)
        if edge is not None:
            view[: len(edge)] = edge
            return len(edge)
        stream = self._stream_at(offset, stop - offset)
        stream.stop = max(stream.stop, stop)
        done = offset
        while done < stop:
            while stream.ranges and stream.ranges[0].stop <= done:
                stream.ranges.popleft()
            self._fetch_ahead(stream, done, stop)
            first = stream.ranges[0]
            with self._named(first.start):
                content = first.content.result()
            taken = memoryview(content)[done - first.start : stop - first.start]
            view[done - offset : done - offset + len(taken)] = taken
            done += len(taken)
        stream.in_a_row += stop - offset
        self._fetch_ahead(stream, stop, stop)
        return stop - offset

    def _edge(self, offset: int, stop: int) -> memoryview | None:
        """Bytes of the beginning or the end, if the store keeps them."""
        if not self._store.keeps:
            return None
        if stop <= EDGE_BYTES:
            start, end = 0, min(EDGE_BYTES, self._size)
        elif offset >= self._size - EDGE_BYTES:
            start, end = max(0, self._size - EDGE_BYTES), self._size
        else:
            return None
        with self._named(start):
            content = self._store.edge(self._key, start, end)
        return memoryview(content)[offset - start : stop - start]

    @contextlib.contextmanager
    def _named(self, start: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(f"{self._name}: cannot be read at byte {start} ({error.strerror})") from error

    def _stream_at(self, offset: int, size: int) -> _Stream:
        for stream in self._streams:
            if stream.begin <= offset <= stream.end and offset < stream.stop:
                break
        else:
            # A single read does not predict further ones.
            stream = _Stream(offset, self._size, -size)
        self._keep(stream)
        return stream

    def _keep(self, stream: _Stream) -> None:
        """Marks a stream as the most recently used one."""
        if stream in self._streams:
            self._streams.remove(stream)
        self._streams.append(stream)
        if len(self._streams) > _STREAMS:
            self._streams.pop(0).close()

    def _fetch_ahead(self, stream: _Stream, position: int, needed: int) -> None:
        """Fetches the bytes up to `needed`, and as many beyond as were read consecutively."""
        most = max(1, min(_MOST_AHEAD, _ALL_AHEAD // _open_files)) * _RANGE_BYTES
        until = min(position + min(max(stream.in_a_row, needed - position), most), stream.stop)
        # Not in pieces of a few bytes.
        least = min(stream.in_a_row // 2, _RANGE_BYTES)
        while stream.end < until and (stream.end < needed or until - stream.end >= least or until == stream.stop):
            stop = min(stream.end + _RANGE_BYTES, until)
            stream.ranges.append(_Range(stream.end, stop, self._store.fetch(self._key, stream.end, stop)))
            stream.end = stop
