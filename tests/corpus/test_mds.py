"""MDS folders: those of MosaicML's own writer, every encoding, and shards and indexes with wrong data."""

from __future__ import annotations

import itertools
import json
import shutil
import struct

import numpy as np
import pytest
from column_files import VOCAB, assert_counts, check_damaged, count, joined, sequences
from golden_rows import GOLDEN, LABELS, ROWS, TEXTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdl_ext.corpus import count_corpus, counting
from pdl_ext.corpus.formats import mds
from pdl_ext.corpus.reading import batches
from pdl_ext.corpus.reading import samples as reading
from pdl_ext.corpus.source import ReadOptions


def write(folder, columns, shards, version=2, **entry):
    """columns: encodings and sizes by name; shards: samples as bytes by column."""
    folder.mkdir(parents=True)
    names = sorted(columns)
    described = {
        "column_names": names,
        "column_encodings": [columns[name][0] for name in names],
        "column_sizes": [columns[name][1] for name in names],
    }
    config = json.dumps(described).encode()
    entries = []
    for number, samples in enumerate(shards):
        bodies = []
        for sample in samples:
            sizes = [len(sample[name]) for name in names if columns[name][1] is None]
            bodies.append(struct.pack(f"<{len(sizes)}I", *sizes) + b"".join(sample[name] for name in names))
        first = 8 + 4 * len(samples) + len(config)
        offsets = list(itertools.accumulate(map(len, bodies), initial=first))
        content = struct.pack(f"<{len(offsets) + 1}I", len(samples), *offsets) + config + b"".join(bodies)
        name = f"shard.{number:05d}.mds"
        (folder / name).write_bytes(content)
        raw = {"basename": name, "bytes": len(content), "hashes": {}}
        described = described | {"format": "mds", "samples": len(samples), "raw_data": raw, "compression": None}
        entries.append(described | {"zip_data": None, "version": 2} | entry)
    (folder / "index.json").write_text(json.dumps({"shards": entries, "version": version}))
    return folder


def write_tokens(folder, rows, **entry):
    samples = [{"tokens": row.tobytes()} for row in rows]
    half = len(samples) // 2
    return write(folder, {"tokens": ("bytes", None)}, [samples[:half], samples[half:]], **entry)


@pytest.mark.parametrize("folder", ["mds-bytes", "mds-int32", "mds-fixed", "mds-columns"])
@pytest.mark.parametrize("targets", ["all", "shifted"])
def test_what_the_library_wrote(folder, targets):
    rows = [list(range(i, i + 6)) for i in range(40)] if folder == "mds-fixed" else ROWS
    kept = [row[1:] for row in rows] if targets == "shifted" else rows
    frequency = count(GOLDEN / folder, targets=targets, dtype="int64" if folder == "mds-bytes" else None)
    assert_counts(frequency, joined(kept), joined(rows).size)
    shards = frequency.provenance.shards
    assert (len(shards) > 1) == (folder in ("mds-bytes", "mds-columns"))
    assert {shard.format for shard in shards} == {"mds"}
    dtypes = {
        "mds-bytes": {"int64"},
        "mds-int32": {"int32"},
        "mds-fixed": {"uint16"},
        "mds-columns": {"uint16", "int64"},
    }
    assert {shard.dtype for shard in shards} == dtypes[folder]


def test_an_id_outside_of_the_vocabulary_is_named_by_its_sample():
    first = next(number for number, row in enumerate(ROWS) if max(row) > 150)
    with pytest.raises(ValueError, match=rf"shard\.\d+\.mds: sample {first}: got the id 1\d\d, expected 0 <= id < 151"):
        count_corpus([GOLDEN / "mds-int32"], 151, strict=True)


def test_labels_and_masks_that_the_library_wrote():
    targets = [label for row in LABELS for label in row if label != -100]
    frequency = count(GOLDEN / "mds-columns", skip_prompt="labels", mask="attention")
    assert_counts(frequency, np.array(targets), joined(ROWS).size)


