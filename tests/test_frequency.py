"""TokenFrequency: exact counts from every dtype, sums of parts, files, probabilities and buckets."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import sys
from collections import UserDict

import fresh_python
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pdl_ext import PowerLaw, TokenFrequency, functional, reference
from pdl_ext.counts import TOKEN_DTYPES
from pdl_ext.provenance import Provenance, Shard, TargetPolicy
from pdl_ext.storage import tensor_file
from pdl_ext.storage.tensor_file import format_of, write_tensors

TORCH_DTYPES = TOKEN_DTYPES


def assert_conserved(frequency, seen):
    assert frequency.counts.sum() + frequency.ignored + frequency.out_of_range == seen
    assert frequency.seen == seen


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1000,), (7, 11, 13), (), (0,)], ids=str)
def test_every_dtype_and_shape(device, dtype, shape):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, shape, generator=generator).to(dtype).to(device)
    frequency = TokenFrequency(200, ignore_index=7).to(device)
    frequency.update(tokens)
    assert torch.equal(frequency.counts, reference.count_tokens(tokens, 200, ignore_index=7))
    wide = tokens.long()
    assert frequency.ignored == (wide == 7).sum()
    assert frequency.out_of_range == (wide >= 200).sum()
    assert_conserved(frequency, tokens.numel())


@pytest.mark.parametrize(
    "dtype", [np.uint8, np.uint16, np.int32, np.uint32, np.int64], ids=lambda dtype: dtype.__name__
)
@pytest.mark.parametrize("kind", ["plain", "read_only", "strided"])
def test_numpy_arrays(device, dtype, kind, recwarn):
    tokens = np.random.default_rng(0).integers(0, 250, 2000).astype(dtype)
    tokens.setflags(write=kind != "read_only")
    if kind == "strided":
        tokens = tokens[::2]
    frequency = TokenFrequency(256).to(device)
    frequency.update(tokens)
    assert frequency.counts.tolist() == np.bincount(tokens, minlength=256).tolist()
    assert not recwarn.list


def test_memory_mapped_corpus(device, tmp_path):
    tokens = np.random.default_rng(0).integers(0, 50257, 4000).astype(np.uint16)
    tokens.tofile(tmp_path / "corpus.bin")
    frequency = TokenFrequency(50257).to(device)
    frequency.update(np.memmap(tmp_path / "corpus.bin", dtype=np.uint16, mode="r"))
    assert frequency.counts.tolist() == np.bincount(tokens, minlength=50257).tolist()


@pytest.mark.parametrize("vocab_size", [65535, 65536, 65537])
def test_ids_at_the_edge_of_uint16(device, vocab_size):
    ids = [0, 65534, 65535, 65535]
    narrow, wide = TokenFrequency(vocab_size).to(device), TokenFrequency(vocab_size).to(device)
    narrow.update(torch.tensor(ids, device=device).to(torch.uint16))
    wide.update(torch.tensor([*ids, 65536], device=device))
    expected = np.bincount([t for t in ids if t < vocab_size], minlength=vocab_size)
    assert narrow.counts.tolist() == expected.tolist()
    assert (
        wide.counts.tolist() == np.bincount([t for t in [*ids, 65536] if t < vocab_size], minlength=vocab_size).tolist()
    )
    assert_conserved(narrow, 4)
    assert_conserved(wide, 5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint32], ids=str)
def test_extreme_ids_are_out_of_range(device, dtype):
    limits = torch.iinfo(dtype)
    tokens = torch.tensor([limits.min if limits.min else 200, limits.max, limits.max - 1, 3, 100, 99], device=device)
    frequency = TokenFrequency(100).to(device)
    frequency.update(tokens.to(dtype))
    assert frequency.out_of_range == 4
    assert frequency.counts.nonzero().flatten().tolist() == [3, 99]


@pytest.mark.parametrize(
    ("rows", "vocab_size"),
    [
        (799, 100),  # just too few for tables of the threads' own
        (800, 100),  # just enough
        (100_003, 97),  # far more, and parts of uneven size
        (1_000_003, 50257),  # a large vocabulary on the threaded path
        (100_003, 128256),  # a large vocabulary on the direct path
        (600_011, 128256),  # CUDA: the first ids on chip, the others beside it
        (50_000, 1),  # every token in one bin
    ],
)
def test_large_batches_match_bincount(device, rows, vocab_size):
    generator = torch.Generator().manual_seed(0)
    # Zipf-like, with ids below 0 and above V among them.
    tokens = (torch.rand(rows, generator=generator) ** 3 * (vocab_size + 5)).long() - 2
    tokens[::50] = -100
    frequency = TokenFrequency(vocab_size).to(device)
    frequency.update(tokens.to(device))
    kept = tokens[(tokens >= 0) & (tokens < vocab_size)]
    assert frequency.counts.tolist() == np.bincount(kept.numpy(), minlength=vocab_size).tolist()
    assert frequency.ignored == (tokens == -100).sum()
    assert_conserved(frequency, rows)


@pytest.mark.devices("emulated")
@pytest.mark.parametrize("ignored", [3, -10], ids=["low", "high"])
@pytest.mark.parametrize("dtype", [torch.uint16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("card", "multiprocessors", "vocab_size"),
    [
        ("sm_90", 4, 50_000),  # a block counts all of them
        ("sm_90", 4, 60_001),  # two blocks share them, of which the second one has less
        ("sm_80", 4, 60_001),
        ("sm_75", 4, 60_001),  # the four blocks that there are
        ("sm_75", 4, 70_001),  # and some ids are beyond their counters
        ("sm_75", 7, 80_003),  # a group of five, and no second one
        ("sm_75", 17, 120_007),  # two groups of eight, and a multiprocessor that is left over
        ("sm_75", 9, 140_009),  # more than the most that share
    ],
)
def test_tables_of_every_card(device, monkeypatch, card, multiprocessors, vocab_size, dtype, ignored):
    monkeypatch.setenv("PDL_EXT_EMULATOR_DEVICE", card)
    monkeypatch.setenv("PDL_EXT_EMULATOR_MULTIPROCESSORS", str(multiprocessors))
    ignore_index = ignored % min(vocab_size, 2**16)
    largest = min(vocab_size + 4, 2**16) if dtype == torch.uint16 else vocab_size + 4
    tokens = (torch.rand(600_013, generator=torch.Generator().manual_seed(0)) ** 2 * largest).to(dtype)
    tokens[::9] = ignore_index
    # One without a counter in any block, before the first vector.
    tokens[1] = largest - 1
    frequency = TokenFrequency(vocab_size, ignore_index=ignore_index)
    # Not at an aligned address.
    frequency.update(tokens[1:])
    expected = reference.count_tokens(tokens[1:], vocab_size, ignore_index=ignore_index)
    assert torch.equal(frequency.counts, expected)
    assert frequency.ignored == (tokens[1:] == ignore_index).sum()
    assert frequency.counts[largest - 1000 :].any()
    assert_conserved(frequency, 600_012)


def test_updates_add_up(device):
    frequency = TokenFrequency(50).to(device)
    parts = torch.randint(-2, 52, (5, 300), generator=torch.Generator().manual_seed(0)).to(device)
    for part in parts:
        frequency.update(part)
    assert torch.equal(frequency.counts, functional.count_tokens(parts, 50))
    assert frequency.total == frequency.counts.sum()
    assert_conserved(frequency, parts.numel())


def test_counts_past_32_bits(device):
    frequency = TokenFrequency.from_counts(torch.tensor([2**32 - 1, 2**53], device=device))
    frequency.update(torch.tensor([0, 1], device=device))
    assert frequency.counts.tolist() == [2**32, 2**53 + 1]


def test_ignore_index_inside_the_vocabulary(device):
    frequency = TokenFrequency(5, ignore_index=0).to(device)
    frequency.update(torch.tensor([0, 0, 1], device=device))
    assert frequency.counts.tolist() == [0, 1, 0, 0, 0]
    assert frequency.ignored == 2


@pytest.mark.parametrize("n", [45, 40_003])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("ignore_index", [3, 12, -1, 2**8 + 3])
def test_what_was_counted_before_stays(device, ignore_index, dtype, n):
    # These include the ignored id, and one that equals it except for bits that the dtype lacks.
    tokens = torch.randint(-1, 14, (n,), generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    frequency = TokenFrequency.from_counts(torch.arange(100, 110, device=device), ignore_index=ignore_index)
    frequency.update(tokens)
    wide = tokens.long()
    is_counted = (wide >= 0) & (wide < 10) & (wide != ignore_index)
    expected = torch.arange(100, 110) + torch.bincount(wide[is_counted].cpu(), minlength=10)
    assert frequency.counts.tolist() == expected.tolist()
    assert frequency.ignored == (wide == ignore_index).sum()
    assert_conserved(frequency, 1045 + n)


# In a process of its own, which has freed no memory that could be reused. There is enough for the table of one of two
# threads.
IN_LITTLE_MEMORY = """
import resource, torch
from pdl_ext import TokenFrequency

