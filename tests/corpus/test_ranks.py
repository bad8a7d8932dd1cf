"""A count over two gloo processes: the counts of one process, after a rank dies, and with another number of ranks."""

from __future__ import annotations

import importlib.util
import itertools
import os

import fresh_python
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open

from pdl_ext import TokenFrequency
from pdl_ext.corpus import count_corpus, counting
from pdl_ext.corpus.ranks import _own_parts

pytestmark = pytest.mark.slow

V, RANKS, SHARDS = 300, 2, 5

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("PyTorch without gloo", allow_module_level=True)


def write_corpus(folder):
    folder.mkdir()
    shards = [np.random.default_rng(seed).integers(0, V, 1000 + 77 * seed) for seed in range(SHARDS)]
    for seed, shard in enumerate(shards):
        (folder / f"{seed}.bin").write_bytes(shard.astype("<u2").tobytes())
    return torch.from_numpy(np.bincount(np.concatenate(shards), minlength=V))


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=RANKS)
    counting.PART_BYTES = 256
    data, state = [folder / "corpus"], folder / "state"

    whole = count_corpus(data, V, dtype="uint16", threads=2, checkpoint=state, group=dist.group.WORLD)
    whole.save(folder / f"whole-{rank}")
    own = torch.tensor([os.path.getsize(f"{state}-{rank}")])
    assert own > 0
    dist.barrier()
    os.unlink(f"{state}-{rank}")
    dist.barrier()

    # One rank fails after a third of its share; then both go on.
    run = counting._Count.run

    def third(self):
        if rank == 1:
            todo = list(self._todo)
            self._todo = iter(todo[: len(todo) // 3])
        run(self)
        raise KeyboardInterrupt

    counting._Count.run = third
    with pytest.raises(KeyboardInterrupt):
        count_corpus(data, V, dtype="uint16", threads=2, checkpoint=state, group=dist.group.WORLD)
    counting._Count.run = run
    dist.barrier()
    if rank == 0:
        # For a single process to go on from.
        for name in ("state-0", "state-1"):
            (folder / f"copied-{name}").write_bytes((folder / name).read_bytes())
    dist.barrier()
    resumed = count_corpus(data, V, dtype="uint16", threads=2, checkpoint=state, group=dist.group.WORLD)
    assert torch.equal(resumed.counts, whole.counts)
    assert resumed.provenance == whole.provenance

    # Each rank's disk is its own, and holds its own checkpoint.
    for path in folder.glob("state-*"):
        path.unlink(missing_ok=True)
    dist.barrier()
    local = folder / f"disk-{rank}"
    local.mkdir()
    counting._Count.run = third
    with pytest.raises(KeyboardInterrupt):
        count_corpus(data, V, dtype="uint16", checkpoint=local / "state", group=dist.group.WORLD)
    counting._Count.run = run
    assert (local / f"state-{rank}").exists()
    again = count_corpus(data, V, dtype="uint16", checkpoint=local / "state", group=dist.group.WORLD)
    assert torch.equal(again.counts, whole.counts)

    # Ranks that see different files are told so, all of them.
    with pytest.raises(ValueError, match="data: got different files or options over the ranks"):
        count_corpus([folder / "corpus" / f"{rank}.bin"], V, dtype="uint16", group=dist.group.WORLD)

    if importlib.util.find_spec("pyarrow") is not None:
        check_table()
    dist.destroy_process_group()


def check_table():
    """Of a table in memory each rank reads a share."""
    import pyarrow as pa

    ids = np.random.default_rng(0).integers(0, V, (100, 90))
    read = []
    frequency = count_corpus(
        pa.table({"tokens": ids.tolist()}),
        V,
        progress=lambda progress: read.append(progress.tokens),
        group=dist.group.WORLD,
    )
    np.testing.assert_array_equal(frequency.counts.numpy(), np.bincount(ids.reshape(-1), minlength=V))
    assert read[-1] == pytest.approx(ids.size / RANKS, rel=0.1)
    with pytest.raises(ValueError, match="group: got one with list, which is read once from its beginning"):
        count_corpus(ids.tolist(), V, group=dist.group.WORLD)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    counts = write_corpus(folder / "corpus")
    mp.spawn(worker, (folder,), nprocs=RANKS)
    return folder, counts


def test_two_ranks_count_as_one(ranks):
    folder, counts = ranks
    for rank in range(RANKS):
        frequency = TokenFrequency.load(folder / f"whole-{rank}")
        assert torch.equal(frequency.counts, counts)
        assert frequency.provenance.tokens == int(counts.sum())
        assert len(frequency.provenance.shards) == SHARDS


def test_one_process_goes_on_from_two_ranks(ranks, monkeypatch):
    folder, counts = ranks
    monkeypatch.setattr(counting, "PART_BYTES", 256)
    done = []
    frequency = count_corpus(
        [folder / "corpus"], V, dtype="uint16", checkpoint=folder / "copied-state", progress=done.append
    )
    assert torch.equal(frequency.counts, counts)
    assert done[-1].bytes_before > 0
    assert [path.name for path in folder.glob("copied-*")] == ["copied-state-0"]


def torchrun(folder, *program):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [*program, "count", str(folder / "corpus"), "--dtype", "uint16", "--vocab-size", str(V)]
    command += ["-o", str(folder / "counts.safetensors")]
    return fresh_python.run(*command, timeout=120, env={"OMP_NUM_THREADS": "1"})


SMALL_PARTS = """
import os, runpy, signal
from pdl_ext.corpus import counting

counting.PART_BYTES = 256
"""
KILLED_AFTER_TEN_PARTS = """
counting._SECONDS_BETWEEN_MERGES = 0.0
finish, finished = counting._Count.finish, []

def finish_and_die(self, table, parts):
    finish(self, table, parts)
    finished.extend(parts)
    if os.environ["RANK"] == "1" and len(finished) >= 10:
        self._save()
        os.kill(os.getpid(), signal.SIGKILL)

counting._Count.finish = finish_and_die
"""
RUN = "runpy.run_module('pdl_ext.cli', run_name='__main__')"


def test_a_rank_that_is_killed_under_torchrun(tmp_path):
    counts = write_corpus(tmp_path / "corpus")
    (tmp_path / "dies.py").write_text(SMALL_PARTS + KILLED_AFTER_TEN_PARTS + RUN)
    (tmp_path / "lives.py").write_text(SMALL_PARTS + RUN)
    assert torchrun(tmp_path, str(tmp_path / "dies.py")).returncode != 0
    assert not (tmp_path / "counts.safetensors").exists()
    left = [tmp_path / f"counts.safetensors.checkpoint-{rank}" for rank in range(RANKS)]
    with safe_open(left[1], framework="np") as file:
        assert 10 <= file.get_tensor("finished").sum() < file.get_tensor("finished").size
    assert left[0].exists()

    run = torchrun(tmp_path, str(tmp_path / "lives.py"))
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("tokens counted") == 1
    frequency = TokenFrequency.load(tmp_path / "counts.safetensors")
    assert torch.equal(frequency.counts, counts)
    assert frequency.tokens_seen == frequency.provenance.tokens == counts.sum()
    assert not list(tmp_path.glob("*checkpoint*"))


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 40])
def test_each_part_has_one_rank_and_each_rank_its_share(ranks):
    sizes = [0, 5, 100, 1, 1, 1, 0, 30, 30, 30, 0]
    finished = [0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0]
    shares = [_own_parts(finished, sizes, rank, ranks) for rank in range(ranks)]
    assert sorted(itertools.chain(*shares)) == [i for i, done in enumerate(finished) if not done]
    equal = [_own_parts([0] * 1000, [7] * 1000, rank, ranks) for rank in range(ranks)]
    assert max(map(len, equal)) - min(map(len, equal)) <= 1


def test_parts_without_bytes_have_an_owner():
    assert _own_parts([0, 0], [0, 0], 0, 2) + _own_parts([0, 0], [0, 0], 1, 2) == [0, 1]
