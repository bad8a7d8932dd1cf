// Dynamic shared memory.
#include "dynamic_shared.h"
#include "kernel.h"

namespace {

using pdl::cuda::dynamic_shared_memory;

// Each block reverses its n numbers.
template <bool kBarrier>
__global__ void reverse(int* output, const int* input, int n) {
  int* values = dynamic_shared_memory<int>();
  const int first = int(blockIdx.x) * n;
  for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) values[i] = input[first + i];
  if (kBarrier) __syncthreads();
  for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) output[first + i] = values[n - 1 - i];
}

// Beside static shared memory, which is another block's business as little.
__global__ void fresh(int* output, const int*, int n) {
  __shared__ int marks[4];
  int* values = dynamic_shared_memory<int>();
  if (threadIdx.x == 0) {
    output[int(blockIdx.x) * 2] = values[0] & values[n - 1];
    output[int(blockIdx.x) * 2 + 1] = marks[0] & marks[3];
    values[0] = values[n - 1] = marks[0] = marks[3] = 7;
  }
}

__global__ void write_at(int*, const int*, int n) {
  if (threadIdx.x == 40) dynamic_shared_memory<int>()[n] = -1;
}

__global__ void read_at(int* output, const int*, int n) {
  if (threadIdx.x == 40) output[0] = dynamic_shared_memory<int>()[n];
}

const kernels::Register kernels_of_shared_memory({
    {"reverse", reverse<true>},
    {"reverse_without_barrier", reverse<false>},
    {"fresh", fresh},
    {"write_at", write_at},
    {"read_at", read_at},
});

}  // namespace
