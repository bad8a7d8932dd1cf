// Stands in for CUDA's header of this name: the subset that csrc/cuda uses, for g++ (see ../README.md).
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "../emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// All thread_local variables of the module lie in one segment, which the emulator poisons at the start of each block.
#define __shared__ thread_local

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// Those of the thread that is running.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

using std::max;
using std::min;

inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}
inline int __ffs(unsigned bits) {
  return __builtin_ffs(static_cast<int>(bits));
}
inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}

using cuda_emulator::Location;

inline void __syncthreads(Location where = Location::current()) {
  cuda_emulator::barrier(where);
}

template <typename V>
V __shfl_down_sync(unsigned mask, V value, unsigned distance, int width = 32, Location where = Location::current()) {
  const int lane = cuda_emulator::lane();
  const int source = lane % width + int(distance) < width ? lane + int(distance) : lane;
  return cuda_emulator::shuffle("__shfl_down_sync", mask, value, source, where);
}

template <typename V>
V __shfl_xor_sync(unsigned mask, V value, int bits, int width = 32, Location where = Location::current()) {
  const int lane = cuda_emulator::lane();
  const int source = (lane ^ bits) / width <= lane / width ? lane ^ bits : lane;
  return cuda_emulator::shuffle("__shfl_xor_sync", mask, value, source, where);
}

template <typename V>
V __shfl_sync(unsigned mask, V value, int source, int width = 32, Location where = Location::current()) {
  const int lane = cuda_emulator::lane();
  return cuda_emulator::shuffle("__shfl_sync", mask, value, lane / width * width + source % width, where);
}

template <typename V>
unsigned __match_any_sync(unsigned mask, V value, Location where = Location::current()) {
  return cuda_emulator::collective<unsigned>("__match_any_sync", mask, value, where, [](auto lanes, int lane) {
    unsigned equal = 0;
    for (int other = 0; other < 32; ++other) {
      if (lanes.has(other) && lanes[other] == lanes[lane]) equal |= 1u << other;
    }
    return equal;
  });
}

inline unsigned __ballot_sync(unsigned mask, int predicate, Location where = Location::current()) {
  return cuda_emulator::collective<unsigned>("__ballot_sync", mask, predicate, where, [](auto lanes, int) {
    unsigned votes = 0;
    for (int other = 0; other < 32; ++other) {
      if (lanes.has(other) && lanes[other] != 0) votes |= 1u << other;
    }
    return votes;
  });
}

inline void __syncwarp(unsigned mask = 0xffffffffu, Location where = Location::current()) {
  cuda_emulator::collective<int>("__syncwarp", mask, 0, where, [](auto, int) { return 0; });
}

// One fiber runs at a time, so that a plain addition is atomic.
template <typename V>
V atomicAdd(V* address, V value) {
  const V before = *address;
  *address = before + value;
  return before;
}

using cudaStream_t = struct CUstream_st*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorNotSupported = 801 };

struct cudaLaunchAttribute;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "kernel parameters take at most 4 KiB");
  if (config->dynamicSmemBytes != 0 || config->numAttrs != 0) return cudaErrorNotSupported;
  const uint64_t threads = uint64_t(config->blockDim.x) * config->blockDim.y * config->blockDim.z;
  const dim3 grid = config->gridDim;
  const bool fits = threads >= 1 && threads <= 1024 && config->blockDim.z <= 64 && grid.x >= 1 &&
                    grid.x <= 0x7fffffffu && grid.y >= 1 && grid.y <= 0xffffu && grid.z >= 1 && grid.z <= 0xffffu;
  if (!fits) return cudaErrorInvalidConfiguration;
  cuda_emulator::run_grid(grid, config->blockDim, [&] { kernel(Parameters(arguments)...); });
  return cudaSuccess;
}
