"""The benchmarks' harness, and every workload and provider of the benchmarks, at tiny sizes on the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.machinery
import inspect
import itertools
import json
import math
import random
import sys
import types
from pathlib import Path

import fresh_python
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import corpus
import cpu
import gpu
import harness
import linear
import plot
import train_step
import workloads

from pdl_ext.engine.ops import _C

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
    growth_linear=((2, 8, 40), (4, 8, 40)),
    copy_bytes=2**16,
)
STEP_SIZES = train_step.Sizes(
    vocab_size=50, width=8, heads=2, layers=2, sequences=3, length=7, batches=2, copy_bytes=2**16
)
BRIEF = harness.Protocol(warm_up=0.0, least_rounds=2, most_rounds=3, seconds=0.0)
# Of PyTorch.
OF_LINEAR = ["F.linear, F.cross_entropy", "F.linear, F.cross_entropy, compiled"]
OF_LINEAR += ["F.linear_cross_entropy"] * hasattr(F, "linear_cross_entropy")
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
        names = {row.provider for row in report.rows}
        assert names == {
            "pdl_ext",
            "pdl_ext, in place",
            "F.cross_entropy",
            "F.cross_entropy, compiled",
            "torch.bincount",
            "copy from pinned memory",
            "plain PyTorch",
            "PDLLoss",
            "PDLLoss, online",
            "pdl_ext, linear",
            *OF_LINEAR,
        }
        at_once = {row.provider for row in report.rows if row.workload.endswith(": at once, in place")}
        assert at_once == {"pdl_ext, in place"}
        names = [name for name, _ in itertools.groupby(row.workload for row in report.rows)]
        assert len(set(names)) == len(names)
        data = strict_json(tmp_path / "benchmark.json")
        assert len(data["rows"]) == len(report.rows)
        assert data["about"]["liger-kernel"] == "absent"
        assert data["copy"]["bytes_per_second"] > 0
        markdown = (tmp_path / "benchmark.md").read_text()
        assert "- flash-attn: absent" in markdown
        assert markdown.count("\n| ") == 2 + len(report.rows)
        assert "ratio, kernel" in markdown
        assert "no kernel time: it waits for the device" in markdown

    def test_least_bytes_leave_out_what_need_not_be_read(self, clock, compiled_without_a_compiler):
        group = gpu.loss_group(clock, SIZES.rows, 40, torch.bfloat16, ignored=0.3)
        least = [one.least_bytes for one in group.workloads()]
        ignored = int((workloads.LossInputs(clock, 12, 40, torch.bfloat16, False, 0.3).targets[0] == -100).sum())
        assert 0 < ignored < 12
        all_rows, read = 2 * 12 * 40, 2 * (12 - ignored) * 40
        assert least == [2 * read + all_rows, read + all_rows, read, read + all_rows]

    def test_peers_that_are_installed(self, clock, tmp_path, monkeypatch, compiled_without_a_compiler):
        """Stand-ins with the peers' signatures, of which two overwrite the logits, are called as the peers would be."""

        class Overwriting(torch.autograd.Function):
            @staticmethod
            def forward(ctx, logits, targets, weight):
                exact = logits.detach().float().requires_grad_()
                with torch.enable_grad():
                    loss = F.cross_entropy(exact, targets, weight=weight)
                (gradient,) = torch.autograd.grad(loss, exact)
                # As a kernel does, behind autograd's back.
                logits.detach().copy_(gradient)
                ctx.save_for_backward(logits.detach())
                return loss.detach()

            @staticmethod
            def backward(ctx, upstream):
                return upstream * ctx.saved_tensors[0], None, None

        def liger(weight=None):
            return lambda logits, targets: Overwriting.apply(logits, targets, weight)

        def quack(
            x, target, lse_partial=None, weight=None, ignore_index=-100, reduction="none", inplace_backward=False
        ):
            return F.cross_entropy(x.float(), target, weight=weight, reduction=reduction)

        def flash(ignore_index=-100, reduction="mean", inplace_backward=False):
            return lambda logits, targets: F.cross_entropy(logits.float(), targets)

        modules = {
            "liger_kernel": {},
            "liger_kernel.transformers": {"LigerCrossEntropyLoss": liger},
            "quack": {},
            "quack.cross_entropy": {"cross_entropy": quack},
            "flash_attn": {},
            "flash_attn.losses": {},
            "flash_attn.losses.cross_entropy": {"CrossEntropyLoss": flash},
        }
        for name, contents in modules.items():
            module = types.ModuleType(name)
            module.__dict__.update(contents)
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(gpu, "installed_peers", lambda: dict.fromkeys(gpu.PEERS, "1.0"))
        report = report_of(tmp_path)
        group = gpu.loss_group(clock, SIZES.rows, 40, torch.bfloat16, peaked=True, ignored=0.3)
        harness.run([group], clock, report, 600, 2**10)
        assert report.failures == {}
        assert [(row.provider, row.failure) for row in report.rows if row.failure] == []
        of_both = {row.provider: row for row in report.rows if row.workload.endswith("forward + backward")}
        assert of_both["flash-attn, in place"].note == "unweighted"
        assert of_both["quack-kernels"].note == ""
        assert of_both["liger-kernel"].no_kernel == "it waits for the device"
        forward = {row.provider for row in report.rows if row.workload.endswith(": forward")}
        assert forward == {"pdl_ext", "F.cross_entropy", "liger-kernel", "quack-kernels", "flash-attn"}

    def test_peer_that_cannot_be_imported_costs_its_rows_only(
        self, clock, tmp_path, monkeypatch, compiled_without_a_compiler
    ):
        for module in ("liger_kernel", "quack", "flash_attn"):
            monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setattr(gpu, "installed_peers", lambda: dict.fromkeys(gpu.PEERS, "1.0"))
        report = report_of(tmp_path)
        harness.run([gpu.loss_group(clock, SIZES.rows, 40, torch.float32)], clock, report, 600, 2**10)
        failed = {row.provider for row in report.rows if row.failure}
        assert failed == {
            "liger-kernel",
            "quack-kernels",
            "quack-kernels, in place",
            "flash-attn",
            "flash-attn, in place",
        }
        assert all("Error" in row.failure for row in report.rows if row.provider in failed)

    def test_peers_here(self):
        assert set(gpu.installed_peers()) == {"liger-kernel", "quack-kernels", "flash-attn", "cut-cross-entropy"}

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
    def test_without_a_card(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path / "results")])
        assert gpu.main() == 2
        assert "there is no CUDA device" in capsys.readouterr().err
        assert not (tmp_path / "results").exists()


