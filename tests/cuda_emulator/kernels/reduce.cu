// Reductions of csrc, which no kernel there has follow one another without a barrier between.
#include "cuda/block_reduce.cuh"
#include "kernel.h"

namespace {

// Each of n sums is over as many numbers as the block has threads.
__global__ void sums_of_block(double* output, const double* input, int n) {
  for (int i = 0; i < n; ++i) {
    const double sum = pdl::cuda::block_sum(input[i * int(blockDim.x) + int(threadIdx.x)]);
    if (threadIdx.x == 0) output[i] = sum;
  }
}

// Of n numbers, by a block of n threads or of fewer.
__global__ void sum_of_threads(double* output, const double* input, int n) {
  __shared__ double of_warp[pdl::cuda::kWarp];
  const double sum = int(blockDim.x) == n
                         ? pdl::cuda::block_sum(input[threadIdx.x])
                         : pdl::cuda::block_sum_of(n, of_warp, [&](int thread) { return input[thread]; });
  if (threadIdx.x == 0) *output = sum;
}

const kernels::Register kernels_of_reductions({{"sums_of_block", sums_of_block}, {"sum_of_threads", sum_of_threads}});

}  // namespace
