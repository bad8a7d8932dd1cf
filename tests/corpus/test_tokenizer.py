"""Texts through a file of the `tokenizers` library."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from test_mds import write as write_mds
from text_tokenizer import TRAINED_ON, counts_of, save_tokenizer

from pdl_ext.corpus import count_corpus, counting
from pdl_ext.corpus.reading import tokenizer as module
from pdl_ext.corpus.reading.pretrained import tokenizer_digest
from pdl_ext.corpus.reading.tokenizer import PlacedText, TextEncoder
from pdl_ext.corpus.source import ReadOptions
from pdl_ext.provenance import TargetPolicy


def placed(texts: Iterable[str]) -> Iterator[PlacedText]:
    return (PlacedText(f"text {number}", text) for number, text in enumerate(texts))


def counts(encoder: TextEncoder, texts: list[str], vocab_size: int = 320) -> np.ndarray:
    total = np.zeros(vocab_size, np.int64)
    for batch in encoder.batches(placed(texts)):
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
    assert encoder.encode([*placed(["", ""])]).tokens.size == 0


def test_threads_share_what_is_encoded_at_once(tmp_path, monkeypatch):
    path = save_tokenizer(tmp_path / "tokenizer.json")
    encoder, other = (TextEncoder(ReadOptions(320, tokenizer=path)) for _ in range(2))
    # Texts of no character, which take memory nevertheless.
    monkeypatch.setattr(module, "CHUNK_CHARACTERS", 160 * module._CHARACTERS_PER_TEXT)
    sizes = []
    monkeypatch.setattr(TextEncoder, "encode", lambda self, texts: sizes.append(len(texts)))

    def sizes_of(batches, number):
        sizes.clear()
        for _ in range(number):
            next(batches)
        return list(sizes)

    alone = encoder.batches(placed(itertools.repeat("")))
    # Few at first, since others may be about to begin.
    assert sizes_of(alone, 3) == [10, 160, 160]
    beside = other.batches(placed(itertools.repeat("")))
    assert sizes_of(beside, 2) == [10, 80]
    assert sizes_of(alone, 1) == [80]
    beside.close()
    assert sizes_of(alone, 1) == [160]
    alone.close()
    assert module._threads_encoding == 0


def test_a_text_larger_than_a_share_is_encoded_alone(tmp_path, monkeypatch):
    path = save_tokenizer(tmp_path / "tokenizer.json")
    monkeypatch.setattr(module, "CHUNK_CHARACTERS", 160)
    encoded = []
    monkeypatch.setattr(TextEncoder, "encode", lambda self, texts: encoded.append([len(text) for _, text in texts]))
    texts = placed(["", "x" * 200, "x" * 100, "x" * 40, "x" * 50])
    list(TextEncoder(ReadOptions(320, tokenizer=path)).batches(texts))
    assert encoded == [[0], [200], [100, 40], [50]]


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
    batch = encoder.encode([*placed(["", "ab", "", "", "cde", ""])])
    first = [encoder.encode([*placed([text])]).tokens.size for text in ("ab", "cde")]
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
    with pytest.raises(ValueError, match=r"missing\.json: cannot be read \(No such file.*save_pretrained.*no hub"):
        TextEncoder(ReadOptions(320, tokenizer=tmp_path / "missing.json"))


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b"\xff\xfe\x00", b'{"model": {"type": "BPE"}}', None])
def test_a_damaged_tokenizer(tmp_path, content):
    path = save_tokenizer(tmp_path / "tokenizer.json")
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: is damaged or not a file of the tokenizers library"):
        TextEncoder(ReadOptions(320, tokenizer=path))


def test_a_tokenizer_at_which_the_library_panics(tmp_path):
    path = save_tokenizer(tmp_path / "tokenizer.json", special_tokens=True)
    content = json.loads(path.read_text())
    content["post_processor"]["special_tokens"] = {}
    path.write_text(json.dumps(content))
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"a\.txt: line 1 \(byte 0\): cannot be encoded by .*tokenizer\.json"):
        count_corpus([tmp_path / "a.txt"], 320, tokenizer=path)


def test_dropout_is_left_out(tmp_path):
    path = save_tokenizer(tmp_path / "tokenizer.json")
    expected = counts_of(path, TRAINED_ON)
    content = json.loads(path.read_text())
    content["model"]["dropout"] = 0.9
    path.write_text(json.dumps(content))
    np.testing.assert_array_equal(counts(TextEncoder(ReadOptions(320, tokenizer=path)), TRAINED_ON), expected)


def test_its_digest_is_of_all_of_it(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(bytes(100_000))
    before = tokenizer_digest(path)
    path.write_bytes(bytes(50_000) + b"\1" + bytes(49_999))
    assert tokenizer_digest(path) != before


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_tokenizer_that_is_replaced_during_the_count(tmp_path, monkeypatch, kind):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = save_tokenizer(tmp_path / "tokenizer.json")
    other = save_tokenizer(tmp_path / "other.json", special_tokens=True)
    for number in range(3):
        texts = ["the fox"] * (10 + number)
        if kind == "jsonl":
            (tmp_path / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        else:
            parquet.write_table(pa.table({"text": texts}), tmp_path / f"{number}.parquet")
    count_part = counting._Worker._count_part
    asked = []

    def replaced_before(self, index, batches):
        asked.append(index)
        if len(asked) == 2:
            os.replace(other, path)
        return count_part(self, index, batches)

    monkeypatch.setattr(counting._Worker, "_count_part", replaced_before)
    monkeypatch.setattr(counting, "_SECONDS_BETWEEN_MERGES", 0.0)
    with pytest.raises(ValueError, match=r"tokenizer\.json: changed while it was counted, from \d+ bytes to \d+"):
        count_corpus([tmp_path / f"*.{kind}"], 320, tokenizer=path, threads=1, checkpoint=tmp_path / "checkpoint")
    # Without the part that was encoded by the other one.
    with safe_open(tmp_path / "checkpoint-0", framework="np") as file:
        assert file.get_tensor("finished").sum() == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_tokenizer_that_is_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    np.arange(9, dtype="<u2").tofile(tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"tokenizer\.json: is not a regular file"):
        count_corpus([tmp_path / "a.bin"], 9, dtype="uint16", tokenizer=tmp_path / "tokenizer.json")


WORDS = ["a", "a", "a", "b", "a", "b"]


@pytest.fixture(scope="module")
def only_a(tmp_path_factory):
    """A tokenizer without an entry for unknown words."""
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("tokenizer") / "words.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="?")).save(str(path))
    return path


def texts_as(kind, folder, texts):
    """The same texts as `kind`, and the place of the fourth one."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"text": texts})
    records = [json.dumps({"text": text}) + "\n" for text in texts]
    if kind == "data":
        return table, "^data: row 3 of the data"
    path = folder / kind
    if kind.startswith("a.txt"):
        content = "".join(text + "\n" for text in texts).encode()
        path.write_bytes(gzip.compress(content) if kind.endswith(".gz") else content)
        byte = sum(len(text) + 1 for text in texts[:3])
        return [path], rf"a\.txt(\.gz)?: line 4 \(byte {byte}( of its decompressed content)?\)"
    if kind == "a.jsonl":
        path.write_text("".join(records))
        return [path], rf"a\.jsonl: line 4 \(byte {sum(map(len, records[:3]))}\)"
    if kind == "a.parquet":
        parquet.write_table(table, path, row_group_size=2)
        return [path], r"a\.parquet: row 1 of row group 1"
    if kind == "a.arrow":
        with pa.ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table)
        return [path], r"a\.arrow: row 3 of the file"
    write_mds(path, {"text": ("str", None)}, [[{"text": text.encode()} for text in texts]])
    return [path], r"shard\.00000\.mds: sample 3"


