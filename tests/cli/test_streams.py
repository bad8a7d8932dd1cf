"""Streams that are closed, full or of another encoding, and too little memory: one line, no traceback, no lost data."""

from __future__ import annotations

import io
import os
import re
import sys
import warnings

import fresh_python
import numpy as np
import pytest
import torch
import torch.distributed as dist

from pdl_ext import TokenFrequency
from pdl_ext.cli import progress
from pdl_ext.cli.main import main
from pdl_ext.corpus.state import State

COUNT = ["count", "a.bin", "--dtype", "uint16", "--vocab-size", "9", "-o"]
needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")


@pytest.fixture(autouse=True)
def corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.arange(9, dtype="<u2").tofile("a.bin")
    TokenFrequency.from_counts(torch.arange(9)).save("old")


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


STREAMS = [
    pytest.param(lambda: None, 1, "Bad file descriptor", id="closed"),
    pytest.param(
        lambda: os.fdopen(os.open("/dev/full", os.O_WRONLY), "w"),
        1,
        "No space left on device",
        id="full",
        marks=needs_full,
    ),
    pytest.param(closed_pipe, 128 + 13, "Broken pipe", id="pipe"),
]


COMMANDS = pytest.mark.parametrize(
    "command", [["show", "old"], ["info"], ["--help"], ["count", "--help"]], ids=" ".join
)


@pytest.mark.parametrize(("stream", "code", "reason"), STREAMS)
@COMMANDS
def test_output_that_cannot_be_written(command, stream, code, reason, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", stream())
    assert main(command) == code
    error = capsys.readouterr().err
    assert re.fullmatch("" if code > 1 else rf"pdl-ext: \[Errno \d+\] {reason}: 'standard output'\n", error)
    # Nothing is left that the interpreter would try to write when it ends.
    sys.stdout.close()


@needs_full
@COMMANDS
def test_output_that_is_not_buffered(command, monkeypatch, capsys):
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(full, write_through=True))
        assert main(command) == 1
    assert capsys.readouterr().err == "pdl-ext: [Errno 28] No space left on device: 'standard output'\n"


@pytest.mark.parametrize(("stream", "_", "reason"), STREAMS)
@pytest.mark.parametrize("command", [[*COUNT, "new"], ["merge", "old", "-o", "new"]], ids=["count", "merge"])
def test_files_are_written_whether_or_not_that_can_be_told(command, stream, _, reason, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", stream())
    assert main(command) == 0
    assert capsys.readouterr().err == (
        f"pdl-ext: warning: the file is written, but standard output is not ({reason})\n"
    )
    sys.stdout.close()
    assert TokenFrequency.load("new").tokens_seen in (9, 36)


def test_standard_error_may_be_closed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    assert main([*COUNT, "new"]) == 0
    assert "new: 9 tokens counted" in capsys.readouterr().out
    assert main(["show", "gone"]) == 1
    # Where print writes what is for no stream at all.
    assert capsys.readouterr().out == ""


@needs_full
def test_standard_error_may_be_full(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", os.fdopen(os.open("/dev/full", os.O_WRONLY), "w"))
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    # A warning before and one after, and lines between.
    assert main([*COUNT[:5], "70000", "-o", "new"]) == 0
    assert main([*COUNT[:5], "5", "-o", "new"]) == 0
    assert "new: 5 tokens counted of 9" in capsys.readouterr().out
    assert main(["show", "gone"]) == 1
    with pytest.raises(OSError, match="No space left"):
        sys.stderr.close()


def test_a_name_that_the_terminal_has_no_characters_for(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main([*COUNT, "\u00e9"]) == 0
    assert stream.buffer.getvalue().startswith(b"\\xe9: 9 tokens counted")
    assert TokenFrequency.load("\u00e9").total == 9


def test_warnings_may_be_errors(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main([*COUNT[:5], "70000", "-o", "new"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pdl-ext: a.bin: its tokens are uint16, and cannot hold ids above 65535")


@pytest.fixture(params=["alone", "ranks"])
def ranks(request, tmp_path, monkeypatch):
    if request.param == "alone":
        yield
        return
    real = dist.init_process_group
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(
        dist,
        "init_process_group",
        lambda *_, **__: real("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1),
    )
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("zeros", [torch.zeros, np.zeros], ids=["PyTorch", "NumPy"])
def test_too_little_memory(zeros, ranks, monkeypatch, capsys):
    monkeypatch.setattr(State, "empty", lambda *_: zeros(2**50))
    assert main([*COUNT, "new"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pdl-ext: memory is not enough (")
    assert "llocate" in line


# In a process of its own: what this one has freed would be taken before the system is asked for any.
IN_LITTLE_MEMORY = """
import os, resource, sys
from pdl_ext import PDLLoss
from pdl_ext.cli import progress
from pdl_ext.cli.main import main

pages = int(open("/proc/self/statm").read().split()[0])
# Enough for the file, which is mapped, but not for what is read of it.
enough = pages * resource.getpagesize() + os.path.getsize("large") + 2**26
resource.setrlimit(resource.RLIMIT_AS, (enough, enough))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs to know how much memory a process has")
@pytest.mark.parametrize("command", [["show", "large"], ["merge", "large", "-o", "new"]], ids=["show", "merge"])
def test_too_little_memory_for_counts(command):
    TokenFrequency.from_counts(torch.ones(2**24, dtype=torch.int64)).save("large")
    run = fresh_python.run("-c", IN_LITTLE_MEMORY, *command, cwd=os.getcwd())
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert line.startswith("pdl-ext: memory is not enough (")


def test_other_errors_are_not_taken_for_too_little_memory(monkeypatch):
    def empty(*_):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(State, "empty", empty)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        main([*COUNT, "new"])
