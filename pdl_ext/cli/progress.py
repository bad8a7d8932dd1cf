"""Shows progress on standard error: bars on a terminal and, for a count, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TextIO, TypeVar

from tqdm import tqdm

if TYPE_CHECKING:
    from pdl_ext.corpus import Progress

__all__ = ["ProgressLine", "steps", "waiting"]

T = TypeVar("T")

_SECONDS_BETWEEN_LINES = 10.0
# Whoever waits for less needs no bar.
_SECONDS_WITHOUT = 2.0
_SECONDS_BETWEEN_REDRAWS = 0.5


def steps(items: Sequence[T], name: str, unit: str) -> tqdm[T]:
    """The items, with a bar while they take longer than two seconds."""
    return tqdm(items, name, file=sys.stderr, unit=unit, disable=None, delay=_SECONDS_WITHOUT, dynamic_ncols=True)


@contextlib.contextmanager
def waiting(name: str, stream: TextIO | None = None) -> Iterator[None]:
    """Shows how long a block takes that has no steps to count, from two seconds on. Leaves nothing behind.

    stream: standard error if None.
    """
    stream = sys.stderr if stream is None else stream
    if not stream.isatty():
        yield
        return
    done, begin = threading.Event(), time.monotonic()

    def text() -> str:
        return f"{name}: {tqdm.format_interval(time.monotonic() - begin)}"

    def show() -> None:
        if done.wait(_SECONDS_WITHOUT):
            return
        with contextlib.suppress(OSError), tqdm(desc=text(), bar_format="{desc}", file=stream, leave=False) as line:
            while not done.wait(_SECONDS_BETWEEN_REDRAWS):
                line.set_description_str(text())

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class ProgressLine:
    """Shows a count's Progress on a stream: tokens, tokens a second, share of the bytes, time left."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: tqdm[None] | None = None
        self._printed = 0.0
        # Until there is something to show: thousands of files are opened before the first is counted.
        self._waiting = contextlib.ExitStack()
        self._waiting.enter_context(waiting("pdl-ext count: looks at the files", stream))

    def show(self, progress: Progress) -> None:
        """Shows the newest progress. A stream that cannot be written to does not end the count."""
        self._waiting.close()
        with contextlib.suppress(OSError):
            self._show(progress)

    def close(self) -> None:
        """Leaves the last line visible."""
        self._waiting.close()
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()

    def _show(self, progress: Progress) -> None:
        if self._stream.isatty():
            self._draw(progress)
        elif progress.seconds - self._printed >= _SECONDS_BETWEEN_LINES:
            self._printed = progress.seconds
            done, total = progress.bytes_now, progress.bytes_total
            rate = (done - progress.bytes_before) / max(progress.seconds, 1e-9)
            left = tqdm.format_interval((total - done) / rate) if rate > 0 else "?"
            print(
                f"{100 * done / max(total, 1):5.1f} %  {tqdm.format_sizeof(progress.tokens)} tokens  "
                f"{tqdm.format_sizeof(_rate(progress))} tokens/s  {left} left",
                file=self._stream,
                flush=True,
            )

    def _draw(self, progress: Progress) -> None:
        if self._bar is None:
            self._bar = tqdm(
                total=progress.bytes_total,
                initial=progress.bytes_before,
                file=self._stream,
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                dynamic_ncols=True,
            )
        told = f"{tqdm.format_sizeof(progress.tokens)} tokens, {tqdm.format_sizeof(_rate(progress))}/s"
        self._bar.set_postfix_str(told, refresh=False)
        self._bar.update(progress.bytes_now - self._bar.n)


def _rate(progress: Progress) -> float:
    return progress.tokens / max(progress.seconds, 1e-9)
