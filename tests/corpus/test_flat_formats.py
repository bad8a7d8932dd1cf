"""Readers of formats with consecutive tokens: correct counts, and errors for bad files."""

from __future__ import annotations

import json
import os
import struct
import sys
import threading
import tracemalloc
import warnings
from pathlib import Path

import fresh_python
import numpy as np
import pytest
import torch
from flat_files import (
    fairseq_index,
    llmc_header,
    megatron_index,
    write_datatrove,
    write_fairseq,
    write_litdata,
    write_llmc,
    write_megatron,
    write_npy,
    write_raw,
    zipf_documents,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdl_ext.corpus import TargetPolicy, count_corpus, counting
from pdl_ext.corpus.reading.flat import AscendingNumbers
from pdl_ext.corpus.table import Table

V = 311
GOLDEN = Path(__file__).parent / "golden"
SHIFTED = TargetPolicy(targets="shifted")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Parts and batches that end inside documents."""
    monkeypatch.setattr(counting, "PART_BYTES", 50_001)
    monkeypatch.setattr("pdl_ext.corpus.reading.flat.BUFFER_BYTES", 7_000)


@pytest.fixture(autouse=True)
def quiet():
    """Warnings of narrow dtypes and of several formats have tests of their own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(cannot hold ids|got files of . formats).*")
        yield


def bincount(tokens):
    return np.bincount(tokens, minlength=V)[:V].tolist()


def targets_of(documents):
    return np.concatenate([document[1:] for document in documents])


# Each with the dtypes that it can hold, and whether it tells where documents begin.
FORMATS = {
    "raw": (write_raw, ("uint8", "int8", "uint16", "int16", "uint32", "int32", "int64"), False),
    "llmc": (write_llmc, ("uint16", "uint32"), False),
    "npy": (write_npy, ("uint8", "int8", "uint16", "int16", "uint32", "int32", "int64"), False),
    "megatron": (write_megatron, ("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32"), True),
    "fairseq": (write_fairseq, ("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32"), True),
    "datatrove": (write_datatrove, ("uint16", "uint32"), True),
    "litdata": (write_litdata, ("uint8", "int8", "int16", "int32", "int64", "uint16"), True),
}
CASES = [(name, dtype) for name, (_, dtypes, _) in FORMATS.items() for dtype in dtypes]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_counts_are_those_of_what_was_written(name, dtype, tmp_path):
    write, _, has_documents = FORMATS[name]
    documents = zipf_documents(min(V, np.iinfo(dtype).max + 1), dtype)
    tokens = np.concatenate(documents)
    path = write(tmp_path, documents)
    given_dtype = dtype if name == "raw" else None

    counted = count_corpus([path], V, dtype=given_dtype, threads=2)
    assert counted.counts.tolist() == bincount(tokens)
    assert counted.tokens_seen == counted.provenance.tokens == tokens.size
    assert {(shard.format, shard.dtype) for shard in counted.provenance.shards} == {(name, dtype)}

    shifted = count_corpus([path], V, dtype=given_dtype, policy=SHIFTED, threads=2)
    expected = targets_of(documents if has_documents else [tokens])
    assert shifted.counts.tolist() == bincount(expected)
    assert int(shifted.ignored) == tokens.size - expected.size


def test_ids_outside_the_vocabulary_are_told_apart(tmp_path):
    tokens = np.array([0, -1, 5, V, V - 1, -(2**31), 2**31 - 1, -100, -7], np.int32)
    path = write_megatron(tmp_path, [tokens])
    counted = count_corpus([path], V)
    assert counted.counts.tolist() == bincount(np.array([0, 5, V - 1]))
    assert (int(counted.ignored), int(counted.out_of_range)) == (1, 5)
    with pytest.raises(ValueError, match=r"text_document\.bin: got the id -1, expected 0 <= id < 311"):
        count_corpus([path], V, strict=True)


def test_narrow_signed_ids_are_not_taken_for_others(tmp_path):
    np.array([-1, -100, 3], np.int8).tofile(tmp_path / "tokens.bin")
    counted = count_corpus([tmp_path / "tokens.bin"], V, dtype="int8")
    assert (int(counted.total), int(counted.ignored), int(counted.out_of_range)) == (1, 1, 1)


def test_warns_of_a_dtype_that_cannot_hold_the_vocabulary(tmp_path):
    np.arange(4, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    with pytest.warns(UserWarning, match=r"tokens\.bin: .*uint16.*above 65535 of a vocabulary of 65537"):
        count_corpus([tmp_path / "tokens.bin"], 65_537, dtype="uint16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        count_corpus([tmp_path / "tokens.bin"], 65_536, dtype="uint16")


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_npy(version, tmp_path):
    tokens = np.arange(10, dtype=np.uint32)
    with open(tmp_path / "tokens.npy", "wb") as file:
        np.lib.format.write_array(file, tokens, version)
    assert count_corpus([tmp_path / "tokens.npy"], V).counts.tolist() == bincount(tokens)


@pytest.mark.parametrize("shape", [(30, 700), (700, 30), (3, 10, 700), (21_000, 1), (1, 21_000)])
def test_rows_of_npy_are_sequences(shape, tmp_path):
    rows = np.random.default_rng(0).integers(0, V, shape).astype(np.uint16)
    np.save(tmp_path / "tokens.npy", rows)
    counted = count_corpus([tmp_path / "tokens.npy"], V, policy=SHIFTED)
    assert counted.counts.tolist() == bincount(rows[..., 1:].ravel())
    np.save(tmp_path / "columns.npy", np.asfortranarray(rows))
    assert count_corpus([tmp_path / "columns.npy"], V).counts.tolist() == bincount(rows.ravel())


def test_npy_of_uint64_with_the_ignore_index_wrapped_and_ids_that_int64_does_not_hold(tmp_path):
    np.save(tmp_path / "tokens.npy", np.array([3, 2**64 - 100, 2**63, 3], np.uint64))
    counted = count_corpus([tmp_path / "tokens.npy"], V)
    assert (int(counted.counts[3]), counted.total, int(counted.ignored), int(counted.out_of_range)) == (2, 2, 1, 1)


def test_npy_without_a_header_is_raw(tmp_path):
    tokens = np.arange(100, dtype=np.uint16)
    tokens.tofile(tmp_path / "part-0.npy")
    assert count_corpus([tmp_path / "part-0.npy"], V, dtype="uint16").counts.tolist() == bincount(tokens)
    with pytest.raises(ValueError, match=r"part-0\.npy: has no header, so its dtype is unknown"):
        count_corpus([tmp_path / "part-0.npy"], V)


def test_documents_of_several_sequences_in_megatron(tmp_path):
    documents = zipf_documents(V, "int32")
    path = write_megatron(tmp_path, documents, sequences_per_document=5)
    counted = count_corpus([path], V, policy=SHIFTED, threads=2)
    assert counted.counts.tolist() == bincount(targets_of(documents))


@pytest.mark.parametrize("write", [write_megatron, write_fairseq])
def test_an_index_of_uint64(write, tmp_path):
    path = write(tmp_path, [np.array([3, 2**64 - 100], np.uint64), np.array([3], np.uint64)])
    counted = count_corpus([path], V, dtype="int64")
    assert (int(counted.counts[3]), int(counted.ignored), counted.provenance.shards[0].dtype) == (2, 1, "int64")


@pytest.mark.parametrize("case", ["megatron, not ended", "megatron, merged documents", "megatron, overflowed"])
def test_the_way_out_of_a_bad_index_counts_its_tokens(case, tmp_path):
    for name, content in BAD[case][0].items():
        (tmp_path / name).write_bytes(content)
    assert count_corpus([tmp_path], V, format="raw", dtype="uint16").total == 4


def test_megatron_with_a_mode_for_each_sequence(tmp_path):
    path = write_megatron(tmp_path, [np.arange(5, dtype=np.uint16), np.arange(3, dtype=np.uint16)])
    with open(path.with_suffix(".idx"), "ab") as file:
        file.write(bytes([0, 1]))
    assert int(count_corpus([path], V).total) == 8


def test_the_mask_of_datatrove(tmp_path):
    documents = zipf_documents(V, "uint16")
    tokens = np.concatenate(documents)
    mask = np.random.default_rng(1).random(tokens.size) < 0.7
    path = write_datatrove(tmp_path, documents, mask)
    counted = count_corpus([path], V, threads=2)
    assert counted.counts.tolist() == bincount(tokens[mask])
    assert int(counted.ignored) == int((~mask).sum())
    first = np.zeros(tokens.size, bool)
    ends = np.cumsum([0, *map(len, documents)])
    first[ends[ends < tokens.size]] = True
    shifted = count_corpus([path], V, policy=SHIFTED, threads=2)
    assert shifted.counts.tolist() == bincount(tokens[mask & ~first])


def test_the_dtype_of_datatrove_is_told_by_its_metadata(tmp_path):
    tokens = np.arange(12, dtype=np.uint32)
    tokens.tofile(tmp_path / "a.ds")
    with pytest.raises(ValueError, match=r"a\.ds: has no header, and no file beside it states its dtype"):
        count_corpus([tmp_path / "a.ds"], V)
    (tmp_path / "a.ds.metadata").write_text("some/tokenizer\n12\n12 T")
    with pytest.raises(ValueError, match=r"no file beside it states its dtype"):
        count_corpus([tmp_path / "a.ds"], V)
    (tmp_path / "a.ds.metadata").write_text("some/tokenizer|4\n12\n12 T")
    assert count_corpus([tmp_path / "a.ds"], V).counts.tolist() == bincount(tokens)
    with pytest.raises(ValueError, match=r"a\.ds: got dtype uint16, expected uint32, which the file states, or none"):
        count_corpus([tmp_path / "a.ds"], V, dtype="uint16")
    # Of twice as many tokens as there are, which 2 bytes each would be.
    np.array([24], np.uint64).tofile(tmp_path / "a.ds.index")
    with pytest.raises(ValueError, match=r"its last document ends at token 24, expected 12"):
        count_corpus([tmp_path / "a.ds"], V)


@pytest.mark.parametrize("name", ["llmc", "npy", "megatron", "fairseq", "litdata"])
def test_a_dtype_that_is_not_what_the_file_tells_is_an_error(name, tmp_path):
    path = FORMATS[name][0](tmp_path, [np.arange(n, dtype="uint16") for n in (3, 5, 7)])
    with pytest.raises(ValueError, match="got dtype int16, expected uint16, which the file states, or none"):
        count_corpus([path], V, dtype="int16")
    assert count_corpus([path], V, dtype="uint16").total == 15


def test_arrays_of_litdata_for_its_tokens_loader(tmp_path):
    documents = zipf_documents(V, "uint16")
    folder = write_litdata(tmp_path, documents, data_format=["no_header_numpy:5"], item_loader="TokensLoader")
    assert count_corpus([folder], V).counts.tolist() == bincount(np.concatenate(documents))


@pytest.mark.parametrize(
    "name", ["datatrove-uint16", "datatrove-uint32", "litdata-arrays", "litdata-tensors", "megatron"]
)
def test_files_of_the_libraries_themselves(name):
    documents = [np.array(document) for document in ([5, 1, 2], [7], [1, 1, 9, 300, 2], [4, 4])]
    mask = np.ones(11, bool)
    if name == "datatrove-uint16":
        mask[[1, 7, 8]] = False
    counted = count_corpus([GOLDEN / name], V)
    assert counted.counts.tolist() == bincount(np.concatenate(documents)[mask])
    mask[[0, 3, 4, 9]] = False
    shifted = count_corpus([GOLDEN / name], V, policy=SHIFTED)
    assert shifted.counts.tolist() == bincount(np.concatenate(documents)[mask])


def test_a_file_is_counted_once_by_whatever_name(tmp_path, monkeypatch):
    tokens = np.arange(20, dtype=np.uint16)
    write_megatron(tmp_path, [tokens])
    write_datatrove(tmp_path, [tokens[:9]], np.ones(9))
    write_litdata(tmp_path, [tokens[:7], tokens[:6]], chunks=2)
    # The whole merge's, which is beside none of its files.
    (tmp_path / "merged.ds.metadata").write_text("some/tokenizer|2\n9\n9 T")
    expected = np.sum([bincount(part) for part in (tokens, tokens[:9], tokens[:7], tokens[:6])], axis=0).tolist()
    assert count_corpus([tmp_path], V).counts.tolist() == expected
    assert count_corpus([f"{tmp_path}/**"], V).counts.tolist() == expected
    monkeypatch.chdir(tmp_path)
    assert count_corpus(["."], V).counts.tolist() == expected
    assert count_corpus(["./*.*", "optimized"], V).counts.tolist() == expected
    assert count_corpus(["*.idx", "*.index", "optimized/*.bin"], V).counts.tolist() == expected
    assert count_corpus(["000_shuffled.ds.loss", "000_shuffled.ds"], V).counts.tolist() == bincount(tokens[:9])
    assert count_corpus(["optimized/chunk-0-1.bin"], V).counts.tolist() == bincount(tokens[:6])
    assert count_corpus(["optimized/index.json"], V).provenance.tokens == 13


# Bad files: by name what is written, the format and dtype that are given, and what the error says.


def _llmc(magic=20240520, version=1, stated=4, tokens=4, order="<"):
    return {"a.bin": llmc_header(magic, version, stated, order) + bytes(2 * tokens)}


def _npy(array):
    return {"a.npy": np.lib.format.magic(1, 0) + _npy_header(array) + array.tobytes()}


def _npy_header(array, **fields):
    header = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape, **fields}
    text = repr(header).encode() + b"\n"
    return struct.pack("<H", len(text)) + text


def _megatron(lengths=(3, 1), boundaries=(0, 1, 2), *, code=8, size=8, at=None, suffix=b""):
    index = bytearray(megatron_index(code, 2, list(lengths), list(boundaries)))
    for offset, value in (at or {}).items():
        index[offset : offset + len(value)] = value
    return {"a.idx": bytes(index) + suffix, "a.bin": bytes(size)}


def _fairseq(size=8):
    return {"a.idx": fairseq_index(8, 2, [3, 1]), "a.bin": bytes(size)}


def _datatrove(ends=(3, 4), size=8, **others):
    return {"a.ds": bytes(size), "a.ds.index": np.array(ends, "<u8").tobytes()} | {
        f"a.ds.{name}": content for name, content in others.items()
    }


def _litdata(chunk=None, index=None, config=None, listed=None):
    content = {
        "chunks": [{"filename": "chunk-0-0.bin", "chunk_size": 2, "dim": 4, "chunk_bytes": 16} | (listed or {})],
        "config": {"compression": None, "data_format": ["no_header_tensor:16"]} | (config or {}),
    }
    if chunk is None:
        chunk = np.array([2, 16, 20, 32, 1, 2, 3, 4], "<u4").tobytes()
    return {"index.json": json.dumps(content) if index is None else index, "chunk-0-0.bin": chunk}


BAD = {
    "raw, odd": ({"a.bin": bytes(7)}, {"dtype": "uint16"}, r"a\.bin: got 7 bytes, expected a multiple of 2"),
    "raw, no dtype": ({"a.bin": bytes(8)}, {}, r"a\.bin: has no header, so its dtype is unknown: give dtype"),
    "llmc, truncated": (_llmc(tokens=3), {}, r"a\.bin: got 1030 bytes, expected 1032: it states 4 tokens of uint16"),
    "llmc, longer": (_llmc(tokens=5), {}, r"a\.bin: got 1034 bytes, expected 1032"),
    "llmc, no header": ({"a.bin": llmc_header(20240520, 1, 4)[:500]}, {}, r"a\.bin: got 500 bytes, expected a header"),
    "llmc, empty": ({"a.bin": b""}, {"format": "llmc"}, r"a\.bin: got 0 bytes, expected a header"),
    "llmc, magic": (_llmc(magic=20240521), {"format": "llmc"}, r"a\.bin: got magic 20240521, expected 20240520 or"),
    "llmc, evaluation": (_llmc(magic=20240522), {}, r"a\.bin: got an evaluation file of llm\.c"),
    "llmc, version": (_llmc(version=7), {}, r"a\.bin: got version 7 of llm\.c's magic 20240520, expected 1"),
    "llmc, big-endian": (_llmc(order=">"), {}, r"a\.bin: got a big-endian file of llm\.c"),
    "llmc, negative": (_llmc(stated=-1), {}, r"a\.bin: states -1 tokens"),
    "npy, truncated": (
        {"a.npy": _npy(np.arange(9))["a.npy"][:-1]},
        {},
        r"a\.npy: got \d+ bytes, expected \d+: it states 9",
    ),
    "npy, two arrays": (
        {"a.npy": _npy(np.arange(9))["a.npy"] * 2},
        {},
        r"a\.npy: got \d+ bytes, expected \d+: it states 9",
    ),
    "npy, big-endian": (_npy(np.arange(9, dtype=">u2")), {}, r"a\.npy: got big-endian uint16"),
    "npy, float": (_npy(np.zeros(9)), {}, r"a\.npy: got an array of float64, expected one of uint8,"),
    "npy, object": (_npy(np.zeros(9, object)), {}, r"a\.npy: got an array of object"),
    "npy, structure": (
        {"a.npy": b"\x93NUMPY\1\0" + _npy_header(np.zeros(3, np.uint16), descr=[("a", "<u2")]) + bytes(6)},
        {},
        r"a\.npy: got an array of \[\('a', '<u2'\)\]",
    ),
    "npy, negative": (
        {"a.npy": b"\x93NUMPY\1\0" + _npy_header(np.zeros(3, np.uint16), shape=(-3, -1)) + bytes(6)},
        {},
        r"a\.npy: got shape \(-3, -1\)",
    ),
    "npy, huge": (
        {"a.npy": b"\x93NUMPY\1\0" + _npy_header(np.zeros(3, np.uint16), shape=(2**62, 2**62)) + bytes(6)},
        {},
        r"a\.npy: got \d+ bytes, expected \d+: it states 2126764793",
    ),
    "npy, columns shifted": (
        {"a.npy": b"\x93NUMPY\1\0" + _npy_header(np.zeros((2, 3), np.uint16), fortran_order=True) + bytes(12)},
        {"policy": SHIFTED},
        r"a\.npy: got a matrix in Fortran's order",
    ),
    "npy, version": (
        {"a.npy": b"\x93NUMPY\x04\0" + bytes(90)},
        {},
        r"a\.npy: is damaged or not a \.npy file .*version 4\.0",
    ),
    "npy, no header": ({"a.npy": b"\x93NUMPY\1\0" + bytes(90)}, {}, r"a\.npy: is damaged or not a \.npy file"),
    "npy, long header": ({"a.npy": b"\x93NUMPY\2\0" + b"\xff" * 90}, {}, r"a\.npy: is damaged or not a \.npy file"),
    "npy, nested header": (
        {"a.npy": b"\x93NUMPY\1\0" + struct.pack("<H", 9000) + b"(" * 9000},
        {},
        r"a\.npy: is damaged or not a \.npy file",
    ),
    "megatron, no bin": ({"a.idx": _megatron()["a.idx"]}, {}, r"a\.bin: is missing, expected it beside a\.idx"),
    "megatron, no idx": ({"a.bin": bytes(8)}, {"format": "megatron"}, r"a\.idx: is missing, expected it beside a\.bin"),
    "megatron, magic": (
        _megatron(at={0: b"X"}),
        {"format": "megatron"},
        r"a\.idx: got magic b'XMIDIDX.*Megatron's \.idx",
    ),
    "megatron, header": (
        _megatron() | {"a.idx": _megatron()["a.idx"][:20]},
        {},
        r"a\.idx: got 20 bytes, expected a header of 26 bytes",
    ),
    "megatron, empty": (
        _megatron() | {"a.idx": b""},
        {"format": "megatron"},
        r"a\.idx: got 0 bytes, expected a header",
    ),
    "megatron, version": (_megatron(at={9: b"\2"}), {}, r"a\.idx: got version 2, expected 1"),
    "megatron, big-endian": (
        _megatron(at={9: bytes([0] * 7 + [1])}),
        {},
        r"a\.idx: got version \d+ \(a big-endian file\), expected 1",
    ),
    "megatron, float": (_megatron(code=7), {}, r"a\.idx: got dtype code 7 \(a float\), expected one of tokens"),
    "megatron, dtype": (_megatron(code=11), {}, r"a\.idx: got dtype code 11, expected one of tokens"),
    "megatron, truncated idx": (
        _megatron() | {"a.idx": _megatron()["a.idx"][:-1]},
        {},
        r"a\.idx: got 81 bytes, expected 82: it states 2 seq",
    ),
    "megatron, bytes left": (_megatron(suffix=b"\0"), {}, r"a\.idx: got 83 bytes, expected 82"),
    "megatron, huge": (_megatron(at={18: b"\xff" * 8}), {}, r"a\.idx: got 82 bytes, expected \d{20,}"),
    "megatron, truncated bin": (_megatron(size=6), {}, r"a\.idx: its sequences end at byte 8 or later, expected 6"),
    "megatron, longer bin": (_megatron(size=10), {}, r"a\.idx: its sequences end at byte 8 or later, expected 10"),
    "megatron, negative": (_megatron(at={38: b"\xff" * 4}), {}, r"a\.idx: got length -1 of sequence 1, expected 0 or"),
    "megatron, outside": (
        _megatron(at={50: b"\7"}),
        {},
        r"a\.idx: got byte 7 as the place of sequence 1, expected 6, where the one before",
    ),
    "megatron, not from 0": (
        _megatron(at={42: b"\2"}),
        {},
        r"a\.idx: got byte 2 as the place of sequence 0, expected 0",
    ),
    "megatron, no documents": (_megatron(boundaries=()), {}, r"a\.idx: got documents from sequence None to 0"),
    "megatron, last document": (
        _megatron(boundaries=(0, 1)),
        {},
        r"a\.idx: got documents from sequence 0 to 1, expected from 0 to 2",
    ),
    "megatron, document outside": (_megatron(boundaries=(0, 3)), {}, r"from sequence 0 to 3, expected from 0 to 2"),
    "megatron, first document": (_megatron(boundaries=(1, 2)), {}, r"from sequence 1 to 2, expected from 0 to 2"),
    "megatron, documents": (
        _megatron(boundaries=(0, 2, 1, 2)),
        {},
        r"a\.idx: got 1 after 2 at entry 2 from byte 58 on, expected numbers that as",
    ),
    "megatron, not ended": (
        _megatron(boundaries=(0,)),
        {},
        r"a\.idx: got documents from sequence 0 to 0, expected from 0 to 2, .*--format raw --dtype uint16",
    ),
    "megatron, merged documents": (
        _megatron(boundaries=(0, 1, 0, 2)),
        {},
        r"a\.idx: got 0 after 1 .* numbers that ascend; .*--format raw --dtype uint16",
    ),
    "megatron, overflowed": (
        _megatron(at={50: (6 - 2**32).to_bytes(8, "little", signed=True)}),
        {},
        r"a\.idx: got byte -4294967290 as the place of sequence 1, expected 6, .* overflowed .*--format raw --dtype ui",
    ),
    "megatron, overflowed and longer": (
        _megatron(at={50: (6 - 2**32).to_bytes(8, "little", signed=True)}, size=10),
        {},
        r"a\.idx: got byte -4294967290 as the place of sequence 1, expected 6, where the one before ends$",
    ),
    "megatron, older": (
        _megatron() | {"a.idx": b"TNTIDX\0\0" + bytes(74)},
        {"dtype": "uint16"},
        r"a\.idx: is an index of the older datasets \(lazy and cached\) .*: write the data anew as mmap",
    ),
    "megatron, codes of Huffman": (
        _megatron() | {"a.idx": b"HUFFIDX\0\0" + bytes(74)},
        {"dtype": "uint16"},
        r"a\.idx: is an index of fairseq's Huffman codes, .*: write the data anew as mmap",
    ),
    "fairseq, truncated": (
        _fairseq() | {"a.idx": _fairseq()["a.idx"][:-1]},
        {},
        r"a\.idx: got 49 bytes, expected \d+: .*\(or 50 bytes, as fairseq's without boundaries\)",
    ),
    "fairseq, longer bin": (_fairseq(size=10), {}, r"a\.idx: its sequences end at byte 8 or later, expected 10"),
    "datatrove, odd": (_datatrove(size=7), {}, r"a\.ds: got 7 bytes, expected 2 or 4 for each of the 4 tokens"),
    "datatrove, truncated": (_datatrove(size=6), {}, r"a\.ds: got 6 bytes, expected 2 or 4 for each of the 4 tokens"),
    "datatrove, other dtype": (
        _datatrove(),
        {"dtype": "uint32"},
        r"a\.ds\.index: its last document ends at token 4, expected 2.*uint32",
    ),
    "datatrove, odd index": (
        _datatrove() | {"a.ds.index": bytes(9)},
        {},
        r"a\.ds\.index: got 9 bytes, expected a multiple of 8",
    ),
    "datatrove, index": (_datatrove((4, 3, 4)), {}, r"a\.ds\.index: got 3 after 4 at entry 1 from byte 0 on"),
    "datatrove, huge": (_datatrove((2**63, 4)), {}, r"a\.ds\.index: got -\d+ after 0 at entry 0"),
    "datatrove, mask": (
        _datatrove(loss=bytes(3)),
        {},
        r"a\.ds\.loss: got 3 bytes, expected 4, one per token of .*a\.ds",
    ),
    "datatrove, missing": ({"a.ds.index": bytes(8)}, {}, r"a\.ds: is missing, expected it beside a\.ds\.index"),
    "litdata, no chunk": (
        {"index.json": _litdata()["index.json"]},
        {},
        r"chunk-0-0\.bin: is missing, expected it beside .*index\.json",
    ),
    "litdata, no index": (
        {"chunk-0-0.bin": _litdata()["chunk-0-0.bin"]},
        {"format": "litdata"},
        r"index\.json: is missing",
    ),
    "litdata, no json": (_litdata(index='{"chunks": ['), {}, r"index\.json: cannot be read as JSON"),
    "litdata, nested json": (_litdata(index='{"chunks": ' + "[" * 200_000), {}, r"index\.json: cannot be read as JSON"),
    "litdata, no text": (_litdata(index=b'{"chunks": "\xff"}'), {}, r"index\.json: cannot be read as JSON"),
    "litdata, no config": (_litdata(index='{"chunks": []}'), {}, r"index\.json: is damaged .*KeyError: 'config'"),
    "litdata, list": (_litdata(index='[{"chunks": 1}]'), {}, r"index\.json: got list, expected an object"),
    "litdata, strange": (_litdata(index='{"chunks": 1, "config": []}'), {}, r"index\.json: is damaged .*TypeError"),
    "litdata, twice": (
        _litdata(
            index=json.dumps(
                {k: v * 2 if k == "chunks" else v for k, v in json.loads(_litdata()["index.json"]).items()}
            )
        ),
        {},
        r"index\.json: lists chunk-0-0\.bin 2 times, expected each chunk once",
    ),
    "litdata, compressed": (
        _litdata(config={"compression": "gzip"}),
        {},
        r"index\.json: got chunks with compression 'gzip' of each chunk, expected 'zstd'",
    ),
    "litdata, not compressed": (
        _litdata(config={"compression": "zstd"}),
        {},
        r"chunk-0-0\.bin: cannot be decompressed as zstd",
    ),
    "litdata, not in batches": (
        _litdata(config={"compression": "zstd", "compression_level": "batch"}),
        {},
        r"chunk-0-0\.bin: begins with .*, expected litdata's mark of compressed batches",
    ),
    "litdata, encrypted": (
        _litdata(config={"encryption": {"level": "chunk"}}),
        {},
        r"index\.json: got chunks with encryption",
    ),
    "litdata, columns": (
        _litdata(config={"data_format": ["no_header_tensor:16", "int"]}),
        {},
        r"index\.json: got the columns 0, 1, expected arrays or bytes in one of input_ids, tokens",
    ),
    "litdata, a column": (
        _litdata(config={"data_format": ["no_header_tensor:16", "int"]}),
        {"policy": TargetPolicy(column="0")},
        r"chunk-0-0\.bin: sample 0 is damaged: got bytes 16 to 20 of 32",
    ),
    "litdata, digits": (
        _litdata(config={"data_format": ["no_header_tensor:" + "1" * 5000]}),
        {},
        r"index\.json: got items of \['no_header_tensor:1+'\] for None, expected those of one tensor",
    ),
    "litdata, formats": (
        _litdata(config={"data_format": [5]}),
        {},
        r"index\.json: got items of \[5\], expected a list",
    ),
    "litdata, pickles": (
        _litdata(config={"data_format": ["pickle"]}),
        {},
        r"index\.json: got the columns tokens \(pickle\), expected arrays",
    ),
    "litdata, arrays": (
        _litdata(config={"data_format": ["no_header_numpy:2"]}),
        {},
        r"chunk-0-0\.bin: sample 0 is damaged: got bytes 16 to 20 of 32",
    ),
    "litdata, sizes": (
        _litdata(config={"item_loader": "PyTreeLoader"}),
        {},
        r"chunk-0-0\.bin: sample 0 is damaged: got bytes 16 to 20 of 32",
    ),
    "litdata, loader": (
        _litdata(config={"item_loader": "ParquetLoader"}),
        {},
        r"index\.json: got items for 'ParquetLoader', expected those for TokensLoader or PyTreeLoader",
    ),
    "litdata, float": (
        _litdata(config={"data_format": ["no_header_tensor:1"]}),
        {},
        r"index\.json: got items of \['no_header_tensor:1'\] for None, expected .* that is one of",
    ),
    "litdata, elsewhere": (
        _litdata(listed={"filename": "../chunk-0-0.bin"}),
        {},
        r"index\.json: got chunk '\.\./chunk-0-0\.bin'",
    ),
    "litdata, items": (_litdata(listed={"chunk_size": 3}), {}, r"chunk-0-0\.bin: states 2 items, expected the 3 of"),
    "litdata, huge": (
        _litdata(listed={"chunk_size": 10**30}),
        {},
        r"chunk-0-0\.bin: got 32 bytes, expected \d{31} for the header",
    ),
    "litdata, negative": (_litdata(listed={"chunk_size": -3}), {}, r"chunk-0-0\.bin: got 32 bytes, expected -4"),
    "litdata, empty": (_litdata(chunk=b""), {}, r"chunk-0-0\.bin: got 0 bytes, expected 16 for the header"),
    "litdata, truncated": (
        _litdata(chunk=_litdata()["chunk-0-0.bin"][:-1]),
        {},
        r"chunk-0-0\.bin: its items are from byte 16 to 32, expected",
    ),
    "litdata, outside": (
        _litdata(chunk=np.array([2, 16, 99, 32, 1, 2, 3, 4], "<u4").tobytes()),
        {},
        r"chunk-0-0\.bin: got 32 after 99",
    ),
    "litdata, tokens": (
        _litdata(listed={"dim": 3}),
        {},
        r"chunk-0-0\.bin: got 32 bytes, expected 28: it states 3 tokens of int32",
    ),
    "litdata, inside a token": (
        _litdata(chunk=np.array([2, 16, 21, 32, 1, 2, 3, 4], "<u4").tobytes()),
        {"policy": SHIFTED},
        r"chunk-0-0\.bin: got an item that begins inside a token",
    ),
}


EMPTY = {
    "raw": ({"a.bin": b""}, "uint16"),
    "llmc": (_llmc(stated=0, tokens=0), None),
    "npy": (_npy(np.zeros((5, 0), np.uint16)), None),
    "megatron": (_megatron((), (0,), size=0), None),
    "megatron, empty documents": (_megatron((0, 0), (0, 2), size=0), None),
    "fairseq": ({"a.idx": fairseq_index(8, 2, []), "a.bin": b""}, None),
    "datatrove": (_datatrove((), size=0), "uint16"),
    "litdata": (
        _litdata(np.array([2, 16, 16, 16], "<u4").tobytes(), listed={"dim": None}),
        None,
    ),
}


@pytest.mark.parametrize("case", EMPTY)
def test_empty_files_are_no_error_beside_others(case, tmp_path):
    files, dtype = EMPTY[case]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match="data: got no token in"):
        count_corpus([tmp_path], V, policy=SHIFTED, dtype=dtype)
    (tmp_path / "more").mkdir()
    np.save(tmp_path / "more" / "tokens.npy", np.arange(5, dtype=dtype or "uint16"))
    counted = count_corpus([tmp_path, tmp_path / "more"], V, policy=SHIFTED, dtype=dtype)
    assert counted.tokens_seen == 5
    assert [shard.format for shard in counted.provenance.shards] in ([case.partition(",")[0], "npy"], ["npy"])


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_told_of(case, tmp_path):
    files, options, message = BAD[case]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=message):
        count_corpus([tmp_path], V, **options)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("option", ["column", "mask", "skip_prompt"])
