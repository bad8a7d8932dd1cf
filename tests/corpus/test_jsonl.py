"""JSON lines of texts and of token ids."""

from __future__ import annotations

import contextlib
import gzip
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_tokenizer import TRAINED_ON, counts_of, save_tokenizer

from pdl_ext.corpus import count_corpus
from pdl_ext.corpus.formats.jsonl import FORMAT
from pdl_ext.corpus.reading import batches
from pdl_ext.corpus.source import ReadOptions
from pdl_ext.provenance import TargetPolicy


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json", special_tokens=True)


@pytest.fixture
def write(tmp_path):
    def write(*records, name="a.jsonl", end="\n", **options):
        path = tmp_path / name
        lines = [record if isinstance(record, str) else json.dumps(record, **options) for record in records]
        path.write_bytes("".join(line + end for line in lines).encode())
        return path

    return write


def count(path, tokenizer=None, vocab_size=320, policy=None, **options):
    return count_corpus([path], vocab_size, tokenizer=tokenizer, policy=policy, threads=1, **options)


def counts(path, *arguments, **options) -> np.ndarray:
    return count(path, *arguments, **options).counts.numpy()


@pytest.mark.parametrize("ensure_ascii", [True, False], ids=["escaped", "UTF-8"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n  \n"], ids=["LF", "CRLF", "blank lines"])
def test_texts(write, tokenizer, end, ensure_ascii):
    texts = [*TRAINED_ON, "", "two\nlines"]
    path = write(*({"id": 1, "text": text} for text in texts), end=end, ensure_ascii=ensure_ascii)
    np.testing.assert_array_equal(counts(path, tokenizer), counts_of(tokenizer, texts))


def test_ids_need_no_tokenizer(write):
    lists = [[1, 2, 3], [], [319, 2], list(range(300))]
    path = write(*({"input_ids": ids} for ids in lists))
    expected = np.bincount(np.concatenate(lists).astype(int), minlength=320)
    np.testing.assert_array_equal(counts(path), expected)


@pytest.mark.parametrize("column", [None, "text", "input_ids", "prompt"])
def test_the_column_that_is_read(write, tokenizer, column):
    record = {"prompt": "the dog", "input_ids": [7, 7], "text": "the fox"}
    expected = np.bincount([7, 7], minlength=320) if column == "input_ids" else None
    if expected is None:
        expected = counts_of(tokenizer, ["the dog" if column == "prompt" else "the fox"])
    got = counts(write(record), tokenizer, policy=TargetPolicy(column=column))
    np.testing.assert_array_equal(got, expected)


def test_texts_and_ids_in_one_file(write, tokenizer):
    path = write({"text": "the fox"}, {"input_ids": [5, 5]}, {"input_ids": [5]}, {"text": "the dog"}, {"text": [6]})
    expected = counts_of(tokenizer, ["the fox", "the dog"]) + np.bincount([5, 5, 5, 6], minlength=320)
    np.testing.assert_array_equal(counts(path, tokenizer), expected)


@pytest.mark.parametrize("tokens", [1, 5, 10**6], ids=["a list a batch", "some lists a batch", "all"])
def test_mask_and_prompt_and_first_token(write, monkeypatch, tokens):
    monkeypatch.setattr(batches, "BATCH_TOKENS", tokens)
    generator = np.random.default_rng(3)
    records, kept, read = [], [], 0
    for size in [4, 0, 1, 9, 3]:
        ids, mask = generator.integers(0, 20, size), generator.integers(0, 2, size)
        labels = np.where(generator.integers(0, 2, size), ids, -7)
        records.append({"input_ids": ids.tolist(), "m": mask.astype(bool).tolist(), "labels": labels.tolist()})
        kept.append(ids[1:][(mask[1:] != 0) & (labels[1:] != -7)])
        read += size
    policy = TargetPolicy(targets="shifted", ignore_index=-7, mask="m", skip_prompt="labels")
    got = count(write(*records), vocab_size=20, policy=policy)
    np.testing.assert_array_equal(got.counts.numpy(), np.bincount(np.concatenate(kept), minlength=20))
    assert got.tokens_seen == read
    assert 0 < got.total < read


def test_ids_outside_the_vocabulary_and_ignored(write):
    got = count(write({"input_ids": [1, 320, -1, -100, 2**63 - 1, -(2**63)]}))
    assert (got.total, int(got.ignored), int(got.out_of_range)) == (1, 1, 4)


@pytest.mark.parametrize("size", [1, 3, 64, 10**6])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_parts_together_are_the_file(write, size, end):
    path = write(*({"input_ids": [number] * number} for number in range(40)), end=end)
    (source,) = FORMAT.open(path, ReadOptions(40))
    parts = list(source.parts(size))
    tokens = [batch.tokens for part in parts for batch in source.batches(part)]
    assert size >= 10**6 or len(parts) >= path.stat().st_size / size
    np.testing.assert_array_equal(np.bincount(np.concatenate(tokens)), np.arange(40))


@pytest.mark.parametrize(
    ("name", "content", "known"),
    [
        ("a.jsonl", b"", True),
        ("a.ndjson", b"", True),
        ("A.JSONL", b"", True),
        ("a.jsonl.gz", b"", True),
        ("a.ndjson.zst", b"", True),
        ("a.json.gz", b"", True),
        ("a.json", b'{"text": 1}', True),
        ("a.json", b'\xef\xbb\xbf{"text": 1}', True),
        ("a.json", b'[{"text": 1}]', False),
        ("a.txt", b'{"text": 1}', False),
        ("jsonl", b'{"text": 1}', False),
    ],
)
def test_names(tmp_path, name, content, known):
    assert FORMAT.recognises(tmp_path / name, content) is known


def test_gzip_and_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b'\xef\xbb\xbf{"input_ids": [3]}\n{"input_ids": [4]}'))
    np.testing.assert_array_equal(counts(tmp_path / "a.json.gz", vocab_size=5), [0, 0, 0, 1, 1])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"is not a line of JSON \(Expecting property name"),
        ("{} {}", r"is not a line of JSON \(Extra data"),
        ('{"text": "a"', r"is not a line of JSON \(Expecting ',' delimiter"),
        ("[" * 10**6, r"is not a line of JSON \(maximum recursion depth"),
        ('{"input_ids": [' + "1" * 5000 + "]}", r"is not a line of JSON \(Exceeds the limit|does not fit into 64 bits"),
        ("[1, 2]", "got a list, expected an object"),
        ('"text"', "got a string, expected an object"),
        ("{}", "has none of 'input_ids', 'tokens', 'token_ids', 'text', but nothing"),
        (
            '{"a": 1, "b": 2}',
            "has none of 'input_ids', 'tokens', 'token_ids', 'text', but 'a', 'b': name another with --column",
        ),
        ('{"input_ids": null, "tokens": [1]}', "'input_ids' is null, expected"),
        ('{"input_ids": [null, 3], "tokens": [1]}', "'input_ids' is a list with null in it, expected"),
        ('{"tokens": null, "text": "a"}', "'tokens' is null, expected"),
        ('{"text": null}', "'text' is null, expected a string or a list of integers"),
        ('{"text": 3}', "'text' is an integer, expected a string or a list of integers"),
        ('{"text": {}}', "'text' is an object, expected a string or a list of integers"),
        ('{"text": ["a"]}', "'text' is a list with a string in it, expected a string or a list of integers"),
        ('{"input_ids": null}', "'input_ids' is null, expected"),
        ('{"input_ids": [1, 2.0]}', "'input_ids' is a list with a float in it, expected"),
        ('{"input_ids": [NaN]}', "'input_ids' is a list with a float in it, expected"),
        ('{"input_ids": [true]}', "'input_ids' is a list with a boolean in it, expected"),
        ('{"input_ids": [1, null]}', "'input_ids' is a list with null in it, expected"),
        ('{"input_ids": [[1]]}', "'input_ids' is a list with a list in it, expected"),
        ('{"input_ids": [9223372036854775808]}', "'input_ids' has an integer in it that does not fit into 64 bits"),
        ('{"text": "\\ud83d"}', "'text' is not Unicode text"),
        ('{"text": "a"}', "got text without a tokenizer, expected --tokenizer"),
    ],
)
def test_bad_lines(write, line, message):
    path = write({"input_ids": [1]}, "", line)
    place = "" if "tokenizer" in message else r" line 3 \(byte 20\):"
    with pytest.raises(ValueError, match=rf"a\.jsonl:{place} ({message})"):
        count(path)


