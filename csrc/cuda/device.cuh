// What the kernels take from the device: widths of warps, conversions, exchange between lanes, atomics.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../portable.h"

namespace pdl::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ double widen(double x) {
  return x;
}
__device__ __forceinline__ float widen(float x) {
  return x;
}
__device__ __forceinline__ float widen(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ __forceinline__ float widen(__half x) {
  return __half2float(x);
}

// Rounds to nearest even.
template <typename T>
__device__ __forceinline__ T narrow(Accumulator<T> x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}

template <typename V>
__device__ __forceinline__ V shuffle_down(V value, int distance) {
  return __shfl_down_sync(kAllLanes, value, distance);
}

// The lanes that hold the same key; every lane of the warp must call it.
__device__ __forceinline__ unsigned lanes_with_equal(unsigned long long key) {
  return __match_any_sync(kAllLanes, key);
}

__device__ __forceinline__ void atomic_add(int64_t* address, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(address), static_cast<unsigned long long>(value));
}
__device__ __forceinline__ void atomic_add(uint32_t* address, uint32_t value) {
  atomicAdd(address, value);
}

// What the launch asked for, aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ T* dynamic_shared_memory() {
  extern __shared__ uint4 pdl_dynamic_shared[];
  return reinterpret_cast<T*>(pdl_dynamic_shared);
}

}  // namespace pdl::cuda