torch.set_num_threads(2)
size = 2**22
tokens = torch.full((8 * size,), 3, dtype=torch.uint8)
tokens[::2] = 7
frequency = TokenFrequency(size, ignore_index=3)
# Fewer, which need no tables; the other thread begins with what it needs.
frequency.update(tokens[:size])
(torch.zeros(2**20) + 1).sum()
before = [total.clone() for total in frequency.buffers()]
pages = int(open("/proc/self/statm").read().split()[0])
enough = pages * resource.getpagesize() + 12 * size
resource.setrlimit(resource.RLIMIT_AS, (enough, enough))
try:
    frequency.update(tokens)
except MemoryError:
    assert all(torch.equal(total, other) for total, other in zip(frequency.buffers(), before, strict=True))
    print("unchanged")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs to know how much memory a process has")
@pytest.mark.slow
def test_too_little_memory_changes_nothing():
    run = fresh_python.run("-c", IN_LITTLE_MEMORY)
    assert run.stdout == "unchanged\n", run.stderr


@pytest.mark.parametrize("token", [0, 99, 100, -100])
def test_tokens_all_alike(device, token):
    frequency = TokenFrequency(100).to(device)
    frequency.update(torch.full((5001,), token, device=device))
    expected = [0] * 102
    expected[{100: 101, -100: 100}.get(token, token)] = 5001
    assert [*frequency.counts.tolist(), int(frequency.ignored), int(frequency.out_of_range)] == expected