def test_texts_that_the_library_wrote(tmp_path):
    pytest.importorskip("tokenizers")
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "c": 2, "é": 3}, "unk_token": "a"}
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(json.dumps({"version": "1.0", "pre_tokenizer": {"type": "Whitespace"}, "model": model}))
    ids = ["abcé".index(word) for text in TEXTS for word in text.split()]
    frequency = count(GOLDEN / "mds-columns", tokenizer=tokenizer)
    assert_counts(frequency, np.array(ids), len(ids))
    with pytest.raises(ValueError, match="got column 'labels' beside texts, expected tokens in 'text'"):
        count(GOLDEN / "mds-columns", tokenizer=tokenizer, skip_prompt="labels")
    with pytest.raises(ValueError, match=r"column 'text' holds text, expected a tokenizer for it \(--tokenizer\)"):
        count(GOLDEN / "mds-columns", column="text")


def test_bytes_need_a_dtype(tmp_path):
    folder = write_tokens(tmp_path / "data", sequences(5))
    with pytest.raises(
        ValueError, match=r"index\.json: column 'tokens' holds bytes.*--dtype\), int64 for files of llm-foundry"
    ):
        count(folder)


@pytest.mark.filterwarnings("ignore:.*cannot hold ids above 127")
@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "int64"])
def test_bytes_of_every_dtype(tmp_path, dtype):
    rows = sequences(60, dtype=dtype)
    folder = write_tokens(tmp_path / "data", rows)
    assert_counts(count(folder, dtype=dtype, targets="shifted"), joined(row[1:] for row in rows), joined(rows).size)


def test_one_shard_or_the_index_may_be_named(tmp_path):
    rows = sequences(60)
    folder = write_tokens(tmp_path / "data", rows)
    assert_counts(count(folder / "shard.00001.mds", dtype="int32"), joined(rows[30:]), joined(rows[30:]).size)
    assert_counts(count(folder / "index.json", dtype="int32"), joined(rows), joined(rows).size)
    assert_counts(count(tmp_path, dtype="int32"), joined(rows), joined(rows).size)
    shutil.copy(folder / "shard.00000.mds", folder / "other.mds")
    with pytest.raises(ValueError, match=r"other\.mds: is not among the 2 shards of"):
        count(folder / "other.mds", dtype="int32")
    (folder / "index.json").unlink()
    for options in ({}, {"format": "mds"}):
        for data in (folder, folder / "other.mds"):
            with pytest.raises(ValueError, match=r"index\.json: is missing, expected it beside the MDS shards"):
                count(data, dtype="int32", **({} if data == folder else options))


