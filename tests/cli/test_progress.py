"""How far a sub-command has come is shown on a terminal alone, on standard error, from two seconds on."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import pdl_ext
from pdl_ext import TokenFrequency
from pdl_ext.cli import counts_file, progress
from pdl_ext.cli.main import main
from pdl_ext.corpus import counting

COUNT = ["count", "a.bin", "--dtype", "uint16", "--vocab-size", "9"]
# Each with the function that its time goes into, and what is shown meanwhile.
COMMANDS = {
    "count": ([*COUNT, "-o", "new"], (counting, "open_sources"), "pdl-ext count: looks at the files"),
    "count --dry-run": ([*COUNT, "--dry-run"], (counting, "open_sources"), "pdl-ext count: looks at the files"),
    "merge": (["merge", "old", "other", "-o", "new"], (counts_file, "load_counts"), "merge"),
    "show": (["show", "old"], (counts_file, "load_counts"), "pdl-ext show"),
    "plot": (["plot", "old", "-o", "a.svg"], (counts_file, "load_counts"), "pdl-ext plot"),
    "explore": (["explore", "old", "-o", "a.html"], (counts_file, "load_counts"), "pdl-ext explore"),
}


class Stream(io.StringIO):
    """What is written, of which each line of a bar begins with a carriage return."""

    def __init__(self, is_terminal):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self):
        return self.is_terminal

    def on_the_screen(self):
        """The last line, as it is left."""
        return self.getvalue().rpartition("\n")[2].rpartition("\r")[2].strip()


@pytest.fixture(autouse=True)
def corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.arange(9, dtype="<u2").tofile("a.bin")
    TokenFrequency.from_counts(torch.arange(9)).save("old")
    TokenFrequency.from_counts(torch.arange(9)).save("other")


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_WITHOUT", 0.0)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_REDRAWS", 0.01)


def run(name, monkeypatch, *, is_terminal, shown=""):
    """What a command writes on standard error, which takes until that has `shown`."""
    if name == "plot":
        pytest.importorskip("matplotlib")
    command, (module, function), _ = COMMANDS[name]
    stream, real = Stream(is_terminal), getattr(module, function)
    monkeypatch.setattr(sys, "stderr", stream)

    def slow(*arguments):
        deadline = time.monotonic() + 10
        # The bar of what has steps is drawn after the first.
        while name != "merge" and shown not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.11)
        return real(*arguments)

    monkeypatch.setattr(module, function, slow)
    assert main(command) == 0
    return stream


@pytest.mark.parametrize("name", COMMANDS)
def test_a_terminal_shows_what_takes_its_time(name, monkeypatch, at_once):
    shown = COMMANDS[name][2]
    stream = run(name, monkeypatch, is_terminal=True, shown=shown)
    assert shown in stream.getvalue()
    if shown.startswith("pdl-ext"):
        # A clock, of which nothing is left.
        assert re.search(rf"\r{shown}: \d\d:\d\d", stream.getvalue())
        assert shown not in stream.on_the_screen()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_pipe_gets_none(name, monkeypatch, at_once):
    assert run(name, monkeypatch, is_terminal=False).getvalue() == ""


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "count"])
def test_what_takes_less_shows_none(name, monkeypatch):
    assert progress._SECONDS_WITHOUT == 2
    # However busy the machine is.
    monkeypatch.setattr(progress, "_SECONDS_WITHOUT", 60.0)
    assert run(name, monkeypatch, is_terminal=True).getvalue() == ""


def test_steps_are_counted_on_a_terminal(monkeypatch, at_once):
    monkeypatch.setattr(sys, "stderr", Stream(True))
    for _ in progress.steps(range(3), "finetune", "step"):
        time.sleep(0.11)
    assert "finetune:  67%" in sys.stderr.getvalue()
    assert re.search(r"\rfinetune: 100%.* 3/3 .*\n$", sys.stderr.getvalue())


def test_a_clock_tells_the_time_since_the_beginning(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stream(True))
    with progress.waiting("a clock"):
        begin = time.monotonic()
        while not sys.stderr.getvalue() and time.monotonic() < begin + 60:
            time.sleep(0.1)
        assert time.monotonic() > begin + 1.5
    assert re.match(r"\ra clock: 00:(0[2-9]|[1-5]\d)", sys.stderr.getvalue())
    assert sys.stderr.on_the_screen() == ""


def test_a_clock_ends_with_an_error(monkeypatch, at_once):
    monkeypatch.setattr(sys, "stderr", Stream(True))
    with contextlib.suppress(KeyboardInterrupt), progress.waiting("a clock"):
        time.sleep(0.1)
        raise KeyboardInterrupt
    assert "a clock" in sys.stderr.getvalue()
    assert sys.stderr.on_the_screen() == ""


def test_lines_stand_above_a_bar(monkeypatch, at_once):
    """A warning that comes while one is drawn has a line for itself."""

    def open_sources(*arguments):
        time.sleep(0.2)
        warnings.warn("a.bin: is odd", stacklevel=1)
        return real(*arguments)

    real = counting.open_sources
    monkeypatch.setattr(counting, "open_sources", open_sources)
    monkeypatch.setattr(sys, "stderr", Stream(True))
    assert main([*COUNT, "--dry-run"]) == 0
    assert re.search(r"\r +\rpdl-ext: warning: a\.bin: is odd\n", sys.stderr.getvalue())


def test_bars_are_drawn_in_one_place():
    """Which is where they learn of terminals."""
    folder = Path(pdl_ext.__file__).parent
    found = [path.relative_to(folder) for path in folder.rglob("*.py") if "tqdm" in path.read_text()]
    assert sorted(map(str, found)) == ["cli/progress.py", "cli/streams.py"]
