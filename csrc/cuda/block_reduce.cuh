// Reductions over a block, in an order that depends only on the block's size.
#pragma once

#include "../row_loss.h"
#include "../token_weights.h"
#include "device.cuh"

namespace pdl::cuda {

template <typename V>
__device__ __forceinline__ V shifted_down(const V& value, int distance) {
  return shuffle_down(value, distance);
}

template <typename A>
__device__ __forceinline__ RowStatistics<A> shifted_down(const RowStatistics<A>& row, int distance) {
  return {shuffle_down(row.max, distance), shuffle_down(row.sum, distance)};
}

template <typename A>
__device__ __forceinline__ EntropyStatistics<A> shifted_down(const EntropyStatistics<A>& row, int distance) {
  return {shifted_down(static_cast<const RowStatistics<A>&>(row), distance), shuffle_down(row.argmax, distance),
          shuffle_down(row.scaled, distance)};
}

template <typename A>
__device__ __forceinline__ WideStatistics<A> shifted_down(const WideStatistics<A>& row, int distance) {
  return {shifted_down(static_cast<const EntropyStatistics<A>&>(row), distance), shuffle_down(row.centred, distance),
          shuffle_down(row.class_weight, distance)};
}

__device__ __forceinline__ RowSums shifted_down(const RowSums& sums, int distance) {
  return {shuffle_down(sums.weighted_ce, distance), shuffle_down(sums.weight, distance),
          shuffle_down(sums.lse_squares, distance), shuffle_down(sums.rows, distance),
          shuffle_down(sums.modulation, distance)};
}

__device__ __forceinline__ CountSums shifted_down(const CountSums& sums, int distance) {
  return {shuffle_down(sums.total, distance), shuffle_down(sums.rareness, distance)};
}

// combine() over the first lanes of a warp, valid in lane 0. The other lanes must have its identity.
template <typename V, typename Combine>
__device__ __forceinline__ V warp_reduce(V value, Combine combine, int lanes = kWarp) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    if (distance < lanes) value = combine(value, shifted_down(value, distance));
  }
  return value;
}

// combine() over all threads of the block, valid in thread 0. Every thread must call it; `identity` pads warps.
template <typename V, typename Combine>
__device__ V block_reduce(V value, const V& identity, Combine combine) {
  __shared__ V of_warp[kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  value = warp_reduce(value, combine);
  // A second reduction in the same kernel must not overwrite values that the first warp still reads.
  __syncthreads();
  if (lane == 0) of_warp[warp] = value;
  __syncthreads();
  if (warp == 0) {
    const int warps = int(blockDim.x) / kWarp;
    value = lane < warps ? of_warp[lane] : identity;
    value = warp_reduce(value, combine, warps);
  }
  return value;
}

// What a cluster's blocks would combine, with the same bits, by one block; valid in thread 0. of_share(rank) is what
// the thread brings for that block. At most kMostShares blocks of kMostThreads threads.
template <int kMostShares, int kMostThreads, typename V, typename OfShare, typename Combine>
__device__ V block_reduce_of_shares(int shares, OfShare of_share, const V& identity, Combine combine) {
  __shared__ V of_warp[kMostShares][kMostThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int share = 0; share < shares; ++share) {
    const V value = warp_reduce(of_share(share), combine);
    // As in block_reduce.
    if (share == 0) __syncthreads();
    if (lane == 0) of_warp[share][warp] = value;
  }
  __syncthreads();
  V value = identity;
  if (warp == 0) {
    const int warps = int(blockDim.x) / kWarp;
    for (int share = 0; share < shares; ++share) {
      value = warp_reduce(lane < warps ? of_warp[share][lane] : identity, combine, warps);
      if (lane == 0) of_warp[share][0] = value;
    }
    __syncwarp();
    value = warp_reduce(lane < shares ? of_warp[lane][0] : identity, combine, shares);
  }
  return value;
}

template <typename V>
__device__ V block_sum(V value) {
  return block_reduce(value, V{}, [](const V& a, const V& b) { return a + b; });
}

// The bits of block_sum() over `threads` threads, by a block of fewer: of_thread(t) is what thread t brings. `of_warp`
// has room for their warps, in shared memory that nobody uses since the last barrier.
template <typename V, typename OfThread>
__device__ V block_sum_of(int threads, V* of_warp, OfThread of_thread) {
  const auto add = [](const V& a, const V& b) { return a + b; };
  const int lane = threadIdx.x % kWarp;
  for (int thread = threadIdx.x; thread < threads; thread += blockDim.x) {
    const V sum = warp_reduce(of_thread(thread), add);
    if (lane == 0) of_warp[thread / kWarp] = sum;
  }
  __syncthreads();
  V sum{};
  if (threadIdx.x < kWarp) {
    const int warps = threads / kWarp;
    if (lane < warps) sum = of_warp[lane];
    sum = warp_reduce(sum, add, warps);
  }
  return sum;
}

}  // namespace pdl::cuda
