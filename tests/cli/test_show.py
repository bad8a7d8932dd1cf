"""`pdl-ext show`: its output for counts, and its errors."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import sys

import pytest
import torch

from pdl_ext import TokenFrequency
from pdl_ext.cli.main import main
from pdl_ext.corpus.reading.pretrained import tokenizer_digest
from pdl_ext.provenance import Provenance, Shard, TargetPolicy


@pytest.fixture
def counts(tmp_path):
    frequency = TokenFrequency.from_counts(torch.tensor([0, 5, 900, 1, 94]))
    frequency.ignored += 7
    frequency.out_of_range += 2
    frequency.seen += 9
    shards = tuple(Shard(f"{number}.bin", 10, f"{number:032x}", "raw", "uint16") for number in range(5))
    policy = TargetPolicy(targets="shifted", column="ids")
    frequency.provenance = Provenance(shards, 1009, policy, "ab" * 16, "0.1.0")
    frequency.save(tmp_path / "counts")
    return tmp_path / "counts"


def test_prints_all_of_it(counts, capsys):
    assert main(["show", str(counts), "--alpha", "0", "1", "--top", "2"]) == 0
    output = capsys.readouterr().out
    assert "1,009: 1,000 counted, 7 ignored, 2 out of range" in output
    assert "vocabulary  5: 1 never seen, 1 seen once" in output
    assert "5 with 50 bytes and 1,009 tokens: raw (uint16)" in output
    assert "2.bin\n            and 2 more" in output
    assert "targets shifted, ignore index -100, column ids, tokenizer abab" in output
    lines = output.splitlines()
    start = lines.index("most frequent:")
    tokens = [line.split() for line in lines[start + 1 : start + 6]]
    assert [t[:2] for t in (tokens[0], tokens[1], tokens[3], tokens[4])] == [
        ["2", "900"],
        ["4", "94"],
        ["1", "5"],
        ["3", "1"],
    ]
    (header,) = [index for index, line in enumerate(lines) if line.startswith("alpha")]
    assert lines[header + 1].split()[:2] == ["0", "100.0"]
    assert float(lines[header + 2].split()[1]) < 50


def test_tokens_as_text(counts, capsys, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"a": 0, "b": 1, "line\n": 2, "d": 3, "e": 4}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "a")).save(str(tmp_path / "tokenizer.json"))
    assert main(["show", str(counts), "--tokenizer", str(tmp_path / "tokenizer.json")]) == 0
    captured = capsys.readouterr()
    assert r"'line\n'" in captured.out
    assert "tokenizer.json is not the tokenizer of the counts" in captured.err


def test_the_tokenizer_of_the_counts_gives_no_warning(counts, capsys, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")).save(str(path))
    frequency = TokenFrequency.load(counts)
    frequency.provenance = dataclasses.replace(frequency.provenance, tokenizer=tokenizer_digest(path))
    frequency.save(counts)
    # The tokens that it does not have are empty texts.
    assert main(["show", str(counts), "--tokenizer", str(path)]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_cannot_be_printed_is_escaped(counts, monkeypatch, encoding):
    frequency = TokenFrequency.load(counts)
    names = ["\u00e9.bin", "a\nb.bin", "\udcff.bin"]
    shards = tuple(Shard(name, 1, f"{number:032x}", "raw", "uint16") for number, name in enumerate(names))
    frequency.provenance = dataclasses.replace(frequency.provenance, shards=shards)
    frequency.save(counts)
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["show", str(counts)]) == 0
    stream.flush()
    lines = stream.buffer.getvalue().decode(encoding).split("\n")
    expected = ["\u00e9.bin" if encoding == "utf-8" else r"\xe9.bin", r"a\nb.bin", r"\udcff.bin"]
    assert [line.strip() for line in lines[4:7]] == expected


def test_what_a_file_says_gives_the_terminal_no_commands(counts, capsys):
    command = "\x1b[2J"
    frequency = TokenFrequency.load(counts)
    policy = TargetPolicy(column=command, mask=command, skip_prompt=command)
    shards = (Shard(command, 1, command, command, command),)
    frequency.provenance = Provenance(shards, 1, policy, command, command)
    frequency.save(counts)
    assert main(["show", str(counts)]) == 0
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert output.count(r"\x1b[2J") == 8


def test_a_vocabulary_of_one(tmp_path, capsys):
    TokenFrequency.from_counts(torch.tensor([3])).save(tmp_path / "counts")
    assert main(["show", str(tmp_path / "counts"), "--alpha", "0.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "0                 3   100.0000 %" in lines[lines.index("most frequent:") + 1]
    (row,) = [line for line in lines if line.startswith("  0.5 ")]
    assert row.split() == ["0.5", "100.0", "%", "100.0", "%", "1", "1", "1"]


def test_counts_from_memory_and_of_nothing(tmp_path, capsys):
    TokenFrequency(1).save(tmp_path / "counts")
    assert main(["show", str(tmp_path / "counts")]) == 0
    output = capsys.readouterr().out
    assert "none: counted from memory" in output
    assert "nothing was counted" in output
    assert "Zipf slope  none" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--alpha", "-1"], "alpha: got -1.0"),
        (["--alpha", "nan"], "alpha: got nan"),
        (["--top", "0"], "top: got 0"),
        (["--tokenizer", "gone.json"], "gone.json: cannot be read (No such file or directory)"),
    ],
)
def test_bad_arguments(arguments, message, counts, capsys):
    assert main(["show", str(counts), *arguments]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_an_extreme_alpha(counts, capsys):
    assert main(["show", str(counts), "--alpha", "1000"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("1e+03"))
    assert "nan" not in line
    assert "inf" not in line


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_tokenizer_that_is_a_pipe(counts, capsys, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert main(["show", str(counts), "--tokenizer", str(tmp_path / "pipe")]) == 1
    assert "pipe: is not a regular file, expected one" in capsys.readouterr().err


def test_a_tokenizer_that_cannot_decode(counts, capsys, tmp_path, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")).save(str(path))

    class Panic(BaseException):
        pass

    class Panicking:
        def __init__(self, tokenizer):
            self.model = tokenizer.model

        def no_truncation(self):
            pass

        def no_padding(self):
            pass

        def decode(self, ids, skip_special_tokens):
            raise Panic("index out of bounds")

        @classmethod
        def from_file(cls, name, load=tokenizers.Tokenizer.from_file):
            return cls(load(name))

    monkeypatch.setattr(tokenizers, "Tokenizer", Panicking)
    assert main(["show", str(counts), "--tokenizer", str(path)]) == 1
    captured = capsys.readouterr()
    assert re.search(r"tokenizer\.json: cannot decode the id \d \(index out of bounds\)", captured.err)
    assert captured.out == ""


def test_no_counts(tmp_path, capsys):
    (tmp_path / "other").write_bytes(b"other")
    (tmp_path / "folder").mkdir()
    for name, message in [
        ("none", f"counts: no file at {tmp_path}/none, expected one that `pdl-ext count` wrote"),
        ("other", f"counts: {tmp_path}/other is damaged or not a safetensors file"),
        ("folder", f"counts: {tmp_path}/folder is not a regular file"),
    ]:
        assert main(["show", str(tmp_path / name)]) == 1
        assert capsys.readouterr().err.startswith(f"pdl-ext: {message}")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("adaptive", ["exp", "chi2"]),
        ("class-balanced", ["0.9", "0.99", "0.999", "0.9999"]),
        ("face", ["-"]),
        ("power-law", ["0", "0.25", "0.5", "0.75", "1", "1.5"]),
        ("uniform", ["-"]),
    ],
)
def test_weightings(name, values, counts, capsys):
    assert main(["show", str(counts), "--weighting", name]) == 0
    lines = capsys.readouterr().out.splitlines()
    (header,) = (place for place, line in enumerate(lines) if "effective sample" in line)
    shown = [line.split() for line in lines[header + 1 :] if not line.startswith(("Effective", "is below"))]
    assert [line[0] for line in shown] == values
    assert all("nan" not in line for line in shown)


def test_only_the_power_law_has_exponents(counts, capsys):
    assert main(["show", str(counts), "--weighting", "face", "--alpha", "1"]) == 1
    assert "alpha: got one with --weighting face, expected none" in capsys.readouterr().err