def test_parts_are_samples(tmp_path, monkeypatch):
    rows = sequences(60)
    folder = write_tokens(tmp_path / "data", rows)
    source, _ = mds.FORMAT.open(folder, ReadOptions(VOCAB, dtype="int32"))
    parts = list(source.parts(source.size // 4))
    assert len(parts) > 3
    assert sum(part.size for part in parts) == source.size
    for part in parts:
        tokens = [batch.tokens for batch in source.batches(part)]
        np.testing.assert_array_equal(joined(tokens), joined(rows[:30][part.start : part.stop]))
    monkeypatch.setattr(counting, "PART_BYTES", 100)
    assert_counts(count_corpus([folder], VOCAB, dtype="int32", threads=3), joined(rows), joined(rows).size)


@pytest.mark.parametrize("window", [32, 100, 2**20])
def test_samples_longer_than_what_is_read_at_once(tmp_path, monkeypatch, window):
    rows = sequences(12, dtype="int64", longest=300)
    masks = [np.arange(row.size) % 3 for row in rows]
    samples = [
        {"tokens": b"\x41" + b"\x05" + struct.pack("<H", r.size) + r.tobytes(), "m": m.astype(np.uint8).tobytes()}
        for r, m in zip(rows, masks, strict=True)
    ]
    for sample, mask in zip(samples, masks, strict=True):
        sample["m"] = b"\x05" + struct.pack("<H", mask.size) + sample["m"]
    folder = write(tmp_path / "data", {"tokens": ("ndarray", None), "m": ("ndarray:uint8", None)}, [samples])
    monkeypatch.setattr(reading, "_WINDOW_BYTES", window)
    for module in (reading, batches):
        monkeypatch.setattr(module, "BATCH_TOKENS", 4)
    monkeypatch.setattr(reading, "_OFFSETS", 3)
    kept = [row[(mask != 0) & (np.arange(row.size) > 0)] for row, mask in zip(rows, masks, strict=True)]
    assert_counts(count(folder, mask="m", targets="shifted"), joined(kept), joined(rows).size)


def _matrix(array, dtype_told, shape_told):
    """An array as MosaicML encodes it: dtype, axes and their lengths, as far as the column does not tell them."""
    code = next(code for code, name in mds._DTYPES.items() if name == array.dtype.name)
    head = b"" if dtype_told else bytes([code])
    if not shape_told:
        head += bytes([array.ndim << 2 | 1]) + np.array(array.shape, "<u2").tobytes()
    return head + array.tobytes()


@pytest.mark.parametrize("encoding", ["ndarray", "ndarray:uint16", "ndarray:uint16:{shape}"])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (2, 3, 4), (1, 7), (7, 1), (40, 30)])
def test_rows_of_arrays_are_sequences(tmp_path, monkeypatch, encoding, shape):
    for module in (reading, batches):
        monkeypatch.setattr(module, "BATCH_TOKENS", 7)
    arrays = np.random.default_rng(0).integers(0, VOCAB, (4, *shape)).astype(np.uint16)
    encoding = encoding.format(shape=",".join(map(str, shape)))
    told = encoding.count(":")
    samples = [{"tokens": _matrix(array, told > 0, told > 1)} for array in arrays]
    folder = write(tmp_path / "data", {"tokens": (encoding, arrays[0].nbytes if told > 1 else None)}, [samples])
    assert_counts(count(folder), arrays.ravel(), arrays.size)
    assert_counts(count(folder, targets="shifted"), arrays[..., 1:].ravel(), arrays.size)


def test_masks_of_arrays_with_axes(tmp_path):
    tokens, mask = np.arange(6, dtype=np.uint16).reshape(2, 3), np.array([[1, 0, 1], [0, 1, 1]], np.uint8)
    columns = {"tokens": ("ndarray", None), "m": ("ndarray", None)}
    sample = {"tokens": _matrix(tokens, False, False), "m": _matrix(mask, False, False)}
    folder = write(tmp_path / "data", columns, [[sample]])
    assert_counts(count(folder, mask="m", targets="shifted"), np.array([2, 4, 5]), 6)
    sample["m"] = _matrix(mask.reshape(3, 2), False, False)
    folder = write(tmp_path / "other", columns, [[sample]])
    with pytest.raises(ValueError, match=r"'m' has shape \(3, 2\) in sample 0, expected \(2, 3\), that"):
        count(folder, mask="m")


def test_no_samples(tmp_path):
    folder = write(tmp_path / "data", {"tokens": ("ndarray", None)}, [[], [{"tokens": b"\x10\x04\x01\x07\x00"}]])
    assert_counts(count(folder), np.array([7]), 1)


