"""Compressed shards of MDS and litdata, and litdata's items with columns: as their writers wrote them, and damaged."""

from __future__ import annotations

import bz2
import gzip
import json
import random
import shutil
import struct
import warnings

import numpy as np
import pytest
from column_files import VOCAB, assert_counts, check_damaged, count, joined, sequences
from flat_files import write_litdata
from golden_rows import GOLDEN, LABELS, ROWS, TEXTS
from test_mds import write, write_tokens
from text_tokenizer import counts_of, save_tokenizer

from pdl_ext.corpus import count_corpus
from pdl_ext.corpus.formats import litdata, mds
from pdl_ext.corpus.reading import compression, samples
from pdl_ext.corpus.reading.compression import decompressed
from pdl_ext.corpus.source import ReadOptions

pa = pytest.importorskip("pyarrow")
PACK = {
    "zstd": lambda content: pa.compress(content, "zstd", asbytes=True),
    "gz": gzip.compress,
    "bz2": bz2.compress,
}
ANSWERS = np.array([label for row in LABELS for label in row if label != -100])


def pack_mds(folder, name="zstd"):
    """Replaces the shards of a folder by compressed ones, as MDSWriter has them."""
    index = json.loads((folder / "index.json").read_text())
    for entry in index["shards"]:
        raw = folder / entry["raw_data"]["basename"]
        packed = raw.with_name(f"{raw.name}.{name}")
        packed.write_bytes(PACK[name](raw.read_bytes()))
        raw.unlink()
        entry["compression"] = f"{name}:3"
        entry["zip_data"] = {"basename": packed.name, "bytes": packed.stat().st_size, "hashes": {}}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def pack_litdata(folder):
    index = json.loads((folder / "index.json").read_text())
    index["config"]["compression"] = "zstd"
    for chunk in index["chunks"]:
        raw = folder / chunk["filename"]
        chunk["filename"] = raw.name.replace(".bin", ".zstd.bin")
        (folder / chunk["filename"]).write_bytes(PACK["zstd"](raw.read_bytes()))
        raw.unlink()
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def test_shards_that_mosaic_ml_wrote():
    assert_counts(count(GOLDEN / "mds-zstd"), joined(ROWS[5:6]), len(ROWS[5]))
    for targets, start in (("all", 0), ("shifted", 1)):
        frequency = count(GOLDEN / "mds-gz", targets=targets)
        assert_counts(frequency, joined(row[start:] for row in ROWS), joined(ROWS).size)
    assert_counts(count(GOLDEN / "mds-gz", skip_prompt="labels", mask="attention"), ANSWERS, joined(ROWS).size)
    plain, packed = (count(GOLDEN / name).provenance.shards for name in ("mds-columns", "mds-gz"))
    assert [(shard.format, shard.dtype) for shard in plain] == [(shard.format, shard.dtype) for shard in packed]
    assert all(shard.name.endswith(".mds.gz") for shard in packed)


def test_chunks_that_litdata_wrote(tmp_path):
    assert_counts(count(GOLDEN / "litdata-zstd-chunk"), joined(ROWS), joined(ROWS).size)
    shifted = count(GOLDEN / "litdata-zstd-chunk", targets="shifted")
    assert_counts(shifted, joined(row[1:] for row in ROWS), joined(ROWS).size)
    tokenizer = save_tokenizer(tmp_path / "tokenizer.json")
    for name in ("litdata-columns", "litdata-zstd-batch"):
        folder = GOLDEN / name
        assert_counts(count(folder), joined(ROWS), joined(ROWS).size)
        assert_counts(count(folder, skip_prompt="labels"), ANSWERS, joined(ROWS).size)
        assert_counts(
            count(folder, column="grid", targets="shifted"), joined(row[1:] for row in ROWS), joined(ROWS).size
        )
        pairs = joined(row[1:] for row in ROWS for _ in range(2))
        assert_counts(count(folder, column="pair", targets="shifted"), pairs, 2 * joined(ROWS).size)
        texts = count_corpus([folder], 320, tokenizer=tokenizer).counts.numpy()
        np.testing.assert_array_equal(texts, counts_of(tokenizer, TEXTS))
        with pytest.raises(ValueError, match=r"index\.json: column 'id' holds 'int', expected arrays of integers"):
            count(folder, column="id")
        with pytest.raises(ValueError, match=r"index\.json: has no column 'no', expected one of text, input_ids"):
            count(folder, column="no")