def test_ignoring_id_zero(device):
    # CUDA: the idle lanes of the last warp must not count as this id.
    frequency = TokenFrequency(9, ignore_index=0).to(device)
    frequency.update(torch.arange(45, device=device) % 9)
    assert frequency.counts.tolist() == [0, *[5] * 8]
    assert frequency.ignored == 5
    assert frequency.out_of_range == 0


@pytest.mark.devices("emulated", "cuda")
def test_strict_counting_by_the_op_is_refused(device):
    ops = torch.ops.pdl_ext_emulated if device.type == "cpu" else torch.ops.pdl_ext
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    with pytest.raises(RuntimeError, match="strict counting"):
        ops.count_tokens_(counts, counts[0], counts[1], counts[2], counts, -100, True)


@pytest.mark.devices("cpu", "cuda")
def test_strict_counts_good_tokens(device):
    frequency = TokenFrequency(5).to(device)
    frequency.update(torch.tensor([1, 4, -100], device=device), strict=True)
    assert frequency.counts.tolist() == [0, 1, 0, 0, 1]
    assert frequency.ignored == 1


@pytest.mark.devices("cpu", "cuda")
@pytest.mark.parametrize("bad", [5, -1, 2**33])
def test_strict_refuses_and_changes_nothing(device, bad):
    frequency = TokenFrequency(5).to(device)
    frequency.update(torch.tensor([2], device=device))
    with pytest.raises(IndexError, match=r"tokens: got .*\b5\b"):
        frequency.update(torch.tensor([1, 1, bad, -100], device=device), strict=True)
    assert frequency.counts.tolist() == [0, 0, 1, 0, 0]
    assert_conserved(frequency, 1)


def test_strict_names_position_and_value():
    with pytest.raises(IndexError, match=r"tokens: got 9 at flattened position 3, expected 0 <= id < 5"):
        TokenFrequency(5).update(torch.tensor([[1, 1], [-100, 9]]), strict=True)


def test_merge(device):
    parts = torch.randint(-2, 23, (2, 400), generator=torch.Generator().manual_seed(0)).to(device)
    whole, first, second = (TokenFrequency(20, ignore_index=3).to(device) for _ in range(3))
    whole.update(parts)
    first.update(parts[0])
    second.update(parts[1])
    first.merge(second)
    for name in ("counts", "ignored", "out_of_range", "seen"):
        assert torch.equal(getattr(first, name), getattr(whole, name))


def test_merge_refuses_another_vocabulary():
    with pytest.raises(ValueError, match="other: got a vocabulary of 6, expected 5"):
        TokenFrequency(5).merge(TokenFrequency(6))
    with pytest.raises(TypeError, match="other: got Tensor, expected TokenFrequency"):
        TokenFrequency(5).merge(torch.zeros(5))


def test_a_merge_that_breaks_the_law_changes_nothing():
    first, second = (TokenFrequency.from_counts(torch.tensor([2**62, 1])) for _ in range(2))
    with pytest.raises(ValueError, match=r"other: got 4611686018427387905 tokens, expected a sum .* below 2\^63"):
        first.merge(second)
    second.counts[0] = -1
    with pytest.raises(ValueError, match="other: got a negative count"):
        first.merge(second)
    second.counts[0] = 777
    with pytest.raises(
        ValueError, match=r"other: got 778 tokens counted, ignored and out of range, expected the [0-9]+ seen"
    ):
        first.merge(second)
    second = TokenFrequency.from_counts(torch.tensor([0, 1]))
    second.provenance = Provenance((), 2, TargetPolicy(), None, "0")
    with pytest.raises(ValueError, match="other: got 1 tokens seen, expected the 2 of the provenance or more"):
        first.merge(second)
    assert first.counts.tolist() == [2**62, 1]
    assert first.provenance is None


def test_counts_that_another_rank_has_overwritten_go_on_to_a_sync():
    files = TokenFrequency.from_counts(torch.arange(3))
    files.provenance = Provenance((), 3, TargetPolicy(), None, "0")
    mine = TokenFrequency.from_counts(torch.tensor([1, 0, 0]))
    mine.merge(files)
    of_rank_0 = TokenFrequency.from_counts(torch.tensor([1, 0, 0]))
    for buffer, broadcast in zip(mine.buffers(), of_rank_0.buffers(), strict=True):
        buffer.copy_(broadcast)
    mine.merge(TokenFrequency.from_counts(torch.tensor([0, 0, 5])))
    assert mine.counts.tolist() == [1, 0, 5]


