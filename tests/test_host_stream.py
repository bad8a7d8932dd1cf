"""The parts in which host memory reaches the device, with stand-ins for streams; tests/test_cuda.py has real ones."""

from __future__ import annotations

import contextlib
import types

import numpy as np
import pytest
import torch

from pdl_ext import TokenFrequency
from pdl_ext.counts import CountTable
from pdl_ext.engine import host_stream


class Streams:
    """Streams that run as late as possible: a copy takes place when it is waited for."""

    def __init__(self, monkeypatch):
        self.pending = []
        self.events = []
        self.log = []
        # The number of the call that fails, of all that are made to streams and events.
        self.fails_at = None
        self.calls = 0
        streams = self

        class Stream:
            def __init__(self, device=None):
                pass

            def wait_stream(self, other):
                pass

            def synchronize(self):
                streams.log.append(("host waits for all", self))
                for event in streams.events:
                    event.happen()
                for destination, source in streams.pending:
                    immediate(destination, source)
                streams.pending = []

            def wait_event(self, event):
                streams.call()
                streams.log.append(("waits for", event))
                event.happen()

        class Event:
            work = ()

            def __init__(self):
                streams.events.append(self)

            def record(self, stream):
                streams.call()
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

    def call(self):
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("CUDA error")

    @property
    def under_way(self):
        return len(self.pending) + sum(len(event.work) for event in self.events)


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
    # When all is counted, memory is the caller's again, or an allocator's.
    ends = [what for what, _ in streams.log if what == "host waits for all"]
    assert len(ends) == 1
    # Each part's count waits for its copy; from the third on, its copy for the count of what its memory held.
    assert len(streams.log) - len(waits) - len(ends) == len(parts) + max(0, len(parts) - 2)


@pytest.fixture(params=[False, True], ids=["pageable", "pinned"])
def streams(monkeypatch, request):
    monkeypatch.setattr(host_stream, "PART_BYTES", 4000)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tokens: request.param)
    return Streams(monkeypatch)


@pytest.mark.parametrize("taken", [1, 2, 3, 5])
def test_nothing_is_under_way_when_it_is_closed(streams, taken):
    parts = host_stream.parts_on_device(torch.arange(5000, dtype=torch.int32), torch.device("cpu"))
    for _ in range(taken):
        next(parts)
    parts.close()
    assert [what for what, _ in streams.log].count("host waits for all") == 1
    assert streams.under_way == 0


# The first two parts make three calls each: the copy is recorded and waited for, and the count recorded. The third part
# also waits for a count.
@pytest.mark.parametrize("fails_at", range(1, 11))
def test_nothing_is_under_way_when_it_fails(streams, fails_at):
    streams.fails_at = fails_at
    parts = host_stream.parts_on_device(torch.arange(5000, dtype=torch.int32), torch.device("cpu"))
    with pytest.raises(RuntimeError, match="CUDA error"):
        for _ in parts:
            pass
    assert streams.calls == fails_at
    assert streams.under_way == 0


def test_nothing_is_under_way_when_counting_fails(streams, monkeypatch):
    frequency = TokenFrequency(9)
    on_device = types.SimpleNamespace(device=types.SimpleNamespace(type="cuda"))
    monkeypatch.setattr(TokenFrequency, "table", CountTable(on_device, *[None] * 3))

    def fail(*_, **__):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(CountTable, "add", fail)
    parts_on_device = host_stream.parts_on_device
    monkeypatch.setattr(
        host_stream, "parts_on_device", lambda tokens, device: parts_on_device(tokens, torch.device("cpu"))
    )
    with pytest.raises(RuntimeError, match="CUDA error"):
        frequency.update(np.arange(5000, dtype=np.int32))
    assert [what for what, _ in streams.log].count("host waits for all") == 1
    assert streams.under_way == 0
