"""The emulator itself, by the kernels of cuda_emulator/kernels: correct ones, and mistakes that it has to detect."""

from __future__ import annotations

import ctypes
import functools
import itertools
import operator
import re

import cuda_emulator
import pytest
import torch
from cuda_emulator import launch

pytestmark = pytest.mark.slow

SEEDS = range(8)
INVALID_VALUE, INVALID_CONFIGURATION, NOT_SUPPORTED, INVALID_CLUSTER_SIZE = 1, 9, 801, 912
POISON = -1


def integers(*shape, low=-1000, high=1000, seed=0):
    return torch.randint(low, high, shape, dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


def poisoned(*shape, dtype=torch.int32):
    return torch.full(shape, POISON if dtype == torch.int32 else torch.nan, dtype=dtype)


def zero():
    return torch.zeros(1, dtype=torch.int32)


def run(kernel, output, *arguments, **shape):
    """The output of a correct kernel."""
    message = launch(kernel, output, *arguments, **shape)
    assert message == ""
    return output


@pytest.fixture
def over_seeds(monkeypatch):
    """For each seed a kernel's output, and the message of its fault."""

    def call(kernel, output, *arguments, **shape):
        results = []
        for seed in SEEDS:
            monkeypatch.setenv("PDL_EXT_EMULATOR_SEED", str(seed))
            copy = output.clone()
            results.append((launch(kernel, copy, *arguments, **shape), copy))
        return results

    return call


@pytest.fixture
def assert_right(over_seeds):
    """Asserts that a kernel's output is as expected with every seed."""

    def check(kernel, expected, *arguments, output=None, **shape):
        for message, result in over_seeds(
            kernel, poisoned(*expected.shape) if output is None else output, *arguments, **shape
        ):
            assert message == ""
            assert torch.equal(result, expected)

    return check


@pytest.fixture
def assert_shows(over_seeds):
    """Asserts that a kernel with a mistake gives a wrong output with some seed, and no fault with any."""

    def check(kernel, expected, *arguments, output=None, **shape):
        results = over_seeds(kernel, poisoned(*expected.shape) if output is None else output, *arguments, **shape)
        assert [message for message, _ in results if message] == []
        assert any(not torch.equal(result, expected) for _, result in results)

    return check


# The name of each kernel's mistake; launches have two blocks of 96 threads unless given.
FAULTS = {
    "early_return": r"deadlock in block .* __syncthreads at .*blocks\.cu.* 1 have returned",
    "divergent_barriers": r"__syncthreads at .* meets that at",
    "early_return_from_vote": r"deadlock in block .* __syncthreads_or at .*blocks\.cu.* 1 have returned",
    "misaligned_vector": r"misaligned address .* at .*blocks\.cu:\d+ in block \(\d, 0, 0\), thread \(\d+, 0, 0\)",
    "shared_out_of_bounds": r"index out of an array's bounds at .* thread",
    "invalid_address": r"invalid access to address 0x\w+ in block .* thread",
    "overflow": r"signed overflow at .* thread",
    "absent_lane": r"deadlock in block .* __shfl_down_sync at .*warps\.cu",
    "absent_lane_in_vote": r"deadlock in block .* __any_sync at .*warps\.cu",
    "absent_lane_in_reduction": r"deadlock in block .* __reduce_add_sync at .*warps\.cu",
    "divergent_shuffles": r"__shfl_\w+_sync at .* meets __shfl_\w+_sync at",
    "lane_outside_mask": r"with a mask that leaves the calling lane out in block .* thread \(\d*(31|63|95), 0, 0\)",
    "misaligned_atomic": r"atomicAdd on an address that is no multiple of 8 at .*atomics\.cu:\d+ in .* thread",
    "misaligned_load": r"__ldg on an address that is no multiple of 16 at .*vectors\.cu:\d+ in .* thread",
    "misaligned_store": r"__stcs on an address that is no multiple of 8 at .*vectors\.cu:\d+ in .* thread",
    "copy_never_waited_for": r"return with an asynchronous copy .* issued at .*pipeline\.cu:\d+ in .* \(5, 0, 0\)",
    "copy_of_odd_size": r"__pipeline_memcpy_async of 12 bytes, which are not 4, 8 or 16 at .*pipeline\.cu.* thread",
    "copy_to_misaligned": r"__pipeline_memcpy_async on an address that is no multiple of 16 at .*pipeline\.cu.* thread",
    "copy_from_misaligned": r"__pipeline_memcpy_async on an address that is no multiple of 16 at .*pipeline.* thread",
    "copy_to_global": r"__pipeline_memcpy_async with an address outside of shared memory .* at .*pipeline\.cu.* thread",
    "copy_from_shared": r"__pipeline_memcpy_async with an address in shared memory .* at .*pipeline\.cu.* thread",
    "copy_from_nowhere": r"invalid access to address 0x\w+ in block .* thread",
    "mbarrier_not_initialised": r"mbarrier_arrive on an mbarrier that is not initialised at .*bulk\.cu.* thread",
    "mbarrier_initialised_by_all": r"mbarrier_init of an mbarrier that is initialised already at .*bulk\.cu.* thread",
    "mbarrier_of_nobody": r"mbarrier_init with a count that is not from 1 to 1048575 at .*bulk\.cu.* thread",
    "mbarrier_in_global_memory": r"mbarrier_init on an address outside of shared memory at .*bulk\.cu.* thread",
    "misaligned_mbarrier": r"mbarrier_init on an address that is no multiple of 8 at .*bulk\.cu.* thread",
    "too_many_arrivals": r"mbarrier_arrive arrives more often than the 2 times of a phase at .*thread \(9, 0, 0\)",
    "too_many_bytes_expected": r"mbarrier_arrive_expect_tx expects more than the 1048575 bytes of a phase at .* thread",
    "arrival_missing": r"deadlock in block .* mbarrier_try_wait_parity at .* \(1 arrivals and 0 bytes to come\)",
    "mbarrier_without_fence": r"cp_async_bulk on an mbarrier without a fence_mbarrier_init .* thread \(0, 0, 0\)",
    "bulk_load_from_misaligned": r"cp_async_bulk on an address that is no multiple of 16 at .*bulk\.cu.* thread",
    "bulk_load_to_misaligned": r"cp_async_bulk on an address that is no multiple of 16 at .*bulk\.cu.* thread",
    "bulk_load_of_odd_size": r"cp_async_bulk of 68 bytes, which is no multiple of 16 at .*bulk\.cu.* thread",
    "misaligned_bulk_store": r"cp_async_bulk on an address that is no multiple of 16 at .*bulk.* thread \(2, 0, 0\)",
    "load_in_flight": r"return of all threads with an asynchronous copy .* never waited for, issued at .*bulk\.cu",
    "copy_of_zeros_alone": r"__pipeline_memcpy_async with more zeros than bytes at .*pipeline\.cu.* thread",
    "parity_of_two": r"mbarrier_try_wait_parity with a parity that is not 0 or 1 at .*bulk\.cu.* thread",
    "thread_without_cluster_barrier": r"deadlock in the cluster of block .*cluster\.sync at .* 1 have returned",
    "block_without_cluster_barrier": r"deadlock in the cluster of block .*cluster\.sync at .* 96 have returned",
    "wait_without_arrival": r"cluster\.barrier_wait without an arrival before it at .*clusters\.cu.* thread",
    "two_arrivals": r"cluster\.barrier_arrive without a wait since the last arrival at .*clusters\.cu.* thread",
    "rank_outside_cluster": r"map_shared_rank to block 2 of a cluster of 2 at .*clusters\.cu.* thread",
    "map_of_global_memory": r"map_shared_rank of an address outside of shared memory at .*clusters\.cu.* thread",
    "write_before_the_start": r"access to the shared memory of block \(\d, 0, 0\), which has not started in .* thread",
    "copy_to_neighbour": r"__pipeline_memcpy_async into another block's shared memory at .*clusters\.cu.* thread",
    "arrival_at_neighbour": r"mbarrier_arrive on another block's mbarrier at .*bulk\.cu.* thread \(0, 0, 0\)",
    "wait_at_neighbour": r"mbarrier_try_wait_parity on another block's mbarrier at .*bulk\.cu.* thread \(0, 0, 0\)",
    "mbarrier_init_in_neighbour": r"mbarrier_init in another block's shared memory at .*bulk\.cu.* thread \(0, 0, 0\)",
    "load_with_mbarrier_of_neighbour": r"cp_async_bulk with an mbarrier of another block than its destination at",
    "store_from_neighbour": r"cp_async_bulk from another block's shared memory at .*bulk\.cu.* thread \(0, 0, 0\)",
    "message_with_mbarrier_of_neighbour": r"st_async with an mbarrier of another block than its destination at",
    "message_to_global_memory": r"st_async to an address outside of shared memory at .*bulk\.cu.* thread",
    "arrival_at_neighbour_without_fence": r"mbarrier_arrive on an mbarrier without a fence_mbarrier_init .* thread",
}
IN_CLUSTERS = list(FAULTS)[list(FAULTS).index("thread_without_cluster_barrier") :]
ARGUMENTS = {"rank_outside_cluster": 2, "copy_of_odd_size": 12}


@pytest.mark.parametrize("kernel", FAULTS)
def test_reports(kernel):
    memory, numbers = torch.zeros(32, dtype=torch.int32), torch.zeros(96, dtype=torch.int32)
    cluster = 2 if kernel in IN_CLUSTERS else (0, 0, 0)
    message = launch(kernel, memory, numbers, ARGUMENTS.get(kernel, 0), grid=2, block=96, cluster=cluster)
    assert re.search(FAULTS[kernel], message), message
    # The state after a fault does not disturb the next launch.
    assert run("correct", torch.zeros(1, dtype=torch.int32), grid=2, block=96) == 6 * 96 * 95 // 2


def test_missing_barrier_shows(over_seeds):
    results = over_seeds("missing_barrier", poisoned(1), grid=2, block=96)
    assert len({int(output) for _, output in results}) > 1


@pytest.mark.parametrize("ones", [0, 1, 95, 96])
def test_votes_of_a_block(ones):
    given = (torch.arange(96, dtype=torch.int32) < ones).int()
    expected = torch.tensor([ones, ones > 0, ones == 96], dtype=torch.int32).expand(96, 3)
    assert torch.equal(run("barrier_votes", poisoned(96, 3), given, grid=1, block=96), expected)


@pytest.mark.parametrize(("low", "high"), [(-2, 3), (1, 3), (-2, 1)])
def test_votes_of_a_warp(low, high):
    given = integers(64, low=low, high=high)
    got = run("votes", poisoned(64, 4), given, grid=1, block=64)
    for lane, row in enumerate(got.tolist()):
        peers = [other for other in range(lane // 32 * 32, lane // 32 * 32 + 32) if other % 2 == lane % 2]
        positive = [other for other in peers if given[other] > 0]
        equal = [other for other in peers if given[other] == given[lane]]
        bits = [sum(1 << other % 32 for other in lanes) for lanes in (positive, equal)]
        expected = [len(positive) > 0, len(positive) == len(peers), *bits]
        assert [value & 0xFFFFFFFF for value in row] == expected


def test_reductions_of_a_warp():
    given = integers(64, low=-(2**31), high=2**31 - 1)
    rows = run("reductions", poisoned(64, 9), given, grid=1, block=64)
    for warp in range(2):
        values = given[32 * warp :][:32].tolist()
        bits = [value & 0xFFFFFFFF for value in values]
        of_bits = [functools.reduce(operation, bits) for operation in (operator.and_, operator.or_, operator.xor)]
        expected = [sum(values), min(values), max(values), sum(bits), min(bits), max(bits), *of_bits]
        wrapped = [(value + 2**31) % 2**32 - 2**31 for value in expected]
        assert rows[32 * warp :][:32].tolist() == [wrapped] * 32


@pytest.mark.parametrize("width", [8, 32])
def test_shuffles(width):
    given = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = run("shuffles", poisoned(64, 4, dtype=torch.float64), given, width, grid=1, block=64)
    for thread in range(64):
        first, lane = thread // width * width, thread % width
        sources = [
            thread - 3 if lane >= 3 else thread,
            thread + 3 if lane + 3 < width else thread,
            first + (lane ^ 5),
            first + 35 % width,
        ]
        assert got[thread].tolist() == [given[source].item() for source in sources]


@pytest.mark.parametrize("n", [1, 25, 1000, 12288, 58112])
def test_dynamic_shared_memory(n, assert_right, assert_shows):
    given = integers(2, n)
    shape = dict(grid=2, block=96, dynamic_shared=4 * n, max_dynamic_shared=4 * n)
    assert_right("reverse", given.flip(1), given, n, **shape)
    if n > 1:
        assert_shows("reverse_without_barrier", given.flip(1), given, n, **shape)


def test_shared_memory_is_each_blocks_own():
    # Dynamic and static, poisoned before each block.
    expected = torch.full((4, 2), POISON, dtype=torch.int32)
    assert torch.equal(
        run("fresh", torch.zeros(4, 2, dtype=torch.int32), n=25, grid=4, block=32, dynamic_shared=100), expected
    )


@pytest.mark.parametrize("size", [0, 100, 4096, 47104])
@pytest.mark.parametrize("past", [0, 500, 10000])
def test_write_past_dynamic_shared_memory(size, past):
    message = launch("write_at", poisoned(1), n=size // 4 + past, grid=2, block=96, dynamic_shared=size)
    expected = rf"(write|access) past the end of the dynamic shared memory \({size} bytes\).* thread \(40, 0, 0\)"
    assert re.search(expected, message) or (past == 10000 and size > 40000 and "invalid access" in message), message
    assert launch("write_at", poisoned(1), n=size // 4 - 1, grid=2, block=96, dynamic_shared=size) == "" or size == 0


def test_read_past_dynamic_shared_memory():
    output = torch.zeros(1, dtype=torch.int32)
    run("read_at", output, n=25, grid=1, block=64, dynamic_shared=100)
    assert output.view(torch.float32).isnan()
    message = launch("read_at", output, n=1025, grid=1, block=64, dynamic_shared=100)
    assert re.search(r"access past the end of the dynamic shared memory .* thread \(40, 0, 0\)", message), message


def rows_of_clusters(size):
    """Three rows for each of two clusters, their sums for each block, and the launch."""
    given = integers(2, 3, size * 64)
    expected = given.sum(-1, dtype=torch.int32).repeat_interleave(size, 0)
    return given, expected, dict(grid=2 * size, block=64, cluster=size, dynamic_shared=4 * size)


@pytest.mark.parametrize(("kernel", "size"), [("cluster_sums", 1), ("cluster_sums", 4), ("cluster_sums_by_arrival", 8)])
def test_clusters(kernel, size, assert_right):
    given, expected, shape = rows_of_clusters(size)
    assert_right(kernel, expected, given, 3, **shape)


@pytest.mark.parametrize("barrier", ["first", "second"])
def test_missing_cluster_barrier_shows(barrier, assert_shows):
    given, expected, shape = rows_of_clusters(4)
    assert_shows(f"cluster_sums_without_{barrier}_barrier", expected, given, 3, **shape)


def test_return_before_other_blocks_have_read(over_seeds):
    given, expected, shape = rows_of_clusters(4)
    results = over_seeds("cluster_sums_without_last_barrier", poisoned(*expected.shape), given, 3, **shape)
    pattern = r"access to the shared memory of block \(\d, 0, 0\), which has returned in block .*thread"
    assert any(re.search(pattern, message) for message, _ in results)


def test_cluster_of_16_in_3_dimensions():
    grid, cluster, threads = (4, 4, 6), (2, 4, 2), 32
    got = run("cluster_places", poisoned(6, 4, 4, 6), grid=grid, block=threads, cluster=cluster, any_cluster_size=1)
    for z, y, x in itertools.product(range(6), range(4), range(4)):
        rank = x % 2 + 2 * (y % 4) + 8 * (z % 2)
        assert got[z, y, x].tolist() == [rank, 16, x % 2, y % 4, z % 2, rank * threads]


def test_histogram_in_distributed_shared_memory(assert_right):
    ids = integers(1000, low=0, high=64)
    expected = torch.bincount(ids, minlength=64).int()
    assert_right("cluster_histogram", expected, ids, 1000, grid=8, block=64, cluster=8, dynamic_shared=256)


def test_warps_of_a_cluster_run_apart(assert_right, assert_shows):
    expected = torch.cat([torch.arange(64, dtype=torch.int32).flip(0) + 64 * rank for rank in (1, 2, 3, 0)])
    shape = dict(grid=4, block=64, cluster=4)
    assert_right("cluster_neighbours", expected, **shape)
    assert_shows("cluster_neighbours_without_barrier", expected, **shape)


@pytest.mark.parametrize("n", [25, 1000, 2000])
def test_write_past_another_blocks_dynamic_shared_memory(n):
    shape = dict(grid=2, block=32, cluster=2, dynamic_shared=100)
    message = launch("write_to_neighbour_at", poisoned(1), n=n, **shape)
    assert re.search(r"(write|access).* past the end of the dynamic shared memory .*in block", message), message
    assert launch("write_to_neighbour_at", poisoned(1), n=24, **shape) == ""


@pytest.mark.parametrize("at_once", ["2", "9"])
def test_clusters_side_by_side(at_once, assert_right, assert_shows, over_seeds, monkeypatch):
    monkeypatch.setenv("PDL_EXT_EMULATOR_AT_ONCE", at_once)
    given, expected, shape = rows_of_clusters(4)
    assert_right("cluster_sums", expected, given, 3, **shape)
    assert_shows("cluster_sums_without_second_barrier", expected, given, 3, **shape)
    results = over_seeds("cluster_sums_without_last_barrier", poisoned(*expected.shape), given, 3, **shape)
    assert any("which has returned in block" in message for message, _ in results)


def sums_of_last_blocks():
    """The numbers of seven blocks; what they leave, whichever of them is the last; the launch."""
    given = integers(7)
    expected = torch.cat([torch.tensor([7, int(given.sum())]), given]).int()
    return given, expected, dict(grid=7, block=64, output=torch.tensor([0, *[POISON] * 8], dtype=torch.int32))


@pytest.mark.parametrize("at_once", ["1", "3", "7"])
def test_sum_by_the_last_block(at_once, assert_right, monkeypatch):
    monkeypatch.setenv("PDL_EXT_EMULATOR_AT_ONCE", at_once)
    given, expected, shape = sums_of_last_blocks()
    assert_right("sum_by_last_block", expected, given, **shape)


@pytest.mark.parametrize(
    ("mistake", "at_once"), [("counted_before_written", "7"), ("last_by_number", "1"), ("no_barrier", "1")]
)
def test_mistake_of_the_last_block_shows(mistake, at_once, assert_shows, monkeypatch):
    monkeypatch.setenv("PDL_EXT_EMULATOR_AT_ONCE", at_once)
    given, expected, shape = sums_of_last_blocks()
    assert_shows(f"sum_by_last_block_{mistake}", expected, given, **shape)


def pipelined(tiles):
    given = integers(tiles, 64, 4)
    return given, given.sum((0, 2), dtype=torch.int32).roll(-1)


@pytest.mark.parametrize("tiles", [0, 1, 2, 7])
def test_pipelined_copies(tiles, assert_right):
    given, expected = pipelined(tiles)
    assert_right("pipelined_sums", expected, given, tiles, grid=1, block=64)


@pytest.mark.parametrize(
    "mistake", ["without_wait", "with_short_wait", "without_barrier", "without_commit", "with_early_refill"]
)
def test_mistake_with_pipelined_copies_shows(mistake, assert_shows):
    given, expected = pipelined(7)
    assert_shows(f"pipelined_sums_{mistake}", expected, given, 7, grid=1, block=64)


@pytest.mark.parametrize("size", [4, 8, 16])
def test_copies_filled_with_zeros(size):
    given = torch.arange(1, 17, dtype=torch.uint8)
    got = run(
        "filled_with_zeros", torch.full((size + 1, size), 99, dtype=torch.uint8), given, size, grid=1, block=size + 1
    )
    assert got.tolist() == [given[: size - zeros].tolist() + [0] * zeros for zeros in range(size + 1)]


def tile_sums(tiles):
    given = integers(tiles, 64)
    return given, (given.long().sum(1) * torch.arange(1, tiles + 1)).sum().int().view(1)


@pytest.mark.parametrize("tiles", [1, 2, 3, 9])
@pytest.mark.parametrize("threads", [64, 128])
def test_bulk_loads(tiles, threads, assert_right):
    given, expected = tile_sums(tiles)
    assert_right("tile_sums", expected, given, tiles, output=zero(), grid=1, block=threads)


@pytest.mark.parametrize("mistake", ["without_wait", "with_wait_without_loop"])
def test_bulk_load_not_waited_for_shows(mistake, assert_shows):
    given, expected = tile_sums(2)
    assert_shows(f"tile_sums_{mistake}", expected, given, 2, output=zero(), grid=1, block=96)


def test_wait_for_the_wrong_phase_shows(over_seeds):
    # Too early, or after that phase forever.
    given, expected = tile_sums(2)
    results = over_seeds("tile_sums_with_wrong_parity", zero(), given, 2, grid=1, block=96)
    assert any(message == "" and not torch.equal(output, expected) for message, output in results)
    assert any(re.search(r"deadlock in block .* mbarrier_try_wait_parity at", message) for message, _ in results)


def test_bulk_load_into_a_buffer_in_use_shows(over_seeds):
    # Consumers that the producer overtakes wait for a phase that has long ended.
    given, _ = tile_sums(3)
    messages = [message for message, _ in over_seeds("tile_sums_without_release", zero(), given, 3, grid=1, block=96)]
    assert any(re.search(r"deadlock in block .* mbarrier_try_wait_parity at", message) for message in messages)


@pytest.mark.parametrize(("mistake", "bytes_to_come"), [("few", -16), ("many", 16)])
def test_wrong_number_of_expected_bytes_is_a_deadlock(mistake, bytes_to_come):
    message = launch(f"tile_sums_with_too_{mistake}_bytes", zero(), integers(9, 64), 9, grid=1, block=96)
    expected = rf"deadlock in block .* mbarrier_try_wait_parity at .* \(0 arrivals and {bytes_to_come} bytes to come\)"
    assert re.search(expected, message), message


def test_more_bytes_copied_than_a_phase_counts():
    given = integers(16384)
    shape = dict(grid=1, block=32, dynamic_shared=65536, max_dynamic_shared=65536)
    message = launch("too_many_bytes_copied", zero(), given, 65536, **shape)
    assert "copies of more than the 1048575 bytes of an mbarrier's phase" in message


def test_bulk_load_past_the_end_of_shared_memory():
    given = integers(32)
    shape = dict(grid=1, block=32, dynamic_shared=100)
    assert launch("load_past_the_end", poisoned(1), given, 96, **shape) == ""
    message = launch("load_past_the_end", poisoned(1), given, 112, **shape)
    assert re.search(r"cp_async_bulk past the end of shared memory at .*bulk\.cu:\d+ in block .* thread", message), (
        message
    )


def test_bulk_load_from_outside_of_the_source():
    given = cuda_emulator.guarded(integers(24))
    message = launch("load_past_the_end", poisoned(1), given, 112, grid=1, block=32, dynamic_shared=128)
    assert re.search(r"invalid access to address 0x\w+ in block .* thread \(0, 0, 0\)", message), message


STORES = dict(block=64, dynamic_shared=2048)


def test_bulk_stores(assert_right):
    given = integers(2, 512)
    assert_right("doubled", 2 * given, given, 512, grid=2, **STORES)


@pytest.mark.parametrize("mistake", ["without_barrier", "with_early_overwrite"])
def test_mistake_with_bulk_stores_shows(mistake, assert_shows):
    given = integers(2, 512)
    assert_shows(f"doubled_{mistake}", 2 * given, given, 512, grid=2, **STORES)


@pytest.mark.parametrize("mistake", ["without_commit", "without_wait"])
def test_return_before_a_bulk_store_has_read(mistake, over_seeds):
    pattern = r"return with an asynchronous copy that was never waited for, issued at .*bulk\.cu.* thread \(0, 0, 0\)"
    for message, _ in over_seeds(f"doubled_{mistake}", poisoned(2, 512), integers(2, 512), 512, grid=2, **STORES):
        assert re.search(pattern, message), message


def test_reading_back_what_a_bulk_store_wrote(assert_right, assert_shows):
    given = integers(512)
    expected = torch.cat([given, given[-1:]])
    assert_right("read_back", expected, given, 512, grid=1, **STORES)
    assert_shows("read_back_after_reading", expected, given, 512, grid=1, **STORES)


def logits_of_clusters(blocks, n):
    size = 4 * n // blocks
    shape = dict(grid=2 * blocks, block=64, cluster=blocks, dynamic_shared=size, max_dynamic_shared=size)
    logits = 4 * torch.randn(2, n, generator=torch.Generator().manual_seed(2))
    return logits, dict(shape, any_cluster_size=int(blocks > 8))


@pytest.mark.parametrize(("blocks", "n"), [(1, 64), (2, 1000), (8, 4096), (16, 16384), (2, 100000)])
def test_row_kept_by_a_cluster(blocks, n, over_seeds):
    logits, shape = logits_of_clusters(blocks, n)
    for message, output in over_seeds("cluster_softmax", poisoned(2, n, dtype=torch.float32), logits, n, **shape):
        assert message == ""
        torch.testing.assert_close(output, logits.softmax(-1))


def test_missing_barrier_of_a_cluster_with_a_row_shows(over_seeds):
    logits, shape = logits_of_clusters(4, 1024)
    outputs = over_seeds("cluster_softmax_without_barrier", torch.zeros(2, 1024), logits, 1024, **shape)
    assert any(not torch.allclose(output, logits.softmax(-1)) for _, output in outputs)


def test_early_return_from_a_cluster_with_a_row(over_seeds):
    logits, shape = logits_of_clusters(4, 1024)
    results = over_seeds("cluster_softmax_with_early_return", torch.zeros(2, 1024), logits, 1024, **shape)
    assert any("which has returned" in message for message, _ in results)


def test_arrival_from_other_blocks(assert_right, assert_shows):
    given = integers(8)
    shape = dict(grid=8, block=32, cluster=8)
    assert_right("gather_by_arrival", given, given, **shape)
    assert_shows("gather_by_arrival_without_wait", given, given, **shape)


@pytest.mark.parametrize("blocks", [1, 2, 8])
def test_messages_to_other_blocks(blocks, assert_right, assert_shows):
    given = integers(blocks, 4)
    shape = dict(grid=blocks, block=32, cluster=blocks)
    expected = given.expand(blocks, blocks, 4).contiguous()
    assert_right("messages_to_all", expected, given, **shape)
    if blocks > 1:
        assert_shows("messages_to_all_without_wait", expected, given, **shape)


def test_atomics(over_seeds):
    given = integers(96, low=1, high=31)
    total, ones = int(given.sum()), set(given.tolist())
    parity = 0
    for value in given.tolist():
        parity ^= 1 << value
    cleared = ~sum(1 << value for value in ones) & 0xFFFFFFFF
    for message, got in over_seeds("atomics", torch.full((2, 16), POISON), given, grid=2, block=96):
        assert message == ""
        for block in got:
            words, floats = block.view(torch.int32)[::2].tolist(), block.view(torch.float32)
            assert words[0] == -total
            assert words[1] == total
            assert block[2] == 96 << 40
            assert floats[6] == total
            assert block.view(torch.float64)[4] == total / 4
            assert words[5] == min(ones)
            assert words[6] == max(ones)
            assert block[7] == min(ones)
            assert block[8] == max(ones)
            assert words[9] & 0xFFFFFFFF == cleared
            assert words[10] == sum(1 << value for value in ones)
            assert block[11] == parity
            assert words[12] == total
            assert words[13] in ones
            assert words[13] + words[14] == total


def test_conversions():
    bits = torch.randint(-(2**31), 2**31, (4000,), generator=torch.Generator().manual_seed(3)).int().view(torch.float32)
    special = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65504, 65520, 1e-8, 6e-8, 3.4e38, 1 + 2**-8, 1 + 3 * 2**-8]
    )
    x = torch.cat([bits, torch.randn(2000), special]).view(-1, 2)
    got = run("conversions", poisoned(len(x), 8, dtype=torch.float32), x, len(x), grid=-(-len(x) // 64), block=64)
    bfloat16, half = x.bfloat16().float(), x.half().float()
    expected = [*bfloat16.T, *half.T, bfloat16[:, 0], half[:, 1], bfloat16.sum(1), half.sum(1)]
    torch.testing.assert_close(got, torch.stack(expected, 1), rtol=0, atol=0, equal_nan=True)


def test_loads_and_stores_with_cache_hints():
    given = integers(16, 4)
    got = run("hinted_copies", poisoned(8, 16, 4), given, 16, grid=1, block=32)
    assert torch.equal(got[:7], given.expand(7, 16, 4))
    assert got[7].view(torch.float32).tolist() == [[1, 2, 3, 4]] * 16


def test_fast_arithmetic():
    x = torch.linspace(0.01, 20, 64)
    got = run("fast_arithmetic", poisoned(64, 7, dtype=torch.float32), x, 64, grid=1, block=64)
    expected = torch.stack([x.exp(), x.log(), 1 / x, x.exp2(), x * x - 1, x.rsqrt(), x], 1)
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-6)


# name: shared memory of a block and a multiprocessor, threads and blocks of a multiprocessor, clusters
DEVICES = {
    "sm_75": (7, 5, 65536, 65536, 1024, 16, 0),
    "sm_80": (8, 0, 166912, 167936, 2048, 32, 0),
    "sm_90": (9, 0, 232448, 233472, 2048, 32, 1),
    "sm_100": (10, 0, 232448, 233472, 2048, 32, 1),
}
ATTRIBUTES = (75, 76, 97, 81, 39, 106, 120)


def attribute(number):
    value = ctypes.c_int()
    return cuda_emulator.library().cuda_emulator_device_attribute(number, ctypes.byref(value)), value.value


@pytest.mark.parametrize("device", DEVICES)
def test_device_attributes(device, monkeypatch):
    monkeypatch.setenv("PDL_EXT_EMULATOR_DEVICE", device)
    assert tuple(attribute(number) for number in ATTRIBUTES) == tuple((0, value) for value in DEVICES[device])
    assert attribute(16) == (0, 4)
    monkeypatch.setenv("PDL_EXT_EMULATOR_MULTIPROCESSORS", "9")
    assert attribute(16) == (0, 9)
    assert attribute(8) == (0, 49152)
    assert attribute(999)[0] == NOT_SUPPORTED


def test_default_device_is_sm_90():
    assert attribute(75) == (0, 9)


def test_unknown_device(monkeypatch):
    monkeypatch.setenv("PDL_EXT_EMULATOR_DEVICE", "sm_12")
    assert "names no device that it knows: sm_12" in launch("correct", zero(), grid=1, block=96)


def test_limits_of_dynamic_shared_memory(monkeypatch):
    shape = dict(grid=1, block=32)
    out = poisoned(1)
    # Each limit with a kernel of its own: attributes stay.
    assert launch("two_arrivals", out, **shape, dynamic_shared=47105) == f"error {INVALID_VALUE}"
    assert launch("write_at", out, **shape, dynamic_shared=232448, max_dynamic_shared=232448) == ""
    assert cuda_emulator.library().cuda_emulator_max_dynamic_shared(b"write_at") == 232448
    assert launch("write_at", out, **shape, dynamic_shared=0, max_dynamic_shared=232449) == f"error {INVALID_VALUE}"
    monkeypatch.setenv("PDL_EXT_EMULATOR_DEVICE", "sm_80")
    assert launch("write_at", out, **shape, dynamic_shared=166913) == f"error {INVALID_VALUE}"
    # The first device's settings do not apply to another device.
    request = dict(max_dynamic_shared=166912)
    assert launch("write_at", out, **shape, dynamic_shared=166912) == f"error {INVALID_VALUE}"
    assert launch("write_at", out, **shape, dynamic_shared=166912, **request) == ""


@pytest.mark.parametrize(
    ("grid", "cluster", "options", "error"),
    [
        (8, 8, {}, 0),
        (7, 2, {}, INVALID_CLUSTER_SIZE),
        ((4, 3, 1), (2, 2, 1), {}, INVALID_CLUSTER_SIZE),
        (9, 9, {}, INVALID_CLUSTER_SIZE),
        (16, 16, {}, INVALID_CLUSTER_SIZE),
        (16, 16, {"any_cluster_size": 1}, 0),
        (32, 32, {"any_cluster_size": 1}, INVALID_CLUSTER_SIZE),
        (8, (2, 0, 1), {}, INVALID_CLUSTER_SIZE),
    ],
)
def test_limits_of_clusters(grid, cluster, options, error):
    shape = {"any_cluster_size": 0, **options}
    message = launch("cluster_places", poisoned(32, 6), grid=grid, block=32, cluster=cluster, **shape)
    assert message == (f"error {error}" if error else "")


@pytest.mark.parametrize("block", [0, 1025, (1, 1, 65), (32, 33, 1)])
def test_limits_of_blocks(block):
    assert launch("correct", poisoned(1), grid=1, block=block) == f"error {INVALID_CONFIGURATION}"


@pytest.mark.parametrize(
    ("device", "kernel", "pattern"),
    [
        ("sm_75", "pipelined_sums", r"__pipeline_\w+ needs a device from sm_80 on, not sm_75 at .*pipeline\.cu"),
        ("sm_75", "reductions", r"__reduce_add_sync needs a device from sm_80 on, not sm_75 at .*warps\.cu"),
        ("sm_80", "tile_sums", r"\w+ needs a device from sm_90 on, not sm_80 at .*bulk\.cu"),
        ("sm_80", "two_arrivals", r"this_cluster needs a device from sm_90 on, not sm_80 at .*clusters\.cu"),
    ],
)
def test_instructions_that_a_device_lacks(device, kernel, pattern, monkeypatch):
    monkeypatch.setenv("PDL_EXT_EMULATOR_DEVICE", device)
    message = launch(kernel, poisoned(64, 9), integers(64), 0, grid=1, block=64)
    assert re.search(pattern, message), message


def test_clusters_need_sm_90(monkeypatch):
    monkeypatch.setenv("PDL_EXT_EMULATOR_DEVICE", "sm_80")
    assert launch("cluster_places", poisoned(2, 6), grid=2, block=32, cluster=2) == f"error {NOT_SUPPORTED}"
    results = (ctypes.c_int * 2)()
    name = ctypes.create_string_buffer(100)
    cuda_emulator.library().cuda_emulator_last_error(results, name, ctypes.c_size_t(100))
    assert (*results, name.value) == (NOT_SUPPORTED, 0, b"cudaErrorNotSupported")


def occupancy(**shape):
    results = (ctypes.c_int * 3)()
    error = cuda_emulator.library().cuda_emulator_occupancy(
        b"correct", ctypes.byref(cuda_emulator.request(**shape)), results
    )
    return error, *results


@pytest.mark.parametrize(
    ("device", "shape", "expected"),
    [
        ("sm_90", dict(block=256), (8, 0, 0)),
        ("sm_90", dict(block=32), (32, 0, 0)),
        ("sm_90", dict(block=1000), (2, 0, 0)),
        ("sm_90", dict(block=256, dynamic_shared=100000, max_dynamic_shared=100000), (2, 0, 0)),
        ("sm_80", dict(block=256, dynamic_shared=100000, max_dynamic_shared=100000), (1, 0, 0)),
        ("sm_75", dict(block=256), (4, 0, 0)),
        ("sm_90", dict(block=256, cluster=2), (8, 16, 8)),
        (
            "sm_90",
            dict(block=256, cluster=16, any_cluster_size=1, dynamic_shared=232448, max_dynamic_shared=232448),
            (1, 1, 16),
        ),
    ],
)
def test_occupancy(device, shape, expected, monkeypatch):
    monkeypatch.setenv("PDL_EXT_EMULATOR_DEVICE", device)
    assert occupancy(grid=16, **{"any_cluster_size": -1 if device != "sm_90" else 0, **shape}) == (0, *expected)


def test_copies_and_fills_of_the_runtime():
    source, copy = integers(16), poisoned(16)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (copy, source)]
    assert (
        cuda_emulator.library().cuda_emulator_copy_and_set(*pointers, ctypes.c_size_t(64), 0, ctypes.c_size_t(8)) == 0
    )
    assert copy.tolist() == [0, 0, *source[2:].tolist()]


def test_every_mutation_has_its_place(monkeypatch):
    monkeypatch.syspath_prepend(cuda_emulator.HERE)
    import mutants

    found = mutants.mutants(cuda_emulator.ROOT / "csrc")
    assert len(found) > len(mutants.MUTATIONS) + len(mutants.VARIANT_MUTATIONS)
    flags = {"", mutants.MESSAGES, mutants.BATCHES, mutants.LAST_BLOCK, mutants.FEW_BLOCKS}
    assert {each.flags for each in found} == flags
