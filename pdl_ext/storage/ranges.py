"""An object of a store, read as a file: ranges that are asked for in a row are fetched ahead, several at a time."""

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

# At 100 MB/s a connection its bytes take 42 ms, about as long as a store's latency. Several at once hide both.
_RANGE_BYTES = 2**22
_MOST_AHEAD = 8
# Over all files that are open, which bounds what is held in memory.
_ALL_AHEAD = 16
# Windows into different places of one file, as columns have.
_STREAMS = 4

_lock = threading.Lock()
_open_files = 0


class _Range(NamedTuple):
    start: int
    stop: int
    content: concurrent.futures.Future[bytes]


class _Stream:
    """Ranges that follow one another, from the place that is read on: [begin, end).

    stop: nothing is fetched from there on; in_a_row: how many bytes were read of them, one after the other.
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
    """An object of `size` bytes, opened to be read by one thread.

    What is read in a row is fetched ahead, as much as was read in it. That is up to eight ranges of 4 MiB, and fewer
    where many files are open. Raises ValueError that names it, for what cannot be fetched or ends before its size.

    name: what errors call it.
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
        """Fetches the bytes [start, stop), which will be read one after the other, as far ahead as may be."""
        stop = min(stop, self._size)
        if self._store.keeps and stop <= EDGE_BYTES:
            return
        stream = _Stream(start, stop, _RANGE_BYTES * _MOST_AHEAD)
        self._keep(stream)
        self._fetch_ahead(stream, start, start)

    def read_at(self, view: memoryview, offset: int) -> int:
        """Fills a buffer from an offset on, up to the object's end; returns how many bytes there were."""
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
        """Bytes of the beginning or the end, where a store keeps them."""
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
            # One read alone tells nothing of those to come.
            stream = _Stream(offset, self._size, -size)
        self._keep(stream)
        return stream

    def _keep(self, stream: _Stream) -> None:
        """Makes a stream the last one to be given up."""
        if stream in self._streams:
            self._streams.remove(stream)
        self._streams.append(stream)
        if len(self._streams) > _STREAMS:
            self._streams.pop(0).close()

    def _fetch_ahead(self, stream: _Stream, position: int, needed: int) -> None:
        """Fetches what is needed up to a place, and what will be if as much follows as was read in a row."""
        most = max(1, min(_MOST_AHEAD, _ALL_AHEAD // _open_files)) * _RANGE_BYTES
        until = min(position + min(max(stream.in_a_row, needed - position), most), stream.stop)
        # Not for every few bytes that were read.
        least = min(stream.in_a_row // 2, _RANGE_BYTES)
        while stream.end < until and (stream.end < needed or until - stream.end >= least or until == stream.stop):
            stop = min(stream.end + _RANGE_BYTES, until)
            stream.ranges.append(_Range(stream.end, stop, self._store.fetch(self._key, stream.end, stop)))
            stream.end = stop