@pytest.mark.parametrize("name", PACK)
def test_one_shard_or_the_index_may_be_named(tmp_path, name):
    rows = sequences(60)
    folder = pack_mds(write_tokens(tmp_path / "data", rows), name)
    assert_counts(count(folder, dtype="int32"), joined(rows), joined(rows).size)
    one = folder / f"shard.00001.mds.{name}"
    assert_counts(count(one, dtype="int32"), joined(rows[30:]), joined(rows[30:]).size)
    assert_counts(count(folder / "index.json", dtype="int32"), joined(rows), joined(rows).size)
    (folder / "index.json").unlink()
    for data in (folder, one):
        with pytest.raises(ValueError, match=r"index\.json: is missing, expected it beside the MDS shards"):
            count(data, dtype="int32")


def test_a_raw_shard_is_read_where_both_are_there(tmp_path):
    rows = sequences(9)
    folder = write_tokens(tmp_path / "data", rows)
    raw = (folder / "shard.00000.mds").read_bytes()
    pack_mds(folder)
    (folder / "shard.00000.mds").write_bytes(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frequency = count(folder, dtype="int32")
    assert_counts(frequency, joined(rows), joined(rows).size)


@pytest.mark.parametrize("block", [1, 7, 100, 5000])
@pytest.mark.parametrize("name", ["mds-gz", "litdata-zstd-batch", "litdata-zstd-chunk"])
def test_blocks_end_anywhere(monkeypatch, name, block):
    """Inside of a number, of what is not read between two samples, of what tells of the samples."""
    monkeypatch.setattr(compression, "_BLOCK_BYTES", block)
    assert_counts(count(GOLDEN / name, targets="shifted"), joined(row[1:] for row in ROWS), joined(ROWS).size)
    if name != "litdata-zstd-chunk":
        assert_counts(count(GOLDEN / name, skip_prompt="labels"), ANSWERS, joined(ROWS).size)


@pytest.mark.parametrize("name", ["br", "snappy"])
def test_other_compressions_are_named_with_the_way_out(tmp_path, name):
    folder = pack_mds(write_tokens(tmp_path / "data", sequences(9)))
    index = json.loads((folder / "index.json").read_text())
    for entry in index["shards"]:
        entry["compression"] = name
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError,
        match=rf"is compressed \({name}\), expected zstd or gz or bz2, or shard.*: decompress it into its folder",
    ):
        count(folder, dtype="int32")


@pytest.mark.parametrize("level", ["sample", "arrow"])
def test_other_levels_of_litdata_are_named(tmp_path, level):
    folder = pack_litdata(write_litdata(tmp_path, sequences(5)))
    index = json.loads((folder / "index.json").read_text())
    index["config"]["compression_level"] = level
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"index\.json: got chunks with compression 'zstd' of each {level}, expected"):
        count(folder)


@pytest.mark.parametrize("targets", ["all", "shifted"])
def test_compressed_token_streams_of_litdata(tmp_path, targets):
    rows = sequences(50)
    folder = pack_litdata(write_litdata(tmp_path, rows))
    kept = [row[1:] for row in rows] if targets == "shifted" else rows
    assert_counts(count(folder, targets=targets), joined(kept), joined(rows).size)
    assert {shard.dtype for shard in count(folder).provenance.shards} == {"int32"}


def test_items_of_a_single_tensor_without_a_loader_of_tokens(tmp_path):
    rows = sequences(20)
    folder = write_litdata(tmp_path, rows, chunks=1, item_loader="PyTreeLoader")
    items = [struct.pack("<I", row.nbytes) + row.tobytes() for row in rows]
    offsets = 4 * (len(rows) + 2) + np.cumsum([0, *map(len, items)])
    (folder / "chunk-0-0.bin").write_bytes(np.array([len(rows), *offsets], "<u4").tobytes() + b"".join(items))
    assert_counts(count(folder, targets="shifted"), joined(row[1:] for row in rows), joined(rows).size)
    assert_counts(count(folder, column="tokens"), joined(rows), joined(rows).size)


