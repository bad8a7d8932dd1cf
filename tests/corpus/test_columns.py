"""Columns of record batches: counts equal those of what was put in, for every type, policy and slice."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from column_files import VOCAB, count, joined, sequences
from test_huggingface import write_stream

from pdl_ext.corpus import TargetPolicy, count_corpus
from pdl_ext.corpus.reading.columns import Columns, Rows
from pdl_ext.corpus.source import ReadOptions

pa = pytest.importorskip("pyarrow")

INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
COUNTED_AS = {"int8": "int32", "int16": "int32", "uint64": "int64"}


def read(batch, *, tokenizer=None, place="row group 3", first=0, **policy):
    """The tokens of a record batch and which are targets."""
    options = ReadOptions(VOCAB, TargetPolicy(**policy), tokenizer=tokenizer)
    columns = Columns(Path("data.parquet"), batch.schema, options)
    batches = list(columns.batches([Rows(batch, range(first, first + batch.num_rows), place)]))
    tokens = [batch.tokens for batch in batches]
    targets = [np.ones(b.tokens.size, bool) if b.is_target is None else b.is_target for b in batches]
    return np.concatenate([np.empty(0, int), *tokens]), np.concatenate([np.empty(0, bool), *targets]), tokens


def lists(rows, type):
    return pa.array([row.tolist() for row in rows], type)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("list_type", ["list_", "large_list"])
def test_lists_of_every_integer(dtype, list_type):
    rows = sequences(50, dtype=dtype)
    array = lists(rows, getattr(pa, list_type)(getattr(pa, dtype)()))
    tokens, is_target, batches = read(pa.record_batch({"input_ids": array}))
    np.testing.assert_array_equal(tokens, joined(rows))
    assert is_target.all()
    assert batches[0].dtype == COUNTED_AS.get(dtype, dtype)
    columns = Columns(Path("f"), pa.schema({"input_ids": array.type}), ReadOptions(VOCAB))
    assert columns.dtype == ("int64" if dtype == "uint64" else dtype)


@pytest.mark.parametrize("window", [(0, 50), (7, 31), (49, 1), (50, 0), (3, 0)], ids=str)
@pytest.mark.parametrize("kind", ["list", "large_list", "fixed", "flat"])
def test_slices_hold_what_they_show(kind, window):
    start, length = window
    rows = [np.arange(4) + i for i in range(50)] if kind == "fixed" else sequences(50)
    if kind == "flat":
        rows = [np.array([i]) for i in range(50)]
        array = pa.array(range(50), pa.int16())
    else:
        types = {
            "list": pa.list_(pa.uint16()),
            "large_list": pa.large_list(pa.int64()),
            "fixed": pa.list_(pa.int32(), 4),
        }
        array = lists(rows, types[kind])
    batch = pa.record_batch({"x": array}).slice(start, length)
    tokens, _, _ = read(batch, column="x")
    np.testing.assert_array_equal(tokens, joined(rows[start : start + length]))
    if kind != "flat":
        kept = [row[1:] for row in rows[start : start + length]]
        tokens, is_target, _ = read(batch, column="x", targets="shifted")
        np.testing.assert_array_equal(tokens[is_target], joined(kept))


def test_long_record_batches_are_cut():
    array = pa.array([list(range(100))] * 10_000, pa.list_(pa.int32()))
    tokens, is_target, batches = read(pa.record_batch({"tokens": array}), targets="shifted")
    assert len(batches) > 3
    np.testing.assert_array_equal(np.bincount(tokens[is_target]), [0] + [10_000] * 99)


def test_integers_are_read_where_they_lie():
    array = pa.array([[1, 2], [3]], pa.list_(pa.int64()))
    _, _, (tokens,) = read(pa.record_batch({"input_ids": array}))
    assert tokens.ctypes.data == array.values.buffers()[1].address


def test_the_column_is_found_by_its_name():
    batch = pa.record_batch(
        {"tokens": pa.array([3]), "token_ids": pa.array([[1]]), "text": pa.array(["a"]), "other": pa.array([[2]])}
    )
    # A number of tokens is no list of them.
    assert read(batch)[0].tolist() == [1]
    assert read(batch, column="other")[0].tolist() == [2]
    assert read(batch, column="tokens")[0].tolist() == [3]


@pytest.mark.parametrize("mask_type", ["bool_", "int8", "uint8", "int64"])
@pytest.mark.parametrize("targets", ["all", "shifted"])
@pytest.mark.parametrize("labels", [False, True])
def test_masks_labels_and_shift_together(mask_type, targets, labels):
    rows = sequences(60)
    generator = np.random.default_rng(1)
    masks = [generator.integers(0, 2, row.size) for row in rows]
    answers = [np.where(generator.integers(0, 2, row.size), row, -100) for row in rows]
    type = getattr(pa, mask_type)()
    batch = pa.record_batch(
        {
            "input_ids": lists(rows, pa.list_(pa.int32())),
            "loss_mask": lists([mask.astype(bool) if mask_type == "bool_" else mask for mask in masks], pa.list_(type)),
            "labels": lists(answers, pa.large_list(pa.int64())),
        }
    ).slice(5, 50)
    policy = {"skip_prompt": "labels"} if labels else {}
    tokens, is_target, _ = read(batch, mask="loss_mask", targets=targets, **policy)
    expected = []
    for row, mask, answer in zip(rows[5:55], masks[5:55], answers[5:55], strict=True):
        kept = mask != 0
        if labels:
            kept &= answer != -100
        if targets == "shifted":
            kept[:1] = False
        expected.append(row[kept])
    np.testing.assert_array_equal(tokens, joined(rows[5:55]))
    np.testing.assert_array_equal(tokens[is_target], joined(expected))


def test_flat_columns_with_a_mask_and_labels():
    batch = pa.record_batch(
        {"x": pa.array([5, 6, 7, 8]), "m": pa.array([True, True, False, True]), "l": pa.array([5, -100, 7, 8])}
    )
    tokens, is_target, _ = read(batch, column="x", mask="m", skip_prompt="l")
    assert tokens[is_target].tolist() == [5, 8]


def test_a_wrapped_ignore_index_is_the_ignore_index():
    tokens, _, _ = read(pa.record_batch({"tokens": pa.array([[2**64 - 100, 2**63, 1]], pa.list_(pa.uint64()))}))
    assert tokens.tolist() == [-100, -(2**63), 1]


class Tagged(pa.ExtensionType):
    def __init__(self, storage):
        super().__init__(storage, "pdl_ext.tagged")

    def __arrow_ext_serialize__(self):
        return b""


def test_extension_types_are_what_they_store():
    array = pa.ExtensionArray.from_storage(Tagged(pa.list_(pa.int32())), pa.array([[1, 2], [3]], pa.list_(pa.int32())))
    assert read(pa.record_batch({"input_ids": array}))[0].tolist() == [1, 2, 3]
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(6, dtype=np.int32).reshape(2, 3))
    assert read(pa.record_batch({"input_ids": tensors}))[0].tolist() == list(range(6))


def test_dictionaries_are_decoded():
    array = pa.array([7, 9, 7], pa.int32()).dictionary_encode()
    assert read(pa.record_batch({"x": array}), column="x")[0].tolist() == [7, 9, 7]


@pytest.mark.parametrize("name", ["input_ids", "tokens", "token_ids"])
@pytest.mark.parametrize("is_dictionary", [False, True])
def test_an_integer_a_row_is_taken_for_ids_by_its_name_alone(name, is_dictionary):
    array = pa.array([7, 9, 7], pa.int32())
    batch = pa.record_batch({name: array.dictionary_encode() if is_dictionary else array})
    with pytest.raises(ValueError, match=rf"or text with a tokenizer: --column {name} reads it as one id per row$"):
        read(batch)
    assert read(batch, column=name)[0].tolist() == [7, 9, 7]


@pytest.fixture
def tokenizer(tmp_path):
    pytest.importorskip("tokenizers")
    vocabulary = {word: number for number, word in enumerate(["[UNK]", "a", "b", "c", "é"])}
    path = tmp_path / "tokenizer.json"
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    path.write_text(json.dumps({"version": "1.0", "pre_tokenizer": {"type": "Whitespace"}, "model": model}))
    return path


@pytest.mark.parametrize("type", ["string", "large_string", "string_view", "dictionary"])
def test_texts(tokenizer, type):
    texts = ["a b", "", "c é zz", "b"] * 700
    array = pa.array(texts).dictionary_encode() if type == "dictionary" else pa.array(texts, getattr(pa, type)())
    batch = pa.record_batch({"text": array, "input_ids": pa.array([[9]] * len(texts))}).slice(2)
    tokens, is_target, _ = read(batch, tokenizer=tokenizer, targets="shifted")
    expected = ([3, 4, 0, 2] + [1, 2, 3, 4, 0, 2] * 699, ([0, 1, 1, 0] + [0, 1, 0, 1, 1, 0] * 699))
    np.testing.assert_array_equal(tokens, expected[0])
    np.testing.assert_array_equal(is_target, expected[1])
    # Ids of a corpus beside texts are named, or there is no tokenizer.
    assert read(batch)[0].tolist() == [9] * (len(texts) - 2)


@pytest.mark.parametrize(
    ("columns", "policy", "message"),
    [
        ({"a": [1], "b": ["x"]}, {}, r"got the columns a, b, expected lists .* input_ids, tokens, token_ids.*--column"),
        ({}, {}, r"got the columns \(none\)"),
        ({"tokens": [3]}, {}, r"got the columns tokens \(int64\), expected lists"),
        ({"a": [1], "input_ids": [["x"]]}, {}, r"got the columns a, input_ids \(list<.*string>\), expected lists"),
        ({"a": [[1]]}, {"column": "b"}, r"has 0 columns 'b', expected one: there are a \(--column\)"),
        ({"a": ["x"]}, {"column": "a"}, r"column 'a' holds text, expected a tokenizer for it \(--tokenizer\)"),
        ({"a": [[1.5]]}, {"column": "a"}, r"column 'a' holds list<.*double>, expected lists of integers"),
        ({"a": [[[1]]]}, {"column": "a"}, r"column 'a' holds list<.*list<.*>>, expected lists of integers"),
        ({"a": [[True]]}, {"column": "a"}, r"column 'a' holds bool, expected integers"),
        ({"a": [1]}, {"column": "a", "targets": "shifted"}, r"column 'a' holds one token per row.*targets 'shifted'"),
        ({"tokens": [[1]], "m": [1]}, {"mask": "m"}, r"column 'm' holds int64 beside 'tokens'.*integer or bool values"),
        ({"tokens": [[1]], "m": [[1.0]]}, {"mask": "m"}, r"column 'm' holds list<.*double> beside"),
        (
            {"tokens": [[1]], "l": [[True]]},
            {"skip_prompt": "l"},
            r"column 'l' holds list<.*bool> beside.*expected integer",
        ),
        ({"tokens": [[1]]}, {"mask": "m"}, r"has 0 columns 'm', expected one: there are tokens \(--mask\)"),
        ({"tokens": [[1]]}, {"skip_prompt": "l"}, r"has 0 columns 'l', expected .* tokens \(--skip-prompt\)"),
    ],
)
def test_wrong_columns(columns, policy, message):
    batch = pa.record_batch({name: pa.array(values) for name, values in columns.items()})
    with pytest.raises(ValueError, match=r"^data\.parquet: " + message):
        read(batch, **policy)


def test_columns_of_the_same_name():
    batch = pa.record_batch([pa.array([[1]]), pa.array([[2]])], names=["tokens", "tokens"])
    with pytest.raises(ValueError, match="has 2 columns 'tokens', expected one"):
        read(batch, column="tokens")


@pytest.mark.parametrize(
    ("values", "row"),
    [([[1], [], [2, None]], 12), ([[1], None, [2]], 11), ([[None], [1], [1]], 10), ([[], [], [], [None], []], 13)],
    ids=str,
)
@pytest.mark.parametrize("list_type", ["list_", "large_list"])
def test_nulls_name_column_and_row(values, row, list_type):
    array = pa.array(values, getattr(pa, list_type)(pa.int32()))
    batch = pa.record_batch({"input_ids": array})
    place = f"column 'input_ids' (is null|has a null) in row {row} of the file, expected no"
    with pytest.raises(ValueError, match=rf"^data\.parquet: {place}"):
        read(batch, place="the file", first=10)
    with pytest.raises(ValueError, match=place):
        read(batch.slice(1) if row > 10 else batch, place="the file", first=11 if row > 10 else 10)
    good = pa.record_batch({"input_ids": pa.array([[1] * len(v or []) for v in values]), "m": array})
    with pytest.raises(ValueError, match=f"column 'm' (is null|has a null) in row {row} of"):
        read(good, place="the file", first=10, mask="m")


def test_nulls_in_flat_and_text_columns(tokenizer):
    for array in (pa.array([1, None]), pa.array(["a", None])):
        with pytest.raises(ValueError, match="column 'x' is null in row 1 of row group 3, expected no nulls"):
            read(pa.record_batch({"x": array}), column="x", tokenizer=tokenizer)


def test_nulls_outside_of_a_slice_do_not_matter():
    batch = pa.record_batch({"input_ids": pa.array([[None], None, [1, 2], None])}).slice(2, 1)
    assert read(batch)[0].tolist() == [1, 2]


def test_masks_of_other_lengths():
    batch = pa.record_batch({"tokens": pa.array([[1, 2], [3, 4]]), "m": pa.array([[1, 1], [1]])})
    with pytest.raises(
        ValueError, match=r"column 'm' has 1 values in row 1 of .*, expected 2, one per token of 'tokens'"
    ):
        read(batch, mask="m")


@pytest.mark.parametrize("offsets", [[0, 9, 2], [0, -1, 2]], ids=str)
def test_offsets_outside_of_the_values(offsets):
    buffers = [None, pa.py_buffer(np.array(offsets, np.int32)), None]
    array = pa.Array.from_buffers(pa.list_(pa.int32()), 2, buffers[:2], children=[pa.array([1, 2], pa.int32())])
    with pytest.raises(ValueError, match=r"[Oo]ffset|values"):
        read(pa.record_batch({"tokens": array}))


def test_a_narrow_dtype_warns(tmp_path):
    write_stream(tmp_path / "a.arrow", {"tokens": pa.array([[1]], pa.list_(pa.uint16()))})
    with pytest.warns(UserWarning, match="a.arrow: its tokens are uint16, and cannot hold ids above 65535"):
        count_corpus([tmp_path], 70_000)


def test_a_dtype_that_is_not_the_columns_is_an_error(tmp_path):
    write_stream(tmp_path / "a.arrow", {"tokens": pa.array([[1]], pa.list_(pa.uint64()))})
    with pytest.raises(
        ValueError, match=r"a\.arrow: got dtype uint16, expected uint64, which the file states, or none"
    ):
        count_corpus([tmp_path], VOCAB, dtype="uint16")
    assert count_corpus([tmp_path], VOCAB, dtype="int64").total == 1


def test_a_missing_pyarrow_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r'pyarrow is not installed: run `pip install "pdl_ext\[corpus\]"`'):
        count(tmp_path / "a.parquet")


@pytest.mark.parametrize("kind", ["a.jsonl", "a.parquet", "a.arrow", "stream.arrow", "table"])
def test_an_id_outside_of_the_vocabulary_is_named_by_its_row(tmp_path, kind):
    """That of a target alone, among rows that are read at once."""
    rows = [[1, 2], [], [250, 3], [4, 260, 5], [270]]
    marks = [[0 if token == 250 else 1 for token in row] for row in rows]
    table = pa.table({"input_ids": rows, "mask": marks})
    data, places = [tmp_path / kind], "row 1 of row group 1"
    if kind == "a.jsonl":
        lines = [json.dumps({"input_ids": row, "mask": mark}) + "\n" for row, mark in zip(rows, marks, strict=True)]
        data[0].write_text("".join(lines))
        places = rf"line 4 \(byte {sum(map(len, lines[:3]))}\)"
    elif kind == "a.parquet":
        pytest.importorskip("pyarrow.parquet").write_table(table, data[0], row_group_size=2)
    elif kind == "a.arrow":
        with pa.ipc.new_file(str(data[0]), table.schema) as file:
            file.write_table(table, 2)
        places = "row 1 of record batch 1"
    elif kind == "stream.arrow":
        write_stream(data[0], table)
        places = "row 3 of the file"
    else:
        data, places = table, "row 3 of the data"
    with pytest.raises(ValueError, match=rf"{places}: got the id 260, expected 0 <= id < {VOCAB}$"):
        count_corpus(data, VOCAB, policy=TargetPolicy(mask="mask"), strict=True)