@pytest.mark.parametrize(
    ("columns", "policy", "message"),
    [
        ({"a": ("bytes", None)}, {}, r"index\.json: got the columns a, expected arrays or bytes in one of input_ids"),
        ({"tokens": ("int", 8)}, {}, r"index\.json: got the columns tokens \(int\), expected arrays or bytes"),
        ({"a": ("int", 8)}, {"column": "a"}, r"column 'a' holds 'int', expected arrays of integers, or bytes"),
        ({"a": ("ndarray:float32", None)}, {"column": "a"}, r"column 'a' holds 'ndarray:float32', expected arrays"),
        (
            {"a": ("ndarray:int32:2,3", 23)},
            {"column": "a"},
            r"holds 'ndarray:int32:2,3' in 23 bytes, expected the lengths of its axes and 4 bytes a number",
        ),
        ({"a": ("ndarray:int32:2,x", 24)}, {"column": "a"}, r"holds 'ndarray:int32:2,x' in 24 bytes, expected the len"),
        (
            {"a": ("ndarray:int32:3", 13)},
            {"column": "a"},
            r"holds 'ndarray:int32:3' in 13 bytes, expected the lengths of its axes and 4",
        ),
        ({"a": ("ndarray", None)}, {"column": "b"}, r"index\.json: has no column 'b', expected one of a \(--column\)"),
        ({"tokens": ("ndarray", None)}, {"mask": "m"}, r"has no column 'm', expected one of tokens \(--mask\)"),
        ({"tokens": ("ndarray", None)}, {"skip_prompt": "l"}, r"has no column 'l', .* tokens \(--skip-prompt\)"),
        (
            {"tokens": ("ndarray", None), "m": ("bytes", None)},
            {"mask": "m"},
            r"column 'm' holds 'bytes', expected arrays of integers$",
        ),
    ],
)
def test_wrong_columns(tmp_path, columns, policy, message):
    folder = write(tmp_path / "data", columns, [[]])
    with pytest.raises(ValueError, match=message):
        count(folder, **policy)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (b"", "column 'tokens' of sample 1 is damaged"),
        (b"\x21", "column 'tokens' of sample 1 is damaged"),
        (b"\x22\x04\x01" + bytes(4), "column 'tokens' of sample 1 is damaged"),
        (b"\x21\x08\x01\x02" + bytes(4), "column 'tokens' of sample 1 is damaged"),
        (b"\x21\x00" + bytes(4), "column 'tokens' of sample 1 is damaged"),
        (b"\x21\xfc" + b"\x01" * 9, "column 'tokens' of sample 1 is damaged"),
        (b"\x21\x04\x02" + bytes(4), "column 'tokens' of sample 1 is damaged"),
        (b"\x21\x07\x01" + bytes(4), "column 'tokens' of sample 1 is damaged"),
        (b"\x21\x07" + b"\xff" * 8, "column 'tokens' of sample 1 is damaged"),
    ],
    ids=str,
)
def test_damaged_arrays(tmp_path, sample, message):
    good = b"\x21\x04\x01" + bytes(4)
    folder = write(tmp_path / "data", {"tokens": ("ndarray", None)}, [[{"tokens": good}, {"tokens": sample}]])
    with pytest.raises(ValueError, match=r"shard\.00000\.mds: " + message):
        count(folder)


def test_bytes_that_are_no_multiple(tmp_path):
    folder = write(tmp_path / "data", {"tokens": ("bytes", None)}, [[{"tokens": bytes(9)}]])
    with pytest.raises(ValueError, match=r"shard\.00000\.mds: column 'tokens' of sample 0 is damaged"):
        count(folder, dtype="int64")