class TestWorkloads:
    def test_ids(self, clock):
        zipf = torch.bincount(workloads.zipf_ids(clock, 100_000, 50), minlength=50)
        expected = 100_000 / torch.arange(1, 51) / (1 / torch.arange(1, 51)).sum()
        torch.testing.assert_close(zipf.double(), expected.double(), rtol=0.2, atol=0)
        scattered = torch.bincount(workloads.scattered_ids(clock, 100_000, 50), minlength=50)
        assert torch.equal(scattered.sort(descending=True).values, zipf.sort(descending=True).values)
        assert not torch.equal(scattered, zipf)
        assert workloads.equal_ids(clock, 10, 50).unique().numel() == 1
        assert workloads.uniform_ids(clock, 1000, 50).unique().numel() == 50
        ascending = workloads.sorted_ids(clock, 100_000, 50)
        assert bool((ascending.diff() >= 0).all())
        assert torch.equal(torch.bincount(ascending, minlength=50), zipf)
        assert {make(clock, 10, 50).dtype for make in workloads.IDS.values()} == {torch.int32}

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

    def test_peers_that_are_installed(self, clock, tmp_path, monkeypatch, compiled_without_a_compiler):
        """Stand-ins with the peers' signatures are called as the peers would be."""

        def liger(ce_weight=None):
            return lambda lin_weight, _input, target, bias=None: F.cross_entropy(
                _input @ lin_weight.t(), target, ce_weight
            )

        def cut(e, c, targets, bias=None):
            return F.cross_entropy(e @ c.t(), targets)

        def quack(x, weight, target, chunk_size=4096):
            return F.cross_entropy(x @ weight.t(), target)

        modules = {
            "liger_kernel": {},
            "liger_kernel.transformers": {"LigerFusedLinearCrossEntropyLoss": liger},
            "cut_cross_entropy": {"linear_cross_entropy": cut},
            "quack": {},
            "quack.linear_cross_entropy": {"chunked_linear_cross_entropy": quack},
        }
        for name, contents in modules.items():
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            module.__dict__.update(contents)
            monkeypatch.setitem(sys.modules, name, module)
        report = report_of(tmp_path)
        harness.run([linear.linear_group(clock, "linear", [(9, 8, 40)], torch.float32)], clock, report, 600, 2**10)
        assert [(row.provider, row.failure) for row in report.rows if row.failure] == []
        notes = {row.provider: row.note for row in report.rows[-3:]}
        assert notes == {
            "liger-kernel, linear": "",
            "cut-cross-entropy": "unweighted",
            "quack-kernels, linear": "unweighted",
        }
        for row in report.rows:
            assert row.flop_per_second * row.wall.median == pytest.approx(6 * 9 * 8 * 40)


