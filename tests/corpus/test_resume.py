"""A count that is killed at any moment and resumed has the counts of an uninterrupted one."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import fresh_python
import numpy as np
import pytest
import torch
from safetensors import safe_open

from pdl_ext.cli.main import main
from pdl_ext.corpus import TargetPolicy, count_corpus, counting
from pdl_ext.corpus.ranks import checkpoints
from pdl_ext.corpus.state import State

pytestmark = pytest.mark.slow

V = 5000

# Forks children that count, kills each at a random moment, and lets the last one finish.
KILLER = """
import os, random, signal, sys, time
import torch
from pdl_ext.corpus import count_corpus, counting
counting.PART_BYTES = 2**14
counting._SECONDS_BETWEEN_MERGES = 0.0
random.seed(int(sys.argv[3]))
killed = 0
while True:
    child = os.fork()
    if child == 0:
        frequency = count_corpus([sys.argv[1]], 5000, dtype="uint16", threads=2, checkpoint=sys.argv[2],
                                 checkpoint_every=1e-4)
        frequency.save(sys.argv[2] + ".result")
        os._exit(0)
    if killed < 25:
        time.sleep(random.uniform(0.0, 0.08))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if status == 0:
        break
    killed += 1
print("killed", killed)
"""


@pytest.fixture
def corpus(tmp_path):
    tokens = np.random.default_rng(0).integers(0, V, 3_000_000)
    (tmp_path / "a.bin").write_bytes(tokens.astype("<u2").tobytes())
    return tmp_path / "a.bin", torch.from_numpy(np.bincount(tokens, minlength=V))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to kill a process after its imports")
def test_kill_9_at_any_moment(corpus, tmp_path):
    path, counts = corpus
    state = tmp_path / "state"
    seed = str(random.randrange(2**31))
    run = fresh_python.run("-c", KILLER, path, state, seed, timeout=300)
    assert run.returncode == 0, f"seed {seed}: {run.stderr}"
    print(run.stdout, "seed", seed)
    from pdl_ext import TokenFrequency

    frequency = TokenFrequency.load(f"{state}.result")
    assert torch.equal(frequency.counts, counts), f"seed {seed}"
    assert frequency.tokens_seen == frequency.provenance.tokens == 3_000_000


# Reads that last long enough for a signal to come between, and a part of which a count waits for.
SLOW_AFTER_TEN = """
import itertools, pathlib, signal, sys, time
from pdl_ext.cli.main import main
from pdl_ext.corpus import counting
from pdl_ext.corpus.reading import flat

# What runs in the background has it ignored from its shell.
signal.signal(signal.SIGINT, signal.default_int_handler)
counting.PART_BYTES = 2**16
read, reads = flat.read_at, itertools.count(1)

def slow(*arguments):
    if next(reads) > 10:
        pathlib.Path({marker!r}).touch()
        time.sleep(0.3)
    read(*arguments)

flat.read_at = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "signals",
    [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT], [signal.SIGTERM, signal.SIGINT, signal.SIGTERM]],
    ids=lambda signals: "-".join(one.name for one in signals),
)
def test_the_command_goes_on_after_signals(corpus, tmp_path, signals, monkeypatch):
    path, counts = corpus
    fifo = tmp_path / "out"
    command = ["count", str(path), "--dtype", "uint16", "--vocab-size", str(V), "-o", str(fifo)]
    slow_after_ten = SLOW_AFTER_TEN.format(marker=str(tmp_path / "ten"))
    run = fresh_python.popen("-c", slow_after_ten, *command, stderr=subprocess.PIPE, text=True)
    first = tmp_path / "out.checkpoint-0"
    # Some parts, which are not in the file yet.
    while not (tmp_path / "ten").exists():
        assert run.poll() is None
        time.sleep(0.01)
    for number in signals:
        run.send_signal(number)
        time.sleep(0.05)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 128 + signals[0]
    assert "the same command resumes from there" in error
    with safe_open(first, framework="np") as file:
        assert int(file.get_tensor("frequency.seen")) > 0
    assert not fifo.exists()

    monkeypatch.setattr(counting, "PART_BYTES", 2**16)
    assert main(command) == 0
    from pdl_ext import TokenFrequency

    assert torch.equal(TokenFrequency.load(fifo).counts, counts)
    assert not first.exists()