def test_a_sum_past_int64_is_called_that(tmp_path):
    frequency = TokenFrequency(2)
    frequency.counts.fill_(2**62)
    with pytest.raises(ValueError, match=r"counts: got counts whose sum is past 2\^63"):
        frequency.save(tmp_path / "counts")


@pytest.mark.parametrize("equal", [False, True])
def test_loaded_counts_have_the_provenance_of_their_own(equal):
    frequency = TokenFrequency.from_counts(torch.arange(3))
    frequency.provenance = Provenance((), 3, TargetPolicy(), None, "0")
    other = TokenFrequency.from_counts(torch.arange(3) if equal else torch.tensor([2, 1, 0]))
    frequency.load_state_dict(other.state_dict())
    assert (frequency.provenance is not None) == equal


@pytest.mark.parametrize("name", ["counts", "ignored", "out_of_range", "seen"])
@pytest.mark.parametrize("change", [777, -1])
def test_what_was_written_to_is_not_saved(tmp_path, name, change):
    frequency = TokenFrequency(5)
    frequency.update(torch.tensor([1, 3, 3, -100, 9]))
    buffer = getattr(frequency, name).view(-1)
    buffer[3 % len(buffer)] += change
    with pytest.raises(
        ValueError, match=r"counts: got \d+ tokens counted, ignored and out of range, expected the \d+ seen"
    ):
        frequency.save(tmp_path / "counts")
    assert not any(tmp_path.iterdir())


def test_probabilities(device):
    frequency = TokenFrequency(4).to(device)
    assert frequency.probabilities().tolist() == [0.25] * 4
    frequency.update(torch.tensor([0, 0, 0, 2], device=device))
    assert frequency.probabilities().dtype == torch.float64
    assert frequency.probabilities().tolist() == [0.75, 0, 0.25, 0]


@pytest.mark.parametrize(
    ("counts", "shares", "expected"),
    [
        # Sorted 60, 20, 10, 6, 4: the shares before them are 0, 60, 80, 90, 96 %.
        ([10, 60, 4, 20, 6, 0], (0.8, 0.15, 0.05), [1, 0, 2, 0, 1, 2]),
        ([10, 60, 4, 20, 6, 0], (0.5, 0.5), [1, 0, 1, 1, 1, 1]),
        ([10, 60, 4], (1.0,), [0, 0, 0]),
        # An entry that begins exactly at an edge, where 0.8 + 0.15 > 0.95 in float64.
        ([16, 3, 1], (0.8, 0.15, 0.05), [0, 1, 2]),
        # Equal counts keep the vocabulary's order.
        ([1, 1, 1, 1], (0.5, 0.25, 0.25), [0, 0, 1, 2]),
        # Nothing counted: all unseen.
        ([0, 0], (0.8, 0.2), [1, 1]),
    ],
)
def test_buckets_by_hand(device, counts, shares, expected):
    frequency = TokenFrequency.from_counts(torch.tensor(counts, device=device))
    assert frequency.buckets(shares).tolist() == expected


def test_default_buckets_cover_their_shares(device):
    counts = (1e5 / torch.arange(1, 2001) ** 1.1).long().to(device)
    frequency = TokenFrequency.from_counts(counts)
    mass = torch.zeros(3, dtype=torch.int64, device=device).scatter_add_(0, frequency.buckets(), counts)
    shares = mass / counts.sum()
    torch.testing.assert_close(shares.cpu(), torch.tensor([0.8, 0.15, 0.05]), atol=0.002, rtol=0)


@pytest.mark.parametrize("shares", [(), (0.5, 0.4), (1.2, -0.2), (1.0, 0.0), (float("nan"), 0.5)], ids=str)
def test_buckets_refuse_other_shares(shares):
    with pytest.raises(ValueError, match=r"shares: got .*, expected positive numbers that sum to 1"):
        TokenFrequency(3).buckets(shares)


@pytest.fixture
def saved(tmp_path):
    frequency = TokenFrequency(70_000, ignore_index=-1)
    frequency.update(torch.randint(-1, 70_003, (5000,), generator=torch.Generator().manual_seed(0)))
    frequency.merge(TokenFrequency.from_counts(torch.tensor([0, 0, 0, 2**50 + 1] + [0] * 69_996), ignore_index=-1))
    frequency.save(tmp_path / "counts.safetensors")
    return frequency, tmp_path / "counts.safetensors"


