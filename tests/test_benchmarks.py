"""The benchmarks' harness, and every workload and provider of the benchmarks, at tiny sizes on the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import itertools
import json
import math
import random
import sys
import types
from pathlib import Path

import fresh_python
import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import corpus
import cpu
import gpu
import harness
import linear
import long_run
import medians
import plot
import regimes
import train_step
import workloads

from pdl_ext import functional
from pdl_ext.engine import linear as engine
from pdl_ext.engine.ops import _C

pytestmark = pytest.mark.slow
SIZES = gpu.Sizes(
    rows=12,
    few_rows=(1,),
    vocab_sizes=(67, 40),
    tokens=3000,
    histogram_vocab_sizes=(300, 70_000),
    few_tokens=500,
    table=300,
    tiny_rows=4,
    tiny_vocab_size=37,
    tiny_calls=3,
    linear=(9, 8, 40),
    copy_bytes=2**16,
)
CPU_SIZES = cpu.Sizes(
    elements=500,
    vocab_sizes=(67, 40),
    tokens=3000,
    few_tokens=1000,
    step_tokens=50,
    histogram_vocab_size=300,
    table=300,
    tiny_rows=4,
    tiny_vocab_size=37,
    tiny_calls=3,
    growth_rows=(1, 3),
    growth_vocab_size=40,
    growth_vocab_sizes=(5, 50),
    growth_fixed_rows=4,
    linear=(9, 8, 40),
    small_linear=(5, 8, 30),
    growth_linear=((2, 8, 40), (4, 8, 40)),
    copy_bytes=2**16,
)
STEP_SIZES = train_step.Sizes(
    vocab_size=50, width=8, heads=2, layers=2, sequences=3, length=7, batches=2, copy_bytes=2**16
)
LONG_SIZES = train_step.Sizes(vocab_size=50, width=8, heads=2, layers=2, sequences=3, length=7)
BRIEF = harness.Protocol(warm_up=0.0, least_rounds=2, most_rounds=3, seconds=0.0)
ABSENT = dict.fromkeys(gpu.PEERS, "absent")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def clock(monkeypatch):
    # Collecting garbage for each provider would take most of the time.
    monkeypatch.setattr(harness.HostClock, "release", lambda self: None)
    # Small enough for a few buffers of each input, so that they rotate.
    return harness.HostClock(cache_bytes=2000)


@pytest.fixture
def compiled_without_a_compiler(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def provider(name="mine", call=lambda i: i, error=lambda result: 0.0, **more):
    return harness.Provider(name, call, error, **more)


def workload(*providers, limit=0.1, least_bytes=1000, calls=1, items=0):
    return harness.Workload("work", providers, limit, least_bytes, calls, items)


def report_of(folder):
    return harness.Report(folder, "Title", {"device": "none"}, BRIEF)


def strict_json(path):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


class TestGpuPlan:
    def test_every_workload_and_provider(self, clock, tmp_path, monkeypatch, compiled_without_a_compiler):
        monkeypatch.setattr(gpu, "installed_peers", lambda: ABSENT)
        report = gpu.benchmark(clock, SIZES, tmp_path, budget=600, protocol=BRIEF)
        assert report.finished
        assert report.failures == {}
        assert report.left_out == []
        assert [row for row in report.rows if row.failure or row.wall is None] == []
        assert all(row.error <= row.limit for row in report.rows)
        at_once = {row.provider for row in report.rows if row.workload.endswith(": at once, in place")}
        assert at_once == {"pdl_ext, in place"}
        names = [name for name, _ in itertools.groupby(row.workload for row in report.rows)]
        assert len(set(names)) == len(names)
        data = strict_json(tmp_path / "benchmark.json")
        assert len(data["rows"]) == len(report.rows)
        assert data["about"]["liger-kernel"] == "absent"
        assert data["copy"]["bytes_per_second"] > 0
        assert (tmp_path / "benchmark.md").read_text().count("\n| ") == 2 + len(report.rows)

    def test_the_compiler_takes_part_in_the_first_groups(self, clock, compiled_without_a_compiler):
        first, *others = gpu.plan(clock, SIZES, compile_groups=1)
        compiled = [
            any("compiled" in provider.name for workload in group.workloads() for provider in workload.providers)
            for group in (first, *others)
        ]
        assert compiled == [True] + [False] * len(others)


class TestWorkloads:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("wrong", [None, "element", "columns", "factor", "ignored row"])
    def test_what_is_wrong_anywhere_is_seen(self, clock, wrong, dtype):
        inputs = workloads.LossInputs(clock, 21, 3000, dtype, peaked=False, ignored=0.1)
        inputs.targets[0][7] = workloads.IGNORED
        loss, gradient = (result.clone() for result in inputs.truth(True))
        if wrong == "element":
            gradient[20, 2999] += gradient[20].abs().median() * 10
        elif wrong == "columns":
            gradient[9, 1000:1300] = 0
        elif wrong == "factor":
            # What the largest element hides: a sixteenth off the targets alone.
            gradient[gradient > 0] *= 1.0625
        elif wrong:
            gradient[7, 5] = gradient.abs().max() / 10
        error = inputs.error((loss.float(), gradient.to(dtype)), True)
        assert (error <= workloads.loss_limit(dtype)) == (wrong is None)

    def test_what_float16_rounds_to_zero_is_not_wrong(self, clock):
        inputs = workloads.LossInputs(clock, 64, 8000, torch.float16, peaked=False, ignored=0.0)
        loss, gradient = inputs.truth(True)
        # As small as those of 8,192 rows with V = 32,000.
        inputs._truths[True] = (loss, gradient / 500)
        rounded = (gradient / 500).to(torch.float16)
        assert (rounded == 0).float().mean() > 0.9
        assert inputs.error((loss.float(), rounded), True) <= workloads.loss_limit(torch.float16)
        rounded[3] *= 2
        assert inputs.error((loss.float(), rounded), True) > workloads.loss_limit(torch.float16)

    @pytest.mark.parametrize("vocab_size", [3000, 131_072])
    def test_what_eager_pytorch_rounds_is_not_wrong(self, clock, vocab_size):
        inputs = workloads.LossInputs(clock, 5, vocab_size, torch.bfloat16, peaked=False, ignored=0.0)
        (eager,) = workloads.pytorch_functions(inputs.weight, torch.bfloat16, compiled=False)
        provider = workloads.loss_provider(inputs, eager, workloads.forward_and_backward)
        workload = harness.Workload("work", [provider], workloads.loss_limit(torch.bfloat16), least_bytes=0)
        (row,) = harness.measure(workload, clock, BRIEF)
        assert row.failure == ""
        assert row.limit == 8 * torch.finfo(torch.bfloat16).eps

    def test_only_what_is_ours_may_fail_a_run(self, tmp_path):
        report = report_of(tmp_path)
        assert workloads.failures(report) == ["nothing of pdl_ext was measured"]
        report.rows = [harness.Row("work", name, "", 0, 0.0) for name in ("pdl_ext", "PDLLoss, online", "peer")]
        assert workloads.failures(report) == []
        for each in report.rows:
            each.failure = "broken"
        report.failures["group"] = "out of memory"
        assert workloads.failures(report) == [
            "work, pdl_ext: broken",
            "work, PDLLoss, online: broken",
            "group: out of memory",
        ]


class TestLinear:
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("part", [None, 0, 1, 2], ids=["right", "loss", "hidden", "classifier"])
    def test_a_wrong_result_is_seen(self, clock, weighted, part):
        inputs = linear.LinearInputs(clock, 21, 8, 40, torch.float32)
        weight = inputs.weight if weighted else None
        loss = F.cross_entropy(inputs.hidden @ inputs.classifier.t(), inputs.targets, weight)
        result = [loss.detach(), *torch.autograd.grad(loss, (inputs.hidden, inputs.classifier))]
        if part is not None:
            result[part] = result[part] * 1.01
        assert (inputs.error(tuple(result), weighted) < 1e-5) == (part is None)
        assert inputs.error(tuple(result), not weighted) > 0.01

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_the_products_alone_take_our_slabs_and_are_checked(self, clock, monkeypatch, dtype):
        inputs = linear.LinearInputs(clock, 300, 8, 40, dtype)
        monkeypatch.setitem(engine._MAX_CHUNK_BYTES, "cpu", 1)
        taken = []
        ranges = engine._ranges
        monkeypatch.setattr(engine, "_ranges", lambda *args: taken.append(ranges(*args)) or taken[-1])
        functional.linear_pdl_loss(inputs.hidden, inputs.classifier, inputs.targets)
        ours = taken[0]
        taken.clear()
        products = linear.products_provider(inputs)
        assert taken == [ours]
        assert len(ours) == 3
        result = products.call(0)
        limit = workloads.loss_limit(dtype)
        assert products.error(result) <= limit
        for part in range(2):
            wrong = list(result)
            wrong[part] = wrong[part] * (1 + 2 * limit)
            assert products.error(tuple(wrong)) > limit

    @pytest.mark.parametrize(
        ("version", "said"),
        [
            ("1.16.0", "1.16.0"),
            ("2.0.dev1", "2.0.dev1"),
            ("1.15.3", "1.15.3, too old: its head runs on a CPU from 1.16 on"),
            ("absent", "absent"),
        ],
    )
    def test_a_peer_that_is_missing_is_told(self, monkeypatch, version, said):
        monkeypatch.setattr(harness, "version_of", lambda package, module: version)
        assert linear.cpu_peers()["TRL"] == said
        assert linear._has_trl_head() == (said == version != "absent")
        monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
        assert linear.cpu_peers()["F.linear_cross_entropy"] == "not in this PyTorch"


class TestRegimes:
    @pytest.mark.parametrize(("regime", "faults"), [(regimes.KEPT, 32769), (regimes.FRESH, 0)])
    def test_a_regime_that_malloc_does_not_have_is_told(self, clock, tmp_path, monkeypatch, regime, faults):
        monkeypatch.setattr(regimes, "page_faults", lambda: faults)
        report, why = cpu.benchmark(clock, cpu.plan(clock, CPU_SIZES), tmp_path, regime, 600, 2**16, BRIEF)
        assert why.startswith("not available: the malloc of ")
        assert report.rows == []
        data = strict_json(tmp_path / "benchmark.json")
        assert data["about"]["memory"] == f"{regimes.NAMES[regime]}: {why}"
        assert data["finished"]
        assert f"- memory: {regimes.NAMES[regime]}: {why}\n" in (tmp_path / "benchmark.md").read_text()

    def test_a_process_for_each(self, tmp_path, monkeypatch):
        # Also where the tests themselves run in one of them.
        monkeypatch.setattr(regimes.os, "environ", dict(regimes.os.environ) | regimes.VARIABLES[regimes.KEPT])
        assert [regimes.is_told(regime) for regime in regimes.NAMES] == [False, True]
        done = fresh_python.run(cpu.__file__, "--only", "step of the module", "--output", tmp_path, check=True)
        about = {regime: strict_json(tmp_path / regime / "benchmark.json")["about"] for regime in regimes.NAMES}
        if "not available" in done.stdout:
            pytest.skip(done.stdout)
        faults = [about[regime]["page_faults_of_a_new_tensor_of_128_MiB"] for regime in regimes.NAMES]
        assert faults[0] >= 64 > regimes.FEW_FAULTS > faults[1]
        assert [about[regime]["memory"] for regime in regimes.NAMES] == ["fresh pages", "pages kept"]
        assert "MALLOC" not in about[regimes.FRESH]["malloc"]
        assert done.stdout.count("step of the module") >= 2

    def test_both_side_by_side(self):
        def rows(*seconds):
            names = ("pdl_ext", "F.cross_entropy", cpu.COPY)
            for name, median in zip(names, seconds, strict=True):
                times = harness.Times(median, median, median, 3) if median else None
                yield harness.Row("loss float32 [2, 3]", name, "", 0, 0.0, wall=times)

        others = [harness.Row("histogram", "pdl_ext", "", 0, 0.0, wall=harness.Times(1.0, 1.0, 1.0, 3))]
        table = cpu.side_by_side(
            {
                regimes.FRESH: [[*rows(0.002, 0.012, 0.001), *others], rows(0.003, 0.012, 0.001), rows(0.001, 0.02, 0)],
                regimes.KEPT: [rows(0.001, 0.0025, 0)],
            }
        )
        assert table[1].startswith("Each cell: fresh pages / pages kept. ")
        assert table[3:] == [
            "| workload | provider | ms | F.cross_entropy | copy of the logits |",
            "| --- | --- | --- | --- | --- |",
            "| loss float32 [2, 3] | pdl_ext | 2 / 1 | 6 / 2.5 | 2.5 / none |",
        ]


class TestMedians:
    """The tables of pages."""

    def test_pages_quote_their_results(self):
        for page in (harness.ROOT / "docs").glob("*.md"):
            text = page.read_text()
            assert medians.filled(text) == text, page

    def test_table_of_several_runs(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(harness, "ROOT", tmp_path)
        for run, seconds in enumerate((0.001, 0.003, 0.002), 1):
            for regime in regimes.NAMES:
                report = report_of(tmp_path / f"run-{run}" / regime)
                times = harness.Times(seconds, seconds, seconds, 3)
                report.rows = [harness.Row("loss float32 [2, 3]", "pdl_ext", "", 0, 0.0, wall=times)]
                report.write()
        page = tmp_path / "page.md"
        before = "# Page\n\n<!-- medians of loss: run-1 run-2 run-3 -->\nold\n<!-- end of medians -->\n\nMore.\n"
        page.write_text(before)
        monkeypatch.setattr(sys, "argv", ["medians.py", str(page), "--check"])
        assert medians.main() == 1
        assert page.read_text() == before
        assert "medians.py" in capsys.readouterr().out
        monkeypatch.setattr(sys, "argv", ["medians.py", str(page)])
        assert medians.main() == 0
        assert "| loss float32 [2, 3] | pdl_ext | 2 / 2 |\n" in page.read_text()
        assert page.read_text().startswith("# Page\n\n<!-- medians of loss: run-1 run-2 run-3 -->\n")
        assert page.read_text().endswith("\n<!-- end of medians -->\n\nMore.\n")
        monkeypatch.setattr(sys, "argv", ["medians.py", str(page), "--check"])
        assert medians.main() == 0


class TestCpuPlan:
    def test_every_workload_and_provider(self, clock, tmp_path, monkeypatch, compiled_without_a_compiler):
        monkeypatch.setattr(regimes, "page_faults", lambda: 0)
        plan = cpu.plan(clock, CPU_SIZES)
        report, why = cpu.benchmark(clock, plan, tmp_path, regimes.KEPT, 600, CPU_SIZES.copy_bytes, BRIEF)
        assert why == ""
        assert report.finished
        assert (report.failures, report.left_out) == ({}, [])
        assert [row for row in report.rows if row.failure or row.wall is None] == []
        assert all(row.error <= row.limit for row in report.rows)
        assert harness.read_rows(tmp_path / "benchmark.json") == report.rows
        names = [name for name, _ in itertools.groupby(row.workload for row in report.rows)]
        assert len(set(names)) == len(names)
        assert report.rows[0].seconds_per_item == report.rows[0].wall.median / (8 * 67)

        data = strict_json(tmp_path / "benchmark.json")
        assert data["about"]["instructions"] == _C.cpu_capability()
        assert data["about"]["cache_bytes"] == 2000
        assert "kernel" not in (tmp_path / "benchmark.md").read_text()
        # The names are those that the picture is drawn of.
        times = plot.medians(data)
        assert times.keys() == set(itertools.product(plot.COLOURS, (67, 40)))
        assert all({*plot.OURS, *plot.PEERS} < of.keys() for of in times.values())
        table = cpu.ratios(report.rows)
        assert sum(line.startswith("  pdl_ext, in place ") for line in table) == 8
        of_linear = [name for name in names if name.startswith("linear")]
        assert sum(" times the three products alone" in line for line in table) == len(of_linear)
        # And a smaller one where PyTorch has but loops for it.
        assert len(of_linear) == 6 + (not harness.has_bfloat16_products())
        heads = {row.provider for row in report.rows if row.workload.startswith("linear float32")}
        assert ("TRL's head" in heads) == linear._has_trl_head()
        assert ("F.linear_cross_entropy" in heads) == hasattr(F, "linear_cross_entropy")
        undifferentiated = [row.provider for row in report.rows if row.workload.startswith("never differentiated")]
        assert undifferentiated == 2 * ["pdl_ext, no_grad", "pdl_ext, no backward", "pdl_ext, whole step"]
        assert {dtype for dtype, _, _ in plot.speed_ups(times, "F.cross_entropy")} == set(plot.COLOURS)

    def test_command(self, clock, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(harness, "HostClock", lambda: clock)
        monkeypatch.setattr(cpu, "Sizes", lambda: CPU_SIZES)
        monkeypatch.setattr(harness, "ROOT", tmp_path)
        monkeypatch.setattr(harness, "machine", lambda _: {"device": "AMD (R) 9", "date": "2030-01-02T03"})
        monkeypatch.setattr(regimes, "page_faults", lambda: 0)
        monkeypatch.setattr(regimes, "is_told", lambda regime: True)
        monkeypatch.setattr(sys, "argv", ["cpu.py", "--only", "token weights", "--regime", "kept", "--budget", "60"])
        assert cpu.main() == 0
        assert capsys.readouterr().out.splitlines()[-2:-1] == ["token weights, V 300"]
        folder = tmp_path / "benchmarks" / "results" / "cpu-amd-r-9-2030-01-02" / "kept"
        assert len(strict_json(folder / "benchmark.json")["rows"]) == 2
        # Peers that take hours get a smaller problem.
        for fast, shapes in ((True, ["[9, 8] x 40"]), (False, ["[9, 8] x 40", "[5, 8] x 30"])):
            monkeypatch.setattr(harness, "has_bfloat16_products", lambda fast=fast: fast)
            groups = cpu.chosen(cpu.plan(clock, CPU_SIZES), ["linear bfloat16"])
            workloads = [workload for group in groups for workload in group.workloads()]
            assert [workload.name for workload in workloads] == [f"linear bfloat16 {shape}" for shape in shapes]
            assert [len(workload.providers) > 2 for workload in workloads] == [fast, True][: len(workloads)]
        capsys.readouterr()
        monkeypatch.setattr(regimes, "page_faults", lambda: 32769)
        assert cpu.main() == 0
        assert capsys.readouterr().out.startswith("pages kept: not available: ")
        monkeypatch.setattr(sys, "argv", ["cpu.py", "--only", "wieghts"])
        assert cpu.main() == 2
        assert "'wieghts'" in capsys.readouterr().err

    @pytest.mark.parametrize("make", [cpu._count_by_numpy, cpu._count_by_counter, cpu._count_on_one_thread])
    def test_wrong_counts_are_seen(self, make):
        ids = torch.tensor([3, 1, 3], dtype=torch.int32)
        right, wrong = torch.tensor([0, 1, 0, 2]).double(), torch.tensor([0, 2, 0, 1]).double()
        for truth, error in ((right, 0.0), (wrong, 0.5)):
            counter = make([ids], 4, functools.partial(harness.relative_error, truth=truth))
            assert counter.error(counter.call(0)) == error


class TestCorpus:
    def test_every_format(self, clock, tmp_path, monkeypatch):
        pytest.importorskip("pyarrow")
        monkeypatch.setattr(harness, "HostClock", lambda: clock)
        monkeypatch.setattr(corpus, "PROTOCOL", BRIEF)
        arguments = ["corpus.py", "--bytes", "200000", "--folder", str(tmp_path), "--output", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", arguments)
        assert corpus.main() == 0
        rows = strict_json(tmp_path / "out" / "benchmark.json")["rows"]
        assert [row["provider"] for row in rows if row["provider"].startswith("pdl_ext")] == [
            "pdl_ext, raw",
            "pdl_ext, npy",
            "pdl_ext, Megatron",
            "pdl_ext, raw",
            "pdl_ext, Parquet",
        ]
        peers = [name for name, (module, _) in corpus.PEERS.items() if importlib.util.find_spec(module)]
        assert [row["failure"] for row in rows] == [""] * (11 + 2 * len(peers))
        assert [row["provider"] for row in rows if row["provider"].endswith(", Parquet")][1:] == [
            f"{name}, Parquet" for name in peers
        ]
        # What it wrote to count is deleted.
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize("name", corpus.PEERS)
    def test_peers_count(self, tmp_path, name):
        module, count = corpus.PEERS[name]
        pytest.importorskip("pyarrow")
        pytest.importorskip(module)
        ids = corpus.zipf(2 * corpus.LENGTH)
        truth = torch.from_numpy(np.bincount(ids, minlength=corpus.VOCAB_SIZE))
        folder = tmp_path / "it's"
        folder.mkdir()
        for source in ({"ids": ids}, {"path": corpus.write_parquet(folder, ids)}):
            counter = count(**source)
            assert counter(0).equal(truth)
            assert counter(0).equal(truth)


class TestLongRun:
    @pytest.fixture
    def ids(self):
        return torch.randint(50, (200,), generator=torch.Generator().manual_seed(0))

    def test_a_resume_changes_nothing(self, ids, tmp_path):
        run = long_run.Run(long_run.OURS, 1, 9, ids, LONG_SIZES)
        whole, counted = long_run.train(run, 0, 9, tmp_path / "none")
        assert not (tmp_path / "none").exists()
        before, _ = long_run.train(run, 0, 5, tmp_path / "state")
        after, counted_after = long_run.in_new_process(long_run.train, run, 5, 9, tmp_path / "state")
        assert before + after == whole
        assert counted == counted_after == 9 * 3 * 7
        theirs, _ = long_run.train(dataclasses.replace(run, loss=long_run.CROSS_ENTROPY), 0, 9, tmp_path / "none")
        assert theirs == pytest.approx(whole, abs=0.01)
        other, _ = long_run.train(dataclasses.replace(run, seed=2), 0, 9, tmp_path / "none")
        assert max(abs(a - b) for a, b in zip(whole, other, strict=True)) > 0.01

    def test_products_in_float32_are_those_of_bfloat16(self):
        torch.manual_seed(0)
        model = train_step.LanguageModel(LONG_SIZES)
        tokens = torch.randint(50, (3, 7))

        def results(products):
            with products:
                with torch.autocast("cpu", torch.bfloat16):
                    logits = model(tokens)
                return logits, *torch.autograd.grad(logits.float().square().sum(), model.parameters())

        for wide, plain in zip(results(long_run._ProductsInFloat32()), results(contextlib.nullcontext()), strict=True):
            assert wide.dtype == plain.dtype
            assert harness.relative_error(wide.double(), plain.double()) < 0.05

    def test_command(self, ids, tmp_path, monkeypatch, capsys):
        pytest.importorskip("matplotlib")
        monkeypatch.setattr(long_run, "verses", lambda vocab_size: ids)
        monkeypatch.setattr(long_run, "SIZES", LONG_SIZES)
        monkeypatch.setattr(long_run, "in_new_process", lambda function, *arguments: function(*arguments))
        monkeypatch.setattr(sys, "argv", ["long_run.py", "--steps", "8", "--seeds", "2", "--output", str(tmp_path)])
        assert long_run.main() == 0
        data = strict_json(tmp_path / "long-run.json")
        assert data["stays"]
        assert data["resumed_at"] == 4
        assert {name: [len(of) for of in by] for name, by in data["losses"].items()} == {
            long_run.CROSS_ENTROPY: [8, 8],
            long_run.OURS: [8, 8],
        }
        assert (tmp_path / "long-run.png").stat().st_size > 1000
        assert "stays on the curve" in capsys.readouterr().out
        # A resume that forgets what was counted is seen.
        train = long_run.train
        monkeypatch.setattr(long_run, "train", lambda *args: (train(*args)[0], 84))
        assert long_run.main() == 1
        assert "leaves the curve" in capsys.readouterr().out

    @pytest.mark.parametrize(("ours", "stays"), [(1.5, True), (2.5, False), (math.nan, False)])
    def test_what_leaves_the_spread_fails(self, ours, stays):
        theirs = [[3.0] * 10, [3.0 + 2**0.5] * 10]
        found = long_run.compared(
            {long_run.CROSS_ENTROPY: theirs, long_run.OURS: [theirs[0], [theirs[1][0] - ours] * 10]}
        )
        assert found["deviation_of_seeds"] == pytest.approx(1.0)
        assert found["stays"] == stays
        if not math.isnan(ours):
            assert found["largest_distance_in_deviations"] == pytest.approx(ours)


class TestTrainStep:
    def test_every_loss(self, clock, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(train_step, "Sizes", lambda: STEP_SIZES)
        monkeypatch.setattr(harness, "HostClock", lambda: clock)
        monkeypatch.setattr(train_step.benchmark, "__defaults__", (BRIEF,))
        monkeypatch.setattr(sys, "argv", ["train_step.py", "--output", str(tmp_path)])
        assert train_step.main() == 0
        rows = strict_json(tmp_path / "benchmark.json")["rows"]
        assert [row["provider"] for row in rows] == [
            "F.cross_entropy",
            "PDLLoss of counts",
            "PDLLoss, online",
            "PDLLoss, online, in place",
        ]
        assert all(row["wall"]["median"] > 0 and row["error"] <= 1e-5 and row["failure"] == "" for row in rows)
        assert [row["wall_ratio"] is None for row in rows] == [True, False, False, False]
        assert [row["bytes_per_second"] for row in rows] == [None] * 4
        assert "| PDLLoss, online |" in capsys.readouterr().out

    def test_another_loss_is_seen(self, clock):
        (step,) = train_step.step_group(clock, STEP_SIZES).workloads()
        plain, counted, online, in_place = step.providers
        result = online.call(0)
        assert online.error(result) <= 1e-5
        assert in_place.error(result) <= 1e-5
        assert min(plain.error(result), counted.error(result)) > step.limit


class TestMeasure:
    def test_providers_take_turns(self, clock):
        calls = []
        first, second = (provider(name, lambda i, name=name: calls.append((name, i))) for name in "ab")
        protocol = dataclasses.replace(BRIEF, least_rounds=8, most_rounds=8)
        random.seed(0)
        rows = harness.measure(workload(first, second, calls=2), clock, protocol)
        assert [row.wall.samples for row in rows] == [8, 8]
        rounds = [tuple(calls[i : i + 4]) for i in range(len(calls) - 32, len(calls), 4)]
        of_first, of_second = [("a", 0), ("a", 1)], [("b", 0), ("b", 1)]
        # None always follows the same one.
        assert set(rounds) == {(*of_first, *of_second), (*of_second, *of_first)}

    def test_figures(self):
        class Clock(harness.HostClock):
            def wall(self, work):
                work()
                return seconds[called[-1]].pop(0)

            def capture(self, work):
                return lambda: 0.5

        # Warm-up of either, then three turns of samples of two calls.
        seconds = {"mine": [9.0, 2.0, 4.0, 6.0], "other": [9.0, 4.0, 8.0, 12.0]}
        called = []
        protocol = harness.Protocol(warm_up=0.0, least_rounds=3, most_rounds=3, seconds=0.0)
        mine, other = harness.measure(
            workload(
                provider("mine", lambda _: called.append("mine")),
                provider("other", lambda _: called.append("other"), not_capturable="it waits"),
                calls=2,
                items=10,
            ),
            Clock(0),
            protocol,
            copy_rate=8000.0,
        )
        assert mine.wall == harness.Times(2.0, 1.4, 2.6, 3)
        assert mine.kernel.median == 0.25
        assert mine.bytes_per_second == 4000.0
        assert mine.share_of_copy == 0.5
        assert mine.wall_ratio is None
        assert other.wall_ratio == 2.0
        assert (other.kernel, other.kernel_ratio, other.no_kernel) == (None, None, "it waits")
        assert other.bytes_per_second == 250.0
        assert (mine.seconds_per_item, other.seconds_per_item) == (0.025, 0.4)

    def test_wrong_result_gets_no_time(self, clock):
        rows = harness.measure(
            workload(*(provider(error=lambda _, e=e: e) for e in (0.1, 0.2, math.nan))), clock, BRIEF
        )
        assert [row.wall is not None for row in rows] == [True, False, False]
        assert rows[1].failure == "wrong: off by 0.2 of the largest entry, above 0.1"
        assert rows[2].failure.startswith("wrong: off by nan")
        assert rows[2].error is None

    # In its first call, and in one that is measured.
    @pytest.mark.parametrize("survives", [0, 3])
    def test_failure_costs_its_own_row(self, clock, survives):
        calls = itertools.count()

        def fail(i):
            if next(calls) >= survives:
                raise torch.OutOfMemoryError("long")

        broken, sound = harness.measure(workload(provider("broken", fail), provider("sound")), clock, BRIEF)
        assert broken.failure == "out of memory"
        assert broken.wall is None
        assert sound.wall is not None
        assert sound.wall_ratio is None

    def test_failing_capture_leaves_the_wall_time(self):
        class Clock(harness.HostClock):
            def capture(self, work):
                raise RuntimeError("operation not permitted when stream is capturing")

        (row,) = harness.measure(workload(provider()), Clock(0), BRIEF)
        assert row.wall is not None
        assert row.no_kernel == "RuntimeError: operation not permitted when stream is capturing"

    def test_inputs_are_restored_before_each_sample(self):
        class Clock(harness.HostClock):
            def capture(self, work):
                def replay():
                    seen.append(state[0])
                    work()
                    return 1.0

                return replay

        state, seen = [0], []

        def call(i):
            state[0] += 1
            return state[0]

        one = provider(call=call, restore=lambda: state.__setitem__(0, 0), error=lambda result: result - 1.0)
        (row,) = harness.measure(workload(one), Clock(0), BRIEF)
        assert row.error == 0.0
        assert seen[1:] == [0] * row.kernel.samples

    def test_memory_that_is_free_does_not_hide_what_a_call_takes(self):
        code = "import harness; piece = lambda: bytearray(b'1') * 2**16; freed = [piece() for _ in range(1024)]; "
        # The heap cannot shrink below a piece that is kept.
        code += "kept = piece(); del freed; held = []; "
        code += "print(harness.HostClock(0).peak_bytes(lambda: held.extend(piece() for _ in range(1024))))"
        # In a process of its own, since memory that this one frees meanwhile would hide it as well.
        done = fresh_python.run("-c", code, env={"PYTHONPATH": str(Path(harness.__file__).parent)}, check=True)
        if done.stdout.strip() == "None":
            pytest.skip("the system does not tell")
        assert 48 * 2**20 <= int(done.stdout) < 128 * 2**20


class TestClockOfACard:
    @pytest.fixture
    def card(self, monkeypatch):
        """Stands in for torch.cuda: notes what is asked of it, and refuses what the real one would not take."""
        asked = []
        capture_signature = inspect.signature(torch.cuda.graph)

        @contextlib.contextmanager
        def graph(*args, **kwargs):
            arguments = capture_signature.bind(*args, **kwargs).arguments
            assert arguments["stream"] == "stream of cuda:0"
            asked.append("begin")
            yield
            asked.append("end")

        class Graph:
            def replay(self):
                asked.append("replay")

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self):
                asked.append("record")

            def synchronize(self):
                asked.append("wait")

            def elapsed_time(self, end):
                return 7.0

        replacements = {
            "graph": graph,
            "CUDAGraph": Graph,
            "Event": Event,
            "Stream": lambda device: f"stream of {device}",
            "stream": lambda stream: contextlib.nullcontext(),
            "synchronize": lambda: asked.append("synchronize"),
            "empty_cache": lambda: None,
            "memory_allocated": lambda: 100,
            "max_memory_allocated": lambda: 350,
            "reset_peak_memory_stats": lambda: asked.append("reset"),
            "get_device_properties": lambda device: types.SimpleNamespace(L2_cache_size=50),
        }
        for name, replacement in replacements.items():
            monkeypatch.setattr(torch.cuda, name, replacement)
        return asked

    def test_replays_a_capture_between_events(self, card):
        replay = harness.CudaClock(torch.device("cuda", 0)).capture(lambda: card.append("work"))
        assert replay() == 0.007
        assert card == ["begin", "work", "end", "record", "replay", "record", "wait"]

    def test_waits_for_the_device(self, card):
        clock = harness.CudaClock(torch.device("cuda", 0))
        assert clock.wall(lambda: card.append("work")) > 0
        assert card == ["synchronize", "work", "synchronize"]

    def test_measures(self, card):
        clock = harness.CudaClock(torch.device("cuda", 0))
        (row,) = harness.measure(workload(provider(), calls=2), clock, BRIEF)
        assert row.kernel.median == 0.0035
        assert row.wall.samples == row.kernel.samples == 2
        assert row.peak_bytes == 250
        assert harness.buffers_for(clock, 10) == 16


class TestRun:
    def test_group_that_fails_is_recorded(self, clock, tmp_path):
        def broken():
            yield workload(provider(error=lambda _: math.nan))
            raise torch.OutOfMemoryError("CUDA out of memory")

        groups = [harness.Group("large", broken), harness.Group("next", lambda: iter([workload(provider())]))]
        report = report_of(tmp_path)
        harness.run(groups, clock, report, 600, 2**10)
        data = strict_json(tmp_path / "benchmark.json")
        assert data["failures"] == {"large": "out of memory"}
        assert len(data["rows"]) == 2
        assert data["finished"]

    def test_what_was_measured_survives_an_end_in_between(self, clock, tmp_path):
        def ended():
            yield workload(provider("done"))
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            harness.run([harness.Group("group", ended)], clock, report_of(tmp_path), 600, 2**10)
        data = strict_json(tmp_path / "benchmark.json")
        assert [row["provider"] for row in data["rows"]] == ["done"]
        assert not data["finished"]
        assert "The run did not end." in (tmp_path / "benchmark.md").read_text()
