"""Corpora in object stores: the counts of the same files on disk, whatever the store does, and no secrets shown."""

from __future__ import annotations

import asyncio
import bz2
import http.server
import importlib
import io
import json
import re
import shutil
import threading
import urllib.parse
from concurrent.futures import Future
from pathlib import Path
from typing import ClassVar

import fresh_python
import numpy as np
import pytest
import safetensors.numpy
import torch
from flat_files import write_datatrove, write_llmc, write_megatron, write_npy, write_raw
from s3 import BUCKET, SECRET, started
from safetensors import safe_open

from pdl_ext import TokenFrequency
from pdl_ext.cli.main import main
from pdl_ext.corpus import TargetPolicy, count_corpus, counting
from pdl_ext.corpus.reading.compression import compression_of, decompressed
from pdl_ext.storage import ranges, store
from pdl_ext.storage.place import place
from pdl_ext.storage.ranges import RangedFile

fsspec = pytest.importorskip("fsspec")
registry = importlib.import_module("fsspec.registry")

V = 300
GOLDEN = Path(__file__).parent / "golden"
ROWS = [np.arange(start % 250, start % 250 + 7, dtype=np.uint16) for start in range(0, 3000, 7)]
SHIFTED = TargetPolicy(targets="shifted")


@pytest.fixture(scope="module")
def s3():
    return started()


@pytest.fixture(autouse=True)
def no_faults(request, monkeypatch):
    """Short pauses, and none of the failures that a test before has asked for."""
    monkeypatch.setattr(store, "_FIRST_PAUSE", 0.001)
    if "s3" in request.fixturenames:
        request.getfixturevalue("s3").faults()


@pytest.fixture
def key(request):
    """A prefix of a test's own."""
    return re.sub(r"\W+", "-", request.node.name)


@pytest.fixture
def memory():
    file_system = fsspec.filesystem("memory")
    yield file_system
    file_system.store.clear()


def tokens_of(size: int) -> np.ndarray:
    return np.random.default_rng(size).integers(0, V, size).astype("<u2")


def counts_of(tokens: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.bincount(tokens, minlength=V))


# What is read.


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_chats_of_a_store(name, s3, key, tmp_path):
    chats = importlib.import_module("test_chats")
    tokenizer = chats.save_chat_tokenizer(tmp_path / "tokenizer")
    path = tmp_path / name
    if path.suffix == ".parquet":
        chats.pq.write_table(chats.pa.Table.from_pylist(chats.CHATS), path, row_group_size=100)
    else:
        chats.write(path, chats.CHATS)
    url = s3.put(f"{key}/{name}", path.read_bytes())
    of_disk, frequency = (chats.count(where, tokenizer) for where in (path, url))
    assert torch.equal(frequency.counts, of_disk.counts)
    assert of_disk.total > 1000
    ours, theirs = frequency.provenance, of_disk.provenance
    assert ours.shards[0].digest == theirs.shards[0].digest
    assert (ours.tokens, ours.tokenizer, ours.chat_template) == (theirs.tokens, theirs.tokenizer, theirs.chat_template)
    s3.put_folder(f"{key}/tokenizer", tokenizer)
    with pytest.raises(ValueError, match=rf"{key}/tokenizer: got a folder in a store, expected a tokenizer\.json"):
        chats.count(path, s3.url(f"{key}/tokenizer/"))
    with pytest.raises(ValueError, match=r"tokenizer\.json, expected --tokenizer with the folder of a transformers"):
        chats.count(url, s3.url(f"{key}/tokenizer/tokenizer.json"))


def test_texts_by_a_tokenizer_of_a_store(s3, key, tmp_path, capsys):
    text_tokenizer = pytest.importorskip("text_tokenizer")
    tokenizer = text_tokenizer.save_tokenizer(tmp_path / "tokenizer.json")
    url = s3.put(f"{key}/tokenizer.json", tokenizer.read_bytes())
    text = s3.put(f"{key}/a.txt", b"the fox\nthe dog\n")
    frequency, by_disk = (count_corpus([text], 512, tokenizer=where) for where in (url, tokenizer))
    assert torch.equal(frequency.counts, by_disk.counts)
    assert frequency.provenance.tokenizer == by_disk.provenance.tokenizer is not None
    counts = s3.url(f"{key}/counts.safetensors")
    frequency.save(counts)
    assert main(["show", counts, "--tokenizer", url, "--top", "5"]) == 0
    told = capsys.readouterr()
    assert "fox" in told.out
    assert told.err == ""
    assert main(["explore", counts, "--tokenizer", url, "-o", str(tmp_path / "page.html")]) == 0
    assert counts.encode() in (tmp_path / "page.html").read_bytes()