class TestFile:
    def test_round_trip(self, saved):
        frequency, path = saved
        loaded = TokenFrequency.load(path)
        assert (loaded.vocab_size, loaded.ignore_index, loaded.total) == (70_000, -1, frequency.total)
        for name, value in frequency.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value)
            assert loaded.state_dict()[name].dtype == torch.int64

    def test_metadata(self, saved):
        frequency, path = saved
        with safe_open(path, framework="np") as file:
            metadata = file.metadata()
            assert len(metadata.pop("digest")) == 32
            assert metadata == {
                "format": "pdl_ext.TokenFrequency/2",
                "vocab_size": "70000",
                "ignore_index": "-1",
                "tokens_seen": str(frequency.tokens_seen),
            }
            assert sorted(file.keys()) == ["counts", "ignored", "out_of_range"]

    def test_save_replaces_a_file(self, saved):
        _, path = saved
        TokenFrequency.from_counts(torch.tensor([1, 2])).save(str(path))
        assert TokenFrequency.load(str(path)).counts.tolist() == [1, 2]
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]

    @pytest.mark.skipif(sys.platform == "win32", reason="needs folders that are synced")
    def test_a_power_cut_after_save_brings_nothing_back(self, saved, monkeypatch):
        frequency, path = saved
        calls = []
        fsync, replace = os.fsync, os.replace

        def synced(descriptor):
            calls.append(os.fstat(descriptor).st_ino)
            fsync(descriptor)

        def replaced(*paths):
            calls.append("replace")
            replace(*paths)

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "replace", replaced)
        frequency.save(path)
        assert calls == [path.stat().st_ino, "replace", path.parent.stat().st_ino]

    def test_a_folder_that_cannot_be_synced_is_no_error(self, saved, monkeypatch):
        _, path = saved

        def refuse(*_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(os, "open", refuse)
        TokenFrequency.from_counts(torch.tensor([1, 2])).save(path)
        assert TokenFrequency.load(path).counts.tolist() == [1, 2]

    def test_failed_save_leaves_no_part(self, saved, monkeypatch):
        frequency, path = saved
        before = path.read_bytes()

        def fail(*_):
            raise OSError(28, "No space left on device")

        for step in ("fsync", "replace"):
            with monkeypatch.context() as patch:
                patch.setattr(f"pdl_ext.storage.tensor_file.os.{step}", fail)
                with pytest.raises(OSError, match=r"No space left on device; not written: .*counts"):
                    frequency.save(path)
        assert path.read_bytes() == before
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]

    def test_full_disk(self, saved):
        resource = pytest.importorskip("resource")
        frequency, path = saved
        before = path.read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        # The file is cut off in the middle of being written, as on a disk that is full.
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        try:
            with pytest.raises(OSError, match=r"not written: .*counts\.safetensors"):
                frequency.save(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == before
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]

    def test_others_may_read_the_file(self, tmp_path):
        path, plain = tmp_path / "counts.safetensors", tmp_path / "plain"
        TokenFrequency(3).save(path)
        plain.touch()
        assert path.stat().st_mode == plain.stat().st_mode

    @pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
    def test_dtypes_that_no_file_has_are_not_written(self, tmp_path, dtype):
        with pytest.raises(TypeError, match=f"finished: got dtype {dtype}, expected one of uint8, int64"):
            write_tensors(tmp_path / "counts", {"finished": torch.zeros(2, dtype=dtype)}, {"format": "a"})
        assert not list(tmp_path.iterdir())

    def test_a_header_that_could_not_be_read_is_not_written(self, saved, monkeypatch):
        frequency, path = saved
        before = path.read_bytes()
        shard = Shard("a" * 1000, 0, "0" * 32, "raw", "uint16")
        frequency.provenance = Provenance((shard,), 0, TargetPolicy(), None, "0")
        monkeypatch.setattr(tensor_file, "_LARGEST_HEADER", 1000)
        with pytest.raises(
            ValueError, match=r"provenance: got 1\d+ characters, expected fewer: a file's header of 1\d+"
        ):
            frequency.save(path)
        assert path.read_bytes() == before

    def test_save_into_a_missing_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="missing"):
            TokenFrequency(3).save(tmp_path / "missing" / "counts.safetensors")

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
    def test_save_replaces_no_pipe(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(FileExistsError, match=r"not a regular file; not written: .*pipe$"):
            TokenFrequency(3).save(tmp_path / "pipe")
        assert (tmp_path / "pipe").is_fifo()
        assert os.listdir(tmp_path) == ["pipe"]

    def test_save_below_a_file(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(NotADirectoryError, match=r"not written: .*file.counts$"):
            TokenFrequency(3).save(tmp_path / "file" / "counts")

    @pytest.mark.parametrize(
        ("path", "error", "message"),
        [
            (5, TypeError, "path: got 5 of type int, expected a path"),
            ("", ValueError, "path: got an empty name, expected a path"),
            ("a\0b", ValueError, r"path: got 'a\\x00b', which has a null character, expected a path"),
        ],
        ids=["number", "empty", "null"],
    )
    def test_what_is_no_path_is_refused(self, path, error, message):
        for use in (TokenFrequency.load, TokenFrequency(3).save):
            with pytest.raises(error, match=message):
                use(path)

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"path: no file at .*none"):
            TokenFrequency.load(tmp_path / "none")

    @pytest.mark.skipif(sys.platform == "win32", reason="needs links")
    def test_a_file_that_cannot_be_read_is_not_told_to_be_damaged_or_absent(self, tmp_path, saved, monkeypatch):
        (tmp_path / "loop").symlink_to("loop")
        for path, reason in [
            (tmp_path, "is not a regular file, expected one"),
            (tmp_path / "loop", "cannot be read (Too many levels of symbolic links)"),
            (tmp_path / ("a" * 5000), "cannot be read (File name too long)"),
        ]:
            with pytest.raises(ValueError, match=re.escape(f"path: {path} {reason}")):
                TokenFrequency.load(path)

        def refuse(*_, **__):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("builtins.open", refuse)
        with pytest.raises(ValueError, match=r"path: .*counts\.safetensors cannot be read \(Permission denied\)"):
            TokenFrequency.load(saved[1])

    @pytest.mark.parametrize("kept", [0, 1, 7, 100, 5000, -1])
    def test_truncated_file(self, saved, kept):
        _, path = saved
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(ValueError, match=r"path: .* is damaged or not a safetensors file"):
            TokenFrequency.load(path)

    def test_changed_counts(self, saved):
        _, path = saved
        content = bytearray(path.read_bytes())
        # The last count of the table.
        length = int.from_bytes(content[:8], "little")
        content[8 + length + 8 * 69_999] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"path: .* is damaged: its content does not have the digest"):
            TokenFrequency.load(path)

    def test_file_of_something_else(self, tmp_path):
        path = tmp_path / "model.safetensors"
        save_file({"weight": torch.zeros(3, dtype=torch.bfloat16)}, path)
        with pytest.raises(ValueError, match=r"path: .* has format None, expected 'pdl_ext.TokenFrequency/2'"):
            TokenFrequency.load(path)
        path.write_text("a text, not tensors")
        with pytest.raises(ValueError, match=r"path: .* is damaged or not a safetensors file"):
            TokenFrequency.load(path)

    def test_the_same_counts_give_the_same_bytes(self, tmp_path):
        contents = set()
        # The safetensors library draws the order of the metadata for each file.
        for _ in range(20):
            TokenFrequency.from_counts(torch.arange(9)).save(tmp_path / "counts")
            contents.add((tmp_path / "counts").read_bytes())
        assert len(contents) == 1
        # Aligned, for whoever maps it.
        assert int.from_bytes(contents.pop()[:8], "little") % 8 == 0

    def test_files_with_their_metadata_in_any_order_are_read(self, saved):
        frequency, path = saved
        with safe_open(path, framework="np") as file:
            metadata = dict(reversed(file.metadata().items()))
            tensors = {name: torch.from_numpy(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        save_file(tensors, path, metadata=metadata)
        assert torch.equal(TokenFrequency.load(path).counts, frequency.counts)
        assert format_of(path) == "pdl_ext.TokenFrequency/2"

    @pytest.mark.skipif(sys.platform != "linux", reason="needs names of any bytes")
    def test_a_name_that_is_no_text(self, tmp_path):
        path = tmp_path / os.fsdecode(b"\xff.counts")
        TokenFrequency.from_counts(torch.arange(3)).save(path)
        assert TokenFrequency.load(path).counts.tolist() == [0, 1, 2]
        assert format_of(path) == "pdl_ext.TokenFrequency/2"

    @pytest.mark.parametrize("kept", [128, -1])
    def test_the_format_of_a_file_that_is_cut_off(self, saved, kept):
        _, path = saved
        path.write_bytes(path.read_bytes()[:kept])
        assert format_of(path) == "pdl_ext.TokenFrequency/2"

    def test_the_format_is_not_what_a_text_in_the_file_says(self, tmp_path):
        inner = json.dumps({"format": "pdl_ext.TokenFrequency/2"}, separators=(",", ":"))
        save_file({"weight": torch.zeros(3)}, tmp_path / "model", metadata={"note": inner})
        assert format_of(tmp_path / "model") is None

    def test_later_format(self, saved):
        frequency, path = saved
        save_file(dict(frequency.state_dict()), path, metadata={"format": "pdl_ext.TokenFrequency/3"})
        with pytest.raises(ValueError, match=r"path: .* 'pdl_ext.TokenFrequency/3', expected .*/2'"):
            TokenFrequency.load(path)

    @pytest.mark.slow
    def test_any_flipped_bit_is_an_error(self, tmp_path):
        path = tmp_path / "counts"
        frequency = TokenFrequency.from_counts(torch.arange(8))
        shard = Shard("a.bin", 56, "0" * 32, "raw", "uint16")
        frequency.provenance = Provenance((shard,), 28, TargetPolicy(), None, "0")
        frequency.save(path)
        content = path.read_bytes()
        # Some bits of each byte: 3 and 8 have no common divisor.
        for bit in range(0, 8 * len(content), 3):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="path: "):
                TokenFrequency.load(path)

    def test_more_tokens_read_than_seen(self, tmp_path):
        frequency = TokenFrequency.from_counts(torch.arange(3))
        frequency.provenance = Provenance((), 4, TargetPolicy(), None, "0")
        with pytest.raises(ValueError, match="counts: got 3 tokens seen, expected the 4 of the provenance or more"):
            frequency.save(tmp_path / "counts")
        frequency.counts[0] = -1
        with pytest.raises(ValueError, match="counts: got a negative count"):
            frequency.save(tmp_path / "counts")
        # In int64 these sum to 0.
        frequency = TokenFrequency(4)
        frequency.counts.fill_(2**62)
        with pytest.raises(ValueError, match=r"counts: got counts whose sum is past 2\^63"):
            frequency.save(tmp_path / "counts")
        assert not list(tmp_path.iterdir())

    def test_a_vocabulary_larger_than_the_file_takes_no_memory(self, saved, monkeypatch):
        frequency, path = saved
        with safe_open(path, framework="np") as file:
            metadata = {**file.metadata(), "vocab_size": str(2**31 - 1)}
        del metadata["digest"]
        write_tensors(path, frequency.state_dict(), metadata)

        def fail(*_, **__):
            raise AssertionError("made a table")

        monkeypatch.setattr(TokenFrequency, "__init__", fail)
        with pytest.raises(ValueError, match=r"path: .*counts of shape \[70000\], a vocabulary of 2147483647"):
            TokenFrequency.load(path)

    @pytest.mark.parametrize(
        ("tensors", "metadata"),
        [
            ({"counts": torch.ones(4, dtype=torch.int64)}, {}),
            ({"counts": torch.ones(3, dtype=torch.uint8)}, {}),
            ({}, {"vocab_size": "three"}),
            ({}, {"tokens_seen": None}),
            ({}, {"tokens_seen": "4"}),
            ({}, {"provenance": "{}"}),
            ({"ignored": None}, {}),
        ],
        ids=["shape", "dtype", "vocab_size", "no_total", "total", "provenance", "no_ignored"],
    )
    def test_inconsistent_file(self, tmp_path, tensors, metadata):
        zero = torch.zeros((), dtype=torch.int64)
        content = {"counts": torch.ones(3, dtype=torch.int64), "ignored": zero, "out_of_range": zero.clone(), **tensors}
        header = {
            "format": "pdl_ext.TokenFrequency/2",
            "vocab_size": "3",
            "ignore_index": "-100",
            "tokens_seen": "3",
            **metadata,
        }
        content, header = ({k: v for k, v in table.items() if v is not None} for table in (content, header))
        write_tensors(tmp_path / "counts", content, header)
        with pytest.raises(ValueError, match="path: "):
            TokenFrequency.load(tmp_path / "counts")


def test_from_counts_copies(device):
    counts = torch.tensor([3, 0, 1], device=device)
    frequency = TokenFrequency.from_counts(counts)
    counts.zero_()
    assert frequency.counts.tolist() == [3, 0, 1]
    assert frequency.counts.device == counts.device


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        (torch.ones(3), TypeError, "counts: got dtype torch.float32, expected int64"),
        (torch.ones(2, 2, dtype=torch.int64), ValueError, r"counts: got shape \[2, 2\], expected \[V\]"),
        (torch.ones(0, dtype=torch.int64), ValueError, r"counts: got shape \[0\], expected \[V\]"),
        ([1, 2], TypeError, "counts: got list, expected an int64 tensor"),
        (torch.tensor([1, -1]), ValueError, "counts: got a negative count, expected all >= 0"),
        (torch.tensor([2**62] * 4), ValueError, r"counts: got counts whose sum is past 2\^63"),
    ],
    ids=["dtype", "matrix", "empty", "list", "negative", "sum"],
)
def test_from_counts_refuses(counts, error, message):
    with pytest.raises(error, match=message):
        TokenFrequency.from_counts(counts)