def test_a_dtype_that_is_not_that_of_the_arrays_is_an_error(tmp_path):
    columns = {"tokens": ("ndarray", None), "labels": ("bytes", None)}
    sample = {"tokens": b"\x10\x04\x01" + bytes(2), "labels": bytes(8)}
    # Of a shard without samples none is told.
    folder = write(tmp_path / "data", columns, [[sample], []])
    with pytest.raises(ValueError, match=r"shard\.00000\.mds: got dtype int64, expected uint16, which the file states"):
        count(folder, dtype="int64")
    # Of the labels another one may be given.
    assert_counts(count(folder, dtype="int64", skip_prompt="labels"), np.array([0]), 1)
    assert_counts(count(folder, dtype="uint16"), np.array([0]), 1)
    # Counted as int64, and told as what it is.
    array = {"tokens": np.arange(1, dtype="<u8").tobytes()}
    folder = write(tmp_path / "wide", {"tokens": ("ndarray:uint64:1", 8)}, [[array]])
    with pytest.raises(ValueError, match=r"mds: got dtype uint16, expected uint64, which the file states"):
        count(folder, dtype="uint16")
    assert_counts(count(folder, dtype="int64"), np.array([0]), 1)


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "uint64"])
def test_labels_that_were_wrapped(tmp_path, dtype):
    labels = np.array([-100, -100, 3, 4], dtype.removeprefix("u")).view(dtype)
    columns = {"tokens": ("bytes", None), "labels": (f"ndarray:{dtype}:4", labels.nbytes)}
    sample = {"tokens": np.arange(1, 5, dtype="<i8").tobytes(), "labels": labels.tobytes()}
    folder = write(tmp_path / "data", columns, [[sample]])
    assert_counts(count(folder, dtype="int64", skip_prompt="labels"), np.array([3, 4]), 4)


def test_masks_of_other_lengths(tmp_path):
    sample = {"tokens": bytes(8), "m": b"\x04\x03" + bytes(3)}
    folder = write(tmp_path / "data", {"tokens": ("bytes", None), "m": ("ndarray:uint8", None)}, [[sample]])
    with pytest.raises(ValueError, match=r"column 'm' has 3 values in sample 0, expected 2, one per token"):
        count(folder, dtype="int32", mask="m")


def test_text_that_is_not_utf_8(tmp_path):
    pytest.importorskip("tokenizers")
    tokenizer = tmp_path / "tokenizer.json"
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    tokenizer.write_text(json.dumps({"version": "1.0", "model": model}))
    folder = write(tmp_path / "data", {"text": ("str", None)}, [[{"text": b"a"}, {"text": b"\xff"}]])
    with pytest.raises(ValueError, match=r"shard\.00000\.mds: sample 1 is not UTF-8"):
        count(folder, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, 31, r"got 31 samples in \d+ bytes, expected 30, as index\.json says"),
        (0, 2**32 - 1, "got 4294967295 samples in"),
        (4, 8, "got samples from byte 8 to"),
        (4, 2**32 - 1, "got samples from byte 4294967295 to"),
        (4 + 4 * 30, 2**31, r"got samples from byte \d+ to 2147483648, expected"),
        (4 + 4 * 5, 2**32 - 8, "sample 4 is damaged: got bytes .* to 4294967288"),
        (4 + 4 * 5, 0, "sample 4 is damaged: got bytes .* to 0"),
        (4 + 4 * 5, 500, "sample 4 is damaged"),
        (8 + 4 * 30, 0, "cannot be read at byte 128 as JSON"),
    ],
)
def test_shards_that_lie(tmp_path, position, value, message):
    folder = write_tokens(tmp_path / "data", sequences(60))
    shard = folder / "shard.00000.mds"
    content = bytearray(shard.read_bytes())
    struct.pack_into("<I", content, position, value)
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard\.00000\.mds: " + message):
        count(folder, dtype="int32")


def test_a_sample_whose_columns_end_elsewhere(tmp_path):
    folder = write_tokens(tmp_path / "data", sequences(60))
    shard = folder / "shard.00000.mds"
    content = bytearray(shard.read_bytes())
    (begin,) = struct.unpack_from("<I", content, 4)
    for size in (2**32 - 1, 0, 8):
        struct.pack_into("<I", content, begin, size)
        shard.write_bytes(content)
        with pytest.raises(ValueError, match=r"shard\.00000\.mds: sample 0 is damaged: got bytes"):
            count(folder, dtype="int32")


