"""Parquet: equal counts for all row groups, pages and codecs; errors that name damaged files."""

from __future__ import annotations

import resource

import numpy as np
import pytest
from column_files import VOCAB, assert_counts, check_damaged, count, joined, sequences
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdl_ext.corpus import counting
from pdl_ext.corpus.formats import parquet
from pdl_ext.corpus.source import Part, ReadOptions

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def write(path, rows, type=None, **options):
    array = pa.array([row.tolist() for row in rows], type or pa.list_(pa.int32()))
    pq.write_table(pa.table({"other": pa.array(["x" * 50] * len(rows)), "input_ids": array}), path, **options)
    return path


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
@pytest.mark.parametrize("row_group_size", [1, 7, 1000])
def test_row_groups(tmp_path, dtype, row_group_size):
    rows = sequences(100, dtype=dtype)
    path = write(tmp_path / "a.parquet", rows, pa.list_(getattr(pa, dtype)()), row_group_size=row_group_size)
    frequency = count(path)
    assert_counts(frequency, joined(rows), joined(rows).size)
    (shard,) = frequency.provenance.shards
    assert (shard.format, shard.dtype) == ("parquet", dtype)


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
@pytest.mark.parametrize(
    "options", [{}, {"use_dictionary": False}, {"data_page_size": 64}, {"version": "1.0"}], ids=str
)
def test_codecs_and_pages(tmp_path, compression, options):
    rows = sequences(300)
    path = write(tmp_path / "a", rows, compression=compression, row_group_size=90, **options)
    assert_counts(count(path, targets="shifted"), joined(row[1:] for row in rows), joined(rows).size)


def test_parts_are_row_groups_and_each_is_read_alone(tmp_path):
    rows = sequences(100)
    path = write(tmp_path / "a.parquet", rows, row_group_size=10)
    (source,) = parquet.FORMAT.open(path, ReadOptions(VOCAB))
    (whole,) = source.parts(2**40)
    assert (whole.start, whole.stop) == (0, 10)
    parts = list(source.parts(whole.size // 4 + 1))
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert sum(part.size for part in parts) == whole.size == source.size
    assert len(list(source.parts(1))) == 10
    for part in parts:
        tokens = [batch.tokens for batch in source.batches(part)]
        np.testing.assert_array_equal(joined(tokens), joined(rows[part.start * 10 : part.stop * 10]))


def test_parts_over_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(counting, "PART_BYTES", 200)
    rows = sequences(100)
    write(tmp_path / "a.parquet", rows[:50], row_group_size=5)
    write(tmp_path / "b.parquet", rows[50:], row_group_size=5)
    frequency = counting.count_corpus([tmp_path], VOCAB, threads=3)
    assert_counts(frequency, joined(rows), joined(rows).size)


def test_a_large_row_group_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "_LARGEST_WHOLE", 2**20)
    rows = [np.arange(1000) % VOCAB] * 10_000
    array = pa.ListArray.from_arrays(
        np.arange(0, 10_000_001, 1000, dtype=np.int32), np.concatenate(rows).astype(np.int32)
    )
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"tokens": array}), path, use_dictionary=False)
    (source,) = parquet.FORMAT.open(path, ReadOptions(VOCAB))
    before = pa.total_allocated_bytes()
    held = []
    total = 0
    for batch in source.batches(Part(0, 1, 0)):
        total += batch.tokens.size
        held.append(pa.total_allocated_bytes() - before)
    assert total == 10_000_000
    assert max(held) < 12 * 2**20


def test_masks_and_labels(tmp_path):
    table = pa.table(
        {"tokens": pa.array([[1, 2, 3], [4, 5]]), "m": pa.array([[0, 1, 1], [1, 1]]), "labels": [[1, 2, -100], [4, 5]]}
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    frequency = count(tmp_path / "a.parquet", mask="m", skip_prompt="labels")
    assert_counts(frequency, np.array([2, 4, 5]), 5)


def test_a_file_without_rows(tmp_path):
    write(tmp_path / "a.parquet", [])
    write(tmp_path / "b.parquet", [np.array([1, 2])])
    assert_counts(count(tmp_path), np.array([1, 2]), 2)


def test_nulls_name_row_and_row_group(tmp_path):
    table = pa.table({"tokens": pa.array([[1], [2], [3], [4, None]])})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    with pytest.raises(ValueError, match=r"a\.parquet: column 'tokens' has a null in row 1 of row group 1"):
        count(tmp_path / "a.parquet")


def test_a_file_cut_anywhere(tmp_path):
    content = write(tmp_path / "a.parquet", sequences(50), row_group_size=20).read_bytes()
    for size in [*range(1, 12), *range(20, len(content), 97), len(content) - 1]:
        path = tmp_path / "cut.parquet"
        path.write_bytes(content[:size])
        with pytest.raises(
            ValueError, match=r"cut\.parquet: (is damaged or not in the Parquet format|its format is unknown)"
        ):
            count(path)


def test_a_page_that_fails_its_checksum(tmp_path):
    path = write(
        tmp_path / "a.parquet", sequences(50), write_page_checksum=True, compression="none", use_dictionary=False
    )
    content = bytearray(path.read_bytes())
    leaf = pq.read_metadata(path).row_group(0).column(1)
    content[leaf.data_page_offset + leaf.total_compressed_size - 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet: is damaged or not in the Parquet format \(.*[Cc][Rr][Cc]"):
        count(path)


def test_a_page_larger_than_the_file(tmp_path):
    path = write(tmp_path / "a.parquet", [np.arange(100)], compression="none", use_dictionary=False)
    leaf = pq.read_metadata(path).row_group(0).column(1)
    content = path.read_bytes()
    # A page's header begins with its type, its size, and its size in the file; each number ends at a byte below 128.
    position = leaf.data_page_offset + 3
    assert content[position - 3 : position] == b"\x15\x00\x15"
    position = next(i for i in range(position, len(content)) if content[i] < 128) + 2
    end = next(i for i in range(position, len(content)) if content[i] < 128) + 1
    path.write_bytes(content[:position] + b"\xfe\xff\xff\xff\x0f" + content[end:])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"a\.parquet: is damaged or not in the Parquet format .*2147483647"):
        count(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_are_errors_or_counts(tmp_path, data):
    content = bytearray(write(tmp_path / "a.parquet", sequences(30), row_group_size=10).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "b.parquet"
    path.write_bytes(content)
    check_damaged(lambda: count(path, format="parquet"), "b.parquet")