def test_an_interruption_before_the_last_thread_starts(corpus, tmp_path, monkeypatch):
    path, counts = corpus
    start = counting._Worker.start
    started = []
    threads = torch.get_num_threads()

    def interrupt(worker):
        if started:
            deadline = time.monotonic() + 60
            while started[0].bytes_done == 0 and time.monotonic() < deadline:
                time.sleep(0.001)
            raise KeyboardInterrupt
        start(worker)
        started.append(worker)

    with monkeypatch.context() as patch:
        patch.setattr(counting._Worker, "start", interrupt)
        with pytest.raises(KeyboardInterrupt):
            count_corpus([path], V, dtype="uint16", threads=2, checkpoint=tmp_path / "state")
    assert started[0].done.is_set()
    assert torch.get_num_threads() == threads
    with safe_open(tmp_path / "state-0", framework="np") as file:
        assert int(file.get_tensor("frequency.seen")) > 0
    frequency = count_corpus([path], V, dtype="uint16", checkpoint=tmp_path / "state")
    assert torch.equal(frequency.counts, counts)


def interrupted(path, checkpoint, monkeypatch, vocab_size=V):
    monkeypatch.setattr(counting, "PART_BYTES", 2**16)
    loop = counting._Count.run

    def half(self):
        self._todo = iter(list(self._todo)[::2])
        loop(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(counting._Count, "run", half)
        with pytest.raises(KeyboardInterrupt):
            count_corpus([path], vocab_size, dtype="uint16", checkpoint=checkpoint)


def test_a_checkpoint_of_another_count_is_refused(corpus, tmp_path, monkeypatch):
    path, _ = corpus
    state = tmp_path / "state"
    interrupted(path, state, monkeypatch)
    content = Path(f"{state}-0").read_bytes()
    refused = re.escape(f"checkpoint: {state}-0 is that of another count")
    with pytest.raises(ValueError, match=refused):
        count_corpus([path], V + 1, dtype="uint16", checkpoint=state)
    with pytest.raises(ValueError, match=refused):
        count_corpus([path], V, dtype="int16", checkpoint=state)
    with pytest.raises(ValueError, match=refused):
        count_corpus([path], V, dtype="uint16", policy=TargetPolicy(targets="shifted"), checkpoint=state)
    os.utime(path, (1, 1))
    with pytest.raises(ValueError, match=refused):
        count_corpus([path], V, dtype="uint16", checkpoint=state)
    assert Path(f"{state}-0").read_bytes() == content


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-3], lambda b: b"", lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b[::-1]]
)
def test_a_damaged_checkpoint_is_refused(damage, corpus, tmp_path, monkeypatch):
    path, _ = corpus
    state = tmp_path / "state"
    interrupted(path, state, monkeypatch)
    file = Path(f"{state}-0")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=re.escape(f"checkpoint: {file} is damaged")):
        count_corpus([path], V, dtype="uint16", checkpoint=state)


def test_a_full_disk_leaves_the_checkpoint_that_was_there(corpus, tmp_path, monkeypatch):
    path, counts = corpus
    state = tmp_path / "state"
    interrupted(path, state, monkeypatch)
    content = Path(f"{state}-0").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=re.escape(f"No space left on device; not written: {state}-0")):
            count_corpus([path], V, dtype="uint16", checkpoint=state)
    assert Path(f"{state}-0").read_bytes() == content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "state-0"]
    assert torch.equal(count_corpus([path], V, dtype="uint16", checkpoint=state).counts, counts)


def test_adopting_a_state_twice_changes_nothing():
    first = State.empty(3, -100, 4, "x")
    second = State.empty(3, -100, 4, "x")
    second.frequency.update(torch.tensor([0, 1, 1, 2, 2, 2]))
    second.finished[1:3] = 1
    first.adopt(second)
    first.adopt(second)
    assert first.frequency.counts.tolist() == [1, 2, 3]
    assert (first.frequency.tokens_seen, first.finished.tolist()) == (6, [0, 1, 1, 0])
    second.finished[3] = 1
    with pytest.raises(ValueError, match="expected each part in one"):
        first.adopt(second)


def test_checkpoints_are_those_of_ranks(tmp_path):
    for name in ("s-10", "s-2", "s-0", "s-x", "s-", "t-1", "s-2.partial"):
        (tmp_path / name).touch()
    assert [path.name for path in checkpoints(tmp_path / "s")] == ["s-0", "s-2", "s-10"]


def test_strict_finds_what_was_counted_without(tmp_path, corpus, monkeypatch):
    path, _ = corpus
    state = tmp_path / "state"
    interrupted(path, state, monkeypatch, vocab_size=V - 1)
    with pytest.raises(ValueError, match=r"ids outside 0 <= id < 4999, expected none: it was counted without strict"):
        count_corpus([path], V - 1, dtype="uint16", checkpoint=state, strict=True)


def test_a_checkpoint_that_holds_nothing_stands_in_nobodys_way(tmp_path, corpus):
    path, counts = corpus
    state = tmp_path / "state"
    with pytest.raises(ValueError, match="got the id"):
        count_corpus([path], 3, dtype="uint16", checkpoint=state, strict=True)
    assert torch.equal(count_corpus([path], V, dtype="uint16", checkpoint=state).counts, counts)