@pytest.mark.parametrize("name", ["mask", "skip_prompt"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "'marks' is null, expected a list of integers"),
        ([1], "got 1 entries of 'marks', expected 2, one per token of 'input_ids'"),
        ([1, 2, 3], "got 3 entries of 'marks', expected 2"),
        ([1, 0.5], "'marks' is a list with a float in it"),
        ([1, 2**64], "'marks' has an integer in it that does not fit"),
    ],
)
def test_bad_masks(write, name, value, message):
    path = write({"input_ids": [1, 2], "marks": value})
    with pytest.raises(ValueError, match=rf"a\.jsonl: line 1 \(byte 0\): {message}"):
        count(path, policy=TargetPolicy(**{name: "marks"}))


@pytest.mark.parametrize("name", ["mask", "skip_prompt"])
def test_missing_masks_and_masks_of_text(write, tokenizer, name):
    policy = TargetPolicy(**{name: "marks"})
    with pytest.raises(ValueError, match="has no 'marks', but 'input_ids'"):
        count(write({"input_ids": [1]}), policy=policy)
    with pytest.raises(ValueError, match=f"got a string as 'text', expected token ids, which {name} is aligned with"):
        count(write({"text": "a", "marks": [1]}), tokenizer, policy=policy)


def test_invalid_utf8(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"input_ids": [1]}\n{"input_ids": [1], "a": "\xff"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl: line 2 \(byte 44\): is not UTF-8"):
        count(tmp_path / "a.jsonl")


@settings(max_examples=150, deadline=None)
@given(
    content=st.one_of(
        st.binary(),
        st.text('{}[]":,\\ u0dtextinput_ids1e9-.\n').map(str.encode),
        st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists).map(
            lambda value: json.dumps({"input_ids": value}).encode()
        ),
    ),
    name=st.sampled_from(["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"]),
)
@pytest.mark.slow
def test_whatever_stands_in_a_file(tmp_path_factory, content, name):
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(content)
    with contextlib.suppress(ValueError):
        assert count(path).tokens_seen >= 0