def test_compressed_files_of_a_store(s3, key):
    of_disk = pytest.importorskip("test_compression")
    for suffix, compress in of_disk.COMPRESS.items():
        path = place("data", s3.put(f"{key}/a{suffix}", compress(of_disk.CONTENT)))
        assert b"".join(decompressed(path, compression_of(path))) == of_disk.CONTENT


@pytest.mark.parametrize("name", ["mds-gz", "litdata-zstd-batch", "litdata-columns", "hf-saved"])
def test_a_count_and_a_dry_run_of_shards_in_a_store(name, s3, key):
    url = s3.put_folder(key, GOLDEN / name)
    of_disk, of_store = (count_corpus([where], 512, policy=SHIFTED) for where in (GOLDEN / name, url))
    assert torch.equal(of_store.counts, of_disk.counts)
    of_disk, of_store = (counting.preview_corpus([where], 512) for where in (GOLDEN / name, url))
    assert [file._replace(name="") for file in of_store] == [file._replace(name="") for file in of_disk]
    assert [file.name for file in of_store] == [f"{url}{Path(file.name).name}" for file in of_disk]


# What is there.


def test_a_folder_a_pattern_a_list_and_a_file_of_a_store(s3, key, tmp_path):
    names = ("a.bin", "b/c.bin", "b/d/e.bin", ".hidden/f.bin", "b/_g.bin", "b/h_doc_idx.npy")
    for number, name in enumerate(names):
        s3.put(f"{key}/{name}", np.full(10**number, number, "<u2").tobytes())
    s3.put(f"{key}/some.list", b"# two\nb/c.bin\n\nb/d/*.bin\n")

    def counted(name, **options):
        frequency = count_corpus([name], V, dtype="uint16", **options)
        assert all(shard.name.startswith(s3.url(f"{key}/")) for shard in frequency.provenance.shards)
        return {number: int(count) for number, count in enumerate(frequency.counts) if count}

    url = s3.url(key)
    with pytest.raises(ValueError, match=r"some\.list: "):
        counted(url)
    assert counted(f"{url}/some.list") == {1: 10, 2: 100}
    (tmp_path / "all.list").write_text(f"{url}/a.bin\n{url}/b/d/\n")
    assert counted(tmp_path / "all.list") == {0: 1, 2: 100}
    assert counted(f"{url}/**/*.bin") == {0: 1, 1: 10, 2: 100, 4: 10_000}
    assert counted(f"{url}/b/c.bin") == {1: 10}
    with pytest.warns(UserWarning, match=rf"{url}/b/h_doc_idx\.npy: is a trainer's own"):
        assert counted(f"{url}/b/") == {1: 10, 2: 100}
    for name in (f"{url}/none", f"{url}/none/*.bin", "memory://none/**/*.bin"):
        with pytest.raises(ValueError, match=rf"data: got {re.escape(name)}, expected a file, a folder or a pattern"):
            counted(name)


def test_a_folder_of_a_web_server(s3, key):
    s3.put(f"{key}/a.bin", tokens_of(50).tobytes())
    s3.put(f"{key}/b/c.bin", tokens_of(60).tobytes())
    frequency = count_corpus([s3.http(f"{key}/")], V, dtype="uint16")
    assert torch.equal(frequency.counts, counts_of(np.concatenate([tokens_of(50), tokens_of(60)])))
    assert [shard.name for shard in frequency.provenance.shards] == [
        s3.http(f"{key}/{n}") for n in ("a.bin", "b/c.bin")
    ]


def test_files_that_go_together_are_found_beside_each_other(s3, key, tmp_path):
    path = write_datatrove(tmp_path, ROWS, mask=np.arange(sum(map(len, ROWS))) % 3)
    s3.put_folder(key, tmp_path)
    options = {"dtype": "uint16", "policy": SHIFTED}
    of_disk = count_corpus([path], V, **options)
    for name in (s3.url(key), s3.url(f"{key}/{path.name}"), s3.http(f"{key}/{path.name}")):
        frequency = count_corpus([name], V, **options)
        assert torch.equal(frequency.counts, of_disk.counts)
        assert frequency.provenance.shards[0].format == "datatrove with its loss mask"


