"""Shows the progress of a count: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, TextIO

from tqdm import tqdm

if TYPE_CHECKING:
    from pdl_ext.corpus import Progress

__all__ = ["ProgressLine"]

_SECONDS_BETWEEN_LINES = 10.0


class ProgressLine:
    """Shows a count's Progress on a stream: tokens, tokens a second, share of the bytes, time left."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: tqdm[None] | None = None
        self._printed = 0.0

    def show(self, progress: Progress) -> None:
        """Shows the newest progress. A stream that cannot be written to does not end the count."""
        with contextlib.suppress(OSError):
            self._show(progress)

    def close(self) -> None:
        """Leaves the last line visible."""
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
