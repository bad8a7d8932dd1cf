// What the kernels take from the device: widths of warps, conversions, exchange between lanes and between the blocks of
// a cluster, atomics, asynchronous copies.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
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

// The larger of a value, which may be NaN, and a number; then the number. One instruction in float32.
__device__ __forceinline__ float larger(float value, float number) {
  return fmaxf(value, number);
}
__device__ __forceinline__ double larger(double value, double number) {
  return value > number ? value : number;
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

// Counters in the block's shared memory. The address is taken once: of a generic pointer sm_90 takes it at each
// addition. An addition of one, known when this is compiled, is an instruction of its own from sm_80 on, which adds up
// the lanes of a warp that have the same counter, where other additions queue.
class SharedCounters {
 public:
#if defined(__CUDA_ARCH__)
  __device__ explicit SharedCounters(uint32_t* counters) {
    // Opaque to the compiler, which would else take the address anew for each use.
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

// Copies 16 bytes into shared memory while the thread goes on; it may read them after the wait for their group.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  __pipeline_memcpy_async(shared, global, 16);
}
__device__ __forceinline__ void end_group_of_copies() {
  __pipeline_commit();
}
// Waits for all groups but the last `under_way`, which may be more than that.
__device__ __forceinline__ void wait_for_copies(int under_way) {
  __pipeline_wait_prior(under_way);
  // The instruction does not tell the compiler that memory has changed, and no barrier follows that would.
  asm volatile("" ::: "memory");
}

// The blocks of a thread block cluster, which sm_90 has; `blocks` is 1 in a launch without.
struct Cluster {
  int blocks;

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  __device__ int rank() const { return blocks == 1 ? 0 : int(cooperative_groups::this_cluster().block_rank()); }
  __device__ void arrive() const {
    if (blocks > 1) cooperative_groups::this_cluster().barrier_arrive();
  }
  // For what the thread has read; what it has written may not be there yet.
  __device__ void arrive_after_reads() const {
#if defined(__CUDA_ARCH__)
    if (blocks > 1) __cluster_barrier_arrive_relaxed();
#else
    arrive();
#endif
  }
  __device__ void wait() const {
    if (blocks > 1) cooperative_groups::this_cluster().barrier_wait();
  }
  // The same variable in the shared memory of another block.
  template <typename V>
  __device__ const V* of_rank(V* variable, int rank) const {
    return blocks == 1 ? variable : cooperative_groups::this_cluster().map_shared_rank(variable, rank);
  }
#else
  __device__ int rank() const { return 0; }
  __device__ void arrive() const {}
  __device__ void arrive_after_reads() const {}
  __device__ void wait() const {}
  template <typename V>
  __device__ const V* of_rank(V* variable, int) const {
    return variable;
  }
#endif
};

// What the launch asked for, aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ T* dynamic_shared_memory() {
  extern __shared__ uint4 pdl_dynamic_shared[];
  return reinterpret_cast<T*>(pdl_dynamic_shared);
}

}  // namespace pdl::cuda