def test_the_same_bytes_have_the_same_digest_wherever_they_are(s3, key, memory, tmp_path):
    path = write_raw(tmp_path, [tokens_of(100_000)])
    memory.pipe_file(f"/{key}/raw.bin", path.read_bytes())
    names = [path, s3.put(f"{key}/raw.bin", path.read_bytes()), s3.http(f"{key}/raw.bin"), f"memory://{key}/raw.bin"]
    frequencies = [count_corpus([name], V, dtype="uint16") for name in names]
    assert len({frequency.provenance.shards[0].digest for frequency in frequencies}) == 1
    assert all(torch.equal(frequency.counts, counts_of(tokens_of(100_000))) for frequency in frequencies)
    with pytest.raises(ValueError, match="got the same content as"):
        count_corpus(names[:2], V, dtype="uint16")


# What goes wrong.


def test_what_passes_is_tried_again(s3, key):
    tokens = tokens_of(5_000_000)
    s3.put(f"{key}/a.bin", tokens.tobytes())
    for name in (s3.url(f"{key}/a.bin"), s3.http(f"{key}/a.bin")):
        for fault in ("refused", "cut"):
            s3.faults(**{fault: 4})
            assert torch.equal(count_corpus([name], V, dtype="uint16").counts, counts_of(tokens))


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"refused": 10**6}, r"a\.bin: cannot be read at byte 0 \(ClientResponseError: 503"),
        ({"cut": 10**6}, r"a\.bin: cannot be read at byte 0 \(ClientPayloadError: Response payload is not completed"),
        ({"ignored": 10**6}, r"a\.bin: cannot be read at byte 0 \(got 400000 bytes for 65536: its server supports no"),
        ({"forbidden": "a.bin"}, r"a\.bin: cannot be read \(ClientResponseError: 403.*own configuration\)"),
    ],
)
def test_what_stays_is_an_error(s3, key, faults, message):
    s3.put(f"{key}/a.bin", tokens_of(200_000).tobytes())
    s3.faults(**faults)
    with pytest.raises(ValueError, match=message):
        count_corpus([s3.http(f"{key}/a.bin")], V, dtype="uint16")
    assert len(s3.faults()["ranges"]) < 100


@pytest.mark.parametrize("after", [3, 5])
def test_an_object_that_changes_is_an_error(s3, key, after, tmp_path):
    s3.put(f"{key}/a.bin", tokens_of(6_000_000).tobytes())
    s3.faults(changed=[f"/{BUCKET}/{key}/a.bin", after])
    with pytest.raises(ValueError, match=r"a\.bin: changed while it was counted, from 12000000 bytes to 12000000"):
        count_corpus([s3.url(f"{key}/a.bin")], V, dtype="uint16", checkpoint=tmp_path / "state")
    with safe_open(tmp_path / "state-0", framework="np") as file:
        counted = file.get_tensor("frequency.counts").sum()
    # Of nothing that was read before the store was asked.
    assert counted == 0


def test_an_object_that_is_shorter_than_listed_is_an_error(s3, key):
    s3.put(f"{key}/a.bin", bytes(100))
    path = place("data", s3.url(f"{key}/a.bin"))
    with RangedFile(path._store, path._key, 120, str(path)) as file, pytest.raises(ValueError, match=r"a\.bin: cannot"):
        file.read()


