"""The code of gpu_check around the commands that need a machine with a card."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gpu_check import __main__ as command_line
from gpu_check import equal_bits, kernels, launches, machine, parts, plan, stand_ins, variants
from gpu_check.check import Check, Outcome, Part, Setting
from gpu_check.equal_bits import error

pytestmark = pytest.mark.slow

SCRIPT = Path(variants.__file__).parent
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
        [sys.executable, str(SCRIPT), "first", "--output", str(tmp_path / "results")], capture_output=True, text=True
    )
    assert time.monotonic() - start < 30
    assert result.returncode == 2
    assert "gpu-check needs a CUDA device, PyTorch built with CUDA, and nvcc; missing here: " in result.stderr
    assert "a CUDA device that PyTorch sees" in result.stderr
    assert not (tmp_path / "results").exists()


def test_pytorch_that_breaks(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so: version mismatch')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert machine.probe_in_a_process()["missing"] == ["a PyTorch that works: OSError: libcudart.so: version mismatch"]


def test_exit_status_and_files(tmp_path, monkeypatch, capsys):
    def failing(part, check, limit):
        part.status = "failed"
        part.failures.append("tests.test_x::test_y: assert 1 == 2")

    monkeypatch.setattr(machine, "probe_in_a_process", lambda dry=False: MACHINE)
    monkeypatch.setattr(command_line.signal, "signal", lambda *_: None)
    for run, code in ((passing, 0), (failing, 1)):
        planned = [Part("build", 10, 1, passing), Part("tests", 10, 1, run)]
        monkeypatch.setitem(plan.COMMANDS, "first", lambda setting, planned=planned: planned)
        assert command_line.main(["first", "--output", str(tmp_path / str(code))]) == code
        assert {path.name for path in (tmp_path / str(code)).iterdir()} == {"first.json", "first.log"}
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
    # The build, which all need, gets its minimum time even if that is more than later parts leave.
    assert [part.detail for part in parts] == [
        "in 10 s (allowed 10 s of its 60)",
        "20 s were left of 30",
        "in 20 s (allowed 20 s of its 60)",
    ]
    assert "not passed: tests" in capsys.readouterr().out.splitlines()[-1]


def test_results_are_written_after_every_part(tmp_path):
    def statuses():
        return [part["status"] for part in json.loads((tmp_path / "first.json").read_text())["parts"]]

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


def test_the_plans_fit_six_minutes_and_come_in_order():
    for setting in (Setting(), *(Setting(built=Path("built"), variant=name) for name in variants.NAMES)):
        first, second = plan.first(setting), plan.second(setting)
        for planned in (first, second):
            # The check whether the kernels are right may use all of its time, the other parts their minimum.
            right = [part for part in planned if re.match("build|launches|equal bits|tests", part.name)]
            assert sum(part.most if part in right else part.least for part in planned) < command_line.BUDGET
        names = [part.name for part in first]
        assert names[:3] == ["build", "launches", "equal bits, release"]
        assert names.index("tests of the kernels") < names.index("other tests") < names.index("times, release")
        assert all((f"times, {name}" in names) == (setting.built is not None) for name in ("messages", "last_block"))
        assert [part.name for part in second][:3] == ["build", "equal bits", "tests of the sums"]
        assert {part.variant for part in second[1:3]} == {setting.variant}
        assert [part.name for part in second][-3:] == ["sanitizer: synccheck", "sanitizer: memcheck", "bench"]
        assert len({part.name for part in (*first, *second)}) >= len(first) + len(second) - 2


def test_words_choose_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "probe_in_a_process", lambda dry=False: MACHINE)
    monkeypatch.setattr(command_line.signal, "signal", lambda *_: None)
    planned = [Part(name, 10, 1, passing) for name in ("build", "tests", "other tests", "launches")]
    monkeypatch.setitem(plan.COMMANDS, "first", lambda setting: planned)
    assert command_line.main(["first", "--only", "other,launch", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "first.json").read_text())
    assert [part["name"] for part in found["parts"]] == ["build", "other tests", "launches"]


def test_another_variant_has_to_be_built_ahead(capsys):
    with pytest.raises(SystemExit):
        command_line.main(["second", "--variant", "messages"])
    assert "--variant: got messages, expected --built with it" in capsys.readouterr().err


def test_hanging_command_is_ended_with_what_it_started(check, tmp_path):
    code = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    start = time.monotonic()
    outcome = check.python("-c", code, limit=2)
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
    assert "ended after 2 s" in (check.folder / "first.log").read_text()


def build(check, monkeypatch, architectures, names=(variants.RELEASE,)):
    """The part, and the commands that it ran, each with its environment."""
    info = f"PyTorch             2.11.0+cu130 (built with 2.11.0)\nCUDA architectures  {architectures}\n"
    outcomes = [Outcome("passed", ""), Outcome("passed", info)] * len(names)
    commands = []

    def execute(self, command, limit, variant, **environment):
        commands.append((command[1:], variant, environment))
        return outcomes.pop(0)

    monkeypatch.setattr(Check, "execute", execute)
    part = Part("build", 100, 1, parts.build)
    check.parts = [part, *(Part("times", 10, 1, passing, name) for name in names)]
    part.run(part, check, 100)
    return part, commands


def test_a_build_is_for_the_devices_that_are_there(check, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    part, commands = build(check, monkeypatch, "900")
    assert (part.status, part.results["release"]["CUDA architectures"]) == ("passed", "900")
    command, _, environment = commands[0]
    assert command == ["setup.py", "build_ext", "--inplace"]
    assert (environment["PDL_EXT_CUDA"], environment["TORCH_CUDA_ARCH_LIST"]) == ("1", "9.0")


@pytest.fixture
def built(tmp_path):
    """What `make gpu-variants` leaves, of a variant that spills."""
    (tmp_path / "built").mkdir()
    about = {"spills": {"release": [], "messages": ["on_chip_kernel<float>: 16+8 bytes"]}}
    (tmp_path / "built" / "objects.json").write_text(json.dumps(about))
    return tmp_path / "built"


def test_variants_are_linked_and_each_is_asked_what_it_is(tmp_path, built, monkeypatch):
    check = Check(tmp_path, MACHINE, 100.0, [], Setting(built=built))
    part, commands = build(check, monkeypatch, "900", ("release", "messages"))
    assert part.status == "passed"
    assert part.detail == "release, messages (spills registers)"
    assert part.results["messages"]["spills"] == "on_chip_kernel<float>: 16+8 bytes"
    assert [command[-2:] for command, _, _ in commands[::2]] == [["--link", "release"], ["--link", "messages"]]
    assert [variant for _, variant, _ in commands[1::2]] == ["release", "messages"]


def test_a_build_of_the_cpu_only_is_refused(check, monkeypatch):
    part, _ = build(check, monkeypatch, "none")
    assert (part.status, part.failures) == ("failed", ["release: what is imported was built without CUDA"])


class TestVariants:
    def test_each_differs_by_a_macro_that_its_sources_know(self):
        for name, variant in variants.VARIANTS.items():
            for source in variant.sources:
                text = variants.with_headers(variants.ROOT / source, variants.ROOT / "csrc").decode()
                for macro in variant.macros:
                    assert f"#if !defined({macro.partition('=')[0]})" in text, name
        assert variants.flags_of("release") == ""
        assert variants.flags_of("messages") == "-DPDL_EXCHANGE=messages"

    def test_all_but_the_library_is_compiled_ahead(self):
        assert "csrc/cuda/loss_and_gradient.cu" in variants.sources()
        assert "csrc/cpu/loss_and_gradient.cpp" in variants.sources()
        assert variants.LIBRARY not in variants.sources()
        assert (variants.ROOT / variants.LIBRARY).is_file()
        python = [
            name
            for name in variants.sources()
            if b"<pybind11" in variants.with_headers(variants.ROOT / name, variants.ROOT / "csrc")
        ]
        assert python == []

    def test_without_cuda_only_the_cpu_sources_are_compiled(self):
        assert all(not name.endswith(".cu") for name in variants.sources(with_cuda=False))
        assert "csrc/cpu/loss_and_gradient.cpp" in variants.sources(with_cuda=False)
        assert variants.environment_of("none") == {"PDL_EXT_CUDA": "0"}
        assert variants.environment_of("9.0") == {"PDL_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}

    def test_kernels_that_spill_are_named(self):
        lines = [
            "ptxas info    : Compiling entry function '_Z4axpyIfEvPKT_PS0_i' for 'sm_90'",
            "ptxas info    : Function properties for _Z4axpyIfEvPKT_PS0_i",
            "    24 bytes stack frame, 16 bytes spill stores, 8 bytes spill loads",
            "ptxas info    : Used 80 registers",
            "ptxas info    : Compiling entry function '_Z5cleanPf' for 'sm_90'",
            "ptxas info    : Function properties for _Z5cleanPf",
            "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads",
            "ptxas info    : Used 8 registers",
        ]
        (line,) = variants.spilling("\n".join(lines))
        assert line.endswith(": 16+8 bytes")
        assert "axpy" in line

    def test_objects_of_other_sources_are_refused(self, tmp_path, monkeypatch):
        assert "expected what `make gpu-variants` leaves" in variants.refusal(tmp_path)
        (tmp_path / "objects.json").write_text(json.dumps({"fingerprint": "another", "architecture": "9.0"}))
        assert "made of other sources or for another PyTorch" in variants.refusal(tmp_path)
        (tmp_path / "objects.json").write_text(json.dumps({"fingerprint": variants.fingerprint()}))
        assert variants.refusal(tmp_path) == ""
        monkeypatch.setitem(variants.VARIANTS, "another", variants.Variant((variants.ONE_CALL,), ("PDL_PACKS=8",)))
        assert "made of other sources" in variants.refusal(tmp_path)

    def test_a_variant_takes_one_object_of_its_own(self, tmp_path):
        for name in ("release/a.o", "release/b.o", "messages/b.o"):
            path = tmp_path / "objects" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        found = [str(path.relative_to(tmp_path / "objects")) for path in variants.objects(tmp_path, "messages")]
        assert found == ["release/a.o", "messages/b.o"]


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
    found, failures = parts.read_junit(path)
    assert found["counts"] == {"passed": 1, "failed": 2, "skipped": 2}
    assert found["skipped"] == {"no second device": 2}
    assert len(found["slowest"]) == 5
    assert failures[0].startswith("test_sample::test_bad: AssertionError: numbers differ")
    assert failures[1].startswith("test_sample::test_error: failed on setup with")


def sanitize(tmp_path, summary, code):
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\necho \"$@\"\necho '========= {summary}'\nexit {code}\n")
    program.chmod(0o755)
    check = Check(tmp_path, MACHINE, 100.0, [], Setting(programs=tmp_path))
    part = Part("sanitizer: racecheck", 100, 1, parts.sanitizer("racecheck"))
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
def test_sanitizer(tmp_path, summary, code, status):
    part = sanitize(tmp_path, summary, code)
    assert part.status == status
    assert part.detail == (summary if "SUMMARY" in summary else "no summary")
    assert bool(part.failures) == (status == "failed")
    assert "--tool racecheck --error-exitcode 1" in (tmp_path / "first.log").read_text()


def test_counters_are_found_amid_other_lines():
    output = "\n".join(
        [
            "==PROF== Connected to process 7",
            '"ID","Kernel Name","launch__registers_per_thread","launch__cluster_max_active","dram__bytes_read.sum",'
            '"smsp__cycles.sum"',
            '"","","register/thread","cluster","Gbyte","cycle"',
            '"0","on_chip_kernel","77","99","2.1","12"',
        ]
    )
    assert parts.read_counters(output) == {
        "launch__registers_per_thread": "77 register/thread",
        "launch__cluster_max_active": "99 cluster",
        "dram__bytes_read.sum": "2.1 Gbyte",
    }
    assert parts.read_counters("==ERROR== no permission") == {}


def test_the_stand_in_for_ncu_has_every_counter(tmp_path):
    folder = stand_ins.write(tmp_path / "programs")
    done = subprocess.run([folder / "ncu", "--csv", "true"], capture_output=True, text=True, check=True)
    found = parts.read_counters(done.stdout)
    assert found.keys() == stand_ins.COUNTERS.keys() - {"smsp__cycles_active.avg"}
    assert found["gpu__time_duration.sum"] == "1,080.10 us"


@pytest.mark.parametrize(
    ("printed", "code", "status"),
    [
        (
            "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access GPU Performance Counters",
            0,
            "refused",
        ),
        ("==ERROR== Profiling is not supported on device 0", 1, "refused"),
        ("==ERROR== Failed to open/create lock file /tmp/nsight-compute-lock.", 1, "refused"),
        ("==ERROR== The application returned an error code (1).", 1, "failed"),
        ("==WARNING== No kernels were profiled.", 0, "failed"),
    ],
)
def test_a_machine_that_refuses_counters_fails_nothing(tmp_path, capsys, printed, code, status):
    program = tmp_path / "ncu"
    program.write_text(f"#!/bin/sh\necho '{printed}'\nexit {code}\n")
    program.chmod(0o755)
    planned = [Part("build", 10, 1, passing), Part("counters", 10, 1, parts.counters(1000))]
    good = Check(tmp_path, MACHINE, 100.0, planned, Setting(programs=tmp_path)).run()
    assert planned[1].status == status
    assert good == (status == "refused")
    verdict = capsys.readouterr().out.splitlines()[-1]
    if good:
        assert planned[1].detail == printed
        assert "all parts passed; refused by the machine: counters" in verdict
    else:
        assert "not passed: counters" in verdict


def test_what_was_left_out_for_time_has_not_passed(tmp_path, monkeypatch):
    printed = "float32 [7, 9]: equal bits\nfloat32 [7, 99]: left out for time\n1 shapes, 0 bad, 1 left out\n"
    monkeypatch.setattr(Check, "execute", lambda *_, **__: Outcome("passed", printed))
    planned = [Part("build", 10, 1, passing), Part("equal bits", 10, 1, parts.script("equal_bits"))]
    assert not Check(tmp_path, MACHINE, 100.0, planned).run()
    assert (planned[1].status, planned[1].failures) == ("incomplete", ["left out for time: float32 [7, 99]"])


def test_shapes_beyond_the_budget_are_named(tmp_path, monkeypatch, capsys):
    found = {"error": 0.5, "failure": ""}
    monkeypatch.setattr(equal_bits, "check", lambda *_: found)
    clock = iter(range(1000))
    monkeypatch.setattr(equal_bits.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(equal_bits.devices, "prepare", lambda _: torch.device("cpu"))
    monkeypatch.setattr(sys, "argv", ["equal_bits", "--output", str(tmp_path), "--budget", "3", "--device", "emulated"])
    assert equal_bits.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(": ")[2] for line in lines[:-1]] == ["equal bits"] * 2 + ["left out for time"] * 14
    assert lines[-1] == "2 shapes, 0 bad, 14 left out"
    assert len(json.loads((tmp_path / "equal_bits.json").read_text())) == 2


def test_launches_of_a_trace():
    others = {"ph": "X", "cat": "kernel", "name": "void at::native::copy()", "ts": 2.0, "dur": 3.0, "args": {}}
    ours = launches.STAND_IN | {"ts": 9.0}
    (line,) = launches.kernels([ours, {"cat": "cpu_op", "ts": 0, "dur": 99, "name": "pdl::cuda"}, others], rows=3)
    assert (line["kernel"], line["microseconds"], line["gap"]) == ("on_chip_kernel", 5.0, 4.0)
    assert (line["blocks_of_a_row"], line["registers per thread"]) == (4, 77)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "wrong", [None, "loss", "element", "nan", "small ones", "small one", "columns", "factor", "ignored row"]
)
def test_what_is_wrong_with_a_gradient_is_seen(wrong, dtype):
    torch.manual_seed(0)
    logits, targets, weight = 3 * torch.randn(5, 2000), torch.randint(2000, (5,)), torch.rand(2000) + 0.5
    targets[1] = -100
    logits = logits.to(dtype)
    leaf = logits.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(leaf, targets, weight.double())
    (gradient,) = torch.autograd.grad(loss, leaf)
    if wrong == "loss":
        loss = loss * 1.001
    elif wrong in ("element", "nan"):
        gradient[4, 1999] = torch.nan if wrong == "nan" else 2 * gradient[4, 1999]
    elif wrong == "small one":
        row = gradient[2].abs()
        gradient[2, row.argmin()] *= 1 + 2**-6
    elif wrong == "small ones":
        gradient[gradient.abs() < 0.03 * gradient.abs().max()] = 0
    elif wrong == "columns":
        gradient[3, 1000:1100] = 0
    elif wrong == "factor":
        gradient *= 1.02
    elif wrong:
        gradient[1, 7] = 1e-6
    got = error(logits, targets, weight, loss.float().detach(), gradient.to(dtype))
    assert (got <= 1) == (wrong is None)


def test_stand_ins_refuse_what_they_do_not_know(tmp_path):
    folder = stand_ins.write(tmp_path / "programs")
    for command in (["ncu", "--wrong", "x", "true"], ["compute-sanitizer", "--wrong", "x", "true"]):
        done = subprocess.run([folder / command[0], *command[1:]], capture_output=True, text=True)
        assert (done.returncode, "unknown option --wrong" in done.stdout) == (2, True)


@pytest.mark.parametrize(
    ("command", "chosen"), [("first", "release,launches,counters"), ("second", "release,synccheck")]
)
def test_the_dry_run_takes_every_step(command, chosen, tmp_path):
    """For the release, which other tests have built; `make gpu-check-dry` has all variants."""
    arguments = [command, "--dry", "--budget", "900", "--only", chosen, "--output", str(tmp_path)]
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / f"{command}.json").read_text())
    assert found["machine"]["device"] == "no card: a dry run"
    assert {part["status"] for part in found["parts"]} == {"passed"}
    names = [part["name"] for part in found["parts"]]
    assert names[0] == "build"
    assert len(names) == {"first": 5, "second": 4}[command]
    # All that was found is in one file.
    assert [part["name"] for part in found["parts"] if not part["results"]] in ([], ["sanitizer: synccheck"])
    assert {path.name for path in tmp_path.iterdir()} == {f"{command}.json", f"{command}.log", "stand-ins"}


def test_what_a_part_knew_is_kept_when_its_time_is_up(tmp_path):
    def slow(part, check, limit):
        code = (
            "import pathlib, time; pathlib.Path('equal_bits.json').write_text('[1]');"
            "pathlib.Path('cut.json').write_text('[1'); time.sleep(60)"
        )
        outcome = check.python("-c", f"import os; os.chdir({str(check.running)!r}); {code}", limit=3)
        part.status = outcome.status

    part = Part("equal bits", 10, 1, slow)
    Check(tmp_path, MACHINE, 100.0, [part]).run()
    assert (part.status, part.results) == ("timed out", {"equal_bits": [1]})
    assert not (tmp_path / "running").exists()


def test_a_variant_that_does_not_link_costs_its_own_parts(tmp_path, built, monkeypatch):
    outcomes = {
        "release": Outcome("passed", "CUDA architectures  900\n"),
        "messages": Outcome("failed", "no such object"),
    }
    monkeypatch.setattr(Check, "execute", lambda self, command, limit, variant, **environment: outcomes[variant])
    planned = [Part("build", 100, 1, parts.build)]
    planned += [Part(f"times, {name}", 10, 1, passing, name) for name in outcomes]
    assert not Check(tmp_path, MACHINE, 100.0, planned, Setting(built=built)).run()
    assert [part.status for part in planned] == ["failed", "passed", "left out"]
    assert planned[0].failures == ["messages: failed: no such object"]


def test_a_hanging_test_leaves_what_was_told(tmp_path, monkeypatch):
    lines = (
        "tests/test_a.py::test_one PASSED [ 50%]\ntests/test_a.py::test_two[cuda] FAILED\ntests/test_a.py::test_three "
    )
    monkeypatch.setattr(Check, "execute", lambda *_, **__: Outcome("failed", lines))
    part = Part("tests", 10, 1, parts.run_tests("cuda", "test_a"))
    part.run(part, Check(tmp_path, MACHINE, 100.0, []), 10)
    assert part.results["counts"] == {"passed": 1, "failed": 1}
    assert part.detail.endswith("no report, the last test was tests/test_a.py::test_three")
    assert part.failures[0] == "tests/test_a.py::test_two[cuda]"


# Its kernels are tested on the emulator by all that is tested there.
@pytest.mark.devices("cpu", "cuda")
def test_subset_agrees_with_the_reference(device):
    kernels.exercise(str(device))
