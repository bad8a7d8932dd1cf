"""`pdl-ext count` from its command line to its file."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys

import fresh_python
import numpy as np
import pytest
import torch

from pdl_ext import PDLLoss, TokenFrequency
from pdl_ext.cli.main import main
from pdl_ext.cli.progress import ProgressLine
from pdl_ext.corpus import Progress, counting

V = 50


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokens = np.random.default_rng(0).integers(0, V, 999)
    (tmp_path / "a.bin").write_bytes(tokens.astype("<u2").tobytes())
    return torch.from_numpy(np.bincount(tokens, minlength=V))


COUNT = ["count", "a.bin", "--dtype", "uint16", "-o", "counts.safetensors", "--vocab-size"]


def test_counts_and_says_so(corpus, capsys, tmp_path):
    assert main([*COUNT, "50"]) == 0
    output = capsys.readouterr().out
    assert "counts.safetensors: 999 tokens counted of 999 in 1 files" in output
    assert "0 ignored, 0 out of range" in output
    assert re.search(r"peak memory \d", output)
    frequency = TokenFrequency.load("counts.safetensors")
    assert torch.equal(frequency.counts, corpus)
    assert [path.name for path in tmp_path.iterdir() if path.name != "a.bin"] == ["counts.safetensors"]
    PDLLoss("counts.safetensors")(torch.zeros(2, V), torch.tensor([1, 2]))


def test_ids_out_of_range_are_reported_and_strict_fails(corpus, capsys, tmp_path):
    assert main([*COUNT, "40"]) == 0
    outside = int(corpus[40:].sum())
    assert f"warning: {outside} ids outside 0 <= id < 40" in capsys.readouterr().err
    assert int(TokenFrequency.load("counts.safetensors").out_of_range) == outside
    (tmp_path / "counts.safetensors").unlink()
    assert main([*COUNT, "40", "--strict"]) == 1
    assert re.search(r"pdl-ext: a.bin: got the id 4\d, expected 0 <= id < 40", capsys.readouterr().err)
    assert not (tmp_path / "counts.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["count", "b.bin", "-o", "c", "--vocab-size", "5"], "data: got b.bin"),
        (["count", "a.bin", "-o", "c", "--vocab-size", "5"], "a.bin: has no header"),
        (["count", "a.bin", "-o", "no/c", "--vocab-size", "5"], "output: got no/c"),
        (["count", "a.bin", "-o", "a\0b", "--vocab-size", "5"], r"output: got 'a\x00b', which has a null character"),
        ([*COUNT, "0"], "vocab_size: got 0"),
        ([*COUNT, "5", "--targets", "odd"], "targets: got 'odd'"),
        ([*COUNT, "5", "--threads", "0"], "threads: got 0"),
    ],
)
def test_errors_are_one_line(arguments, message, corpus, capsys):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("pdl-ext: ")
    assert message in error
    assert error.count("\n") == 1


def test_what_killed_processes_left_is_removed(corpus, tmp_path):
    left = [tmp_path / f".counts.safetensors{middle}.1234.partial" for middle in ("", ".checkpoint-3")]
    others = [tmp_path / name for name in (".counts.safetensors.en.1234.partial", ".other.1234.partial")]
    for path in (*left, *others):
        path.write_bytes(b"half")
    assert main([*COUNT, "50"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a.bin", "counts.safetensors", *(o.name for o in others)}


def test_an_output_that_is_a_folder_is_refused_before_counting(corpus, tmp_path, capsys):
    (tmp_path / "counts.safetensors").mkdir()
    assert main([*COUNT, "50"]) == 1
    assert "output: got counts.safetensors, a folder, expected a file" in capsys.readouterr().err
    assert not list(tmp_path.glob("*checkpoint*"))


@pytest.mark.parametrize("command", ["count", "merge"])
def test_an_output_that_holds_no_counts_is_not_overwritten(command, corpus, tmp_path, capsys):
    assert main([*COUNT, "50"]) == 0
    content = (tmp_path / "a.bin").read_bytes()
    arguments = COUNT[:4] if command == "count" else ["merge", "counts.safetensors"]
    assert main([*arguments, "-o", "a.bin", *(["--vocab-size", "50"] if command == "count" else [])]) == 1
    assert "output: got a.bin, a file that holds no counts" in capsys.readouterr().err
    assert (tmp_path / "a.bin").read_bytes() == content
    # Counts may be counted anew, and those that are cut off, too.
    (tmp_path / "counts.safetensors").write_bytes((tmp_path / "counts.safetensors").read_bytes()[:-9])
    assert main([*COUNT, "50"]) == 0
    assert torch.equal(TokenFrequency.load("counts.safetensors").counts, corpus)


def test_an_output_that_cannot_be_read_is_not_told_to_hold_no_counts(corpus, tmp_path, monkeypatch, capsys):
    (tmp_path / "counts.safetensors").write_bytes(b"counts")

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("pathlib.Path.open", refuse)
    assert main([*COUNT, "50"]) == 1
    assert capsys.readouterr().err == "pdl-ext: counts.safetensors: cannot be read (Permission denied)\n"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with a name")
def test_an_output_may_be_empty_or_a_link_but_no_pipe(corpus, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    assert main([*COUNT[:4], "-o", "pipe", "--vocab-size", "50"]) == 1
    assert "output: got pipe, a file that holds no counts" in capsys.readouterr().err
    (tmp_path / "nowhere").symlink_to("no/such")
    assert main([*COUNT[:4], "-o", "nowhere", "--vocab-size", "50"]) == 1
    assert "output: got nowhere, expected a file in a folder that exists" in capsys.readouterr().err
    (tmp_path / "real").touch()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / ".link.checkpoint-0.1234.partial").touch()
    assert main([*COUNT[:4], "-o", "link", "--vocab-size", "50"]) == 0
    assert (tmp_path / "link").is_symlink()
    assert not list(tmp_path.glob(".*.partial"))
    assert torch.equal(TokenFrequency.load(tmp_path / "real").counts, corpus)


@pytest.mark.parametrize("name", ["counts.safetensors", "counts.bin"])
@pytest.mark.parametrize("data", [".", "*"])
def test_an_output_that_is_empty_is_no_data(data, name, corpus, tmp_path):
    (tmp_path / name).touch()
    assert main(["count", data, "--dtype", "uint16", "-o", f"{tmp_path}/{name}", "--vocab-size", "50"]) == 0
    frequency = TokenFrequency.load(name)
    assert torch.equal(frequency.counts, corpus)
    assert [shard.name for shard in frequency.provenance.shards] == ["a.bin"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs names of any bytes")
def test_an_output_whose_name_is_no_text_is_read_and_replaced(corpus):
    name = os.fsdecode(b"\xff")
    for _ in range(2):
        assert main([*COUNT[:4], "-o", name, "--vocab-size", "50"]) == 0
    assert torch.equal(TokenFrequency.load(name).counts, corpus)


def test_warnings_are_one_line(corpus, capsys):
    assert main([*COUNT, "70000"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pdl-ext: warning: a.bin: its tokens are uint16, and cannot hold ids above 65535")


def test_a_corpus_without_a_token_is_an_error(corpus, tmp_path, capsys):
    (tmp_path / "a.bin").write_bytes(b"")
    assert main([*COUNT, "50"]) == 1
    assert "data: got no token in a.bin, expected some" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    (tmp_path / "b.bin").write_bytes(b"")
    assert main(["count", "b.bin", *COUNT[1:], "50"]) == 1
    assert "data: got no token in b.bin and 1 other files, expected some" in capsys.readouterr().err


def test_an_interrupt_while_the_output_is_written_loses_nothing(corpus, tmp_path, monkeypatch, capsys):
    def save(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TokenFrequency, "save", save)
        assert main([*COUNT, "50"]) == 128 + signal.SIGINT
    assert "the same command resumes from there" in capsys.readouterr().err
    assert not (tmp_path / "counts.safetensors").exists()
    # It goes on, and does not read the corpus again.
    monkeypatch.setattr(counting._Worker, "run", lambda worker: worker.done.set())
    assert main([*COUNT, "50"]) == 0
    assert torch.equal(TokenFrequency.load("counts.safetensors").counts, corpus)


def test_an_interrupt_before_the_first_checkpoint_promises_none(corpus, monkeypatch, capsys):
    def open_sources(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(counting, "open_sources", open_sources)
    assert main([*COUNT, "50"]) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "pdl-ext count: interrupted\n"


class Stream:
    def __init__(self, is_terminal):
        self.is_terminal, self.text = is_terminal, ""

    def isatty(self):
        return self.is_terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress(is_terminal):
    stream = Stream(is_terminal)
    line = ProgressLine(stream)
    for seconds in (1.0, 12.0, 13.0, 50.0):
        line.show(Progress(int(seconds * 1e6), 100, 100 + int(seconds), 200, seconds))
    line.close()
    if is_terminal:
        assert "50.0M tokens, 1.00M/s" in stream.text
        assert "150/200" in stream.text.replace("150B", "150").replace("200B", "200") or "75%" in stream.text
    else:
        assert stream.text.splitlines() == [
            " 56.0 %  12.0M tokens  1.00M tokens/s  01:28 left",
            " 75.0 %  50.0M tokens  1.00M tokens/s  00:50 left",
        ]


HOLD_THE_LOCK = """
import sys
from pathlib import Path
from pdl_ext.storage.file_lock import only_writer
with only_writer(Path("counts.safetensors")):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_count_to_one_output_is_told(corpus, tmp_path, capsys):
    (tmp_path / "real").mkdir()
    (tmp_path / "counts.safetensors").symlink_to("real/c")
    with fresh_python.popen("-c", HOLD_THE_LOCK, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline().strip() == b"held"
        # By whatever name.
        for name in ("counts.safetensors", "real/c"):
            assert main([*COUNT[:4], "-o", name, "--vocab-size", "50"]) == 1
            holder = rf"process {other.pid} on \S+ is going to write"
            error = rf"pdl-ext: output: got {name}, which {holder}, expected another file: choose one, or wait\n"
            assert re.fullmatch(error, capsys.readouterr().err)
        assert not list(tmp_path.glob("*checkpoint*"))
        assert main([*COUNT[:4], "-o", "other", "--vocab-size", "50"]) == 0
        # However it ends.
        other.kill()
    assert (tmp_path / "real" / ".c.lock").exists()
    assert main([*COUNT, "50"]) == 0
    assert torch.equal(TokenFrequency.load("counts.safetensors").counts, corpus)
    assert not (tmp_path / "real" / ".c.lock").exists()


def test_a_file_system_without_locks_is_written_to(corpus, monkeypatch):
    from pdl_ext.storage import file_lock

    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(file_lock.fcntl, "flock", refuse)
    assert main([*COUNT, "50"]) == 0


def test_a_lock_that_is_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """Between the two calls of this process the other one may end, and its file with it."""
    from pdl_ext.storage import file_lock

    flock, calls = file_lock.fcntl.flock, []

    def removed_before(descriptor, how):
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / ".c.lock").unlink()
        flock(descriptor, how)

    monkeypatch.setattr(file_lock.fcntl, "flock", removed_before)
    with file_lock.only_writer(tmp_path / "c"):
        assert len(calls) == 2
        assert str(os.getpid()) in (tmp_path / ".c.lock").read_text()
    assert not list(tmp_path.iterdir())