def test_credentials_appear_nowhere(s3, key, tmp_path, capsys):
    s3.put(f"{key}/a.bin", tokens_of(3000).tobytes())
    address = s3.http(f"{key}/a.bin").replace("://", f"://somebody:{SECRET}@") + f"?X-Amz-Signature={SECRET}"
    output = str(tmp_path / "counts")
    command = ["count", address, "--dtype", "uint16", "--vocab-size", str(V), "-o", output]
    assert main(command) == 0
    assert TokenFrequency.load(output).provenance.shards[0].name == s3.http(f"{key}/a.bin")
    assert main([*command[:-1], str(tmp_path / "other"), "--strict", "--vocab-size", "5"]) == 1
    for faults in ({"forbidden": "a.bin"}, {"refused": 10**6}):
        s3.faults(**faults)
        assert main(command) == 1
    s3.faults()
    assert main(["count", address.replace("a.bin", "none.bin"), *command[2:]]) == 1
    assert main([*command[:-1], address]) == 1
    told = "".join(capsys.readouterr())
    assert told.count("a.bin") > 3
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert SECRET not in told
    assert SECRET.encode() not in written
    assert [path.name for path in tmp_path.iterdir() if "checkpoint" in path.name] == ["other.checkpoint-0"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("of https://user:pass@host/a?sig=x no", "of https://host/a no"),
        ("got 's3://b/a?.bin' and url='http://h/x?token' at", "got 's3://b/a?.bin' and url='http://h/x' at"),
        ("gs://b/a?generation=5", "gs://b/a"),
        ("no URL?, a@b", "no URL?, a@b"),
        ("http://h/it's.bin?X-Amz-Signature=x", "http://h/it's.bin"),
        ("http://h/sp ace.bin?sig=x", "http://h/sp ace.bin"),
        ("got ['http://h/sp ace.bin?sig=x&a=1']", "got ['http://h/sp ace.bin"),
        ("http://h/x#access_token=x", "http://h/x"),
        ("zip://x.bin::http://user:secret@host/a.zip?sig=x", "zip://x.bin::http://host/a.zip"),
        ("s3://AKIA:wJal/rXU@bucket/x", "s3://bucket/x"),
        ("http://u:p'q@h:80/x", "http://h:80/x"),
        ("http://h:80/a@b.bin", "http://h:80/a@b.bin"),
        ("s3://b/q?a=b.bin", "s3://b/q?a=b.bin"),
    ],
)
def test_redacted(text, expected):
    assert store.redacted(text) == expected


def test_a_store_without_its_package_or_credentials(s3, key, monkeypatch):
    monkeypatch.setitem(registry.known_implementations, "gs", {"class": "no_such_module.Store", "err": "Install it"})
    monkeypatch.delitem(registry._registry, "gs", raising=False)
    with pytest.raises(ImportError, match=r'^gcsfs is not installed, .*: run `pip install "pdl_ext\[remote\]" gcsfs`$'):
        count_corpus(["gs://bucket/a.bin"], V)
    with pytest.raises(ValueError, match=r"^foo://bucket: cannot be opened \(ValueError: Protocol not known: foo\)"):
        count_corpus(["foo://me:hush@bucket"], V)


def test_missing_credentials_are_told_at_once():
    tried = []

    async def once():
        tried.append(1)
        raise importlib.import_module("botocore.exceptions").NoCredentialsError

    with pytest.raises(PermissionError, match=r"Unable to locate credentials; credentials are taken from the store's"):
        asyncio.run(store._tried(once))
    assert len(tried) == 1


# How it is read.


