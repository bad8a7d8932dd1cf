"""The parts in which host memory reaches the device, with stand-ins for streams; tests/test_cuda.py has real ones."""

from __future__ import annotations

import contextlib

import pytest
import torch

from pdl_ext import host_stream


class Streams:
    """Streams that run as late as they may: a copy takes place when somebody waits for it."""

    def __init__(self, monkeypatch):
        self.pending = []
        self.log = []
        streams = self

        class Stream:
            def __init__(self, device=None):
                pass

            def wait_stream(self, other):
                pass

            def synchronize(self):
                streams.log.append(("host waits for all", self))

            def wait_event(self, event):
                streams.log.append(("waits for", event))
                event.happen()

        class Event:
            work = ()

            def record(self, stream):
                self.work, streams.pending = tuple(streams.pending), []

            def happen(self):
                for destination, source in self.work:
                    destination.copy_(source)
                self.work = ()

            def synchronize(self):
                streams.log.append(("host waits for", self))
                self.happen()

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(host_stream, "_pinned_like", lambda tokens, size: torch.empty(size, dtype=tokens.dtype))
        immediate = torch.Tensor.copy_

        def copy_(destination, source, non_blocking=False):
            if non_blocking:
                self.pending.append((destination, source))
                return destination
            return immediate(destination, source)

        monkeypatch.setattr(torch.Tensor, "copy_", copy_)


@pytest.mark.parametrize("is_pinned", [False, True], ids=["pageable", "pinned"])
@pytest.mark.parametrize(
    "size",
    [
        1,  # a part of one token
        1000,  # one whole part
        1001,  # a second of one token
        2000,  # each buffer once
        5003,  # buffers used again
    ],
)
def test_parts_are_the_tokens(monkeypatch, size, is_pinned):
    monkeypatch.setattr(host_stream, "PART_BYTES", 4000)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tokens: is_pinned)
    tokens = torch.arange(size, dtype=torch.int32) + 7
    streams = Streams(monkeypatch)
    parts = [part.clone() for part in host_stream.parts_on_device(tokens, torch.device("cpu"))]
    assert torch.equal(torch.cat(parts), tokens)
    assert len(parts) == -(-size // 1000)
    # The host waits for a pinned buffer's copy before it fills it again, and never otherwise.
    waits = [what for what, _ in streams.log if what == "host waits for"]
    assert len(waits) == (0 if is_pinned else max(0, len(parts) - 2))
    # What is pinned belongs to the caller, who may write to it when all is counted.
    ends = [what for what, _ in streams.log if what == "host waits for all"]
    assert len(ends) == is_pinned
    # Each part's count waits for its copy; from the third on, its copy for the count of what its memory held.
    assert len(streams.log) - len(waits) - len(ends) == len(parts) + max(0, len(parts) - 2)
