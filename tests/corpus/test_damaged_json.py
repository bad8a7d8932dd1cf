"""Indexes and tokenizers that are valid JSON with unexpected content: values of another kind, absent or repeated."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path

import pytest
from column_files import check_damaged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_tokenizer import TRAINED_ON, save_tokenizer

from pdl_ext.corpus import count_corpus

GOLDEN = Path(__file__).parent / "golden"
# A listing in a folder that a reader opens, and what its count is told.
LISTINGS = {
    "hf-saved/state.json": {},
    "hf-indices/state.json": {},
    "hf-splits/dataset_dict.json": {},
    "litdata-tensors/index.json": {},
    "litdata-arrays/index.json": {},
    "litdata-columns/index.json": {},
    "litdata-zstd-batch/index.json": {},
    "mds-bytes/index.json": {"dtype": "uint16"},
    "mds-gz/index.json": {},
    "mds-columns/index.json": {},
    "mds-fixed/index.json": {},
}
ODD = [
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**63), 10**30, 0.0, 1.5, -0.0, 1e300),
    *(float("inf"), float("-inf"), float("nan")),
    *("", "0", "a", "../a", "/", "a\0b", "\ud800", "é", "x" * 5000, "mds", "zstd", "uint16", "int32:-1", "ndarray:"),
    *([], {}, [[]], [None], {"": None}, [[[[3]]]], ["a", 3], {"a": {"b": []}}),
]


def places(value, path=()):
    """Every value in what JSON holds, by its path."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


@st.composite
def damaged(draw, content):
    """Content with one to three values replaced, left out or repeated."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        *path, key = draw(st.sampled_from([path for path in places(content) if path] or [(None,)]))
        if key is None:
            break
        parent = content
        for step in path:
            parent = parent[step]
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "repeat"]))
        if action == "remove":
            del parent[key]
        elif action == "repeat" and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        else:
            parent[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
    return content


def read(data, vocab_size=512, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return count_corpus(data, vocab_size, threads=1, **options)


# The same examples each time: what is new is for fuzz.py to find.
FIXED = settings(
    max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("name", LISTINGS)
@FIXED
@given(data=st.data())
@pytest.mark.slow
def test_listings(tmp_path, name, data):
    if name.startswith("hf"):
        pytest.importorskip("pyarrow")
    folder = tmp_path / "data"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(GOLDEN / name.split("/")[0], folder)
    file = folder / name.split("/")[1]
    content = data.draw(damaged(json.loads(file.read_text())))
    file.write_text(json.dumps(content))
    check_damaged(lambda: read([folder], **LISTINGS[name]), str(folder))


@FIXED
@given(data=st.data())
@pytest.mark.slow
def test_tokenizers(tmp_path, data):
    path = save_tokenizer(tmp_path / "tokenizer.json", special_tokens=True)
    content = json.loads(path.read_text())
    # Nearly all places are in these.
    vocabulary, merges = content["model"].pop("vocab"), content["model"].pop("merges")
    content = data.draw(damaged(content))
    if isinstance(content.get("model"), dict) and data.draw(st.booleans()):
        content["model"] |= {"vocab": vocabulary, "merges": merges}
    path.write_text(json.dumps(content))
    (tmp_path / "a.txt").write_text("\n".join(TRAINED_ON))
    check_damaged(lambda: read([tmp_path / "a.txt"], tokenizer=path), "tokenizer.json")


def test_whole_ones_are_counted(tmp_path):
    path = save_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "a.txt").write_text("\n".join(TRAINED_ON))
    assert read([tmp_path / "a.txt"], tokenizer=path).total > 20
    for name, options in LISTINGS.items():
        if not name.startswith("hf-splits"):
            assert read([GOLDEN / name.split("/")[0]], **options).total > 10, name
