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

SCRIPT = Path(gpu_check.__file__)
MACHINE = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.11.0+cu130", "capabilities": ["9.0"], "missing": []}
NO_CARD = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")


@pytest.fixture
def check(tmp_path):
    return Check(tmp_path, MACHINE, 100.0, [])


def passing(part, check, limit):
    part.status, part.detail = "passed", f"in {limit:.0f} s"


def results(folder):
    return json.loads((folder / "gpu_check.json").read_text())


def saying(monkeypatch, *outcomes):
    """The commands that a part runs, which end with these outcomes instead."""
    commands = []
    left = list(outcomes)

    def execute(self, command, limit, **environment):
        commands.append((list(command), environment))
        return left.pop(0)

    monkeypatch.setattr(Check, "execute", execute)
    return commands


class TestCommandLine:
    def test_unknown_words_are_refused_by_name(self, capsys):
        with pytest.raises(SystemExit) as caught:
            gpu_check.main(["--only", "tests,speed"])
        assert caught.value.code == 2
        assert "got 'speed', expected words of build, tests, sanitizer, bench" in capsys.readouterr().err

    @NO_CARD
    def test_without_a_card_it_ends_at_once(self, tmp_path):
        start = time.monotonic()
        result = subprocess.run(
            [sys.executable, str(SCRIPT), "--output", str(tmp_path / "results")], capture_output=True, text=True
        )
        assert time.monotonic() - start < 30
        assert result.returncode == 2
        assert "gpu-check needs a CUDA device, PyTorch built with CUDA, and nvcc; missing here: " in result.stderr
        assert "a CUDA device that PyTorch sees" in result.stderr
        assert not (tmp_path / "results").exists()

    def test_without_pytorch(self, tmp_path, monkeypatch):
        (tmp_path / "torch.py").write_text("raise ImportError('none')")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        assert "PyTorch, so that no CUDA device can be looked for" in gpu_check.probe_in_a_process()["missing"]

    def test_pytorch_that_breaks(self, tmp_path, monkeypatch):
        (tmp_path / "torch.py").write_text("raise OSError('libcudart.so: version mismatch')")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        assert gpu_check.probe_in_a_process()["missing"] == [
            "a PyTorch that works: OSError: libcudart.so: version mismatch"
        ]

    def test_words_choose_parts(self):
        def names(*words):
            return [part.name for part in gpu_check.parts_for(words)]

        sanitizers = ["sanitizer: memcheck", "sanitizer: racecheck", "sanitizer: initcheck"]
        assert names(*gpu_check.WORDS) == ["build", "tests", *sanitizers, "bench"]
        assert names("sanitizer") == ["build", *sanitizers]
        assert names("build") == ["build"]

    def test_least_times_fit_the_default_budget(self):
        build, *others = gpu_check.parts_for(gpu_check.WORDS)
        assert build.most + sum(part.least for part in others) <= 540

    def test_default_folder(self):
        folder = gpu_check.default_folder(MACHINE)
        assert folder.relative_to(gpu_check.ROOT).as_posix() == "benchmarks/results/nvidia-h100-80gb-hbm3-torch2.11.0"

    def test_exit_status_and_files(self, tmp_path, monkeypatch, capsys):
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


