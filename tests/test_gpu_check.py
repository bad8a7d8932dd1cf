"""What gpu_check.py does around the commands that only a machine with a card can run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import pytest
import torch
from gpu_check import Check, Outcome, Part

pytestmark = pytest.mark.slow

SCRIPT = Path(gpu_check.__file__)
MACHINE = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.11.0+cu130", "capabilities": ["9.0"], "missing": []}
NO_CARD = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")


@pytest.fixture
def check(tmp_path):
    return Check(tmp_path, MACHINE, 100.0, [])


def passing(part, check, limit):
    part.status, part.detail = "passed", f"in {limit:.0f} s"


@NO_CARD
def test_without_a_card_it_ends_at_once(tmp_path):
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--output", str(tmp_path / "results")], capture_output=True, text=True
    )
    assert time.monotonic() - start < 30
    assert result.returncode == 2
    assert "gpu-check needs a CUDA device, PyTorch built with CUDA, and nvcc; missing here: " in result.stderr
    assert "a CUDA device that PyTorch sees" in result.stderr
    assert not (tmp_path / "results").exists()


def test_pytorch_that_breaks(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so: version mismatch')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert gpu_check.probe_in_a_process()["missing"] == [
        "a PyTorch that works: OSError: libcudart.so: version mismatch"
    ]


def test_exit_status_and_files(tmp_path, monkeypatch, capsys):
    def failing(part, check, limit):
        part.status = "failed"
        part.failures.append("tests.test_x::test_y: assert 1 == 2")

    monkeypatch.setattr(gpu_check, "probe_in_a_process", lambda: MACHINE)
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    for run, code in ((passing, 0), (failing, 1)):
        parts = [Part("build", 10, 1, passing), Part("tests", 10, 1, run)]
        monkeypatch.setattr(gpu_check, "parts_for", lambda words, parts=parts: parts)
        assert gpu_check.main(["--output", str(tmp_path / str(code))]) == code
        assert {path.name for path in (tmp_path / str(code)).iterdir()} == {"gpu_check.json", "gpu_check.log"}
    last = capsys.readouterr().out.splitlines()[-5:]
    assert last[0] == "tests: tests.test_x::test_y: assert 1 == 2"
    assert [line.split()[:2] for line in last[2:4]] == [["build", "passed"], ["tests", "failed"]]
    assert last[4].startswith("NVIDIA H100 80GB HBM3: not passed: tests; results are in ")


def test_part_without_time_is_left_out_and_says_so(tmp_path, capsys):
    parts = [Part("build", 60, 10, passing), Part("tests", 60, 30, passing), Part("bench", 60, 15, passing)]
    check = Check(tmp_path, MACHINE, 30.0, parts)
    check.start -= 10
    assert not check.run()
    assert [part.status for part in parts] == ["passed", "left out", "passed"]
    # The build, which all need, gets its least time though that is more than later ones leave.
    assert [part.detail for part in parts] == [
        "in 10 s (allowed 10 s of its 60)",
        "20 s were left of 30",
        "in 20 s (allowed 20 s of its 60)",
    ]
    assert "not passed: tests" in capsys.readouterr().out.splitlines()[-1]


def test_results_are_written_after_every_part(tmp_path):
    def statuses():
        return [part["status"] for part in json.loads((tmp_path / "gpu_check.json").read_text())["parts"]]

    def look(part, check, limit):
        assert statuses() == ["passed", "running", "not begun"]
        raise RuntimeError("broken")

    parts = [Part("build", 10, 1, passing), Part("tests", 10, 1, look), Part("bench", 10, 1, passing)]
    Check(tmp_path, MACHINE, 100.0, parts).run()
    assert statuses() == ["passed", "failed", "passed"]
    assert parts[1].detail == "RuntimeError: broken"


def test_nothing_is_checked_without_a_build(tmp_path):
    def failing(part, check, limit):
        part.status = "failed"

    parts = [Part("build", 10, 1, failing), Part("tests", 10, 1, passing)]
    assert not Check(tmp_path, MACHINE, 100.0, parts).run()
    assert (parts[1].status, parts[1].detail) == ("left out", "there is no build to check")


def test_words_choose_parts():
    def names(*words):
        return [part.name for part in gpu_check.parts_for(words)]

    sanitizers = ["sanitizer: memcheck", "sanitizer: racecheck", "sanitizer: initcheck"]
    assert names(*gpu_check.WORDS) == ["build", "tests", *sanitizers, "bench"]
    assert names("sanitizer") == ["build", *sanitizers]
    assert names("build") == ["build"]


def test_hanging_command_is_ended_with_what_it_started(check, tmp_path):
    code = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    start = time.monotonic()
    outcome = check.execute([sys.executable, "-c", code], 2)
    assert time.monotonic() - start < 20
    assert outcome.status == "timed out"
    child = int(outcome.output.split()[0])
    for _ in range(100):
        try:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            break
        if state == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("what the command started goes on running")
    assert "ended after 2 s" in (check.folder / "gpu_check.log").read_text()


def build(check, monkeypatch, architectures):
    """The part, and the commands that it ran, each with its environment."""
    info = f"PyTorch             2.11.0+cu130 (built with 2.11.0)\nCUDA architectures  {architectures}\n"
    outcomes = [Outcome("passed", ""), Outcome("passed", info)]
    commands = []

    def execute(self, command, limit, **environment):
        commands.append((command, environment))
        return outcomes.pop(0)

    monkeypatch.setattr(Check, "execute", execute)
    part = Part("build", 100, 1, gpu_check.build)
    gpu_check.build(part, check, 100)
    return part, commands


def test_a_build_is_for_the_devices_that_are_there(check, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    part, commands = build(check, monkeypatch, "900")
    assert (part.status, part.results["CUDA architectures"]) == ("passed", "900")
    command, environment = commands[0]
    assert command[1:] == ["setup.py", "build_ext", "--inplace"]
    assert (environment["PDL_EXT_CUDA"], environment["TORCH_CUDA_ARCH_LIST"]) == ("1", "9.0")


def test_a_build_of_the_cpu_only_is_refused(check, monkeypatch):
    part, _ = build(check, monkeypatch, "none")
    assert (part.status, part.failures) == ("failed", ["what is imported was built without CUDA"])


SOURCE = """
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2, "numbers differ"
@pytest.mark.parametrize("n", [1, 2])
def test_absent(n): pytest.skip("no second device")
@pytest.fixture
def broken(): raise RuntimeError("no memory")
def test_error(broken): pass
"""


def test_report_is_read(tmp_path):
    (tmp_path / "test_sample.py").write_text(SOURCE)
    path = tmp_path / "junit.xml"
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={path}", "test_sample.py"]
    subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True)
    found, failures = gpu_check.read_junit(path)
    assert found["counts"] == {"passed": 1, "failed": 2, "skipped": 2}
    assert found["skipped"] == {"no second device": 2}
    assert len(found["slowest"]) == 5
    assert failures[0].startswith("test_sample::test_bad: AssertionError: numbers differ")
    assert failures[1].startswith("test_sample::test_error: failed on setup with")


def sanitize(check, tmp_path, monkeypatch, summary, code):
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\necho \"$@\"\necho '========= {summary}'\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    part = Part("sanitizer: racecheck", 100, 1, gpu_check.sanitizer("racecheck"))
    part.run(part, check, 100)
    return part


@pytest.mark.parametrize(
    ("summary", "code", "status"),
    [
        ("ERROR SUMMARY: 0 errors", 0, "passed"),
        ("RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)", 0, "failed"),
        ("ERROR SUMMARY: 3 errors", 1, "failed"),
        ("ERROR SUMMARY: 0 errors", 1, "failed"),
        ("Device not supported", 0, "failed"),
    ],
)
def test_sanitizer(check, tmp_path, monkeypatch, summary, code, status):
    part = sanitize(check, tmp_path, monkeypatch, summary, code)
    assert part.status == status
    assert part.detail == (summary if "SUMMARY" in summary else "no summary")
    assert bool(part.failures) == (status == "failed")
    assert "--tool racecheck --error-exitcode 1" in (check.folder / "gpu_check.log").read_text()


# Its kernels are tested on the emulator by all that is tested there.
@pytest.mark.devices("cpu", "cuda")
def test_subset_agrees_with_the_reference(device):
    gpu_check.exercise_kernels(str(device))
