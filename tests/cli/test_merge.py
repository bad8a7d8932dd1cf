"""`pdl-ext merge`: sums of compatible counts, and no output for others."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from pdl_ext import TokenFrequency
from pdl_ext.cli.main import main
from pdl_ext.corpus import TargetPolicy, count_corpus


@pytest.fixture
def counts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def count(name, *, vocab_size=9, **options):
        generator = np.random.default_rng(len(name))
        (tmp_path / f"{name}.bin").write_bytes(generator.integers(0, 9, 600).astype("<u2").tobytes())
        frequency = count_corpus([f"{name}.bin"], vocab_size, dtype="uint16", **options)
        frequency.save(name)
        return frequency

    return count


def test_sums(counts, capsys):
    parts = [counts("a"), counts("bb"), counts("ccc")]
    assert main(["merge", "a", "bb", "ccc", "-o", "all"]) == 0
    assert "all: 1,800 tokens of 3 files" in capsys.readouterr().out
    merged = TokenFrequency.load("all")
    assert torch.equal(merged.counts, sum(part.counts for part in parts))
    assert merged.provenance.tokens == 1800
    assert [shard.name for shard in merged.provenance.shards] == ["a.bin", "bb.bin", "ccc.bin"]


def test_what_does_not_go_together_is_not_written(counts, capsys, tmp_path):
    counts("a").save("copy")
    counts("vocabulary", vocab_size=10)
    counts("policy", policy=TargetPolicy(targets="shifted"))
    (tmp_path / "tokenizer.json").write_text("{}")
    counts("tokenizer", tokenizer=tmp_path / "tokenizer.json")
    ignored = TokenFrequency(9, ignore_index=0)
    ignored.update(torch.arange(9))
    ignored.save("ignored")
    for other, message in [
        ("vocabulary", "vocabulary: does not go with a: got a vocabulary of 10, expected 9"),
        ("policy", "policy: does not go with a: got counts with targets='shifted', expected 'all'"),
        ("tokenizer", "tokenizer: does not go with a: got counts of tokenizer"),
        ("ignored", "ignored: does not go with a: got ignore_index 0, expected -100"),
        ("a", "a: got the same file twice"),
        ("copy", "copy: does not go with a: a.bin: got the same content as a.bin"),
        ("copy", "expected each shard once: allow_overlap (--allow-overlap) counts it again"),
        ("gone", "counts: no file at gone, expected one that `pdl-ext count` wrote"),
    ]:
        assert main(["merge", "a", other, "-o", "all"]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert "other: " not in error
        assert not (tmp_path / "all").exists()


def test_a_refused_or_failed_merge_leaves_the_old_output(counts, capsys, tmp_path, monkeypatch):
    counts("a"), counts("bb"), counts("vocabulary", vocab_size=10)
    before = {name: (tmp_path / name).read_bytes() for name in ("a", "bb")}
    # The output is one of the inputs, and the refusal comes after a sum that went well.
    assert main(["merge", "a", "bb", "vocabulary", "-o", "a"]) == 1
    assert "vocabulary: does not go with a and those after it: got a vocabulary of 10" in capsys.readouterr().err

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(["merge", "a", "bb", "-o", "a"]) == 1
    assert "No space left on device; not written: a" in capsys.readouterr().err
    assert {name: (tmp_path / name).read_bytes() for name in ("a", "bb")} == before
    assert not list(tmp_path.glob("*.partial"))
    assert not list(tmp_path.glob(".*.partial"))


def test_overlap_that_is_wanted(counts):
    once = counts("a").counts
    assert main(["merge", "a", "a", "--allow-overlap", "-o", "all"]) == 0
    assert torch.equal(TokenFrequency.load("all").counts, 2 * once)


def test_a_file_of_counts_without_shards_merges_once(tmp_path, capsys):
    path, link = tmp_path / "memory", tmp_path / "link"
    TokenFrequency.from_counts(torch.arange(4)).save(path)
    link.symlink_to(path)
    for again in (path, link):
        assert main(["merge", str(path), str(again), "-o", str(tmp_path / "all")]) == 1
        assert f"{again}: got the same file twice, expected each once" in capsys.readouterr().err
        assert not (tmp_path / "all").exists()
    assert main(["merge", str(path), str(link), "--allow-overlap", "-o", str(tmp_path / "all")]) == 0
    assert TokenFrequency.load(tmp_path / "all").counts.tolist() == [0, 2, 4, 6]


def test_a_refused_merge_changes_nothing(counts):
    first, same = counts("a"), counts("a")
    before = first.counts.clone()
    with pytest.raises(ValueError, match="same content"):
        first.merge(same)
    assert torch.equal(first.counts, before)
    assert first.provenance.tokens == 600


def test_counts_from_memory_merge_with_those_of_files(counts):
    memory = TokenFrequency.from_counts(torch.arange(9))
    memory.merge(counts("a"))
    assert memory.provenance.tokens == 600
    assert memory.tokens_seen == 600 + 36