@pytest.mark.parametrize("threads", [1, 2])
def test_latency_is_hidden_by_several_requests_a_thread(s3, key, threads, monkeypatch):
    monkeypatch.setattr(counting, "_LEAST_PART_BYTES", 2**26)
    monkeypatch.setattr(ranges, "_RANGE_BYTES", 2**17)
    tokens = tokens_of(1_000_000)
    s3.put(f"{key}/a.bin", tokens.tobytes())
    s3.put(f"{key}/b.bin", tokens[::-1].tobytes())
    s3.faults(latency=0.05)
    frequency = count_corpus([s3.url(key)], V, dtype="uint16", threads=threads)
    assert torch.equal(frequency.counts, 2 * counts_of(tokens))
    seen = s3.faults()
    read_ahead = [size for size in seen["ranges"] if size == 2**17]
    assert len(read_ahead) >= 2 * (2_000_000 // 2**17)
    # Eight at once, and no more.
    assert 6 <= seen["at_once"] <= 8 * threads


def test_many_small_files_are_read_at_once(s3, key):
    for number in range(60):
        s3.put(f"{key}/{number}.bin", tokens_of(500 + number).tobytes())
    s3.faults(latency=0.05)
    assert count_corpus([s3.url(key)], V, dtype="uint16").total == sum(range(500, 560))
    seen = s3.faults()
    assert seen["at_once"] > 8
    # Each once, for all that looks at it.
    assert len(seen["ranges"]) == 60


class Bytes:
    """Stands for a store that has one object, and notes what is held of it and asked."""

    keeps = False

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.asked: list[tuple[int, int]] = []

    def fetch(self, key: str, start: int, stop: int) -> Future[bytes]:
        assert 0 <= start < stop <= len(self.content)
        self.asked.append((start, stop))
        future: Future[bytes] = Future()
        future.set_result(self.content[start:stop])
        return future


def held(file: RangedFile) -> int:
    return sum(part.stop - part.start for stream in file._streams for part in stream.ranges)


@pytest.fixture
def small_ranges(monkeypatch):
    monkeypatch.setattr(ranges, "_RANGE_BYTES", 64)


def test_any_order_of_reads_gives_the_bytes(small_ranges):
    content = np.random.default_rng(0).bytes(20_000)
    generator = np.random.default_rng(1)
    with RangedFile(Bytes(content), "key", len(content), "name") as file:
        for _ in range(3000):
            kind = generator.integers(4)
            if kind == 0:
                file.seek(int(generator.integers(0, 20_100)))
            elif kind == 1:
                file.seek(-int(generator.integers(0, 300)), io.SEEK_END)
            elif kind == 2:
                start = int(generator.integers(0, 20_000))
                file.read_ahead(start, start + int(generator.integers(1, 2000)))
            position = file.tell()
            size = int(generator.integers(0, 400))
            assert file.read(size) == content[position : position + size]
            assert held(file) <= 4 * (8 + 1) * 64 + 400


def test_what_is_announced_is_fetched_once_and_nothing_else(small_ranges):
    stored = Bytes(bytes(range(250)) * 40)
    with RangedFile(stored, "key", 10_000, "name") as file:
        file.read_ahead(1000, 9000)
        assert [stop for _, stop in stored.asked] == [1000 + 64 * number for number in range(1, 9)]
        file.seek(1000)
        for _ in range(80):
            file.read(100)
            assert held(file) <= 9 * 64 + 100
    assert sorted(stored.asked) == [(start, min(start + 64, 9000)) for start in range(1000, 9000, 64)]


def test_single_reads_fetch_what_was_asked_and_rows_of_them_ever_more_ahead(small_ranges):
    stored = Bytes(bytes(10_000))
    with RangedFile(stored, "key", 10_000, "name") as file:
        for start in (5000, 700, 8000):
            file.seek(start)
            file.read(10)
        assert stored.asked == [(5000, 5010), (700, 710), (8000, 8010)]
        file.seek(2000)
        read = 0
        while read < 3000:
            read += len(file.read(10))
            # Never more than was read.
            assert stored.asked[-1][1] - 2000 <= max(2 * read, 30)
        assert len(stored.asked) < 3 + 3000 / 64 + 20


def test_many_open_files_share_what_is_read_ahead(small_ranges):
    files = [RangedFile(Bytes(bytes(10_000)), "key", 10_000, "name") for _ in range(64)]
    for file in files:
        file.read_ahead(0, 10_000)
    assert sum(map(held, files)) == 64 * 64
    for file in files:
        file.close()
    with RangedFile(Bytes(bytes(10_000)), "key", 10_000, "name") as file:
        file.read_ahead(0, 10_000)
        assert held(file) == 8 * 64


# What is written.


def test_an_interrupted_count_goes_on_from_a_checkpoint_in_the_store(s3, key, monkeypatch):
    monkeypatch.setattr(counting, "PART_BYTES", 2**14)
    monkeypatch.setattr(counting, "_SECONDS_BETWEEN_MERGES", 0.0)
    tokens = tokens_of(200_000)
    s3.put(f"{key}/a/a.bin", tokens.tobytes())
    options = {"dtype": "uint16", "threads": 1, "checkpoint": s3.url(f"{key}/state")}
    run = counting._Count._report

    def interrupt(self, seconds):
        run(self, seconds)
        if self._state.finished.sum() >= 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(counting._Count, "_report", interrupt)
        patch.setattr(counting, "_SECONDS_BETWEEN_REPORTS", 0.001)
        with pytest.raises(KeyboardInterrupt):
            count_corpus([s3.url(f"{key}/a/")], V, **options)
    assert s3.keys(f"{key}/state") == ["-0"]
    done = []
    frequency = count_corpus([s3.url(f"{key}/a/")], V, progress=done.append, **options)
    assert torch.equal(frequency.counts, counts_of(tokens))
    assert done[-1].bytes_before >= 3 * 2**14
    s3.put(f"{key}/a/a.bin", tokens[::-1].tobytes())
    with pytest.raises(ValueError, match=r"checkpoint: s3://.*/state-0 is that of another count"):
        count_corpus([s3.url(f"{key}/a/")], V, **options)


def test_an_interruption_does_not_wait_for_a_store_that_never_answers(memory, key, monkeypatch, tmp_path):
    memory.pipe_file(f"/{key}/a.bin", tokens_of(200_000).tobytes())
    waiting: list[Future[bytes]] = []
    fetch = store.Store.fetch

    def hang(self, key, start, stop):
        if stop - start <= store.EDGE_BYTES:
            return fetch(self, key, start, stop)
        waiting.append(Future())
        return waiting[-1]

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(store.Store, "fetch", hang)
    monkeypatch.setattr(counting, "_SECONDS_FOR_A_STORE", 0.1)
    with pytest.raises(KeyboardInterrupt):
        count_corpus([f"memory://{key}"], V, dtype="uint16", checkpoint=tmp_path / "state", progress=interrupt)
    assert waiting
    assert not waiting[0].done()
    assert (tmp_path / "state-0").exists()
    waiting[0].set_exception(OSError(5, "at last"))


def test_ranks_share_the_parts_and_write_to_the_store(s3, key):
    tokens = [tokens_of(3000 + number) for number in range(5)]
    for number, some in enumerate(tokens):
        s3.put(f"{key}/in/{number}.bin", some.tobytes())
    output = s3.url(f"{key}/out/counts.safetensors")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pdl_ext.cli", "count"]
    command += [s3.url(f"{key}/in/"), "--dtype", "uint16", "--vocab-size", str(V), "-o", output]
    run = fresh_python.run(*command, timeout=120, env={"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert "unclosed" not in run.stderr.lower()
    assert f"{output}: 15,010 tokens counted of 15,010 in 5 files" in run.stdout
    assert s3.keys(f"{key}/out/") == ["counts.safetensors"]
    frequency = TokenFrequency.load(output)
    assert torch.equal(frequency.counts, counts_of(np.concatenate(tokens)))


def test_counts_in_a_store_are_shown_merged_and_not_overwritten_by_others(s3, key, capsys):
    for name in ("a", "b"):
        s3.put(f"{key}/{name}.bin", tokens_of(ord(name)).tobytes())
        command = ["count", s3.url(f"{key}/{name}.bin"), "--dtype", "uint16", "--vocab-size", str(V), "-o"]
        assert main([*command, s3.url(f"{key}/{name}.counts")]) == 0
    merged = s3.url(f"{key}/c.counts")
    assert main(["merge", s3.url(f"{key}/a.counts"), s3.url(f"{key}/b.counts"), "-o", merged]) == 0
    assert main(["show", merged]) == 0
    assert "195: 195 counted" in capsys.readouterr().out
    before = s3.get(f"{key}/a.bin")
    assert main([*command, s3.url(f"{key}/a.bin")]) == 1
    assert s3.get(f"{key}/a.bin") == before
    assert main([*command, s3.http(f"{key}/d.counts")]) == 1
    assert main([*command, s3.url(key)]) == 1
    assert main(["show", s3.url(f"{key}/none")]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [re.sub(r"s3://\S+/", "", line) for line in errors] == [
        "pdl-ext: output: got a.bin, a file that holds no counts, expected a new one, or counts to replace",
        f"pdl-ext: [Errno 30] A web server takes no files; not written: {s3.http(f'{key}/d.counts.checkpoint-0')}",
        f"pdl-ext: output: got {key}, a folder, expected a file",
        "pdl-ext: counts: no file at none, expected one that `pdl-ext count` wrote",
    ]
    assert s3.keys(f"{key}/") == ["a.bin", "a.counts", "b.bin", "b.counts", "c.counts"]


@pytest.mark.parametrize(
    ("command", "name", "beginning"),
    [("explore", "report.html", b"<!DOCTYPE html>"), ("plot", "a.png", b"\x89PNG"), ("plot", "a.svg", b"<?xml")],
)
def test_pages_and_pictures_are_written_to_a_store(command, name, beginning, s3, key, tmp_path, capsys):
    if command == "plot":
        pytest.importorskip("matplotlib")
    counts = s3.url(f"{key}/counts")
    TokenFrequency.from_counts(torch.tensor([3, 2, 1])).save(counts)
    assert main([command, counts, "-o", s3.url(f"{key}/{name}")]) == 0
    assert main([command, counts, "-o", str(tmp_path / name)]) == 0
    assert s3.get(f"{key}/{name}") == (tmp_path / name).read_bytes()
    assert s3.get(f"{key}/{name}").startswith(beginning)
    assert capsys.readouterr().out.splitlines() == [s3.url(f"{key}/{name}"), str(tmp_path / name)]
    # Again, over its own.
    assert main([command, counts, "-o", s3.url(f"{key}/{name}")]) == 0
    s3.put(f"{key}/mine.html", b"<!DOCTYPE html>\n<html>\n")
    s3.put(f"{key}/mine.pdf", b"%PDF")
    for output, message in [
        (s3.url(f"{key}/mine.{'html' if command == 'explore' else 'pdf'}"), "output: got s3://"),
        (s3.http(f"{key}/{name}"), f"[Errno 30] A web server takes no files; not written: {s3.http(key)}/{name}"),
        (f"nowhere://bucket/{name}", f"nowhere://bucket/{name}: cannot be opened"),
    ]:
        capsys.readouterr()
        assert main([command, counts, "-o", output]) == 1
        told = capsys.readouterr()
        assert told.err.startswith("pdl-ext: ")
        assert told.err.count("\n") == 1
        assert message in told.err
    assert s3.get(f"{key}/mine.html") == b"<!DOCTYPE html>\n<html>\n"
    assert s3.get(f"{key}/mine.pdf") == b"%PDF"


def test_what_a_store_does_not_take_is_told_before_anything_is_counted(s3, key, tmp_path):
    s3.put(f"{key}/a.bin", tokens_of(100).tobytes())
    s3.faults(forbidden="/out/")
    with pytest.raises(OSError, match=r"not written: s3://bucket/.*/out/state-0"):
        count_corpus([s3.url(f"{key}/a.bin")], V, dtype="uint16", checkpoint=s3.url(f"{key}/out/state"))
    with pytest.raises(OSError, match=r"PermissionError: Forbidden.*not written: s3://bucket/.*/out/counts"):
        TokenFrequency(V).save(s3.url(f"{key}/out/counts"))


# Damage.


def damaged(content: bytes, generator: np.random.Generator) -> bytes:
    some = bytearray(content)
    kind = generator.integers(3)
    if kind == 0:
        return bytes(some[: generator.integers(len(some))])
    if kind == 1:
        return bytes(some) + generator.bytes(5)
    for index in generator.integers(0, len(some), 3):
        some[index] = generator.integers(256)
    return bytes(some)


def outcome(data: str, root: str, tokenizer: Path) -> object:
    try:
        frequency = count_corpus([data], 512, policy=SHIFTED, tokenizer=tokenizer, threads=1, allow_overlap=True)
    except ValueError as error:
        return str(error).replace(root, "")
    return frequency.counts.tolist(), int(frequency.out_of_range)


def test_damaged_files_are_told_as_they_are_on_disk(memory, tmp_path):
    text_tokenizer = pytest.importorskip("text_tokenizer")
    pytest.importorskip("pyarrow")
    tokenizer = text_tokenizer.save_tokenizer(tmp_path / "tokenizer.json")
    generator = np.random.default_rng(0)
    of_arrays = io.BytesIO()
    np.savez(of_arrays, tokens=ROWS[0])
    files = []
    for name in (
        *("datatrove-uint16", "litdata-tensors", "litdata-zstd-batch", "hf-saved", "hf-indices", "mds-columns"),
        "mds-gz",
    ):
        shutil.copytree(GOLDEN / name, tmp_path / "all" / name)
        files += [path for path in (tmp_path / "all" / name).iterdir() if path.stat().st_size]
    for write in (write_llmc, write_npy, write_megatron):
        folder = tmp_path / "all" / write.__name__
        folder.mkdir()
        path = write(folder, ROWS[:9])
        files += [path, *folder.glob("*.idx")]
    for name, content in (
        ("a.txt", b"the fox\r\n\nit\n"),
        ("a.jsonl", b'{"text": "the fox"}\n{"input_ids": [1, 2]}\n'),
        ("a.txt.bz2", bz2.compress(b"the fox\n")),
        ("a.npz", of_arrays.getvalue()),
        ("a.safetensors", safetensors.numpy.save({"tokens": ROWS[0]})),
    ):
        (tmp_path / "all" / name).mkdir()
        path = tmp_path / "all" / name / name
        path.write_bytes(content)
        files.append(path)
    for number, path in enumerate(files * 4):
        whole = path.read_bytes()
        path.write_bytes(damaged(whole, generator))
        remote = f"/{number}/{path.parent.name}"
        for file in path.parent.rglob("*"):
            if file.is_file():
                memory.pipe_file(f"{remote}/{file.relative_to(path.parent)}", file.read_bytes())
        on_disk = outcome(str(path.parent), str(path.parent), tokenizer)
        assert outcome(f"memory:/{remote}", f"memory:/{remote}", tokenizer) == on_disk, path
        path.write_bytes(whole)


# Hugging Face.


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers for one repository, as far as reading goes."""

    FILES: ClassVar = {"README.md": b"# A card", "data/a.bin": bytes(range(200)), "data/sub/b.bin": b"\1\0" * 50}

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        folder = re.fullmatch(r"/api/datasets/some/set/tree/main/?(.*)", path)
        file = re.fullmatch(r"/datasets/some/set/resolve/main/(.*)", path)
        if path == "/api/datasets/some/set":
            self.answer(json.dumps({"id": "some/set", "sha": "0" * 40, "siblings": []}).encode())
        elif folder:
            self.answer(json.dumps(self.entries(folder[1], "recursive=true" in self.path)).encode())
        elif file and file[1] in self.FILES:
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            self.answer(self.FILES[file[1]][first : last + 1], 206)
        else:
            self.answer(b"{}", 404)

    def entries(self, folder: str, recursive: bool) -> list[dict[str, object]]:
        found = {}
        for name, content in self.FILES.items():
            parts = Path(name).relative_to(folder).parts if Path(name).is_relative_to(folder) else ()
            for depth in range(1, len(parts) + 1 if recursive else min(2, len(parts) + 1)):
                kind = "file" if depth == len(parts) else "directory"
                path = str(Path(folder, *parts[:depth]))
                found[path] = {"type": kind, "oid": "1", "size": len(content) if kind == "file" else 0, "path": path}
        return list(found.values())

    def answer(self, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: pip install 'pdl_ext[demo]'")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": f"http://127.0.0.1:{server.server_port}"})
        yield
        server.shutdown()


def test_a_repository_of_hugging_face(hub):
    for name, files in [
        ("hf://datasets/some/set", ["data/a.bin", "data/sub/b.bin"]),
        ("hf://datasets/some/set/data/*.bin", ["data/a.bin"]),
        ("hf://datasets/some/set/data/sub/b.bin", ["data/sub/b.bin"]),
    ]:
        frequency = count_corpus([name], 2**16, dtype="uint16")
        tokens = np.concatenate([np.frombuffer(Hub.FILES[file], "<u2") for file in files])
        assert torch.equal(frequency.counts, torch.from_numpy(np.bincount(tokens, minlength=2**16)))
        shards = [shard.name for shard in frequency.provenance.shards]
        assert shards == [f"hf://datasets/some/set/{file}" for file in files]
    with pytest.raises(ValueError, match="data: got hf://datasets/some/other, expected a file, a folder or a pattern"):
        count_corpus(["hf://datasets/some/other"], 2**16, dtype="uint16")


@pytest.mark.parametrize("url", ["zip://a.bin::memory://z.zip", "hosted://a/d/x.bin"])
def test_what_its_name_alone_does_not_tell_is_refused(url, monkeypatch):
    class Hosted(type(fsspec.filesystem("memory"))):
        """Its keys leave out the host, as ftp's do."""

        protocol = "hosted"

        def __init__(self, host="", **options):
            super().__init__(**options)

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + path.partition("://")[2].partition("/")[2]

        @staticmethod
        def _get_kwargs_from_urls(path):
            return {"host": path.partition("://")[2].partition("/")[0]}

    monkeypatch.setitem(registry._registry, "hosted", Hosted)
    fsspec.filesystem("memory").pipe("/z.zip", b"PK\5\6" + bytes(18))
    with pytest.raises(ValueError, match=r"data: got .*, expected a URL that its bucket and name identify"):
        count_corpus([url], V)


def test_names_that_begin_as_a_link_of_a_page_are_counted(s3, key):
    for name in ("#a.bin", "?b.bin", "c.bin"):
        s3.put(f"{key}/{name}", np.arange(4, dtype=np.uint16).tobytes())
    assert count_corpus([f"s3://{BUCKET}/{key}/"], V, dtype="uint16", allow_overlap=True).total == 12


@pytest.mark.parametrize(("of_a_page", "kept"), [(True, ["a/b"]), (False, ["a/?C=N", "a/#x", "a/b"])])
def test_links_of_a_page_to_itself_are_no_files(of_a_page, kept):
    listed = [{"name": f"a/{name}", "type": "file"} for name in ("?C=N", "#x", "b")]
    assert [key for key, _ in store._entries("a", listed, of_a_page)] == kept
