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

const kernels::Register kernels_of_reductions({{"sums_of_block", sums_of_block}});

}  // namespace
