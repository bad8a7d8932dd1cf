"""The emulator itself: mistakes that it has to catch, each planted in a kernel of cuda_emulator/faults.cpp."""

from __future__ import annotations

import re

import cuda_emulator
import pytest

FAULTS = {
    "early_return": r"deadlock in block .* __syncthreads at .*faults\.cpp.* 1 have returned",
    "divergent_barriers": r"__syncthreads at .* meets that at",
    "absent_lane": r"deadlock in block .* __shfl_down_sync at .*faults\.cpp",
    "divergent_shuffles": r"__shfl_\w+_sync at .* meets __shfl_\w+_sync at",
    "lane_outside_mask": r"with a mask that leaves the calling lane out in block .* thread \(\d*(31|63|95), 0, 0\)",
    "misaligned_vector": r"misaligned address .* at .*faults\.cpp:\d+ in block \(\d, 0, 0\), thread \(\d+, 0, 0\)",
    "shared_out_of_bounds": r"index out of an array's bounds at .* thread",
    "invalid_address": r"invalid access to address 0x\w+ in block .* thread",
    "overflow": r"signed overflow at .* thread",
}


@pytest.mark.parametrize("kernel", FAULTS)
def test_emulator_reports(kernel):
    _, message = cuda_emulator.run_faulty(kernel)
    assert re.search(FAULTS[kernel], message), message
    # What a fault leaves behind does not disturb the next launch.
    assert cuda_emulator.run_faulty("correct") == ([6 * 96 * 95 // 2, *[0] * 7], "")


def test_emulator_shows_a_missing_barrier(monkeypatch):
    sums = set()
    for seed in range(8):
        monkeypatch.setenv("PDL_EXT_EMULATOR_SEED", str(seed))
        memory, message = cuda_emulator.run_faulty("missing_barrier")
        assert message == ""
        sums.add(memory[0])
    assert len(sums) > 1
