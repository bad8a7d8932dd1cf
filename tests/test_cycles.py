"""Unused objects are freed at once: no tensor, array or object of the package waits for Python's cyclic collector."""

from __future__ import annotations

import contextlib
import gc
import threading

import numpy as np
import pytest
import torch

from pdl_ext import PDLLoss, TokenFrequency
from pdl_ext.corpus import count_corpus


def count(folder, vocab_size=100, **options):
    count_corpus([folder / "tokens.bin"], vocab_size, dtype="uint16", threads=2, **options)


def interrupted(folder):
    def interrupt(_):
        raise KeyboardInterrupt

    count(folder, progress=interrupt)


def loss(_):
    logits = torch.zeros(6, 50, requires_grad=True)
    PDLLoss(vocab_size=50)(logits, torch.arange(6)).backward()


def linear(_):
    hidden, weight = (torch.zeros(n, 4, requires_grad=True) for n in (6, 50))
    PDLLoss().linear(hidden, weight, torch.arange(6)).backward()


CASES = {
    "count": count,
    "count, checkpoint": lambda folder: count(folder, checkpoint=folder / "checkpoint"),
    "count, an id outside the vocabulary": lambda folder: count(folder, 50, strict=True),
    "count, no file": lambda folder: count(folder / "nowhere"),
    "count, interrupted": interrupted,
    "update": lambda folder: TokenFrequency(100).update(np.arange(100)),
    "update, an id outside the vocabulary": lambda folder: TokenFrequency(9).update(torch.arange(10), strict=True),
    "save": lambda folder: TokenFrequency(9).save(folder / "counts"),
    "load": lambda folder: TokenFrequency.load(folder / "counts"),
    "load, another file": lambda folder: TokenFrequency.load(folder / "tokens.bin"),
    "loss": loss,
    "loss, linear": linear,
    "loss, a target outside the vocabulary": lambda _: PDLLoss()(torch.zeros(2, 5), torch.tensor([1, 5])),
}


@pytest.mark.usefixtures("little_garbage")
@pytest.mark.parametrize("name", CASES)
def test_nothing_is_left_in_a_cycle(name, tmp_path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    TokenFrequency(9).save(tmp_path / "counts")
    before = set(threading.enumerate())

    def run():
        with contextlib.suppress(ValueError, IndexError, KeyboardInterrupt):
            CASES[name](tmp_path)
        # They have reported that they are done, which is before they end.
        for thread in set(threading.enumerate()) - before:
            thread.join()

    # Once, for what is made once.
    run()
    # What other tests left may take several rounds.
    while gc.collect():
        pass
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        run()
        gc.collect()
        found = {type(left) for left in gc.garbage}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    # Not the compiler's tensors, which are of classes of its own.
    assert found & {torch.Tensor, np.ndarray} == set()
    assert {kind for kind in found if kind.__module__.startswith("pdl_ext")} == set()