class TestCpuPlan:
    def test_every_workload_and_provider(self, clock, tmp_path, compiled_without_a_compiler):
        report = cpu.benchmark(clock, cpu.plan(clock, CPU_SIZES), tmp_path, 600, CPU_SIZES.copy_bytes, BRIEF)
        assert report.finished
        assert (report.failures, report.left_out) == ({}, [])
        assert [row for row in report.rows if row.failure or row.wall is None] == []
        assert all(row.error <= row.limit for row in report.rows)
        ours = ["pdl_ext", "pdl_ext, in place"]
        of_losses = [*ours, "F.cross_entropy", "F.cross_entropy, compiled", "copy of the logits"]
        counters = ["pdl_ext", "pdl_ext, 1 thread", "np.bincount", "torch.bincount"]
        expected = {f"loss {dtype} [{shape}]": of_losses for shape in ("8, 67", "13, 40") for dtype in plot.COLOURS}
        expected |= {
            f"histogram of 3000 ids, V 300, {kind}, {dtype}": counters
            for kind in workloads.IDS
            for dtype in ("uint16", "int64", "int32")
        }
        without_threads = ["pdl_ext", "np.bincount", "torch.bincount"]
        expected["histogram of 50 ids, V 300, Zipf, int64"] = without_threads
        expected["histogram of 1000 ids, V 300, Zipf, int64"] = [*without_threads, "collections.Counter"]
        expected["token weights, V 300"] = ["pdl_ext", "plain PyTorch"]
        expected["step of the module, float32 [4, 37]"] = ["PDLLoss", "PDLLoss, online", "pdl_ext", "F.cross_entropy"]
        for dtype in plot.COLOURS:
            expected[f"linear {dtype} [9, 8] x 40"] = ["pdl_ext, linear", *OF_LINEAR]
            expected |= {f"linear, growth with N {dtype} [{n}, 8] x 40": ["pdl_ext, linear"] for n in (2, 4)}
        for axis, shapes in (("N", ("1, 40", "3, 40")), ("V", ("4, 5", "4, 50"))):
            growth = {f"growth with {axis}: loss float32 [{shape}]": [*ours, "copy of the logits"] for shape in shapes}
            expected |= growth
        by_workload = itertools.groupby(report.rows, lambda row: row.workload)
        assert {name: [row.provider for row in rows] for name, rows in by_workload} == expected
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

    def test_a_loss_reads_and_writes_the_logits_once(self, clock, compiled_without_a_compiler):
        (one,) = cpu.loss_group(clock, 500, 67, torch.bfloat16).workloads()
        assert (one.name, one.items, one.least_bytes) == ("loss bfloat16 [8, 67]", 8 * 67, 2 * 2 * 8 * 67)
        copied = one.providers[-1]
        assert copied.error(copied.call(0)) == 0.0
        assert copied.error(copied.call(1)) == 1.0

    @pytest.mark.parametrize("make", [cpu._count_by_numpy, cpu._count_by_counter, cpu._count_on_one_thread])
    def test_wrong_counts_are_seen(self, make):
        ids = torch.tensor([3, 1, 3], dtype=torch.int32)
        right, wrong = torch.tensor([0, 1, 0, 2]).double(), torch.tensor([0, 2, 0, 1]).double()
        for truth, error in ((right, 0.0), (wrong, 0.5)):
            counter = make([ids], 4, functools.partial(harness.relative_error, truth=truth))
            assert counter.error(counter.call(0)) == error

    def test_one_thread(self, monkeypatch):
        seen = []

        def call(i):
            seen.append(torch.get_num_threads())
            raise IndexError

        monkeypatch.setattr(cpu, "count_by_pdl_ext", lambda *_: provider(call=call))
        torch.set_num_threads(2)
        with pytest.raises(IndexError):
            cpu._count_on_one_thread([], 4, lambda counts: 0.0).call(0)
        assert (seen, torch.get_num_threads()) == ([1], 2)

    def test_ratios(self):
        def row(workload, provider, seconds=None, **more):
            wall = None if seconds is None else harness.Times(seconds, seconds, seconds, 5)
            return harness.Row(workload, provider, "", 0, 0.0, wall=wall, **more)

        rows = [
            row("loss", "pdl_ext", 0.004, seconds_per_item=2e-9, peak_bytes=3 * 2**20),
            row("loss", "pdl_ext, in place", 0.002),
            row("loss", "F.cross_entropy", 0.010),
            row("loss", "F.cross_entropy, compiled", failure="no compiler"),
            row("loss", "copy of the logits", 0.001),
            row("step", "PDLLoss", failure="wrong"),
            row("step", "F.cross_entropy", 0.010),
        ]
        assert cpu.ratios(rows)[2:] == [
            "loss",
            "  pdl_ext            4 ms, 2 ns an item, peak 3 MiB; pdl_ext, in place 0.50; F.cross_entropy 2.50; "
            "F.cross_entropy, compiled: none; 4.00 times a copy of the logits",
            "  pdl_ext, in place  2 ms; F.cross_entropy 5.00; F.cross_entropy, compiled: none; "
            "2.00 times a copy of the logits",
            "step",
            "  PDLLoss            failed; F.cross_entropy: none",
        ]

    def test_words_choose_groups(self, clock):
        groups = cpu.plan(clock, CPU_SIZES)
        assert cpu.chosen(groups, []) == groups
        names = [group.name for group in cpu.chosen(groups, ["token weights", "float32 [8"])]
        assert names == ["loss float32 [8, 67]", "token weights, V 300"]
        with pytest.raises(ValueError, match="no group has 'wieghts' in its name"):
            cpu.chosen(groups, ["token", "wieghts"])

    def test_command(self, clock, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(harness, "HostClock", lambda: clock)
        monkeypatch.setattr(cpu, "Sizes", lambda: CPU_SIZES)
        monkeypatch.setattr(harness, "ROOT", tmp_path)
        monkeypatch.setattr(harness, "machine", lambda _: {"device": "AMD (R) 9", "date": "2030-01-02T03"})
        monkeypatch.setattr(sys, "argv", ["cpu.py", "--only", "token weights", "--budget", "60"])
        assert cpu.main() == 0
        assert capsys.readouterr().out.splitlines()[-2:-1] == ["token weights, V 300"]
        folder = tmp_path / "benchmarks" / "results" / "cpu-amd-r-9-2030-01-02"
        assert len(strict_json(folder / "benchmark.json")["rows"]) == 2
        monkeypatch.setattr(sys, "argv", ["cpu.py", "--only", "wieghts"])
        assert cpu.main() == 2
        assert "'wieghts'" in capsys.readouterr().err


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
        assert [row["failure"] for row in rows] == [""] * 11
        # What it wrote to count is deleted.
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


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

    def test_steps_train(self, clock):
        (step,) = train_step.step_group(clock, dataclasses.replace(STEP_SIZES, batches=1)).workloads()
        for each in step.providers:
            losses = [float(each.call(i)[0]) for i in range(20)]
            assert losses[-1] < 0.99 * losses[0]

    def test_model_sees_no_later_token(self):
        model = train_step.LanguageModel(STEP_SIZES)
        tokens = torch.randint(49, (1, 7))
        later = tokens.clone()
        later[0, 4] = 49
        changed = (model(tokens) != model(later)).any(-1)[0]
        assert changed.tolist() == [False] * 4 + [True] * 3


class TestPlot:
    @pytest.fixture
    def results(self):
        seconds = {"pdl_ext": 2.0, "pdl_ext, in place": 1.0, "F.cross_entropy": 6.0, "F.cross_entropy, compiled": 3.0}
        rows = [
            {"workload": f"{prefix}loss {dtype} [9, {size}]", "provider": name, "wall": {"median": size * time}}
            for prefix, dtype, size in (
                ("", "float32", 40),
                ("", "float32", 67),
                ("", "bfloat16", 67),
                ("growth with N: ", "float32", 80),
            )
            for name, time in seconds.items()
        ]
        # One that failed.
        rows[3]["wall"] = None
        about = {"device": "a CPU", "threads": 2, "torch": "2.13", "date": "2030-01-02T03"}
        return {"about": about, "rows": rows}

    def test_speed_ups(self, results):
        times = plot.medians(results)
        assert times.keys() == {("float32", 40), ("float32", 67), ("bfloat16", 67)}
        assert list(plot.speed_ups(times, "F.cross_entropy")) == [
            ("float32", "pdl_ext", {40: 3.0, 67: 3.0}),
            ("float32", "pdl_ext, in place", {40: 6.0, 67: 6.0}),
            ("bfloat16", "pdl_ext", {67: 3.0}),
            ("bfloat16", "pdl_ext, in place", {67: 6.0}),
        ]
        compiled = list(plot.speed_ups(times, "F.cross_entropy, compiled"))
        assert compiled[1] == ("float32", "pdl_ext, in place", {67: 3.0})

    def command(self, monkeypatch, results, folder):
        (folder / "benchmark.json").write_text(json.dumps(results))
        arguments = [str(folder / "benchmark.json"), str(folder / "docs" / "speed.png")]
        monkeypatch.setattr(sys, "argv", ["plot.py", *arguments])
        return plot.main()

    def test_picture(self, results, tmp_path, monkeypatch):
        pyplot = pytest.importorskip("matplotlib.pyplot")
        figures = []
        monkeypatch.setattr(pyplot, "close", figures.append)
        assert self.command(monkeypatch, results, tmp_path) == 0
        assert (tmp_path / "docs" / "speed.png").read_bytes().startswith(b"\x89PNG")
        over_eager, over_compiled = figures[0].axes
        assert [bar.get_height() for bar in over_eager.patches] == [3.0, 3.0, 6.0, 6.0, 3.0, 6.0]
        assert [bar.get_height() for bar in over_compiled.patches] == [1.5, 3.0, 1.5, 3.0]
        # No bar covers another, though one vocabulary has fewer.
        assert len({round(bar.get_x(), 6) for bar in over_eager.patches}) == 6
        assert [label.get_text() for label in over_eager.get_xticklabels()] == ["40", "67"]
        monkeypatch.undo()
        pyplot.close(figures[0])

    def test_without_matplotlib(self, results, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert self.command(monkeypatch, results, tmp_path) == 1
        assert "pip install matplotlib" in capsys.readouterr().err

    def test_results_without_losses(self, results, tmp_path, monkeypatch, capsys):
        pytest.importorskip("matplotlib")
        del results["rows"][:-4]
        assert self.command(monkeypatch, results, tmp_path) == 1
        assert "the results hold no times of pdl_ext's loss" in capsys.readouterr().err


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

    def test_figures_that_say_nothing_are_left_out(self, clock):
        (row,) = harness.measure(workload(provider(), least_bytes=0, items=0), clock, BRIEF, copy_rate=8000.0)
        assert (row.bytes_per_second, row.share_of_copy, row.seconds_per_item) == (None, None, None)

    def test_wrong_result_gets_no_time(self, clock):
        rows = harness.measure(
            workload(*(provider(error=lambda _, e=e: e) for e in (0.1, 0.2, math.nan))), clock, BRIEF
        )
        assert [row.wall is not None for row in rows] == [True, False, False]
        assert rows[1].failure == "wrong: off by 0.2 of the largest entry, above 0.1"
        assert rows[2].failure.startswith("wrong: off by nan")
        assert rows[2].error is None

    @pytest.mark.parametrize(
        ("error", "said"),
        [(RuntimeError("first\nsecond"), "RuntimeError: first"), (torch.OutOfMemoryError("long"), "out of memory")],
    )
    @pytest.mark.parametrize("survives", [0, 1, 3])
    def test_failure_costs_its_own_row(self, clock, error, said, survives):
        calls = itertools.count()

        def fail(i):
            if next(calls) >= survives:
                raise error

        broken, sound = harness.measure(workload(provider("broken", fail), provider("sound")), clock, BRIEF)
        assert broken.failure == said
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

    def printed(self, code):
        # In a process of its own, since memory that this one frees meanwhile would hide what the call takes.
        done = fresh_python.run("-c", code, env={"PYTHONPATH": str(Path(harness.__file__).parent)}, check=True)
        if done.stdout.strip() == "None":
            pytest.skip("the system does not tell")
        return int(done.stdout)

    def test_memory_of_a_call(self):
        code = "import harness; held = []; size = 64 * 2**20; "
        code += "print(harness.HostClock(0).peak_bytes(lambda: held.append(bytearray(b'1') * size)))"
        assert 32 * 2**20 <= self.printed(code) < 128 * 2**20

    def test_memory_that_is_free_does_not_hide_what_a_call_takes(self):
        code = "import harness; piece = lambda: bytearray(b'1') * 2**16; freed = [piece() for _ in range(1024)]; "
        # The heap cannot shrink below a piece that is kept.
        code += "kept = piece(); del freed; held = []; "
        code += "print(harness.HostClock(0).peak_bytes(lambda: held.extend(piece() for _ in range(1024))))"
        assert 48 * 2**20 <= self.printed(code) < 128 * 2**20

    def test_last_cache(self, tmp_path):
        assert harness.last_cache_bytes(tmp_path) == 2**25
        for index, size in enumerate(("32K", "32K", "1024K", "65536K")):
            (tmp_path / f"index{index}").mkdir()
            (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
        assert harness.last_cache_bytes(tmp_path) == 2**26
        assert harness.HostClock().cache_bytes >= 2**18

    def test_buffers_exceed_three_times_the_cache(self):
        clock = harness.HostClock(cache_bytes=1000)
        assert [harness.buffers_for(clock, size) for size in (1, 1000, 2999, 3001)] == [3001, 4, 2, 1]


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
    def test_budget_that_is_spent(self, clock, tmp_path):
        groups = [harness.Group(name, lambda: iter([workload(provider())])) for name in ("one", "two")]
        report = report_of(tmp_path)
        harness.run(groups, clock, report, 0.0, 2**10)
        assert report.left_out == ["one", "two"]
        assert strict_json(tmp_path / "benchmark.json")["left_out"] == ["one", "two"]
        assert "Left out, for time: one, two." in (tmp_path / "benchmark.md").read_text()

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

    def test_machine(self):
        about = harness.machine(torch.device("cpu"))
        assert about["torch"] == torch.__version__
        assert {"device", "commit", "date", "python", "cuda"} <= set(about)
