"""Objects in Python: datasets, tables of Arrow and iterables of arrays have the counts of files with the same data."""

from __future__ import annotations

import array
import itertools
import re

import numpy as np
import pytest
import torch
from column_files import VOCAB, assert_counts, joined, sequences
from golden_rows import CHOSEN, LABELS, ROWS, TEXTS
from text_tokenizer import counts_of, save_tokenizer

from pdl_ext import TokenFrequency
from pdl_ext.corpus import TargetPolicy, count_corpus, counting, objects
from pdl_ext.corpus.reading import arrays, batches

pa = pytest.importorskip("pyarrow")
COLUMNS = {"text": TEXTS, "input_ids": ROWS, "labels": LABELS, "mask": [[i % 2 for i in row] for row in ROWS]}


@pytest.fixture(scope="module")
def datasets():
    return pytest.importorskip("datasets", reason="datasets is not installed: pip install 'pdl_ext[trl]'")


@pytest.fixture(scope="module")
def dataset(datasets):
    return datasets.Dataset.from_dict(COLUMNS)


def count(data, **options) -> TokenFrequency:
    policy = {name: options.pop(name) for name in ("targets", "mask", "skip_prompt", "column") if name in options}
    return count_corpus(data, VOCAB, policy=TargetPolicy(**policy), **options)


def test_a_dataset_counts_as_its_rows(dataset):
    targets = [label for row in LABELS for label in row[1:] if label != -100]
    frequency = count(dataset, targets="shifted", skip_prompt="labels")
    assert_counts(frequency, np.array(targets), joined(ROWS).size)
    (shard,) = frequency.provenance.shards
    assert shard.name == f"datasets.Dataset {dataset._fingerprint}: 40 rows of input_ids, labels"
    assert (shard.format, shard.dtype, frequency.provenance.tokens) == ("datasets.Dataset", "int32", joined(ROWS).size)
    assert shard.size > 4 * frequency.provenance.tokens


def test_chosen_and_shuffled_rows_of_a_dataset(dataset, monkeypatch):
    # Several parts, and several pieces of each.
    monkeypatch.setattr(counting, "_LEAST_PART_BYTES", 2000)
    monkeypatch.setattr(objects, "_PIECE_BYTES", 300)
    chosen = joined(ROWS[row] for row in CHOSEN)
    assert_counts(count(dataset.select(CHOSEN), threads=3), chosen, chosen.size)
    for shuffled in (dataset.shuffle(seed=1), dataset.select(range(40)), dataset.sort("text")):
        assert_counts(count(shuffled, threads=3), joined(ROWS), joined(ROWS).size)


def test_a_dataset_on_disk_is_the_same_and_no_lists_are_made(dataset, tmp_path, monkeypatch):
    dataset.save_to_disk(tmp_path / "saved", num_shards=2)
    from datasets import load_from_disk
    from datasets.formatting import formatting

    monkeypatch.setattr(formatting, "_arrow_array_to_numpy", None, raising=False)
    for name in ("format_row", "format_column", "format_batch"):
        monkeypatch.setattr(formatting.PythonFormatter, name, None)
    expected = count([tmp_path / "saved"], mask="mask")
    assert torch.equal(count(load_from_disk(tmp_path / "saved"), mask="mask").counts, expected.counts)


def test_a_dataset_of_texts(dataset, tmp_path):
    tokenizer = save_tokenizer(tmp_path / "tokenizer.json")
    frequency = count_corpus(dataset, 320, tokenizer=tokenizer)
    np.testing.assert_array_equal(frequency.counts.numpy(), counts_of(tokenizer, TEXTS))
    assert frequency.provenance.tokenizer is not None


def test_the_same_dataset_is_not_merged_twice(dataset):
    frequency = count(dataset)
    with pytest.raises(ValueError, match=r"datasets\.Dataset .*: got the same content as"):
        frequency.merge(count(dataset))
    frequency.merge(count(dataset.select(range(3, 9))))
    assert frequency.total == joined(ROWS).size + joined(ROWS[3:9]).size