@pytest.mark.parametrize("order", "<>")
def test_tensors_with_a_header_of_either_order(order):
    head = struct.pack(f"{order}IIII", 16, 2, 3, 4) + bytes(48)
    assert litdata._prefix(litdata._TENSORS, head, None) == (np.dtype("<i4"), (3, 4), 16)
    for damaged in (head[:7], head[:12], struct.pack("<II", 1, 1) + head[8:], struct.pack("<II", 16, 10**6)):
        assert litdata._prefix(litdata._TENSORS, damaged, None)[1] is None


@pytest.mark.parametrize("limit", ["_LARGEST_PACKED_HEAD", "_LARGEST_PACKED_SAMPLE"])
def test_what_would_not_fit_into_memory_is_refused(tmp_path, monkeypatch, limit):
    folder = pack_mds(write_tokens(tmp_path / "data", sequences(60)))
    monkeypatch.setattr(samples, limit, 30)
    with pytest.raises(
        ValueError, match=r"00000\.mds\.zstd: got \d+ bytes .* in a compressed shard: decompress it first"
    ):
        count(folder, dtype="int32")


def test_a_bomb_is_read_piece_by_piece(tmp_path):
    """A sample of 48 MiB in a shard of a few KB: the decompressor never returns more than a block at once."""
    folder = pack_mds(write(tmp_path / "data", {"tokens": ("bytes", None)}, [[{"tokens": bytes(48 * 2**20)}]]))
    assert (folder / "shard.00000.mds.zstd").stat().st_size < 20_000
    assert int(count(folder, dtype="int32").counts[0]) == 12 * 2**20
    index = json.loads((folder / "index.json").read_text())
    # Behind what it states there is more.
    packed = folder / "shard.00000.mds.zstd"
    packed.write_bytes(packed.read_bytes() + PACK["zstd"](bytes(2**20)))
    index["shards"][0]["zip_data"]["bytes"] = packed.stat().st_size
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"mds\.zstd: decompresses to \d+ bytes, expected \d+"):
        count(folder, dtype="int32")


def damaged_bytes(generator, content):
    damaged = bytearray(content)
    for _ in range(generator.randint(1, 4)):
        damaged[generator.randrange(min(len(damaged), 600))] = generator.choice([0, 1, 255, generator.randrange(256)])
    return bytes(damaged[: generator.choice([len(damaged), generator.randrange(len(damaged))])])


@pytest.mark.parametrize("name", ["mds-gz", "mds-zstd", "litdata-columns", "litdata-zstd-batch", "litdata-zstd-chunk"])
def test_damaged_shards_give_errors_alone(tmp_path, name):
    """Of a shard as it lies there, and of what it is when it is decompressed."""
    folder = tmp_path / "data"
    shutil.copytree(GOLDEN / name, folder)
    file = next(path for path in sorted(folder.iterdir()) if path.name != "index.json")
    whole, generator = file.read_bytes(), random.Random(name)
    packs = {"mds-gz": PACK["gz"], "mds-zstd": PACK["zstd"], "litdata-zstd-chunk": PACK["zstd"]}
    compression = "gzip" if name == "mds-gz" else "zstd"
    unpacked = b"".join(decompressed(file, compression)) if name in packs else b""
    for number in range(120):
        if unpacked and number % 2:
            file.write_bytes(packs[name](damaged_bytes(generator, unpacked)))
        else:
            file.write_bytes(damaged_bytes(generator, whole))
        if name.startswith("mds"):
            index = json.loads((folder / "index.json").read_text())
            index["shards"][0]["zip_data"]["bytes"] = file.stat().st_size
            (folder / "index.json").write_text(json.dumps(index))
        options = {"targets": ["all", "shifted"][number % 3 // 2]}
        check_damaged(lambda options=options: count(folder, **options), str(folder))


def test_a_sample_tells_how_many_tokens_there_are():
    for name, module in (("mds-gz", mds), ("litdata-zstd-batch", litdata)):
        sources = module.FORMAT.open(GOLDEN / name, ReadOptions(VOCAB))
        found = [source.sample() for source in sources]
        assert sum(sample.tokens for sample in found) == joined(ROWS).size
        assert [sample.size for sample in found] == [source.size for source in sources]
