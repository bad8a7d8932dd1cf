"""`pdl-ext count --dry-run`: the files that would be counted, their format and dtype, and their approximate tokens."""

from __future__ import annotations

import gzip
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "corpus"))

from column_files import VOCAB, sequences
from flat_files import write_llmc, write_megatron, write_npy
from golden_rows import GOLDEN
from text_tokenizer import save_tokenizer

from pdl_ext.cli.main import main
from pdl_ext.corpus import count_corpus
from pdl_ext.corpus.counting import preview_corpus

ROWS_16 = [row.astype(np.uint16) for row in sequences(40)]


def test_files_are_listed_and_nothing_is_written(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for write in (write_megatron, write_npy):
        write(data, ROWS_16)
    write_llmc(data, ROWS_16[:9])
    (data / "a.jsonl").write_text(json.dumps({"input_ids": [1, 2, 3]}))
    before = sorted(tmp_path.rglob("*"))
    assert main(["count", str(data), "--vocab-size", "200", "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert "got files of 4 formats" in captured.err
    head, *files, last = captured.out.splitlines()
    assert head.split() == ["file", "bytes", "format", "dtype", "tokens"]
    number, less = (sum(map(len, rows)) for rows in (ROWS_16, ROWS_16[:9]))
    assert [re.split(r"  +", line.removeprefix(f"{data}/")) for line in files] == [
        ["a.jsonl", "24", "jsonl", "int64", "about 3"],
        ["llmc.bin", f"{1024 + 2 * less:,}", "llmc", "uint16", f"{less:,}"],
        ["text_document.bin", f"{2 * number:,}", "megatron", "uint16", f"{number:,}"],
        ["tokens.npy", f"{128 + 2 * number:,}", "npy", "uint16", f"{number:,}"],
    ]
    assert last == f"about {2 * number + less + 3:,} tokens in 4 files; nothing was counted"
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_is_checked_and_left_alone(tmp_path, capsys):
    write_npy(tmp_path, ROWS_16)
    arguments = ["count", str(tmp_path / "tokens.npy"), "--vocab-size", "200", "--dry-run", "-o"]
    assert main([*arguments, str(tmp_path / "c")]) == 0
    assert not (tmp_path / "c").exists()
    assert main([*arguments, str(tmp_path / "no" / "c")]) == 1
    assert "expected a file in a folder that exists" in capsys.readouterr().err
    assert main(arguments[:4]) == 1
    assert capsys.readouterr().err == "pdl-ext: output: got none, expected a file for the counts (-o FILE)\n"


def test_what_would_fail_fails(tmp_path, capsys):
    for name in "ab":
        np.save(tmp_path / name, np.arange(3000))
    assert main(["count", str(tmp_path), "--vocab-size", "200", "--dry-run"]) == 1
    assert "got the same content as" in capsys.readouterr().err
    assert main(["count", str(tmp_path), "--vocab-size", "200", "--dry-run", "--allow-overlap"]) == 0
    assert "6,000 tokens in 2 files" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    ["mds-columns", "mds-gz", "hf-saved", "hf-indices", "litdata-columns", "litdata-zstd-batch", "litdata-zstd-chunk"],
)
def test_estimates_of_small_sources_are_exact(name):
    files = preview_corpus([GOLDEN / name], VOCAB)
    assert sum(file.tokens for file in files) == count_corpus([GOLDEN / name], VOCAB).tokens_seen


def write_texts(folder, texts):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    lines = "\n".join(texts).encode()
    (folder / "a.txt").write_bytes(lines)
    (folder / "b.txt.gz").write_bytes(gzip.compress(lines))
    (folder / "b.txt.zst").write_bytes(pa.compress(lines, "zstd", asbytes=True))
    (folder / "c.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    table = pa.table({"other": list(range(len(texts))), "text": texts})
    pq.write_table(table, folder / "d.parquet", row_group_size=len(texts))
    with pa.ipc.new_stream(str(folder / "e.arrow"), table.schema) as stream:
        stream.write_table(table, 1000)
    with pa.ipc.new_file(str(folder / "f.arrow"), table.schema) as file:
        file.write_table(table, 1000)


def test_estimates_by_a_sample_are_near(tmp_path, monkeypatch):
    """Of what is alike all over, from its beginning: 2^15 tokens or a little more, of twice as many."""
    tokenizer = save_tokenizer(tmp_path / "tokenizer.json")
    data = tmp_path / "data"
    data.mkdir()
    words = np.array(["the", "quick", "brown", "fox", "café", "lazy dog"])
    generator = np.random.default_rng(0)
    write_texts(data, [" ".join(words[generator.integers(0, 6, 9)]) for _ in range(5_000)])
    for path in sorted(data.iterdir()):
        (file,) = preview_corpus([path], 320, tokenizer=tokenizer)
        tokens = count_corpus([path], 320, tokenizer=tokenizer).tokens_seen
        assert not file.is_exact
        assert file.tokens == pytest.approx(tokens, rel=0.15), path.name


def test_json_lines_are_listed_as_ids_or_text(tmp_path):
    tokenizer = save_tokenizer(tmp_path / "tokenizer.json")
    ids, text = json.dumps({"input_ids": [1, 2]}), json.dumps({"text": "the fox"})
    long = json.dumps({"about": "x" * 300_000, "tokens": list(range(9))})
    for name, content, dtype in [
        ("a.jsonl", f"\n \n{ids}\n{text}\n", "int64"),
        ("b.jsonl", f"{text}\n{ids}\n", "text"),
        ("c.jsonl.gz", f"\ufeff{ids}\n{text}\n", "int64"),
        ("d.jsonl", f"{long}\n", "int64"),
        ("e.jsonl", json.dumps({"text": "the fox", "input_ids": [1]}), "text"),
    ]:
        encoded = content.encode()
        (tmp_path / name).write_bytes(gzip.compress(encoded) if name.endswith(".gz") else encoded)
        (file,) = preview_corpus([tmp_path / name], 320, tokenizer=tokenizer)
        assert (file.format, file.dtype) == ("jsonl", dtype), name
        frequency = count_corpus([tmp_path / name], 320, tokenizer=tokenizer)
        assert frequency.provenance.shards[0].dtype == dtype
        assert frequency.tokens_seen == pytest.approx(file.tokens, abs=2)
    # What is damaged is told where it is read.
    (tmp_path / "f.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match=r"f\.jsonl: line 1 \(byte 0\): is not a line of JSON"):
        count_corpus([tmp_path / "f.jsonl"], 320, tokenizer=tokenizer)


def test_few_of_many_files_are_read(tmp_path, monkeypatch):
    from pdl_ext.corpus.formats import jsonl

    for number in range(100):
        lines = [json.dumps({"input_ids": list(range(10))}) for _ in range(1 + number % 2)]
        (tmp_path / f"{number:02}.jsonl").write_text("\n".join(lines))
    opened = set()
    batches = jsonl._JsonLinesSource.batches
    monkeypatch.setattr(
        jsonl._JsonLinesSource, "batches", lambda self, part: opened.add(self.path) or batches(self, part)
    )
    with pytest.warns(UserWarning, match="equal by chance"):
        files = preview_corpus([tmp_path], 200)
    assert len(opened) == 8
    assert sum(file.tokens for file in files) == pytest.approx(1500, rel=0.1)
    assert len(files) == 100


def test_of_ranks_the_first_one_tells_it(tmp_path, capsys, monkeypatch):
    np.arange(9, dtype=np.uint16).tofile(tmp_path / "a.bin")
    command = ["count", str(tmp_path), "--dtype", "uint16", "--vocab-size", "10", "--dry-run"]
    for rank, told in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert main(command) == 0
        assert ("9 tokens in 1 files" in capsys.readouterr().out) == told
