// Barriers of a block, its static shared memory, and what the sanitizer sees.
#include <cstdint>

#include "kernel.h"

namespace {

constexpr int kThreads = 96;

__device__ int block_sum(int value, bool with_barrier) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = value;
  if (with_barrier) __syncthreads();
  int sum = 0;
  for (int other : values) sum += other;
  return sum;
}

__global__ void correct(int* output, const int*, int) {
  const int sum = block_sum(int(threadIdx.x), true);
  const int of_warp = __shfl_down_sync(0xffffffffu, sum, 1);
  if (threadIdx.x % 32 == 0) atomicAdd(output, of_warp);
}

__global__ void missing_barrier(int* output, const int*, int) {
  const int sum = block_sum(int(threadIdx.x), false);
  if (threadIdx.x == 0) output[0] = sum;
}

__global__ void early_return(int* output, const int*, int) {
  if (threadIdx.x == 70) return;
  output[0] = block_sum(int(threadIdx.x), true);
}

__global__ void divergent_barriers(int*, const int*, int) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

// Of each thread's input: how many are not zero, whether any is, whether all are.
__global__ void barrier_votes(int* output, const int* input, int) {
  const int mine = input[threadIdx.x];
  const int count = __syncthreads_count(mine);
  const int any = __syncthreads_or(mine);
  const int all = __syncthreads_and(mine);
  output[threadIdx.x * 3] = count;
  output[threadIdx.x * 3 + 1] = any != 0;
  output[threadIdx.x * 3 + 2] = all != 0;
}

__global__ void early_return_from_vote(int* output, const int*, int) {
  if (threadIdx.x == 70) return;
  output[0] = __syncthreads_or(1);
}

__global__ void misaligned_vector(int* output, const int*, int) {
  const uint4 loaded = *reinterpret_cast<uint4*>(output + 1);
  output[0] = int(loaded.x);
}

__global__ void shared_out_of_bounds(int* output, const int*, int) {
  __shared__ int values[8];
  values[threadIdx.x] = 1;
  __syncthreads();
  output[0] = values[0];
}

__global__ void invalid_address(int* output, const int*, int) {
  // Downwards, since above the highest mapping there may be no address to tell.
  output[-(int64_t(1) << 40)] = 1;
}

__global__ void overflow(int* output, const int*, int) {
  output[0] = 0x7fffffff;
  output[0] += int(threadIdx.x) + 1;
}

const kernels::Register kernels_of_blocks({
    {"correct", correct},
    {"missing_barrier", missing_barrier},
    {"early_return", early_return},
    {"divergent_barriers", divergent_barriers},
    {"barrier_votes", barrier_votes},
    {"early_return_from_vote", early_return_from_vote},
    {"misaligned_vector", misaligned_vector},
    {"shared_out_of_bounds", shared_out_of_bounds},
    {"invalid_address", invalid_address},
    {"overflow", overflow},
});

}  // namespace