@pytest.mark.parametrize("cut", [1, 100, 1500])
def test_truncated_shards(tmp_path, cut):
    folder = write_tokens(tmp_path / "data", sequences(60))
    shard = folder / "shard.00001.mds"
    content = shard.read_bytes()
    shard.write_bytes(content[:-cut])
    with pytest.raises(ValueError, match=r"shard\.00001\.mds: got "):
        count(folder, dtype="int32")
    shard.write_bytes(content[:5])
    with pytest.raises(ValueError, match=r"shard\.00001\.mds: got 0 samples in 5 bytes, expected 30"):
        count(folder, dtype="int32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "json"}, r"got shards of format 'json', expected 'mds'"),
        ({"samples": 3}, r"shard\.00000\.mds: got 30 samples in \d+ bytes, expected 3"),
        ({"samples": "x"}, r"index\.json: is damaged or not an index of MDS shards .*samples 'x'"),
        ({"samples": 30.0}, r"index\.json: is damaged or not an index of MDS shards .*samples 30\.0"),
        ({"column_names": ["input_ids"]}, r"shard\.00000\.mds: got the columns .*'tokens'.*, expected .*'input_ids'"),
        ({"column_sizes": [8]}, r"shard\.00000\.mds: got the columns .*, expected .*8"),
        ({"column_sizes": [float("inf")]}, r"got no columns of shard\.00000\.mds"),
        ({"column_sizes": [10**40]}, r"got no columns of shard\.00000\.mds"),
        ({"column_sizes": [0]}, r"got no columns of shard\.00000\.mds"),
        ({"column_sizes": []}, r"got no columns of shard\.00000\.mds"),
        ({"column_names": 3}, r"got no columns of shard\.00000\.mds"),
        ({"raw_data": {"basename": "b.mds", "bytes": 1}}, r"b\.mds: is missing, which index\.json lists"),
        ({"raw_data": {"basename": "b" * 5000, "bytes": 1}}, r"b: is missing, which index\.json lists"),
        (
            {"raw_data": {"basename": "b" * 5000}, "zip_data": {"basename": "c"}, "compression": "d"},
            r"c: is compressed",
        ),
        ({"raw_data": {"basename": "../b", "bytes": 1}}, r"got '\.\./b', expected the name of a file in its folder"),
        (
            {"raw_data": {"basename": "shard.00000.mds", "bytes": 1}},
            r"shard\.00000\.mds: got \d+ bytes, expected 1, as",
        ),
        ({"raw_data": None}, r"index\.json: is damaged or not an index of MDS shards"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_indexes_that_lie(tmp_path, changes, message):
    folder = write_tokens(tmp_path / "data", sequences(60), **changes)
    with pytest.raises(ValueError, match=message):
        count(folder, dtype="int32")


def test_a_shard_that_is_listed_twice(tmp_path):
    folder = write_tokens(tmp_path / "data", sequences(60))
    index = json.loads((folder / "index.json").read_text())
    index["shards"].append(index["shards"][0])
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"data: lists .*shard\.00000\.mds twice, expected each file once"):
        count(folder, dtype="int32")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"shards"', "cannot be read as JSON"),
        ('["shards"]', "got list, expected an object"),
        ('{"shards": [], "version": 3}', "got version 3, expected 2"),
        ('{"shards": []}', "is damaged or not an index of MDS shards"),
        ('{"shards": 3, "version": 2}', "is damaged or not an index of MDS shards"),
        ('{"shards": [3], "version": 2}', "is damaged or not an index of MDS shards"),
    ],
)
def test_damaged_indexes(tmp_path, index, message):
    (tmp_path / "index.json").write_text(index)
    with pytest.raises(ValueError, match=r"index\.json: .*" + message):
        count(tmp_path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_are_errors_or_counts(tmp_path, data):
    folder = tmp_path / "data"
    shutil.rmtree(folder, ignore_errors=True)
    rows = sequences(10)
    samples = [{"tokens": b"\x21\x04" + bytes([row.size]) + row.tobytes()} for row in rows]
    shard = write(folder, {"tokens": ("ndarray", None)}, [samples]) / "shard.00000.mds"
    content = bytearray(shard.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    shard.write_bytes(content)
    check_damaged(lambda: count(folder), "shard.00000.mds")