class TestBudget:
    def test_later_parts_keep_what_they_need_at_least(self, tmp_path, capsys):
        limits = []

        def note(part, check, limit):
            limits.append(round(limit))
            passing(part, check, limit)

        parts = [Part("build", 80, 10, note), Part("tests", 50, 20, note), Part("bench", 200, 30, note)]
        assert Check(tmp_path, MACHINE, 100.0, parts).run()
        # None of them took any time, so the budget is whole for each.
        assert limits == [50, 50, 100]
        assert [part.detail for part in parts] == [
            "in 50 s (allowed 50 s of its 80)",
            "in 50 s",
            "in 100 s (allowed 100 s of its 200)",
        ]

    def test_part_without_time_is_left_out_and_says_so(self, tmp_path, capsys):
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

    def test_nothing_is_checked_without_a_build(self, tmp_path, capsys):
        def failing(part, check, limit):
            part.status = "failed"

        parts = [Part("build", 10, 1, failing), Part("tests", 10, 1, passing)]
        assert not Check(tmp_path, MACHINE, 100.0, parts).run()
        assert (parts[1].status, parts[1].detail) == ("left out", "there is no build to check")

    def test_results_are_written_after_every_part(self, tmp_path, capsys):
        def look(part, check, limit):
            assert [one["status"] for one in results(tmp_path)["parts"]] == ["passed", "running", "not begun"]
            raise RuntimeError("broken")

        parts = [Part("build", 10, 1, passing), Part("tests", 10, 1, look), Part("bench", 10, 1, passing)]
        Check(tmp_path, MACHINE, 100.0, parts).run()
        written = results(tmp_path)
        assert written["machine"]["torch"] == "2.11.0+cu130"
        assert [one["status"] for one in written["parts"]] == ["passed", "failed", "passed"]
        assert written["parts"][1]["detail"] == "RuntimeError: broken"

    def test_results_of_an_earlier_run_go(self, tmp_path):
        (tmp_path / "benchmark.json").write_text("{}")
        Check(tmp_path, MACHINE, 100.0, [])
        assert not (tmp_path / "benchmark.json").exists()


class TestCommands:
    def test_output_and_status(self, check):
        outcome = check.execute([sys.executable, "-c", "import os; print(os.environ['GIVEN'])"], 30, GIVEN="value")
        assert outcome == Outcome("passed", "value\n")
        assert check.execute([sys.executable, "-c", "import sys; sys.exit(3)"], 30).status == "failed"
        assert "value" in (check.folder / "gpu_check.log").read_text()

    def test_finds_the_modules_of_the_source_tree(self, check):
        assert check.execute([sys.executable, "-c", "import gpu_check, harness, pdl_ext"], 60).status == "passed"

    def test_hanging_command_is_ended_with_what_it_started(self, check, tmp_path):
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

    def test_long_output_keeps_its_ends(self, check, monkeypatch):
        monkeypatch.setattr(gpu_check, "LOG_BYTES_OF_A_PART", 100)
        outcome = check.execute([sys.executable, "-c", "print('first' + 1000 * '.' + 'last')"], 30)
        check.execute([sys.executable, "-c", "print('next')"], 30)
        assert outcome.output.startswith("first")
        assert outcome.output.endswith("last\n")
        assert "bytes are left out here" in outcome.output
        log = (check.folder / "gpu_check.log").read_bytes()
        assert len(log) < 1000
        assert b"\0" not in log
        assert b"next" in log


class TestBuild:
    INFO = "PyTorch             2.11.0+cu130 (built with 2.11.0)\nCUDA architectures  900\n"

    def run(self, check, monkeypatch, *outcomes):
        commands = saying(monkeypatch, *outcomes)
        part = Part("build", 100, 1, gpu_check.build)
        gpu_check.build(part, check, 100)
        return part, commands

    def test_is_for_the_devices_that_are_there(self, check, monkeypatch):
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        part, commands = self.run(check, monkeypatch, Outcome("passed", ""), Outcome("passed", self.INFO))
        assert part.status == "passed"
        assert part.results["CUDA architectures"] == "900"
        command, environment = commands[0]
        assert command[1:] == ["setup.py", "build_ext", "--inplace"]
        assert environment["PDL_EXT_CUDA"] == "1"
        assert environment["TORCH_CUDA_ARCH_LIST"] == "9.0"
        assert int(environment["MAX_JOBS"]) >= 1

    def test_of_the_cpu_only_is_refused(self, check, monkeypatch):
        info = Outcome("passed", self.INFO.replace("900", "none"))
        part, _ = self.run(check, monkeypatch, Outcome("passed", ""), info)
        assert part.status == "failed"
        assert part.failures == ["what is imported was built without CUDA"]

    def test_that_fails_shows_its_end(self, check, monkeypatch):
        part, commands = self.run(check, monkeypatch, Outcome("failed", "ptxas\nerror: no\n"))
        assert part.status == "failed"
        assert part.failures == ["ptxas\nerror: no"]
        assert len(commands) == 1