KINDS = ["a.txt", "a.txt.gz", "a.jsonl", "a.parquet", "a.arrow", "mds", "data"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_the_tokenizer_refuses_is_named_by_its_place(tmp_path, only_a, kind):
    data, place = texts_as(kind, tmp_path, WORDS)
    with pytest.raises(ValueError, match=rf"{place}: cannot be encoded by .*words\.json \(.*\)$"):
        count_corpus(data, 320, tokenizer=only_a)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_is_too_long_is_named_by_its_place(tmp_path, only_a, kind, monkeypatch):
    data, place = texts_as(kind, tmp_path, ["a", "a", "a", "b" * 40, "a"])
    monkeypatch.setattr(module, "MAX_TEXT_BYTES", 39)
    with pytest.raises(ValueError, match=rf"{place}: got a text of 40 characters, expected 39 at most"):
        count_corpus(data, 320, tokenizer=only_a)


@pytest.mark.parametrize("kind", KINDS)
def test_an_id_outside_of_the_vocabulary_is_named_by_its_place(tmp_path, kind):
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path / "words.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 7}, unk_token="a")).save(str(path))
    data, place = texts_as(kind, tmp_path, WORDS)
    with pytest.raises(ValueError, match=rf"{place}: got the id 7, expected 0 <= id < 5$"):
        count_corpus(data, 5, tokenizer=path, strict=True)


def test_documents_and_texts_that_are_refused_together_alone(tmp_path, only_a):
    (tmp_path / "a.txt").write_text("b\na")
    with pytest.raises(ValueError, match=r"/a\.txt: cannot be encoded by .*words\.json"):
        count_corpus([tmp_path / "a.txt"], 320, tokenizer=only_a, policy=TargetPolicy(sample_by="document"))

    def refuse_several(texts):
        if len(texts) > 1:
            raise RuntimeError("no memory\nfor them")
        return texts

    with pytest.raises(ValueError, match=r"^text 0: one of 3 texts from here on cannot be encoded by t \(no memory\)$"):
        module.encoded([*placed("abc")], refuse_several, Path("t"))


def test_without_the_library(tmp_path, monkeypatch):
    path = save_tokenizer(tmp_path / "tokenizer.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r'tokenizers is not installed: run `pip install "pdl_ext\[corpus\]"`'):
        TextEncoder(ReadOptions(320, tokenizer=path))
