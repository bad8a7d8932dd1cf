"""Counting from several threads at once: every token once, and readers see whole batches."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import threading
import warnings

import fresh_python
import numpy as np
import pytest
import torch
import torch.distributed as dist

from pdl_ext import PDLLoss, TokenFrequency, frequency, functional
from pdl_ext.storage.whole_file import partial_files

THREADS = 4


def in_threads(*functions):
    """Runs all functions at the same time; raises the error of one of them."""
    start, errors = threading.Barrier(len(functions)), []

    def run(function):
        try:
            start.wait()
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error


def repeatedly(times, function):
    def run():
        for _ in range(times):
            function()

    return run


def waits(function):
    """Whether it does not end soon by itself; a function that ends it."""
    thread = threading.Thread(target=function)
    thread.start()
    thread.join(0.3)
    return thread.is_alive(), thread.join


def compiled(of):
    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.of = of

        def forward(self, tokens):
            self.of.update(tokens)
            return tokens + 1

    torch.compiler.reset()
    return torch.compile(Counting(), fullgraph=True)


def add_tokens(of, tokens):
    of.table.add(tokens, ignore_index=-100)


def linear(of, tokens):
    loss = PDLLoss(vocab_size=of.vocab_size)
    loss.frequency = of
    loss.linear(torch.zeros(len(tokens), 2), torch.zeros(of.vocab_size, 2), tokens)


def unfused(of, tokens):
    loss = PDLLoss(vocab_size=of.vocab_size)
    loss.frequency = of
    loss(torch.zeros(len(tokens), of.vocab_size), tokens)


WAYS = {
    "update": lambda of, tokens: of.update(tokens),
    "NumPy": lambda of, tokens: of.update(tokens.numpy()),
    "strict": lambda of, tokens: of.update(tokens, strict=True),
    "op": add_tokens,
    "loss": unfused,
    "linear": linear,
    "merge": lambda of, tokens: of.merge(TokenFrequency.from_counts(functional.count_tokens(tokens, of.vocab_size))),
}


@pytest.mark.serial
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tracked", [False, True], ids=["", "tracked"])
# Long enough for the threads to overlap: 400,000 are counted straight into the first table. They reach the second by
# way of tables of the kernel's threads.
@pytest.mark.parametrize("vocab_size", [60_000, 40_000])
def test_threads_add_up(way, vocab_size, tracked):
    n, times = (40, 30) if way in ("loss", "linear") else (400_000, 40)
    tokens = torch.arange(n) % 2
    counted = TokenFrequency(vocab_size)
    if tracked and way != "op":
        counted.track_own()
    in_threads(*[repeatedly(times, lambda: WAYS[way](counted, tokens))] * THREADS)
    expected = torch.bincount(tokens, minlength=vocab_size) * times * THREADS
    assert torch.equal(counted.counts, expected)
    assert counted.tokens_seen == times * THREADS * n
    if counted._tracked:
        assert torch.equal(counted._own[:-3], expected)


@pytest.mark.serial
@pytest.mark.parametrize("tracked", [False, True], ids=["", "tracked"])
@pytest.mark.slow
def test_threads_with_graphs_add_up(tracked):
    tokens = torch.arange(400_000) % 2
    counted = TokenFrequency(60_000)
    if tracked:
        counted.track_own()
    update = compiled(counted)
    update(tokens)
    in_threads(*[repeatedly(100, lambda: update(tokens))] * THREADS)
    expected = torch.bincount(tokens, minlength=60_000) * (100 * THREADS + 1)
    assert torch.equal(counted.counts, expected)
    assert not tracked or torch.equal(counted._own[:-3], expected)


def test_threads_that_begin_an_online_loss_learn_one_frequency(monkeypatch):
    loss = PDLLoss()
    both, new_frequency = threading.Barrier(2), PDLLoss._new_frequency

    def new(self, vocab_size):
        # Until both are here, if both come.
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.3)
        return new_frequency(self, vocab_size)

    monkeypatch.setattr(PDLLoss, "_new_frequency", new)
    in_threads(*[lambda: loss(torch.zeros(3, 5), torch.arange(3))] * 2)
    assert loss.frequency.counts.tolist() == [2, 2, 2, 0, 0]


def test_merging_into_each_other_waits_for_nobody():
    first, second = TokenFrequency(50_000), TokenFrequency(50_000)
    in_threads(repeatedly(100, lambda: first.merge(second)), repeatedly(100, lambda: second.merge(first)))


def test_a_file_has_whole_batches(tmp_path):
    counted = TokenFrequency(50_000)
    tokens = torch.arange(40_000)
    saved = []

    def save():
        path = tmp_path / str(len(saved))
        saved.append(path)
        counted.save(path)

    in_threads(repeatedly(300, lambda: counted.update(tokens)), repeatedly(20, save))
    for path in saved:
        loaded = TokenFrequency.load(path)
        assert torch.equal(loaded.counts[:40_000], torch.full((40_000,), loaded.tokens_seen // 40_000))


def test_nobody_waits_for_a_disk(tmp_path, monkeypatch):
    counted = TokenFrequency(5)

    def write(path, tensors, metadata):
        counted.update(torch.tensor([1]))
        assert tensors["counts"].sum() == 0

    monkeypatch.setattr(frequency, "write_tensors", write)
    done = []
    # By another thread, since this one could.
    thread = threading.Thread(target=lambda: (counted.save(tmp_path / "counts"), done.append(1)))
    thread.start()
    thread.join()
    assert done == [1]
    assert counted.total == 1


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["sync", "all_reduce"])
def test_what_is_counted_while_ranks_exchange_stays(name, rank, monkeypatch):
    counted = TokenFrequency.from_counts(torch.tensor([5, 0, 0]))
    counted.update(torch.tensor([1]))
    exchanging = []

    def all_reduce(tensor, op=None, group=None):
        if len(tensor) == 6:
            exchanging.append(waits(lambda: counted.update(torch.tensor([2]))))

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 1)
    monkeypatch.setattr(dist, "all_gather_object", lambda found, own, group: found.__setitem__(0, own))
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    getattr(counted, name)()
    ((waited, end),) = exchanging
    end()
    # A second rank has given what it alone had counted; the first one's counts are all that there is.
    alone = name == "sync" and rank == 1
    assert counted.counts.tolist() == [0 if alone else 5, 1, 1]
    assert counted._own[:3].tolist() == [0, 0, 1]
    assert waited


def test_loading_a_state_waits():
    counted = TokenFrequency(3)
    with counted.lock:
        waited, end = waits(lambda: counted.load_state_dict(TokenFrequency.from_counts(torch.arange(3)).state_dict()))
    end()
    assert waited
    assert counted.counts.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("copied", "shared"),
    [(copy.copy, True), (copy.deepcopy, False), (lambda of: pickle.loads(pickle.dumps(of)), False)],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_copy_waits_for_what_it_shares(copied, shared):
    counted = TokenFrequency(3)
    other = copied(counted)
    assert (other.counts is counted.counts) == shared
    with counted.lock:
        waited, end = waits(lambda: other.update(torch.tensor([1])))
    end()
    assert waited == shared
    assert other.counts.tolist() == [0, 1, 0]


# Forks while another thread counts: in the lock of a frequency, and in the kernel without one.
FORKS = """
import os, signal, sys, threading
import torch
from pdl_ext import TokenFrequency

