"""The counting loop, on raw files: every token once, over threads and parts; errors; and the state after a stop."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time

import numpy as np
import pytest
import torch

from pdl_ext.corpus import TargetPolicy, count_corpus, counting, discover
from pdl_ext.corpus.reading import flat
from pdl_ext.corpus.source import Batch, Format, Part, Source
from pdl_ext.storage import tensor_file

V = 1000


def zipf(n, seed=0, vocab_size=V):
    generator = np.random.default_rng(seed)
    return (generator.pareto(1.1, n) * 3).astype(np.int64) % vocab_size


def expected(tokens, vocab_size=V):
    return torch.from_numpy(np.bincount(tokens, minlength=vocab_size))


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(counting, "PART_BYTES", 1000)
    monkeypatch.setattr(flat, "BUFFER_BYTES", 128)


def write(path, tokens, dtype="<u2"):
    path.write_bytes(tokens.astype(dtype).tobytes())
    return path


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "int64"])
def test_counts_every_token_once(dtype, threads, tmp_path, small_parts):
    vocab_size = 100 if dtype in ("uint8", "int8") else V
    shards = [zipf(n, n, vocab_size) for n in (1, 7, 500, 501, 4099)]
    for number, shard in enumerate(shards):
        write(tmp_path / f"{number}.bin", shard, np.dtype(dtype).newbyteorder("<"))
    frequency = count_corpus([tmp_path], vocab_size, dtype=dtype, threads=threads)
    assert torch.equal(frequency.counts, expected(np.concatenate(shards), vocab_size))
    assert frequency.tokens_seen == frequency.provenance.tokens == sum(map(len, shards))


def test_many_tokens_in_real_parts(tmp_path):
    tokens = zipf(3_000_001)
    write(tmp_path / "a.bin", tokens)
    assert torch.equal(count_corpus([tmp_path / "a.bin"], V, dtype="uint16").counts, expected(tokens))


def test_what_is_no_target_is_seen_and_not_counted(tmp_path, small_parts):
    tokens = np.array([5, 7, 7, 3, -100, 1200, -1, 2, V])
    write(tmp_path / "a.bin", tokens, "<i4")
    frequency = count_corpus([tmp_path], V, dtype="int32")
    assert frequency.counts.nonzero().flatten().tolist() == [2, 3, 5, 7]
    assert (frequency.total, int(frequency.ignored), int(frequency.out_of_range)) == (5, 1, 3)
    shifted = count_corpus([tmp_path], V, dtype="int32", policy=TargetPolicy(targets="shifted", ignore_index=7))
    assert shifted.counts.nonzero().flatten().tolist() == [2, 3]
    assert (shifted.total, int(shifted.ignored), int(shifted.out_of_range)) == (2, 3, 4)


def test_shifted_targets_leave_out_one_token_a_file_not_one_a_part(tmp_path, small_parts):
    tokens = zipf(5000)
    write(tmp_path / "a.bin", tokens)
    frequency = count_corpus([tmp_path], V, dtype="uint16", policy=TargetPolicy(targets="shifted"))
    assert torch.equal(frequency.counts, expected(tokens[1:]))
    assert int(frequency.ignored) == 1


def test_strict_names_the_file_and_the_id(tmp_path):
    write(tmp_path / "good.bin", np.array([1, 2]))
    write(tmp_path / "wrong.bin", np.array([1, V]))
    assert int(count_corpus([tmp_path], V, dtype="uint16").out_of_range) == 1
    with pytest.raises(ValueError, match=rf"wrong.bin: got the id {V}, expected 0 <= id < {V}"):
        count_corpus([tmp_path], V, dtype="uint16", strict=True)


def test_data_may_be_files_folders_patterns_and_lists(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / ".hidden").mkdir()
    paths = [tmp_path / "a.bin", tmp_path / "deep" / "b.bin", tmp_path / "deep" / "er" / "c.bin"]
    shards = [zipf(50, seed) for seed in range(3)]
    for path, shard in zip(paths, shards, strict=True):
        write(path, shard)
    write(tmp_path / "deep" / ".hidden" / "d.bin", zipf(50, 9))
    (tmp_path / "all.list").write_text("# relative to this file\na.bin\n\ndeep/**/*.bin\n")

    def counts(*data):
        return count_corpus(data, V, dtype="uint16").counts

    everything = expected(np.concatenate(shards))
    assert torch.equal(counts(tmp_path / "all.list"), everything)
    assert torch.equal(counts(tmp_path / "a.bin", tmp_path / "deep"), everything)
    assert torch.equal(counts(str(tmp_path / "**" / "*.bin")), everything)
    # Named twice, counted once.
    assert torch.equal(counts(tmp_path / "a.bin", tmp_path / "deep", tmp_path / "deep" / "b.bin"), everything)
    assert torch.equal(counts(tmp_path / "deep" / "er"), expected(shards[2]))


def test_the_same_content_twice_is_refused(tmp_path):
    write(tmp_path / "a.bin", zipf(2048))
    write(tmp_path / "b.bin", zipf(2048))
    with pytest.raises(ValueError, match=r"b.bin: got the same content as .*a.bin"):
        count_corpus([tmp_path], V, dtype="uint16")
    frequency = count_corpus([tmp_path], V, dtype="uint16", allow_overlap=True)
    assert torch.equal(frequency.counts, 2 * expected(zipf(2048)))


def test_small_files_may_be_the_same(tmp_path):
    documents = [np.random.default_rng(seed).integers(0, 9, seed % 8 + 1) for seed in range(300)]
    for number, document in enumerate(documents):
        write(tmp_path / f"{number:03}.bin", document)
    with pytest.warns(UserWarning, match=r"032\.bin: has the same content as .*, and \d+ other files like it: each is"):
        frequency = count_corpus([tmp_path], V, dtype="uint16")
    assert torch.equal(frequency.counts, expected(np.concatenate(documents)))


def test_more_names_than_a_file_of_counts_has_room_for(tmp_path, monkeypatch):
    for name in "abc":
        write(tmp_path / f"{name}.bin", zipf(10, seed=ord(name)))
    seen = []
    monkeypatch.setattr(tensor_file, "_LARGEST_HEADER", 4096 + 500)
    options = {"dtype": "uint16", "progress": seen.append}
    with pytest.raises(
        ValueError,
        match=r"^data: got 3 files, .* would need \d+ bytes of metadata in a counts file, expected at most 500",
    ):
        count_corpus([tmp_path], V, **options, output=tmp_path / "counts", checkpoint=tmp_path / "checkpoint")
    assert not seen
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "b.bin", "c.bin"]
    # Counts that no file is made of may come from any number.
    frequency = count_corpus([tmp_path], V, **options)
    assert frequency.total == 30
    # What was let through has room.
    monkeypatch.setattr(tensor_file, "_LARGEST_HEADER", 4096 + len(json.dumps(frequency.provenance.to_json())))
    count_corpus([tmp_path], V, **options, output=tmp_path / "counts").save(tmp_path / "counts")


def test_provenance_tells_what_was_counted(tmp_path):
    write(tmp_path / "a.bin", zipf(50))
    provenance = count_corpus([tmp_path], V, dtype="uint16").provenance
    (shard,) = provenance.shards
    assert (shard.name, shard.size, shard.format, shard.dtype) == (str(tmp_path / "a.bin"), 100, "raw", "uint16")
    assert provenance.tokens == 50
    assert provenance.policy == TargetPolicy()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": []}, "data: got list with nothing in it, expected files"),
        ({"data": "a.bin"}, "data: got 'a.bin', expected a list"),
        ({"data": 5}, "data: got 5, expected a list"),
        ({"data": ["a.bin", 1]}, "data: got 1 of type int, expected a path"),
        ({"data": [b"a.bin"]}, "data: got b'a.bin' of type bytes, expected a path"),
        ({"data": np.array("a.bin")}, "data: got array('a.bin', dtype='<U5'), expected a list"),
        ({"data": ["nowhere"]}, "data: got nowhere, expected a file, a folder or a pattern"),
        ({"data": ["empty"]}, "data: got nothing to count in empty"),
        ({"data": ["a.txy"], "dtype": None}, "a.txy: its format is unknown"),
        ({"data": ["broken.list"]}, "broken.list: line 3: got ./gone.bin, expected a file"),
        ({"data": ["binary.list"]}, "binary.list: cannot be read as a list of files"),
        ({"data": ["odd.bin"], "dtype": "uint16"}, "odd.bin: got 3 bytes, expected a multiple of 2"),
        ({"dtype": None}, "a.bin: has no header, so its dtype is unknown: give dtype"),
        ({"dtype": "float32"}, "dtype: got 'float32'"),
        ({"format": "arrows"}, "format: got 'arrows', expected one of"),
        ({"vocab_size": 0}, "vocab_size: got 0"),
        ({"threads": 0}, "threads: got 0"),
        ({"checkpoint_every": 0}, "checkpoint_every: got 0"),
        ({"checkpoint": 5}, "checkpoint: got 5 of type int, expected a path"),
        ({"checkpoint": ""}, "checkpoint: got an empty name, expected a path"),
        ({"output": 5}, "output: got 5 of type int, expected a path"),
        ({"tokenizer": 5}, "tokenizer: got 5 of type int, expected a path"),
        ({"tokenizer": ""}, "tokenizer: got an empty name, expected a path"),
        ({"group": "x"}, "group: got str, expected a ProcessGroup that this rank is in, or None"),
        ({"progress": 5}, "progress: got 5, expected a function or None"),
        ({"checkpoint": "nowhere/state"}, "[Errno 2] No such file or directory; not written: nowhere/state-0"),
        ({"tokenizer": "gone.json"}, "gone.json: cannot be read"),
    ],
)
def test_bad_arguments_are_named(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txy").write_bytes(b"\x01\x02")
    (tmp_path / "odd.bin").write_bytes(b"\x01\x02\x03")
    (tmp_path / "broken.list").write_text("# a list\n\ngone.bin\n")
    (tmp_path / "binary.list").write_bytes(b"\xff\xfe\x00")
    write(tmp_path / "a.bin", zipf(50))
    options = {"data": ["a.bin"], "vocab_size": V, "dtype": "uint16"} | options
    with pytest.raises((TypeError, ValueError, OSError), match=f"^{re.escape(message)}"):
        count_corpus(options.pop("data"), options.pop("vocab_size"), **options)


def test_policy_of_a_wrong_type_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"policy: got str, expected TargetPolicy"):
        count_corpus([tmp_path], V, policy="all")
    for options, error in [
        ({"targets": "some"}, ValueError),
        ({"ignore_index": 2**40}, ValueError),
        ({"column": ""}, ValueError),
        ({"mask": 3}, ValueError),
        ({"special_tokens": 1}, TypeError),
        ({"sample_by": "page"}, ValueError),
    ]:
        with pytest.raises(error, match=f"{next(iter(options))}: got"):
            TargetPolicy(**options)


def test_a_corpus_without_a_token_is_an_error(tmp_path):
    data, checkpoint = tmp_path / "data", tmp_path / "checkpoint"
    data.mkdir()
    write(data / "a.bin", np.zeros(0))
    with pytest.raises(ValueError, match=r"data: got no token in .*a\.bin, expected some"):
        count_corpus([data], V, dtype="uint16", checkpoint=checkpoint)
    np.save(data / "b.npy", np.zeros((3, 0), np.uint16))
    with pytest.raises(ValueError, match=r"data: got no token in .*a\.bin and 1 other files, expected some"):
        count_corpus([data], V, dtype="uint16", checkpoint=checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    # Of which none is a target, but which are there.
    write(data / "c.bin", np.full(5, -100), "<i2")
    assert int(count_corpus([data / "c.bin"], V, dtype="int16").ignored) == 5


def test_a_narrow_dtype_is_warned_of(tmp_path):
    write(tmp_path / "a.bin", zipf(50))
    message = r"a.bin: its tokens are uint16, and cannot hold ids above 65535 of .* when it was written"
    with pytest.warns(UserWarning, match=rf"{message}$"):
        count_corpus([tmp_path], 65537, dtype="uint16")
    # Once, however many files there are.
    for name in "bc":
        write(tmp_path / f"{name}.bin", zipf(60))
    with pytest.warns(UserWarning, match=rf"{message}; the same goes for 2 other files$") as warned:
        count_corpus([tmp_path], 65537, dtype="uint16", allow_overlap=True)
    assert len(warned) == 1


class Slow(Source):
    """100 parts of one token, each of which calls `during` and takes a while."""

    def __init__(self, path, during=lambda part: None, seconds=0.0):
        super().__init__("slow", path, "uint16")
        self._during, self._seconds = during, seconds

    def parts(self, size):
        return [Part(i, i + 1, 1) for i in range(100)]

    def batches(self, part):
        time.sleep(self._seconds)
        self._during(part)
        yield Batch(np.array([part.start], np.uint16))


def register(monkeypatch, make):
    slow = Format("slow", lambda path, options: [make(path)], lambda path, head: path.suffix == ".slow")
    monkeypatch.setitem(discover.FORMATS, "slow", slow)


@pytest.mark.parametrize("change", [lambda path: path.write_bytes(b"longer"), os.utime, lambda path: path.unlink()])
def test_a_file_that_changes_is_an_error(change, tmp_path, monkeypatch):
    path = tmp_path / "a.slow"
    path.write_bytes(b"long")
    os.utime(path, (1, 1))
    register(monkeypatch, lambda path: Slow(path, lambda part: change(path) if part.start == 50 else None))
    with pytest.raises(ValueError, match=r"a.slow: (changed while it was counted|cannot be read)"):
        count_corpus([path], V, threads=2)


def test_an_error_in_a_thread_stops_all_and_leaves_a_checkpoint_to_go_on_from(tmp_path, monkeypatch):
    monkeypatch.setattr(counting, "_SECONDS_BETWEEN_MERGES", 0.0)
    path = tmp_path / "a.slow"
    path.write_bytes(b"")
    counted = []
    fails = [True]

    def during(part):
        counted.append(part.start)
        if part.start == 60 and fails:
            raise ValueError("a.slow: is damaged")

    register(monkeypatch, lambda path: Slow(path, during, 0.001))
    with pytest.raises(ValueError, match=r"a.slow: is damaged"):
        count_corpus([path], V, threads=2, checkpoint=tmp_path / "state")
    assert len(counted) < 100
    before = set(counted) - {60}
    counted.clear()
    fails.clear()
    frequency = count_corpus([path], V, threads=2, checkpoint=tmp_path / "state")
    assert torch.equal(frequency.counts, expected(np.arange(100)))
    # What was finished is not read again.
    assert sorted(counted) == sorted(set(range(100)) - before)


@pytest.fixture
def interruptible():
    # Whoever runs the tests in the background may have them ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_leaves_a_checkpoint(tmp_path, monkeypatch, interruptible):
    path = tmp_path / "a.slow"
    path.write_bytes(b"")
    counted = []

    def during(part):
        counted.append(part.start)
        if part.start == 40:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    register(monkeypatch, lambda path: Slow(path, during, 0.002))
    with pytest.raises(KeyboardInterrupt):
        count_corpus([path], V, threads=1, checkpoint=tmp_path / "state")
    assert len(counted) < 100
    register(monkeypatch, lambda path: Slow(path, lambda part: counted.append(part.start)))
    frequency = count_corpus([path], V, checkpoint=tmp_path / "state")
    assert torch.equal(frequency.counts, expected(np.arange(100)))
    # The part under way was finished before the checkpoint.
    assert sorted(counted) == list(range(100))


def test_progress_ends_at_the_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.slow"
    path.write_bytes(b"")
    register(monkeypatch, lambda path: Slow(path, seconds=0.005))
    seen = []
    count_corpus([path], V, threads=2, progress=seen.append)
    assert len(seen) >= 2
    assert [p.tokens for p in seen] == sorted(p.tokens for p in seen)
    last = seen[-1]
    assert (last.tokens, last.bytes_before, last.bytes_now, last.bytes_total) == (100, 0, 100, 100)
    assert last.seconds > 0.1


def test_threads_of_the_caller_are_left_alone(tmp_path):
    write(tmp_path / "a.bin", zipf(50))
    before = torch.get_num_threads()
    count_corpus([tmp_path], V, dtype="uint16", threads=2)
    assert torch.get_num_threads() == before
    assert threading.active_count() == 1 or not any("Worker" in type(t).__name__ for t in threading.enumerate())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("targets", ["all", "shifted"])
def test_a_count_without_gradients_is_like_any_other(tmp_path, mode, targets):
    write(tmp_path / "a.bin", zipf(50))
    with mode():
        frequency = count_corpus(
            [tmp_path], V, dtype="uint16", policy=TargetPolicy(targets=targets), checkpoint=tmp_path / "state"
        )
    counted = expected(zipf(50)[targets == "shifted" :])
    assert torch.equal(frequency.counts, counted)
    # And can be gone on with, within the mode and without.
    with mode():
        frequency.update(torch.tensor([1]))
    frequency.update(torch.tensor([1]))
    counted[1] += 2
    assert torch.equal(frequency.counts, counted)


def test_only_ids_are_taken_from_a_folder_of_ids(tmp_path):
    write(tmp_path / "train.bin", zipf(50))
    (tmp_path / "meta.pkl").write_bytes(b"even")
    with pytest.raises(ValueError, match=r"meta.pkl: is a pickle, which is not read"):
        count_corpus([tmp_path], V, dtype="uint16")
    assert torch.equal(count_corpus([str(tmp_path / "*.bin")], V, dtype="uint16").counts, expected(zipf(50)))
    assert count_corpus([tmp_path / "meta.pkl"], V, format="raw", dtype="uint16").tokens_seen == 2


def test_counts_and_checkpoints_in_the_folder_are_no_corpus(tmp_path, monkeypatch):
    write(tmp_path / "train.bin", zipf(50))
    for _ in range(2):
        checkpoint = tmp_path / "counts.safetensors.checkpoint"
        frequency = count_corpus([tmp_path], V, dtype="uint16", checkpoint=checkpoint)
        frequency.save(tmp_path / "counts.safetensors")
        assert torch.equal(frequency.counts, expected(zipf(50)))


def test_links_and_lists_that_turn_in_circles(tmp_path):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.bin", zipf(50))
    (tmp_path / "in" / "up").symlink_to(tmp_path)
    assert torch.equal(count_corpus([tmp_path], V, dtype="uint16").counts, expected(zipf(50)))
    (tmp_path / "a.list").write_text("b.list\n")
    (tmp_path / "b.list").write_text("a.list\n")
    with pytest.raises(ValueError, match=r"a.list: lists itself"):
        count_corpus([tmp_path / "a.list"], V, dtype="uint16")


def test_several_empty_files(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.bin").write_bytes(b"")
    write(tmp_path / "c.bin", zipf(50))
    assert count_corpus([tmp_path], V, dtype="uint16").tokens_seen == 50
