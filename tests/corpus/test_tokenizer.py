"""Texts through a file of the `tokenizers` library."""

from __future__ import annotations

import sys
import threading
import warnings

import numpy as np
import pytest
from text_tokenizer import TRAINED_ON, counts_of, save_tokenizer

from pdl_ext.corpus import tokenizer as module
from pdl_ext.corpus.source import ReadOptions
from pdl_ext.corpus.tokenizer import TextEncoder
from pdl_ext.provenance import TargetPolicy


def counts(encoder: TextEncoder, texts: list[str], vocab_size: int = 320) -> np.ndarray:
    total = np.zeros(vocab_size, np.int64)
    for batch in encoder.batches(texts):
        tokens = batch.tokens if batch.is_target is None else batch.tokens[batch.is_target]
        total += np.bincount(tokens, minlength=vocab_size)
    return total


@pytest.mark.parametrize("chunk", [1, 50, 2**20], ids=["a text at once", "some texts", "all"])
def test_counts_are_those_of_each_text_encoded_alone(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK_CHARACTERS", chunk)
    path = save_tokenizer(tmp_path / "tokenizer.json")
    texts = [*TRAINED_ON, "", "x", *TRAINED_ON]
    got = counts(TextEncoder(ReadOptions(320, tokenizer=path)), texts)
    np.testing.assert_array_equal(got, counts_of(path, texts))
    assert got.sum() > 20


def test_no_texts_are_no_batches(tmp_path):
    encoder = TextEncoder(ReadOptions(320, tokenizer=save_tokenizer(tmp_path / "tokenizer.json")))
    assert list(encoder.batches([])) == []
    assert encoder.encode(["", ""]).tokens.size == 0


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
    path = save_tokenizer(tmp_path / "tokenizer.json", cuts_and_pads=True)
    texts = ["a", "the quick brown fox jumps over the lazy dog and much else"]
    got = counts(TextEncoder(ReadOptions(320, tokenizer=path)), texts)
    np.testing.assert_array_equal(got, counts_of(path, texts))
    assert got.sum() not in (4, 8)


@pytest.mark.parametrize("special_tokens", [True, False])
def test_special_tokens_by_policy(tmp_path, special_tokens):
    path = save_tokenizer(tmp_path / "tokenizer.json", special_tokens=True)
    options = ReadOptions(320, TargetPolicy(special_tokens=special_tokens), tokenizer=path)
    got = counts(TextEncoder(options), TRAINED_ON)
    np.testing.assert_array_equal(got, counts_of(path, TRAINED_ON, special_tokens=special_tokens))
    assert got[:2].tolist() == ([4, 4] if special_tokens else [0, 0])


def test_shifted_leaves_out_the_first_token_of_each_text(tmp_path):
    path = save_tokenizer(tmp_path / "tokenizer.json", special_tokens=True)
    policy = TargetPolicy(targets="shifted")
    expected = counts_of(path, TRAINED_ON)
    expected[0] = 0
    got = counts(TextEncoder(ReadOptions(320, policy, tokenizer=path)), TRAINED_ON)
    np.testing.assert_array_equal(got, expected)


def test_shifted_with_empty_texts(tmp_path):
    path = save_tokenizer(tmp_path / "tokenizer.json")
    encoder = TextEncoder(ReadOptions(320, TargetPolicy(targets="shifted"), tokenizer=path))
    batch = encoder.encode(["", "ab", "", "", "cde", ""])
    first = [encoder.encode([text]).tokens.size for text in ("ab", "cde")]
    assert np.flatnonzero(~batch.is_target).tolist() == [0, first[0]]
    assert batch.tokens.size == sum(first)


def test_threads_share_one(tmp_path):
    path = save_tokenizer(tmp_path / "tokenizer.json", special_tokens=True)
    encoder = TextEncoder(ReadOptions(320, tokenizer=path))
    texts = [f"{text} {number}" for number in range(500) for text in TRAINED_ON]
    found = []
    threads = [threading.Thread(target=lambda: found.append(counts(encoder, texts))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for got in found:
        np.testing.assert_array_equal(got, counts_of(path, texts))


def test_is_loaded_once_and_again_when_replaced(tmp_path):
    path = save_tokenizer(tmp_path / "tokenizer.json")
    options = ReadOptions(320, tokenizer=path)
    assert TextEncoder(options)._tokenizer is TextEncoder(options)._tokenizer
    before = counts(TextEncoder(options), TRAINED_ON)
    save_tokenizer(path, special_tokens=True)
    after = counts(TextEncoder(options), TRAINED_ON)
    assert (after - before)[:2].tolist() == [4, 4]


def test_warns_of_a_vocabulary_that_is_too_small(tmp_path):
    path = save_tokenizer(tmp_path / "tokenizer.json")
    with pytest.warns(UserWarning, match=r"tokenizer\.json: has \d+ entries, and the vocabulary 300: "):
        TextEncoder(ReadOptions(300, tokenizer=path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TextEncoder(ReadOptions(320, tokenizer=path))


def test_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"corpus\.txt: got text without a tokenizer, expected --tokenizer"):
        TextEncoder(ReadOptions(320), tmp_path / "corpus.txt")


def test_a_tokenizer_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.json: cannot be read \(No such file"):
        TextEncoder(ReadOptions(320, tokenizer=tmp_path / "missing.json"))


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b"\xff\xfe\x00", b'{"model": {"type": "BPE"}}', None])
def test_a_damaged_tokenizer(tmp_path, content):
    path = save_tokenizer(tmp_path / "tokenizer.json")
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: is damaged or no file of the tokenizers library"):
        TextEncoder(ReadOptions(320, tokenizer=path))


def test_a_text_that_the_tokenizer_refuses(tmp_path):
    import tokenizers

    path = tmp_path / "words.json"
    # Without an entry for unknown words.
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="?")).save(str(path))
    encoder = TextEncoder(ReadOptions(320, tokenizer=path), tmp_path / "corpus.txt")
    with pytest.raises(ValueError, match=r"corpus\.txt: cannot be encoded by .*words\.json"):
        encoder.encode(["b"])


def test_without_the_library(tmp_path, monkeypatch):
    path = save_tokenizer(tmp_path / "tokenizer.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r'tokenizers is not installed: run `pip install "pdl_ext\[corpus\]"`'):
        TextEncoder(ReadOptions(320, tokenizer=path))