counted = TokenFrequency(2**20)
many, few = torch.zeros(2**22, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
add = {
    "update": counted.update,
    "op": lambda tokens: counted.table.add(tokens, ignore_index=-100),
}[sys.argv[1]]
going = True
def go_on():
    while going:
        add(many)
thread = threading.Thread(target=go_on)
thread.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        before = int(counted.counts[0])
        add(few)
        os._exit(int(counted.counts[0]) != before + 1)
    _, status = os.waitpid(child, 0)
    if status:
        break
going = False
thread.join()
print(status)
"""


@pytest.mark.serial
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("way", ["update", "op"])
def test_a_fork_goes_on_counting(way):
    done = fresh_python.run("-W", "ignore", "-c", FORKS, way, timeout=120)
    assert done.stdout == "0\n", done.stderr


# PyTorch warns once in a process.
READ_ONLY = """
import numpy as np, torch
from pdl_ext import TokenFrequency
tokens = np.arange(5)
tokens.setflags(write=False)
counted = TokenFrequency(5)
counted.update(tokens)
counted.update(np.broadcast_to(tokens, (3, 5)))
counted.update(tokens[:0])
assert counted.counts.tolist() == [4] * 5
assert not tokens.flags.writeable
torch.from_numpy(tokens)
"""


@pytest.mark.slow
def test_arrays_that_cannot_be_written_to_give_no_warning():
    done = fresh_python.run("-c", READ_ONLY, check=True)
    # PyTorch's own of the last line shows that it could have been.
    assert done.stderr.count("not writable") == 1


def test_filters_of_warnings_are_left_alone(monkeypatch):
    tokens = np.arange(5)
    tokens.setflags(write=False)
    before, seen = list(warnings.filters), []
    from_numpy = torch.from_numpy

    def look(array):
        seen.append(list(warnings.filters))
        return from_numpy(array)

    monkeypatch.setattr(torch, "from_numpy", look)
    TokenFrequency(5).update(tokens)
    assert seen == [before]


@pytest.mark.parametrize("dtype", [object, "U1", "M8[s]", np.complex64, np.float64], ids=str)
def test_read_only_arrays_of_other_dtypes_are_refused(dtype):
    tokens = np.zeros(2, dtype)
    tokens.setflags(write=False)
    with pytest.raises(TypeError):
        TokenFrequency(5).update(tokens)


# Saves to one path, again and again.
SAVES = """
import sys, threading, torch
from pdl_ext import TokenFrequency
def save(n):
    frequency = TokenFrequency.from_counts(torch.full((20_000,), n))
    for _ in range(20):
        frequency.save(sys.argv[1])
threads = [threading.Thread(target=save, args=(n,)) for n in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


@pytest.mark.slow
def test_saves_to_one_path(tmp_path):
    path = tmp_path / "counts"
    TokenFrequency(20_000).save(path)
    processes = [fresh_python.popen("-c", SAVES, path, stderr=-1, text=True) for _ in range(2)]
    while any(process.poll() is None for process in processes):
        counts = TokenFrequency.load(path).counts
        assert bool((counts == counts[0]).all())
    assert [process.communicate()[1] for process in processes] == ["", ""]
    assert [process.returncode for process in processes] == [0, 0]
    assert os.listdir(tmp_path) == ["counts"]


@pytest.mark.slow
def test_what_a_killed_process_left_is_found(tmp_path):
    code = "import os, sys, pathlib; from pdl_ext.storage.whole_file import whole_file\n"
    code += "with whole_file(pathlib.Path(sys.argv[1])) as partial: partial.touch(); os._exit(9)"
    path = tmp_path / "counts"
    left = [path, path, path.with_name("counts.checkpoint-3")]
    for of in left:
        assert fresh_python.run("-c", code, of).returncode == 9
    path.with_name(".counts.other.1234.partial").touch()
    found = partial_files(path)
    assert len(found) == len(set(found)) == 3
    assert {file.name for file in found} == set(os.listdir(tmp_path)) - {".counts.other.1234.partial"}