@pytest.mark.parametrize("vocab_size", [0, -1, 2**31, 3.0, "3", True])
def test_vocab_size_out_of_range_is_refused(vocab_size):
    for build in (TokenFrequency, lambda v: functional.count_tokens(torch.tensor([1]), v)):
        with pytest.raises(ValueError, match=r"vocab_size: got .*, expected an int from 1 to 2\^31 - 1"):
            build(vocab_size)


@pytest.mark.parametrize("ignore_index", [1.5, "pad", None, True])
def test_ignore_index_of_another_type_is_refused(ignore_index):
    with pytest.raises(ValueError, match=r"ignore_index: got .*, expected an int"):
        TokenFrequency(3, ignore_index=ignore_index)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([1, 2], TypeError, "tokens: got list, expected a tensor"),
        (torch.ones(3), TypeError, "tokens: got dtype torch.float32, expected one of uint8, uint16, int32"),
        (np.ones(3), TypeError, "tokens: got dtype torch.float64, expected one of"),
        (torch.ones(3, dtype=torch.int64, device="meta"), ValueError, "tokens: got device meta, expected cpu"),
    ],
    ids=["list", "float", "numpy_float", "device"],
)
def test_bad_tokens_are_refused(tokens, error, message):
    frequency = TokenFrequency(5)
    with pytest.raises(error, match=message):
        frequency.update(tokens)
    assert_conserved(frequency, 0)
    if not isinstance(tokens, np.ndarray) and getattr(tokens, "device", None) != torch.device("meta"):
        with pytest.raises(error, match=message):
            functional.count_tokens(tokens, 5)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"labels": torch.ones(3), "input_ids": 3}, r"got dict, .*: pass the entry .*, as batch\['labels'\]$"),
        (UserDict(input_ids=torch.ones(3)), r"got UserDict, .*: pass the entry .*, as batch\['input_ids'\]$"),
        ({}, r"got dict, .*: pass the entry that holds the targets, as batch\['labels'\]$"),
        (
            [torch.ones(3)],
            r"got list, expected a tensor or a NumPy array: pass torch\.tensor of it, or one sequence after",
        ),
        ((1, 2), "got tuple, expected a tensor or a NumPy array: pass"),
        ("text", "got str, expected a tensor or a NumPy array$"),
        (None, "got NoneType, expected a tensor or a NumPy array$"),
    ],
    ids=str,
)
def test_what_is_no_tensor_is_told_what_to_pass(tokens, message):
    frequency = TokenFrequency(5)
    with pytest.raises(TypeError, match=f"tokens: {message}"):
        frequency.update(tokens)
    assert_conserved(frequency, 0)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("make", [torch.tensor, np.array], ids=["torch", "numpy"])
