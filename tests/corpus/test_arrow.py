"""Arrow files, Feather and streams: equal counts for each, errors for truncated ones."""

from __future__ import annotations

import numpy as np
import pytest
from column_files import VOCAB, assert_counts, check_damaged, count, joined, sequences
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdl_ext.corpus.formats import arrow
from pdl_ext.corpus.source import ReadOptions

pa = pytest.importorskip("pyarrow")
feather = pytest.importorskip("pyarrow.feather")


def table_of(rows, type=None):
    array = pa.array([row.tolist() for row in rows], type or pa.list_(pa.int32()))
    return pa.table({"attention_mask": array, "input_ids": array})


def write(path, rows, kind="stream", rows_per_batch=9, compression=None, type=None):
    writer = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    table = table_of(rows, type)
    with writer(str(path), table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as file:
        file.write_table(table, max_chunksize=rows_per_batch)
    return path


KINDS = ["file", "stream"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows_per_batch", [1, 9, 1000])
@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_files_and_streams(tmp_path, kind, rows_per_batch, compression):
    rows = sequences(100, dtype="uint16")
    path = write(tmp_path / "no-suffix", rows, kind, rows_per_batch, compression, pa.large_list(pa.uint16()))
    frequency = count(path, targets="shifted")
    assert_counts(frequency, joined(row[1:] for row in rows), joined(rows).size)
    (shard,) = frequency.provenance.shards
    assert (shard.format, shard.dtype) == ("arrow", "uint16")


def test_feather(tmp_path):
    rows = sequences(100)
    feather.write_feather(table_of(rows), str(tmp_path / "a.feather"), chunksize=30)
    assert_counts(count(tmp_path / "a.feather"), joined(rows), joined(rows).size)


def test_files_are_read_in_parts(tmp_path):
    rows = sequences(100)
    path = write(tmp_path / "a.arrow", rows, "file", rows_per_batch=10)
    (source,) = arrow.FORMAT.open(path, ReadOptions(VOCAB))
    parts = list(source.parts(source.size // 3))
    assert [(part.start, part.stop) for part in parts] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert sum(part.size for part in parts) == source.size
    assert len(list(source.parts(1))) == 10
    for part in parts:
        tokens = [batch.tokens for batch in source.batches(part)]
        np.testing.assert_array_equal(joined(tokens), joined(rows[part.start * 10 : part.stop * 10]))


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(tmp_path, kind):
    write(tmp_path / "a.arrow", [], kind)
    write(tmp_path / "b.arrow", [np.array([1, 2])], kind)
    empty = pa.record_batch({"input_ids": pa.array([], pa.list_(pa.int32()))})
    with pa.ipc.new_file(str(tmp_path / "c.arrow"), empty.schema) as file:
        file.write_batch(empty)
    assert_counts(count(tmp_path), np.array([1, 2]), 2)


def test_dictionaries_and_big_endian_columns_beside_the_tokens(tmp_path):
    batch = pa.record_batch({"lang": pa.array(["en", "de"]).dictionary_encode(), "tokens": pa.array([[1], [2, 3]])})
    for kind in (pa.ipc.new_file, pa.ipc.new_stream):
        with kind(str(tmp_path / "a.arrow"), batch.schema) as file:
            file.write_batch(batch)
            file.write_batch(batch)
        assert_counts(count(tmp_path / "a.arrow"), np.array([1, 2, 3] * 2), 6)


@pytest.mark.parametrize("kind", KINDS)
def test_nulls_name_the_row(tmp_path, kind):
    batch = pa.record_batch({"tokens": pa.array([[1], [2, None]])})
    with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(str(tmp_path / "a"), batch.schema) as file:
        file.write_batch(batch.slice(0, 1))
        file.write_batch(batch)
    place = "row 1 of record batch 1" if kind == "file" else "row 2 of the file"
    with pytest.raises(ValueError, match=f"a: column 'tokens' has a null in {place}"):
        count(tmp_path / "a")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_anywhere(tmp_path, kind):
    content = write(tmp_path / "a.arrow", sequences(50), kind).read_bytes()
    # Where a record batch ends, too, which a reader of streams takes for the end.
    ends = [i for i in range(len(content)) if content[i : i + 4] == b"\xff\xff\xff\xff"]
    assert len(ends) > 5
    for size in [*range(8, 20), *range(20, len(content), 197), *ends[1:], len(content) - 1]:
        path = tmp_path / "cut.arrow"
        path.write_bytes(content[:size])
        with pytest.raises(
            ValueError, match=r"cut\.arrow: (is damaged or not in the Arrow format|does not end with the mark)"
        ):
            count(path, format="arrow")


def test_bytes_behind_the_end_of_a_stream(tmp_path):
    path = write(tmp_path / "a.arrow", sequences(50))
    content = path.read_bytes()
    path.write_bytes(content * 2)
    with pytest.raises(
        ValueError, match=rf"a\.arrow: got {2 * len(content)} bytes, expected {len(content)}, where its"
    ):
        count(path)


@pytest.mark.parametrize("size", [2**33, 2**50, 2**63 - 1, 2**64 - 8])
def test_a_body_larger_than_the_file(tmp_path, size):
    path = write(tmp_path / "a.arrow", [np.arange(100)])
    with pa.OSFile(str(path)) as file:
        _, message = pa.ipc.MessageReader.open_stream(file)
    content = path.read_bytes()
    stated = message.body.size.to_bytes(8, "little")
    position = content.index(stated, content.index(message.metadata.to_pybytes()))
    path.write_bytes(content[:position] + size.to_bytes(8, "little") + content[position + 8 :])
    with pytest.raises(ValueError, match=r"a\.arrow: is damaged or not in the Arrow format"):
        count(path)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_are_errors_or_counts(tmp_path, kind, data):
    content = bytearray(write(tmp_path / "a.arrow", sequences(30), kind).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "b.arrow"
    path.write_bytes(content)
    check_damaged(lambda: count(path, format="arrow"), "b.arrow")