def test_a_count_of_a_dataset_goes_on_from_its_checkpoint(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(counting, "_LEAST_PART_BYTES", 2000)
    count(dataset, checkpoint=tmp_path / "c")
    monkeypatch.setattr(counting._Worker, "run", lambda worker: worker.done.set())
    assert count(dataset, checkpoint=tmp_path / "c").total == joined(ROWS).size
    with pytest.raises(ValueError, match="is that of another count"):
        count(dataset.select(range(5)), checkpoint=tmp_path / "c")


def test_a_dataset_with_a_transform_is_refused(dataset):
    with pytest.raises(
        ValueError, match=r"data: got a Dataset with a transform, .* Use map instead, or pass the ids alone"
    ):
        count(dataset.with_transform(lambda batch: batch))
    assert_counts(count(row["input_ids"] for row in dataset.with_format("numpy")), joined(ROWS), joined(ROWS).size)


@pytest.mark.parametrize("is_typed", [False, True])
def test_a_streamed_dataset(datasets, dataset, is_typed, monkeypatch):
    monkeypatch.setattr(objects, "_STREAMED_ROWS", 7)

    def rows():
        yield from ({name: COLUMNS[name][row] for name in COLUMNS} for row in range(40))

    streamed = dataset.to_iterable_dataset(3) if is_typed else datasets.IterableDataset.from_generator(rows)
    for data in (streamed, streamed.map(lambda row: row), streamed.shuffle(seed=1, buffer_size=5)):
        frequency = count(data, targets="shifted", skip_prompt="labels")
        targets = [label for row in LABELS for label in row[1:] if label != -100]
        assert_counts(frequency, np.array(targets), joined(ROWS).size)
        (shard,) = frequency.provenance.shards
        # A map makes a typed one untyped.
        dtype = "int32" if is_typed and data.features else "int64"
        assert (shard.name, shard.dtype) == (
            "datasets.IterableDataset: 40 rows of input_ids, labels",
            dtype,
        )
        assert shard.size > 4 * joined(ROWS).size
    assert count(streamed.take(5)).total == joined(ROWS[:5]).size
    for name in ("checkpoint", "group"):
        options = {name: {"checkpoint": "c", "group": object()}[name]}
        monkeypatch.setattr(counting, "check_group", lambda group: group)
        with pytest.raises(ValueError, match=rf"{name}: got one with datasets\.IterableDataset, which is read once"):
            count(streamed, **options)


def test_no_more_of_a_streamed_dataset_is_held_than_some_bytes_and_a_row(datasets, monkeypatch):
    monkeypatch.setattr(objects, "_PIECE_BYTES", 10_000)
    held = []
    batches_of = objects.Columns.batches
    monkeypatch.setattr(
        objects.Columns,
        "batches",
        lambda self, rows: batches_of(self, [held.append(some.batch) or some for some in rows]),
    )
    lengths = [1, 2000, 3, *[400] * 20, 1, 1, 5000, *[1] * 30]
    # Beside a column that is not read, and is held all the same.
    rows = [{"input_ids": [7] * length, "other": "x" * 8 * length} for length in lengths]
    frequency = count(datasets.IterableDataset.from_generator(lambda: iter(rows)))
    assert_counts(frequency, np.full(sum(lengths), 7), sum(lengths))
    assert sum(batch.num_rows for batch in held) == len(lengths)
    sizes = [2 * batch.nbytes for batch in held]
    assert max(sizes) < 10_000 + 2 * 8 * 5000 + 100
    assert sorted(sizes)[-3] < 10_000 + 2 * 8 * 400 + 100
    assert len(held) < 14


def test_rows_of_a_streamed_dataset_may_tell_their_types_in_part(datasets, monkeypatch):
    """Each by itself: an empty list is one of nothing, and a column may be there in some rows alone."""
    rows = [{"input_ids": []}, {"input_ids": [1, 2]}, {"x": "a", "input_ids": [3]}, {"input_ids": []}]
    for size in (2, 1000):
        monkeypatch.setattr(objects, "_STREAMED_ROWS", size)
        frequency = count(datasets.IterableDataset.from_generator(lambda: iter(rows)))
        assert_counts(frequency, np.array([1, 2, 3]), 3)
        assert frequency.provenance.shards[0].name == "datasets.IterableDataset: 4 rows of input_ids"
    for other, message in [
        (
            {"input_ids": ["a"]},
            r"^data: got rows 0 to 1 with columns that do not go together \(.*\), expected the same",
        ),
        ({"input_ids": 5}, r"^data: got rows 0 to 1 with columns that do not go together"),
        ({"input_ids": None}, r"^data: column 'input_ids' is null in row 1 of the data"),
        ({"y": 5}, r"^data: column 'input_ids' is null in row 1 of the data"),
    ]:
        some = [rows[1], other]
        with pytest.raises(ValueError, match=message):
            count(datasets.IterableDataset.from_generator(lambda some=some: iter(some)))


def test_splits_are_refused_with_the_way_out(datasets, dataset):
    splits = datasets.DatasetDict({"train": dataset, "test": dataset})
    for data in (splits, datasets.IterableDatasetDict({"train": dataset.to_iterable_dataset()})):
        with pytest.raises(TypeError, match=r"data: got \w*DatasetDict with 'train'.*data\[\.\.\.\] of the split"):
            count(data)
    assert count(splits["train"]).total == joined(ROWS).size


def test_tables(monkeypatch):
    table = pa.table(COLUMNS)
    expected = [
        token
        for row, marks in zip(ROWS, COLUMNS["mask"], strict=True)
        for token, mark in zip(row, marks, strict=True)
        if mark
    ]
    for data in (table, pa.concat_tables([table[:10], table[10:]]), table.to_batches()[0]):
        frequency = count(data, mask="mask")
        assert_counts(frequency, np.array(expected), joined(ROWS).size)
        name = {"Table": "Table", "RecordBatch": "RecordBatch"}[type(data).__name__]
        assert frequency.provenance.shards[0].name == f"pyarrow.{name}: 40 rows of input_ids, mask"
    monkeypatch.setattr(counting, "_LEAST_PART_BYTES", 1000)
    assert_counts(count(table[7:33], threads=4), joined(ROWS[7:33]), joined(ROWS[7:33]).size)
    # Whatever its chunks are.
    first = count(table)
    with pytest.raises(ValueError, match="got the same content as"):
        first.merge(count(pa.concat_tables([table[:10], table[10:]])))
    first.merge(count(table[1:]))


@pytest.mark.parametrize("place", [0, 5000, 9999])
def test_tables_are_told_apart_by_their_ends(place):
    """As files are, by size, head and tail."""
    ids = np.arange(10_000) % VOCAB
    first = count(pa.table({"tokens": pa.array(ids.reshape(-1, 100).tolist())}))
    ids[place] += 1
    second = count(pa.table({"tokens": pa.array(ids.reshape(-1, 100).tolist())}))
    if place == 5000:
        with pytest.raises(ValueError, match="got the same content as"):
            first.merge(second)
    else:
        first.merge(second)


def test_frames_of_pandas():
    pandas = pytest.importorskip("pandas", reason="pandas comes with datasets")
    assert_counts(count(pandas.DataFrame({"tokens": ROWS})), joined(ROWS), joined(ROWS).size)
    with pytest.raises(ValueError, match=r"data: got the columns a, expected lists of token ids"):
        count(pandas.DataFrame({"a": ROWS}))
    with pytest.raises(TypeError, match=r"data: got Int64Array, expected a table of Arrow"):
        count(pa.array([1, 2]))


def test_errors_of_tables_name_the_argument_and_the_row():
    with pytest.raises(ValueError, match=r"^data: column 'input_ids' is null in row 2 of the data, expected no nulls"):
        count(pa.table({"input_ids": [[1], [2], None]}))
    with pytest.raises(ValueError, match=r"^data: row 1 of the data: got the id 200, expected 0 <= id < 200$"):
        count(pa.table({"input_ids": [[1], [200]]}), strict=True)
    with pytest.raises(ValueError, match=r"^data: got no token, expected some$"):
        count(pa.table({"input_ids": pa.array([[], []], pa.list_(pa.int32()))}))
    offsets = pa.py_buffer(np.array([0, 2, 1, 3], np.int32))
    ids = pa.array([1, 2, 3], pa.int32())
    broken = pa.ListArray.from_buffers(pa.list_(pa.int32()), 3, [None, offsets], children=[ids])
    with pytest.raises(ValueError, match=r"^data: is damaged \("):
        count(pa.table({"input_ids": broken}))


def rows_as(kind):
    rows = sequences(300, seed=4, dtype="int32")
    makers = {
        "NumPy": lambda row: row,
        "strided": lambda row: np.repeat(row, 2)[::2],
        "read-only": lambda row: np.frombuffer(row.tobytes(), np.int32),
        "big-endian": lambda row: row.astype(">i4"),
        "int16": lambda row: row.astype(np.int16),
        "uint64": lambda row: row.astype(np.uint64),
        "tensors": torch.from_numpy,
        "lists": lambda row: row.tolist(),
        "tuples": lambda row: tuple(row.tolist()),
        "array": lambda row: array.array("i", row.tolist()),
        "Arrow": lambda row: pa.array(row),
    }
    return rows, map(makers[kind], rows)


@pytest.mark.parametrize(
    "kind",
    ["NumPy", "strided", "read-only", "big-endian", "int16", "uint64", "tensors", "lists", "tuples", "array", "Arrow"],
)
@pytest.mark.parametrize("targets", ["all", "shifted"])
def test_iterables_of_arrays(kind, targets):
    rows, data = rows_as(kind)
    kept = [row[1:] for row in rows] if targets == "shifted" else rows
    frequency = count(data, targets=targets)
    assert_counts(frequency, joined(kept), joined(rows).size)
    (shard,) = frequency.provenance.shards
    assert shard.name == "map: 300 arrays"
    assert shard.digest != count([np.arange(3)]).provenance.shards[0].digest
    assert frequency.provenance.policy.targets == targets


def test_memory_that_is_used_again_is_counted_before(monkeypatch):
    rows = sequences(200, seed=2)
    buffer = np.empty(64, np.int32)

    def refilled():
        for row in rows:
            buffer[: row.size] = row
            yield buffer[: row.size]
            buffer[:] = -1

    assert_counts(count(refilled()), joined(rows), joined(rows).size)
    monkeypatch.setattr(batches, "BATCH_TOKENS", 8)
    assert_counts(count(refilled(), targets="shifted"), joined(row[1:] for row in rows), joined(rows).size)


def test_rows_of_the_last_axis_are_sequences(monkeypatch):
    cube = np.random.default_rng(0).integers(0, VOCAB, (4, 5, 6))
    for size in (7, 2**18):
        monkeypatch.setattr(arrays, "_BATCH_TOKENS", size)
        for data in (cube, torch.from_numpy(cube), [cube], iter(cube), cube.astype(np.uint16)):
            frequency = count(data, targets="shifted")
            assert_counts(frequency, cube[..., 1:].reshape(-1), cube.size)


def test_one_array_is_one_sequence():
    for data in (np.arange(9), torch.arange(9), [list(range(9))]):
        assert_counts(count(data, targets="shifted"), np.arange(1, 9), 9)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([1, 2, 3], TypeError, r"data: got int as item 0, expected an array of ids: pass \[data\] if"),
        (itertools.count(), TypeError, r"data: got int as item 0"),
        ([[1, 2], None], TypeError, r"data: got NoneType as item 1, expected an array of ids"),
        ([[1, 2], "a.bin"], TypeError, r"data: got str as item 1, expected an array of ids"),
        ([[1.5, 2]], TypeError, r"data: got list as item 0 of float64 in 1 axes, expected integers"),
        ([[True, False]], TypeError, r"data: got list as item 0 of bool"),
        ([[[1, 2], [3]]], ValueError, r"data: got list as item 0, expected an array of ids, one axis of the same"),
        ([np.array([1, [2]], object)], TypeError, r"data: got ndarray as item 0 of object in 1 axes"),
        ([np.array(3)], TypeError, r"data: got ndarray as item 0 of int64 in 0 axes"),
        ([torch.ones(3)], TypeError, r"data: got Tensor as item 0 of torch\.float32, expected integers"),
        ([torch.ones(3, dtype=torch.bfloat16)], TypeError, r"data: got Tensor as item 0 of torch\.bfloat16"),
        (
            [{"input_ids": [1]}],
            TypeError,
            r"data: got dict as item 0, .*row\['input_ids'\] for row in data.*count_labels",
        ),
        ({"input_ids": [1]}, TypeError, r"data: got dict with 'input_ids', expected one of its values"),
        (7, TypeError, r"data: got 7, expected a list of files"),
        ([], ValueError, r"^data: got list with nothing in it, expected files, folders or patterns, or arrays of ids$"),
        ({}, TypeError, r"^data: got dict with nothing, expected one of its values"),
        (
            iter([]),
            ValueError,
            r"^data: got list_iterator with nothing in it, expected files, .*: make it anew, since an iterator",
        ),
        ([[], []], ValueError, r"^data: got no token, expected some$"),
    ],
    ids=range(18),
)
def test_what_is_no_data_is_refused_with_the_way_out(data, error, message):
    with pytest.raises(error, match=message):
        count(data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"column": "a"}, "data: got arrays with column 'a', expected None: they have no columns"),
        ({"mask": "a"}, "data: got arrays with mask 'a'"),
        ({"skip_prompt": "a"}, "data: got arrays with skip_prompt 'a'"),
        ({"dtype": "uint16"}, "dtype: got 'uint16' with arrays, expected None: arrays have their own"),
        ({"format": "raw"}, "format: got 'raw' with data in memory, expected None: it is for files"),
        ({"checkpoint": "c"}, "checkpoint: got one with list, which is read once from its beginning, expected None"),
    ],
)
def test_options_that_are_for_files_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        count([[1, 2]], **options)