def test_columns_are_refused(name, option, tmp_path):
    path = FORMATS[name][0](tmp_path, [np.arange(5, dtype="uint16")] * 3)
    with pytest.raises(ValueError, match=f"{option} 'labels', expected None: a file of {name} has no columns"):
        count_corpus([path], V, policy=TargetPolicy(**{option: "labels"}), dtype="uint16")


def test_a_chunk_that_is_not_listed(tmp_path):
    folder = write_litdata(tmp_path, [np.arange(5, dtype=np.int32)], chunks=1)
    (folder / "chunk-0-1.bin").write_bytes((folder / "chunk-0-0.bin").read_bytes())
    with pytest.raises(ValueError, match=r"chunk-0-1\.bin: is not among the 1 chunks of .*index\.json"):
        count_corpus([folder / "chunk-0-1.bin"], V)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser reads everything")
@pytest.mark.parametrize("name", FORMATS)
def test_unreadable_files_are_told_of(name, tmp_path):
    path = FORMATS[name][0](tmp_path, [np.arange(5, dtype="uint16")] * 3)
    path = path / "chunk-0-0.bin" if path.is_dir() else path
    path.chmod(0)
    with pytest.raises(ValueError, match=rf"{path.name}: cannot be read \(Permission denied\)"):
        count_corpus([path], V, dtype="uint16")


