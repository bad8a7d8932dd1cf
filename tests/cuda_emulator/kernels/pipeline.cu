// Asynchronous copies of a few bytes, in groups of each thread; from sm_80 on.
#include <cuda_pipeline_primitives.h>

#include "kernel.h"

namespace {

constexpr int kThreads = 64;
constexpr int kStages = 2;

enum class Mistake { none, no_wait, short_wait, no_barrier, no_commit, early_refill };

// Each thread sums what its neighbour's copies bring, in n tiles of 16 bytes a thread through two buffers.
template <Mistake kMistake>
__global__ void pipelined_sums(int* output, const int4* input, int n) {
  __shared__ int4 tiles[kStages][kThreads];
  const int thread = int(threadIdx.x);
  const auto fetch = [&](int tile) {
    if (tile < n) __pipeline_memcpy_async(&tiles[tile % kStages][thread], input + tile * kThreads + thread, 16);
    if (kMistake != Mistake::no_commit) __pipeline_commit();
  };
  for (int tile = 0; tile < kStages; ++tile) fetch(tile);
  int sum = 0;
  for (int tile = 0; tile < n; ++tile) {
    if (kMistake != Mistake::no_wait) __pipeline_wait_prior(kMistake == Mistake::short_wait ? kStages : kStages - 1);
    if (kMistake != Mistake::no_barrier) __syncthreads();
    const int4 loaded = tiles[tile % kStages][(thread + 1) % kThreads];
    // Poison in place of a number must not overflow.
    sum = int(unsigned(sum) + unsigned(loaded.x) + unsigned(loaded.y) + unsigned(loaded.z) + unsigned(loaded.w));
    if (kMistake != Mistake::early_refill) __syncthreads();
    fetch(tile + kStages);
  }
  output[thread] = sum;
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

// Copies of n bytes of which the last threadIdx.x bytes are zeros.
__global__ void filled_with_zeros(unsigned char* output, const unsigned char* input, int n) {
  __shared__ uint4 tile[17];
  auto* mine = reinterpret_cast<unsigned char*>(&tile[threadIdx.x]);
  __pipeline_memcpy_async(mine, input, size_t(n), threadIdx.x);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  for (int i = 0; i < n; ++i) output[int(threadIdx.x) * n + i] = mine[i];
}

__global__ void copy_never_waited_for(int*, const int* input, int) {
  __shared__ int value;
  if (threadIdx.x == 5) {
    __pipeline_memcpy_async(&value, input, 4);
    __pipeline_commit();
  }
}

__global__ void copy_of_odd_size(int*, const int* input, int n) {
  __shared__ uint4 value;
  __pipeline_memcpy_async(&value, input, size_t(n));
}

__global__ void copy_to_misaligned(int*, const int* input, int) {
  __shared__ uint4 values[2];
  __pipeline_memcpy_async(reinterpret_cast<int*>(values) + 1, input, 16);
}

__global__ void copy_from_misaligned(int*, const int* input, int) {
  __shared__ uint4 value;
  __pipeline_memcpy_async(&value, input + 1, 16);
}

__global__ void copy_to_global(int* output, const int* input, int) {
  __pipeline_memcpy_async(output, input, 4);
}

__global__ void copy_from_shared(int*, const int*, int) {
  __shared__ int values[2];
  __pipeline_memcpy_async(values, values + 1, 4);
}

__global__ void copy_of_zeros_alone(int*, const int* input, int) {
  __shared__ uint4 values;
  __pipeline_memcpy_async(&values, input, 8, 9);
}

__global__ void copy_from_nowhere(int*, const int* input, int) {
  __shared__ int value;
  __pipeline_memcpy_async(&value, input - (1ll << 40), 4);
}

const kernels::Register kernels_of_pipelines({
    {"pipelined_sums", pipelined_sums<Mistake::none>},
    {"pipelined_sums_without_wait", pipelined_sums<Mistake::no_wait>},
    {"pipelined_sums_with_short_wait", pipelined_sums<Mistake::short_wait>},
    {"pipelined_sums_without_barrier", pipelined_sums<Mistake::no_barrier>},
    {"pipelined_sums_without_commit", pipelined_sums<Mistake::no_commit>},
    {"pipelined_sums_with_early_refill", pipelined_sums<Mistake::early_refill>},
    {"filled_with_zeros", filled_with_zeros},
    {"copy_never_waited_for", copy_never_waited_for},
    {"copy_of_odd_size", copy_of_odd_size},
    {"copy_to_misaligned", copy_to_misaligned},
    {"copy_from_misaligned", copy_from_misaligned},
    {"copy_to_global", copy_to_global},
    {"copy_from_shared", copy_from_shared},
    {"copy_of_zeros_alone", copy_of_zeros_alone},
    {"copy_from_nowhere", copy_from_nowhere},
});

}  // namespace