def test_what_tells_how_texts_are_read_is_refused_with_arrays(tmp_path):
    tokenizer = save_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"^data: got arrays with learn 'assistant', expected rows of chats"):
        count_corpus([[1, 2]], 300, policy=TargetPolicy(learn="assistant", max_length=4, packing="bfd_split"))
    with pytest.raises(ValueError, match=r"^tokenizer: got one with arrays, expected None"):
        count_corpus([[1, 2]], 300, tokenizer=tokenizer)


def test_names_of_files_may_come_from_any_iterable(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(5))
    for data in ((str(path) for path in tmp_path.iterdir()), {tmp_path / "a.npy"}, np.array([str(tmp_path / "a.npy")])):
        assert count(data).total == 5


def test_a_loader_of_tensors_is_begun_once():
    begun = []

    class Loader:
        def __iter__(self):
            begun.append(True)
            return iter(torch.arange(12).reshape(3, 4))

    frequency = count(Loader(), targets="shifted")
    assert_counts(frequency, np.array([1, 2, 3, 5, 6, 7, 9, 10, 11]), 12)
    assert frequency.provenance.shards[0].name == "Loader: 3 arrays"
    assert len(begun) == 1


def test_errors_of_the_data_themselves_come_through():
    def broken():
        yield [1, 2]
        raise LookupError("the stream is closed")

    with pytest.raises(LookupError, match="the stream is closed"):
        count(broken())


