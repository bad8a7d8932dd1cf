// Device functions for the kernels: warps, conversions, exchange between lanes, atomics, asynchronous copies.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>
#include <cuda/atomic>

#include <bit>
#include <cstdint>
#include <cstring>

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

// Two adjacent 16-bit numbers, the first in the lower half of the word: fewer instructions than one by one.
template <typename T>
__device__ __forceinline__ float2 widen_pair(uint32_t word);
template <>
__device__ __forceinline__ float2 widen_pair<__nv_bfloat16>(uint32_t word) {
  return {std::bit_cast<float>(word << 16), std::bit_cast<float>(word & 0xffff0000u)};
}
template <>
__device__ __forceinline__ float2 widen_pair<__half>(uint32_t word) {
  __half2 pair;
  memcpy(&pair, &word, sizeof pair);
  return __half22float2(pair);
}

// Rounds to nearest even.
template <typename T>
__device__ __forceinline__ uint32_t narrow_pair(float2 x);
template <>
__device__ __forceinline__ uint32_t narrow_pair<__nv_bfloat16>(float2 x) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x.x, x.y);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}
template <>
__device__ __forceinline__ uint32_t narrow_pair<__half>(float2 x) {
  const __half2 pair = __floats2half2_rn(x.x, x.y);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

// The larger numbers of two pairs; where one is NaN, the other. Cards before sm_80 compare one by one, and need no
// pairs.
template <typename T>
constexpr bool kComparesPairs =
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    false;
#else
    sizeof(T) == 2;
#endif
template <typename T>
__device__ __forceinline__ uint32_t larger_pair(uint32_t a, uint32_t b) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  Pair pair_a, pair_b;
  memcpy(&pair_a, &a, sizeof a);
  memcpy(&pair_b, &b, sizeof b);
  const Pair pair = __hmax2(pair_a, pair_b);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

// A loaded value that is not used before this call: otherwise the compiler would wait for the load at its own place.
template <typename V>
__device__ __forceinline__ V not_before(V loaded) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(V) == 2) {
    uint16_t bits;
    memcpy(&bits, &loaded, sizeof bits);
    asm volatile("" : "+h"(bits));
    memcpy(&loaded, &bits, sizeof bits);
  }
#endif
  return loaded;
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

// Counts the caller's arrival, one of `count`, and says how many came before it. The last caller, once it has fenced,
// sees what each wrote before its own arrival. The increment is a release, and the fence makes an acquire of its
// result. It is no acquire itself, or the caller would wait for the result here.
__device__ __forceinline__ uint32_t arrive(uint32_t* counter, uint32_t count) {
#if defined(__CUDA_ARCH__)
  uint32_t before;
  // Of an addition of 1 ptxas makes one for the warp, and a shuffle that waits for its result.
  asm volatile("atom.inc.release.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter)), "r"(count - 1)
               : "memory");
  return before;
#else
  return ::cuda::atomic_ref<uint32_t, ::cuda::thread_scope_device>(*counter).fetch_add(
      1, ::cuda::std::memory_order_release);
#endif
}
__device__ __forceinline__ void fence_behind_arrivals() {
  ::cuda::atomic_thread_fence(::cuda::std::memory_order_acq_rel, ::cuda::thread_scope_device);
}

// Counters in the block's shared memory. Their address is converted once: with a generic pointer, sm_90 converts it at
// each addition. From sm_80 on, adding a compile-time one is a separate instruction. It merges the lanes of a warp with
// the same counter, where other additions are serialised.
class SharedCounters {
 public:
#if defined(__CUDA_ARCH__)
  __device__ explicit SharedCounters(uint32_t* counters) {
    // Opaque to the compiler, which would otherwise convert the address again for each use.
    asm volatile("mov.u32 %0, %1;" : "=r"(address_) : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(counters))));
  }
  __device__ __forceinline__ void increment(uint32_t index) const {
    asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(address_ + index * 4) : "memory");
  }

 private:
  uint32_t address_;
#else
  __device__ explicit SharedCounters(uint32_t* counters) : counters_(counters) {}
  __device__ void increment(uint32_t index) const { atomicAdd(counters_ + index, 1u); }

 private:
  uint32_t* counters_;
#endif
};

// Copies 16 bytes into shared memory asynchronously; the thread may read them after it has waited for their group.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  __pipeline_memcpy_async(shared, global, 16);
}
__device__ __forceinline__ void end_group_of_copies() {
  __pipeline_commit();
}
// Waits for all groups but the last `under_way`; if these are many, for some of them, too. The number is part of the
// instruction.
__device__ __forceinline__ void wait_for_copies(int under_way) {
  if (under_way <= 0) {
    __pipeline_wait_prior(0);
  } else if (under_way == 1) {
    __pipeline_wait_prior(1);
  } else if (under_way == 2) {
    __pipeline_wait_prior(2);
  } else if (under_way == 3) {
    __pipeline_wait_prior(3);
  } else {
    __pipeline_wait_prior(4);
  }
  // The instruction does not tell the compiler that memory has changed, and no barrier follows that would.
  asm volatile("" ::: "memory");
}

// On sm_90 a kernel may start while the previous one runs; see launch.cuh.
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The shared memory that the launch requested, aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ T* dynamic_shared_memory() {
  extern __shared__ uint4 pdl_dynamic_shared[];
  return reinterpret_cast<T*>(pdl_dynamic_shared);
}

}  // namespace pdl::cuda