@pytest.mark.parametrize("dtype", ["int8", "int16", "uint64"])
def test_integers_that_the_histogram_does_not_know(dtype, make, strict):
    ids = np.array([3, 0, -100, 3, *([] if strict else [-1, 100])]).astype(dtype)
    frequency = TokenFrequency(5)
    frequency.update(torch.from_numpy(ids) if make is torch.tensor else ids, strict=strict)
    assert frequency.counts.tolist() == [1, 0, 0, 2, 0]
    assert (int(frequency.ignored), int(frequency.out_of_range)) == (1, 0 if strict else 2)
    with pytest.raises(IndexError):
        frequency.update(make([7]) if make is torch.tensor else np.array([7], dtype), strict=True)


@pytest.mark.parametrize("convert", [torch.nn.Module.half, torch.nn.Module.double, torch.nn.Module.bfloat16])
def test_counts_survive_conversions(convert):
    frequency = TokenFrequency.from_counts(torch.tensor([2**53 + 1, 257]))
    assert convert(frequency).counts.tolist() == [2**53 + 1, 257]
    assert frequency.ignored.dtype == torch.int64


MODES = [torch.inference_mode, torch.no_grad, torch.enable_grad]


def used(frequency, path):
    """All operations of a frequency, which add [0, 2, 1] to its counts."""
    before = frequency.counts.clone()
    frequency.update(torch.tensor([1]))
    frequency.update(np.array([2]), strict=True)
    frequency.merge(TokenFrequency.from_counts(torch.tensor([0, 1, 0])))
    assert torch.equal(frequency.counts, before + torch.tensor([0, 2, 1]))
    frequency.save(path)
    assert torch.equal(TokenFrequency.load(path).counts, frequency.counts)
    state = frequency.state_dict()
    frequency.load_state_dict({name: total.clone() for name, total in state.items()})
    assert torch.equal(frequency.probabilities(), frequency.counts.double() / frequency.total)
    weights = functional.token_weights(frequency.counts, PowerLaw())
    torch.testing.assert_close(weights, reference.token_weights(frequency.counts, PowerLaw()), check_dtype=False)
    assert_conserved(frequency, frequency.tokens_seen)
    return functional.count_tokens(frequency.counts, 9)