@pytest.mark.parametrize("name", ["llmc", "npy", "megatron", "fairseq", "datatrove", "litdata"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.slow
def test_damaged_files_give_values_errors_or_counts(name, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp(name)
    FORMATS[name][0](folder, [np.arange(n, dtype="uint16") for n in (3, 0, 5)])
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=8))
    path.write_bytes(content)
    try:
        counted = count_corpus([folder], V, policy=SHIFTED, dtype=data.draw(st.sampled_from([None, "uint16"])))
    except ValueError as error:
        told = str(error)
    else:
        told = f"{folder}: {counted.tokens_seen - counted.provenance.tokens} tokens lost"
        assert counted.tokens_seen == counted.provenance.tokens
    assert str(folder) in told or told.startswith("data:")


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_ascending_numbers_are_found(data, tmp_path_factory):
    steps = data.draw(st.lists(st.integers(0, 3), max_size=50))
    repeats = data.draw(st.sampled_from([1, 100, 5000]))
    numbers = np.repeat(np.cumsum(steps), repeats).astype("<u8")
    path = tmp_path_factory.mktemp("numbers") / "numbers"
    numbers.tofile(path)
    ascending = AscendingNumbers(path, "<u8", 0, numbers.size)
    assert ascending.last == (numbers[-1] if numbers.size else 0)
    low, high = sorted(data.draw(st.tuples(st.integers(0, 160), st.integers(0, 160))))
    expected = np.flatnonzero((numbers >= low) & (numbers < high))
    found = [(position + np.arange(values.size), values) for position, values in ascending.between(low, high)]
    positions = np.concatenate([positions for positions, _ in found] or [[]])
    assert positions.tolist() == expected.tolist()
    assert np.concatenate([values for _, values in found] or [[]]).tolist() == numbers[expected].tolist()
    assert ascending.distinct_between(low, high).tolist() == np.unique(numbers[expected]).tolist()


def test_indexes_are_not_held_in_memory(tmp_path):
    documents = 500_000
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(documents))
    lengths = np.ones(documents, np.int64)
    (tmp_path / "a.idx").write_bytes(megatron_index(1, 1, lengths, np.arange(documents + 1)))
    tracemalloc.start()
    try:
        counted = count_corpus([path], V, policy=SHIFTED, threads=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert int(counted.ignored) == documents
    assert peak < 3e6, f"{peak} bytes held of an index of {documents * 20}"


def test_a_count_leaves_the_number_of_threads_alone(tmp_path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        count_corpus([tmp_path / "tokens.bin"], V, dtype="uint16", threads=2)
        assert torch.get_num_threads() == 3
        assert _threads_of_a_new_thread() == 3
        with pytest.raises(ValueError, match="got the id"):
            count_corpus([tmp_path / "tokens.bin"], 5, dtype="uint16", threads=2, strict=True)
        assert torch.get_num_threads() == 3
        assert _threads_of_a_new_thread() == 3
    finally:
        torch.set_num_threads(before)


# In a process of its own, without PyTorch's threads of other tests. Its kernels and additions would divide tables and
# batches of this size.
TASKS = """
import os, sys
import numpy as np, torch
from pdl_ext.corpus import count_corpus
from pdl_ext.corpus.table import Table

def watched(method):
    def run(*arguments):
        method(*arguments)
        tasks.append(len(os.listdir("/proc/self/task")))
    return run

tasks = []
torch.set_num_threads(3)
Table.add, Table.move_to = watched(Table.add), watched(Table.move_to)
# The calling thread has helpers.
torch.zeros(2**20)
before = len(os.listdir("/proc/self/task"))
count_corpus([sys.argv[1]], 50257, dtype="uint16", threads=2)
print(max(tasks) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs to know how many threads a process has")
@pytest.mark.slow
def test_each_thread_counts_by_itself(tmp_path):
    tokens = np.arange(2**22, dtype=np.uint16)
    tokens[tokens >= 50257] = 7
    tokens.tofile(tmp_path / "tokens.bin")
    assert int(fresh_python.run("-c", TASKS, tmp_path / "tokens.bin", check=True).stdout) <= 2


def test_counts_that_overlap_leave_the_number_of_threads_alone(tmp_path, monkeypatch):
    np.arange(3, dtype=np.uint16).tofile(tmp_path / "ends_first.bin")
    np.arange(5, dtype=np.uint16).tofile(tmp_path / "ends_last.bin")
    add, seen = Table.add, []
    both_count, first_has_ended = threading.Barrier(2), threading.Event()

    def recorded(table, batch):
        both_count.wait(60)
        seen.append(_threads_of_a_new_thread())
        if batch.tokens.size == 5:
            first_has_ended.wait(60)
        add(table, batch)

    def count(name):
        count_corpus([tmp_path / name], V, dtype="uint16", threads=1)

    monkeypatch.setattr(Table, "add", recorded)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        last = threading.Thread(target=count, args=("ends_last.bin",))
        last.start()
        count("ends_first.bin")
        first_has_ended.set()
        last.join()
        assert torch.get_num_threads() == 3
        assert _threads_of_a_new_thread() == 3
    finally:
        torch.set_num_threads(before)
    # Those that begin meanwhile keep what they begin with.
    assert seen == [3, 3]


def _threads_of_a_new_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]