class TestTests:
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

    def report(self, folder, source):
        (folder / "test_sample.py").write_text(source)
        path = folder / "junit.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={path}",
            "test_sample.py",
        ]
        code = subprocess.run(command, cwd=folder, capture_output=True).returncode
        return path, "passed" if code == 0 else "failed"

    def test_report_is_read(self, tmp_path):
        found, failures = gpu_check.read_junit(self.report(tmp_path, self.SOURCE)[0])
        assert found["counts"] == {"passed": 1, "failed": 2, "skipped": 2}
        assert found["skipped"] == {"no second device": 2}
        assert len(found["slowest"]) == 5
        assert failures[0].startswith("test_sample::test_bad: AssertionError: numbers differ")
        assert failures[1].startswith("test_sample::test_error: failed on setup with")

    @pytest.mark.parametrize(
        ("source", "status", "detail"),
        [
            ("def test_good(): pass", "passed", "1 passed, 0 failed, 0 skipped"),
            ("def test_bad(): assert False", "failed", "0 passed, 1 failed, 0 skipped"),
            ("import pytest\ndef test_a(): pytest.skip('x')", "failed", "0 passed, 0 failed, 1 skipped"),
        ],
    )
    def test_part(self, check, monkeypatch, tmp_path, source, status, detail):
        report, code = self.report(tmp_path, source)

        def execute(self, command, limit, **environment):
            place = next(word for word in command if word.startswith("--junitxml="))
            os.replace(report, place.partition("=")[2])
            return Outcome(code, "")

        monkeypatch.setattr(Check, "execute", execute)
        part = Part("tests", 100, 1, gpu_check.tests)
        gpu_check.tests(part, check, 100)
        assert (part.status, part.detail) == (status, detail)

    def test_that_hang_are_named(self, check, monkeypatch):
        output = "tests/test_a.py::test_fine[a] PASSED [ 1%]\ntests/test_b.py::test_hangs[b] "
        saying(monkeypatch, Outcome("timed out", output))
        part = Part("tests", 100, 1, gpu_check.tests)
        gpu_check.tests(part, check, 100)
        assert (part.status, part.detail) == (
            "timed out",
            "no report; the last test was tests/test_b.py::test_hangs[b]",
        )


class TestSanitizer:
    def run(self, check, tmp_path, monkeypatch, summary, code):
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
            ("RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, "passed"),
            ("RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)", 0, "failed"),
            ("ERROR SUMMARY: 3 errors", 1, "failed"),
            ("ERROR SUMMARY: 0 errors", 1, "failed"),
            ("Device not supported", 0, "failed"),
        ],
    )
    def test_status(self, check, tmp_path, monkeypatch, summary, code, status):
        part = self.run(check, tmp_path, monkeypatch, summary, code)
        assert part.status == status
        assert part.detail == (summary if "SUMMARY" in summary else "no summary")
        assert bool(part.failures) == (status == "failed")
        assert "--tool racecheck --error-exitcode 1" in (check.folder / "gpu_check.log").read_text()

    def test_absent_is_not_passed(self, check, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(gpu_check.cuda_compile, "find_nvcc", lambda: None)
        part = Part("sanitizer: memcheck", 100, 1, gpu_check.sanitizer("memcheck"))
        part.run(part, check, 100)
        assert part.status == "absent"

    def test_is_found_beside_nvcc(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", "/nowhere")
        program = tmp_path / "bin" / "compute-sanitizer"
        program.parent.mkdir()
        program.write_text("")
        program.chmod(0o755)
        monkeypatch.setattr(gpu_check.cuda_compile, "find_nvcc", lambda: program.with_name("nvcc"))
        assert gpu_check.find_sanitizer() == str(program)

    def test_subset_agrees_with_the_reference(self, device):
        gpu_check.exercise_kernels(str(device))


def test_benchmarks_get_what_is_left(check, monkeypatch):
    commands = saying(monkeypatch, Outcome("passed", ""))
    (check.folder / "benchmark.json").write_text('{"rows": [1, 2], "left_out": ["one"]}')
    part = Part("bench", 200, 1, gpu_check.bench)
    gpu_check.bench(part, check, 145)
    assert (part.status, part.detail) == ("passed", "2 rows, 1 workloads left out for time")
    assert commands[0][0][1:] == ["benchmarks/gpu.py", "--output", str(check.folder), "--budget", "100"]