def tracked(frequency):
    frequency.update(torch.tensor([1]))
    return frequency


MADE = {
    "new": lambda path: TokenFrequency(3),
    "from_counts": lambda path: TokenFrequency.from_counts(torch.arange(3)),
    "load": TokenFrequency.load,
    "to": lambda path: TokenFrequency(3).to("meta").to_empty(device="cpu"),
    "deepcopy": lambda path: copy.deepcopy(tracked(TokenFrequency.from_counts(torch.arange(3)))),
    "pickle": lambda path: pickle.loads(pickle.dumps(tracked(TokenFrequency.from_counts(torch.arange(3))))),
    "float": lambda path: TokenFrequency.from_counts(torch.arange(3)).double(),
}


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("within", MODES)
@pytest.mark.parametrize("then", MODES)
def test_modes_of_autograd_make_no_difference(tmp_path, made, within, then):
    TokenFrequency.from_counts(torch.arange(3)).save(tmp_path / "counts")
    with within():
        frequency = MADE[made](tmp_path / "counts")
        if made == "to":
            frequency.load_state_dict(TokenFrequency(3).state_dict())
    for mode in (then, within, then):
        with mode():
            given = used(frequency, tmp_path / "saved")
        # What one mode makes is counted in the other.
        counted = TokenFrequency(9)
        with within():
            counted.update(given)
        counted.update(given)
        assert counted.tokens_seen == 2 * given.numel()


def test_rarer_than(device):
    frequency = TokenFrequency.from_counts(torch.tensor([5, 0, 200, 199], device=device))
    assert frequency.rarer_than(200).tolist() == [True, True, False, True]
    assert frequency.rarer_than(1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("count", [0, 2.5, True, 2**63])
def test_rarer_than_needs_a_count(count):
    with pytest.raises(ValueError, match=r"count: got .*, expected an int from 1 to 2\^63 - 1"):
        TokenFrequency(3).rarer_than(count)
