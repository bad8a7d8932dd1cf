"""A local Ray of two workers against np.bincount: every form of a column of tokens, and errors."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import fresh_python
import numpy as np
import pytest
import torch

pytestmark = pytest.mark.slow

VOCAB = 97


def test_missing_ray_names_the_pip_command(tmp_path):
    (tmp_path / "ray.py").write_text("raise ImportError('not there')\n")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import pdl_ext.integrations.ray"
    result = fresh_python.run("-c", program)
    assert 'ImportError: ray is not installed: run `pip install "pdl_ext[ray]"` (not there)' in result.stderr


ray = pytest.importorskip("ray", reason="needs pdl_ext[ray]")
pa = pytest.importorskip("pyarrow", reason="needs pdl_ext[ray]")

import pyarrow.parquet  # noqa: E402

from pdl_ext import TokenFrequency  # noqa: E402
from pdl_ext.integrations.ray import TokenCounts, count_dataset, to_frequency  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def two_workers():
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture
def rows():
    """Lists of ids with the ignored and the out of range among them, some empty."""
    random = np.random.default_rng(5)
    lengths = [*random.integers(0, 40, 60), 0]
    return [random.choice([*range(VOCAB), -100, -1, VOCAB, 1000], length).astype(np.int64) for length in lengths]


def assert_counts(frequency, tokens, masked=0):
    tokens = np.concatenate([*tokens, np.zeros(0, np.int64)])
    valid = tokens[(tokens >= 0) & (tokens < VOCAB)]
    assert torch.equal(frequency.counts, torch.from_numpy(np.bincount(valid, minlength=VOCAB)))
    ignored = int((tokens == -100).sum())
    assert int(frequency.ignored) == ignored + masked
    assert int(frequency.out_of_range) == tokens.size - valid.size - ignored


def blocks_of(column, **others):
    """A dataset of three blocks, each a slice that begins inside of its arrays."""
    table = pa.table({"tokens": column, **others, "more": pa.array(range(len(column)))})
    cuts = [0, 7, 30, len(column)]
    return ray.data.from_arrow([table.slice(a, b - a) for a, b in itertools.pairwise(cuts)])


@pytest.mark.parametrize("kind", ["list", "large_list", "nested", "int32", "scalars"])
def test_arrow_columns(rows, kind):
    types = {"large_list": pa.large_list(pa.int64()), "int32": pa.list_(pa.int32())}
    if kind == "nested":
        column = pa.array([[row[:3].tolist(), row[3:].tolist()] for row in rows])
    elif kind == "scalars":
        column = pa.array(np.concatenate(rows))
    else:
        column = pa.array([row.tolist() for row in rows], types.get(kind, pa.list_(pa.int64())))
    assert_counts(count_dataset(blocks_of(column), "tokens", VOCAB), rows)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.uint64])
def test_tensors_of_each_dtype(dtype):
    tokens = np.random.default_rng(1).integers(0, 120, (64, 9)).astype(dtype)
    tokens[3, 2] = np.iinfo(dtype).max
    # Above the largest int64 there is no id, whatever it becomes.
    expected = np.minimum(tokens, np.iinfo(np.int64).max if dtype == np.uint64 else tokens).astype(np.int64)
    assert_counts(count_dataset(ray.data.from_numpy([tokens[:20], tokens[20:]]), "data", VOCAB), expected)


def test_what_is_masked_is_ignored(rows):
    random = np.random.default_rng(6)
    masks = [random.integers(0, 2, row.size) for row in rows]
    column = pa.array([row.tolist() for row in rows], pa.list_(pa.int64()))
    dataset = blocks_of(column, mask=pa.array([mask.tolist() for mask in masks], pa.list_(pa.int8())))
    kept = [row[mask != 0] for row, mask in zip(rows, masks, strict=True)]
    masked = sum(map(len, rows)) - sum(map(len, kept))
    frequency = count_dataset(dataset, "tokens", VOCAB, mask="mask")
    assert_counts(frequency, kept, masked)
    assert frequency.tokens_seen == frequency.provenance.tokens == sum(map(len, rows))
    assert (frequency.provenance.policy.column, frequency.provenance.policy.mask) == ("tokens", "mask")


@pytest.mark.parametrize("type_of_mask", [pa.large_list(pa.int8()), pa.list_(pa.int8(), 2)])
def test_a_mask_in_lists_of_another_kind(type_of_mask):
    table = pa.table({"tokens": pa.array([[1, 2], [2, 3]]), "mask": pa.array([[1, 0], [1, 1]], type_of_mask)})
    frequency = count_dataset(ray.data.from_arrow(table), "tokens", 5, mask="mask")
    assert (frequency.counts.tolist(), int(frequency.ignored)) == ([0, 1, 1, 1, 0], 1)


def test_aggregation(rows):
    column = pa.array([row.tolist() for row in rows], pa.list_(pa.int64()))
    result = blocks_of(column).aggregate(TokenCounts("tokens", VOCAB, alias_name="counts"))
    assert_counts(to_frequency(np.asarray(result["counts"], np.int64)), rows)


def test_another_ignore_index():
    dataset = ray.data.from_items([{"tokens": [1, 2, 2]}, {"tokens": [2, 5]}])
    frequency = count_dataset(dataset, "tokens", 6, ignore_index=2)
    assert frequency.counts.tolist() == [0, 1, 0, 0, 0, 1]
    assert (int(frequency.ignored), frequency.ignore_index) == (3, 2)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([[1, None], [2]]), "tokens: got 1 nulls, expected none"),
        (pa.array([[1], None]), "tokens: got 1 nulls, expected none"),
        (pa.array([[1.5], [2.0]]), "tokens: got list<.*double>, expected integers"),
        (pa.array(["a", "b"]), "tokens: got string, expected integers"),
        (pa.array([[True], [False]]), "tokens: got list<.*bool>, expected integers"),
    ],
)
def test_bad_columns_are_named(column, message):
    with pytest.raises(ValueError, match=message):
        count_dataset(ray.data.from_arrow(pa.table({"tokens": column})), "tokens", VOCAB)


@pytest.mark.parametrize("column", [[], [[], []], [None]], ids=str)
def test_a_dataset_without_a_token(column):
    table = pa.table({"tokens": pa.array(column, pa.list_(pa.int64()))})
    with pytest.raises(ValueError, match=r"ds: got no token in column 'tokens', expected some|tokens: got 1 nulls"):
        count_dataset(ray.data.from_arrow(table), "tokens", VOCAB)


def test_bad_arguments_are_named():
    dataset = ray.data.from_items([{"tokens": [1, 2], "mask": [1]}])
    with pytest.raises(ValueError, match=r"ids: got no such column, expected one of .*tokens"):
        count_dataset(dataset, "ids", VOCAB)
    with pytest.raises(ValueError, match="mask: got lists of other lengths than those of tokens"):
        count_dataset(dataset, "tokens", VOCAB, mask="mask")
    with pytest.raises(TypeError, match=r"ds: got list, expected ray.data.Dataset"):
        count_dataset([1, 2], "tokens", VOCAB)
    with pytest.raises(ValueError, match="vocab_size: got 0"):
        count_dataset(dataset, "tokens", 0)
    with pytest.raises(TypeError, match=r"table: got list, expected int64 \[V \+ 3\]"):
        to_frequency([1, 2, 3])
    with pytest.raises(ValueError, match="table: got 3 tokens counted, ignored and out of range, expected the 4 seen"):
        to_frequency(np.array([2, 0, 1, 0, 4]))


def test_the_documented_snippet(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    pyarrow.parquet.write_table(pa.table({"input_ids": [[1, 2], [2]]}), tmp_path / "corpus" / "a.parquet")
    # Ray's workers have a working folder of their own.
    snippet = snippet.replace('"corpus/"', repr(str(tmp_path / "corpus")))
    exec(compile(snippet, "scaling.md", "exec"), {})
    assert TokenFrequency.load("counts.safetensors").counts[:4].tolist() == [0, 1, 2, 0]