def test_objects_like_files_count_the_same(dataset, tmp_path):
    """From disk, a Dataset, a table, and arrays."""
    dataset.to_parquet(str(tmp_path / "a.parquet"))
    expected = count([tmp_path / "a.parquet"], targets="shifted").counts
    for data in (dataset, dataset.to_iterable_dataset(), dataset.data.table, dataset.with_format("torch")["input_ids"]):
        assert torch.equal(count(data, targets="shifted").counts, expected)


def test_names_are_no_objects():
    assert objects.opener_of("a") == (None, "a")
    opener, data = objects.opener_of(iter(["a", "b"]))
    assert opener is None
    assert list(data) == ["a", "b"]


def test_a_preview_is_of_files(datasets, dataset, monkeypatch):
    """Whatever the columns are, and without a look at the rows."""
    monkeypatch.setattr(datasets.Dataset, "__iter__", None)
    for data, name in [
        (dataset, "Dataset"),
        (dataset.select_columns("mask"), "Dataset"),
        (dataset.to_iterable_dataset(), "IterableDataset"),
        (pa.table(COLUMNS), "Table"),
        (np.arange(9), "ndarray"),
        ([[1, 2]], "list"),
    ]:
        with pytest.raises(TypeError) as caught:
            counting.preview_corpus(data, VOCAB)
        assert str(caught.value) == (
            f"data: got {name}, expected files, folders or patterns: data in memory are counted by count_corpus, "
            "without a preview"
        )
