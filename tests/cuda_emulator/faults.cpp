// Kernels with the mistakes that the emulator has to catch, and one without: tests call them by name.
#include <cstdio>
#include <exception>
#include <map>
#include <string>

#include "cuda_runtime.h"

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

__global__ void correct(int* memory) {
  const int sum = block_sum(int(threadIdx.x), true);
  const int of_warp = __shfl_down_sync(0xffffffffu, sum, 1);
  if (threadIdx.x % 32 == 0) atomicAdd(memory, of_warp);
}

__global__ void missing_barrier(int* memory) {
  const int sum = block_sum(int(threadIdx.x), false);
  if (threadIdx.x == 0) memory[0] = sum;
}

__global__ void early_return(int* memory) {
  if (threadIdx.x == 70) return;
  memory[0] = block_sum(int(threadIdx.x), true);
}

__global__ void divergent_barriers(int*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void absent_lane(int* memory) {
  if (threadIdx.x % 32 != 5) memory[0] = __shfl_down_sync(0xffffffffu, 1, 1);
}

__global__ void divergent_shuffles(int* memory) {
  if (threadIdx.x % 2 == 0) {
    memory[0] = __shfl_down_sync(0xffffffffu, 1, 1);
  } else {
    memory[0] = __shfl_xor_sync(0xffffffffu, 1, 1);
  }
}

__global__ void lane_outside_mask(int* memory) {
  memory[0] = __shfl_down_sync(0x7fffffffu, 1, 1);
}

__global__ void misaligned_vector(int* memory) {
  const uint4 loaded = *reinterpret_cast<uint4*>(memory + 1);
  memory[0] = int(loaded.x);
}

__global__ void shared_out_of_bounds(int* memory) {
  __shared__ int values[8];
  values[threadIdx.x] = 1;
  __syncthreads();
  memory[0] = values[0];
}

__global__ void invalid_address(int* memory) {
  memory[int64_t(1) << 40] = 1;
}

__global__ void overflow(int* memory) {
  memory[0] = 0x7fffffff;
  memory[0] += int(threadIdx.x) + 1;
}

const std::map<std::string, void (*)(int*)> kernels = {
    {"correct", correct},
    {"missing_barrier", missing_barrier},
    {"early_return", early_return},
    {"divergent_barriers", divergent_barriers},
    {"absent_lane", absent_lane},
    {"divergent_shuffles", divergent_shuffles},
    {"lane_outside_mask", lane_outside_mask},
    {"misaligned_vector", misaligned_vector},
    {"shared_out_of_bounds", shared_out_of_bounds},
    {"invalid_address", invalid_address},
    {"overflow", overflow},
};

}  // namespace

// Runs a kernel in two blocks; `memory` holds 8 zeroed ints, aligned to 16 bytes. Leaves the fault's message, or "".
extern "C" __attribute__((visibility("default"))) void cuda_emulator_run(const char* name, int* memory, char* message,
                                                                         size_t size) {
  message[0] = 0;
  try {
    cudaLaunchConfig_t config = {};
    config.gridDim = {2};
    config.blockDim = {kThreads};
    cudaLaunchKernelEx(&config, kernels.at(name), memory);
  } catch (const std::exception& error) {
    snprintf(message, size, "%s", error.what());
  }
}
