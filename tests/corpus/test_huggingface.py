"""Hugging Face datasets on disk: those written by the library, with indices, splits and a cache, and damaged ones."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from column_files import VOCAB, assert_counts, count, joined, sequences
from golden_rows import CHOSEN, GOLDEN, LABELS, ROWS

from pdl_ext.corpus import count_corpus
from pdl_ext.corpus.formats import huggingface

pa = pytest.importorskip("pyarrow")


def write_stream(path, columns, rows_per_batch=7):
    table = pa.table(columns)
    with pa.ipc.new_stream(str(path), table.schema) as file:
        file.write_table(table, max_chunksize=rows_per_batch)
    return path


def save(folder, shards, indices=None):
    """A dataset as the library saves it, its indices over two files."""
    folder.mkdir()
    state = {"_data_files": [], "_indices_data_files": None, "_split": "train"}
    for number, rows in enumerate(shards):
        name = f"data-{number:05d}-of-{len(shards):05d}.arrow"
        write_stream(folder / name, {"input_ids": pa.array([row.tolist() for row in rows], pa.list_(pa.int32()))})
        state["_data_files"].append({"filename": name})
    if indices is not None:
        state["_indices_data_files"] = [{"filename": "indices-0.arrow"}, {"filename": "indices-1.arrow"}]
        for number, half in enumerate((indices[::2], indices[1::2])):
            write_stream(folder / f"indices-{number}.arrow", {"indices": pa.array(half, pa.uint64())})
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


@pytest.mark.parametrize("folder", ["hf-saved", "hf-cache"])
def test_what_the_library_wrote(folder):
    frequency = count(GOLDEN / folder, targets="shifted", skip_prompt="labels")
    targets = [label for row in LABELS for label in row[1:] if label != -100]
    assert_counts(frequency, np.array(targets), joined(ROWS).size)
    assert {(shard.format, shard.dtype) for shard in frequency.provenance.shards} == {("huggingface", "int32")}
    assert len(frequency.provenance.shards) == (2 if folder == "hf-saved" else 1)


@pytest.mark.parametrize("folder", ["hf-indices", "hf-chosen"])
def test_chosen_rows_that_the_library_wrote(folder):
    chosen = joined(ROWS[row] for row in CHOSEN)
    assert_counts(count(GOLDEN / folder), chosen, chosen.size)


def test_the_golden_indices_are_indices():
    state = json.loads((GOLDEN / "hf-indices" / "state.json").read_text())
    assert state["_indices_data_files"] == [{"filename": "indices.arrow"}]


def test_splits_are_not_counted_together():
    with pytest.raises(ValueError, match=r"hf-splits: holds the splits train, test, expected one.*hf-splits/train"):
        count(GOLDEN / "hf-splits")
    for split, rows in (("train", ROWS[:30]), ("test", ROWS[30:])):
        assert_counts(count(GOLDEN / "hf-splits" / split), joined(rows), joined(rows).size)


def test_the_only_split(tmp_path):
    shutil.copytree(GOLDEN / "hf-splits", tmp_path / "data")
    (tmp_path / "data" / "dataset_dict.json").write_text('{"splits": ["test"]}')
    assert_counts(count(tmp_path / "data"), joined(ROWS[30:]), joined(ROWS[30:]).size)


@pytest.mark.parametrize("window", [1, 10, 2**22])
@pytest.mark.parametrize("shards", [1, 3])
def test_indices_repeat_and_leave_out(tmp_path, monkeypatch, shards, window):
    monkeypatch.setattr(huggingface, "_WINDOW", window)
    rows = sequences(90)
    indices = [*np.random.default_rng(3).integers(0, 90, 70).tolist(), 89, 0, 0, 0]
    size = 90 // shards
    folder = save(tmp_path / "data", [rows[i * size : (i + 1) * size] for i in range(shards)], indices)
    chosen = [rows[index] for index in indices]
    assert_counts(count(folder, targets="shifted"), joined(row[1:] for row in chosen), joined(chosen).size)
    assert_counts(count_corpus([folder], VOCAB, threads=3), joined(chosen), joined(chosen).size)


def test_no_index_at_all(tmp_path):
    save(tmp_path / "data", [sequences(5)], [])
    with pytest.raises(ValueError, match=r"data: got no token in .*data-00000-of-00001\.arrow, expected some"):
        count(tmp_path / "data")
    # The others of its rows are not counted beside those of another.
    save(tmp_path / "more", [sequences(9, seed=1)])
    assert_counts(count(tmp_path), joined(sequences(9, seed=1)), joined(sequences(9, seed=1)).size)


@pytest.mark.parametrize("index", [20, 2**40, 2**64 - 1])
def test_an_index_past_the_last_row(tmp_path, index):
    folder = save(tmp_path / "data", [sequences(10), sequences(10, seed=1)], [1, index, 2])
    with pytest.raises(ValueError, match=rf"indices-0\.arrow: got index {index}, expected less than 20"):
        count(folder)


def test_a_null_in_a_chosen_row_is_named_by_its_row(tmp_path):
    folder = save(tmp_path / "data", [sequences(1)], [12, 11])
    file = folder / "data-00000-of-00001.arrow"
    write_stream(file, {"input_ids": pa.array([[1]] * 12 + [[None]])})
    with pytest.raises(ValueError, match=r"data-00000-of-00001\.arrow: column 'input_ids' has a null in row 12 of"):
        count(folder)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"indices": pa.array([1], pa.int32())}, "got the columns indices: int32, expected indices of uint64"),
        ({"index": pa.array([1], pa.uint64())}, "got the columns index: uint64"),
        ({"indices": pa.array([None], pa.uint64())}, "got a null in indices"),
    ],
    ids=["int32", "another name", "null"],
)
def test_indices_that_are_none(tmp_path, columns, message):
    folder = save(tmp_path / "data", [sequences(5)], [1])
    write_stream(folder / "indices-0.arrow", columns)
    with pytest.raises(ValueError, match=r"indices-0\.arrow: " + message):
        count(folder)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("{", r"state\.json: cannot be read as JSON"),
        ("[" * 100_000, r"state\.json: cannot be read as JSON"),
        ("[]", r"state\.json: got list, expected an object"),
        ("{}", r"state\.json: got _data_files None, expected a list of files"),
        ('{"_data_files": [3]}', r"state\.json: got _data_files \[3\]"),
        ('{"_data_files": [{}]}', r"state\.json: got None, expected the name of a file in its folder"),
        ('{"_data_files": [{"filename": "../a.arrow"}]}', r"got '\.\./a\.arrow', expected the name of a file in its"),
        ('{"_data_files": [{"filename": "/etc/passwd"}]}', r"got '/etc/passwd', expected the name of a file in its"),
        (
            json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}] * 2}),
            r"data: lists .*data-00000-of-00001\.arrow twice, expected each file once",
        ),
        ('{"_data_files": [{"filename": "b.arrow"}]}', r"b\.arrow: is missing, which state\.json lists"),
        (f'{{"_data_files": [{{"filename": "{"b" * 5000}"}}]}}', r"b: is missing, which state\.json lists"),
    ],
)
def test_a_damaged_state(tmp_path, state, message):
    folder = save(tmp_path / "data", [sequences(5)])
    (folder / "state.json").write_text(state)
    with pytest.raises(ValueError, match=message):
        count(folder)


@pytest.mark.parametrize("split", ["train", "b" * 5000], ids=len)
def test_a_split_that_is_not_there(tmp_path, split):
    (tmp_path / "dataset_dict.json").write_text(f'{{"splits": ["{split}"]}}')
    with pytest.raises(ValueError, match=rf"{split}: is not a folder, although dataset_dict\.json lists it"):
        count(tmp_path)


@pytest.mark.parametrize("splits", ["[]", '"train"', "[1]"])
def test_damaged_splits(tmp_path, splits):
    folder = save(tmp_path / "data", [sequences(5)])
    (folder / "dataset_dict.json").write_text(f'{{"splits": {splits}}}')
    with pytest.raises(ValueError, match=r"dataset_dict\.json: got splits .*, expected a list of names"):
        count(folder)


def test_a_shard_that_was_cut_off(tmp_path):
    folder = save(tmp_path / "data", [sequences(50), sequences(50, seed=1)])
    file = folder / "data-00001-of-00002.arrow"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"data-00001-of-00002\.arrow: does not end with the mark of a stream's end"):
        count(folder)


def cache(folder, *names):
    folder.mkdir()
    (folder / "dataset_info.json").write_text("{}")
    for number, name in enumerate(names):
        write_stream(folder / name, {"tokens": pa.array([[number, 7]])})
    return folder


def test_a_cache(tmp_path):
    names = ["wiki-train-00000-of-00002.arrow", "wiki-train-00001-of-00002.arrow", "cache-0123456789abcdef.arrow"]
    assert_counts(count(cache(tmp_path / "data", *names)), np.array([0, 7, 1, 7]), 4)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["w-train.arrow", "w-test.arrow"], r"holds the splits w-test, w-train, expected one: name the files"),
        (["w-train-00000-of-00003.arrow", "w-train-00002-of-00003.arrow"], r"got 2 files, expected 3"),
        (["cache-01.arrow"], r"holds the splits \(none\)"),
    ],
)
def test_a_cache_that_is_not_one_split(tmp_path, names, message):
    with pytest.raises(ValueError, match="data: " + message):
        count(cache(tmp_path / "data", *names))


def test_a_folder_that_is_no_dataset(tmp_path):
    with pytest.raises(ValueError, match=r"has neither state\.json nor dataset_info\.json"):
        huggingface.FORMAT.open(tmp_path, None)
