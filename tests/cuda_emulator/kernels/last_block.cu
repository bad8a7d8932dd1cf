// A sum over all blocks, by the one of them that is the last to bring its number.
#include <cuda/atomic>

#include "kernel.h"

namespace {

enum class Mistake { none, counted_before_written, last_by_number, no_barrier };

// The counter, which begins at 0, the sum, and each block's number.
template <Mistake kMistake>
__global__ void sum_by_last_block(int* output, const int* input, int) {
  __shared__ int is_last;
  int* const numbers = output + 2;
  if (threadIdx.x == 0) {
    const auto count = [&] {
      const cuda::atomic_ref<int, cuda::thread_scope_device> counter(*output);
      return counter.fetch_add(1, cuda::std::memory_order_acq_rel) == int(gridDim.x) - 1;
    };
    bool last = kMistake == Mistake::counted_before_written && count();
    numbers[blockIdx.x] = input[blockIdx.x];
    if (kMistake != Mistake::counted_before_written) last = count();
    if (kMistake == Mistake::last_by_number) last = blockIdx.x == gridDim.x - 1;
    is_last = last;
  }
  if (kMistake != Mistake::no_barrier) __syncthreads();
  if (is_last != 1 || threadIdx.x + 1 != blockDim.x) return;
  int sum = 0;
  for (int i = 0; i < int(gridDim.x); ++i) sum += numbers[i];
  output[1] = sum;
}

const kernels::Register kernels_of_last_blocks({
    {"sum_by_last_block", sum_by_last_block<Mistake::none>},
    {"sum_by_last_block_counted_before_written", sum_by_last_block<Mistake::counted_before_written>},
    {"sum_by_last_block_last_by_number", sum_by_last_block<Mistake::last_by_number>},
    {"sum_by_last_block_no_barrier", sum_by_last_block<Mistake::no_barrier>},
});

}  // namespace
