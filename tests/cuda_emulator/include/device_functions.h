// Stands in for what nvcc knows without a header of its own: barriers, warp-wide operations, fences, bits and fast
// arithmetic (see ../README.md).
#pragma once

#include <math.h>
#include <stdint.h>

#include <algorithm>
#include <bit>
#include <concepts>
#include <type_traits>

#include "../emulator.h"

// Those of the thread that is running.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

using std::max;
using std::min;

using cuda_emulator::Location;

inline void __syncthreads(Location where = Location::current()) {
  cuda_emulator::barrier("__syncthreads", 0, where);
}
inline int __syncthreads_count(int predicate, Location where = Location::current()) {
  return cuda_emulator::barrier("__syncthreads_count", predicate, where);
}
inline int __syncthreads_or(int predicate, Location where = Location::current()) {
  return cuda_emulator::barrier("__syncthreads_or", predicate, where) != 0;
}
inline int __syncthreads_and(int predicate, Location where = Location::current()) {
  return cuda_emulator::barrier("__syncthreads_and", !predicate, where) == 0;
}

// Every write is seen at once.
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

namespace cuda_emulator {

// What a shuffle of CUDA's takes; the headers of the 16-bit floats add theirs.
template <typename V>
constexpr bool can_be_shuffled = std::is_arithmetic_v<V> && (sizeof(V) == 4 || sizeof(V) == 8);

}  // namespace cuda_emulator

template <typename V>
  requires cuda_emulator::can_be_shuffled<V>
V __shfl_sync(unsigned mask, V value, int source, int width = 32, Location where = Location::current()) {
  const int lane = cuda_emulator::lane();
  return cuda_emulator::shuffle("__shfl_sync", mask, value, lane / width * width + (source & (width - 1)), where);
}

template <typename V>
  requires cuda_emulator::can_be_shuffled<V>
V __shfl_up_sync(unsigned mask, V value, unsigned distance, int width = 32, Location where = Location::current()) {
  const int lane = cuda_emulator::lane();
  const int source = lane % width >= int(distance) ? lane - int(distance) : lane;
  return cuda_emulator::shuffle("__shfl_up_sync", mask, value, source, where);
}

template <typename V>
  requires cuda_emulator::can_be_shuffled<V>
V __shfl_down_sync(unsigned mask, V value, unsigned distance, int width = 32, Location where = Location::current()) {
  const int lane = cuda_emulator::lane();
  const int source = lane % width + int(distance) < width ? lane + int(distance) : lane;
  return cuda_emulator::shuffle("__shfl_down_sync", mask, value, source, where);
}

template <typename V>
  requires cuda_emulator::can_be_shuffled<V>
V __shfl_xor_sync(unsigned mask, V value, int bits, int width = 32, Location where = Location::current()) {
  const int lane = cuda_emulator::lane();
  const int source = (lane ^ bits) / width <= lane / width ? lane ^ bits : lane;
  return cuda_emulator::shuffle("__shfl_xor_sync", mask, value, source, where);
}

template <typename V>
  requires(std::is_arithmetic_v<V> && (sizeof(V) == 4 || sizeof(V) == 8))
unsigned __match_any_sync(unsigned mask, V value, Location where = Location::current()) {
  return cuda_emulator::collective<unsigned>("__match_any_sync", mask, value, where, [](auto lanes, int lane) {
    return lanes.votes([&](V other) { return other == lanes[lane]; });
  });
}

inline unsigned __ballot_sync(unsigned mask, int predicate, Location where = Location::current()) {
  return cuda_emulator::collective<unsigned>("__ballot_sync", mask, predicate, where, [](auto lanes, int) {
    return lanes.votes([](int vote) { return vote != 0; });
  });
}

inline int __any_sync(unsigned mask, int predicate, Location where = Location::current()) {
  return cuda_emulator::collective<int>("__any_sync", mask, predicate, where, [](auto lanes, int) {
    return int(lanes.votes([](int vote) { return vote != 0; }) != 0);
  });
}

inline int __all_sync(unsigned mask, int predicate, Location where = Location::current()) {
  return cuda_emulator::collective<int>("__all_sync", mask, predicate, where, [](auto lanes, int) {
    return int(lanes.votes([](int vote) { return vote != 0; }) == lanes.mask);
  });
}

inline void __syncwarp(unsigned mask = 0xffffffffu, Location where = Location::current()) {
  cuda_emulator::collective<int>("__syncwarp", mask, 0, where, [](auto, int) { return 0; });
}

namespace cuda_emulator {

template <typename V, typename Combine>
V reduce(const char* operation, unsigned mask, V value, Location where, Combine combine) {
  require_capability(80, operation, where);
  return collective<V>(operation, mask, value, where, [&](auto lanes, int lane) {
    V result = lanes[lane];
    for (int other = 0; other < 32; ++other) {
      if (other != lane && lanes.has(other)) result = combine(result, lanes[other]);
    }
    return result;
  });
}

}  // namespace cuda_emulator

// A sum of signed integers wraps on a card.
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, Location where = Location::current()) {
  return cuda_emulator::reduce("__reduce_add_sync", mask, value, where, [](unsigned a, unsigned b) { return a + b; });
}
inline int __reduce_add_sync(unsigned mask, int value, Location where = Location::current()) {
  return int(__reduce_add_sync(mask, unsigned(value), where));
}
template <typename V>
  requires(std::same_as<V, int> || std::same_as<V, unsigned>)
V __reduce_min_sync(unsigned mask, V value, Location where = Location::current()) {
  return cuda_emulator::reduce("__reduce_min_sync", mask, value, where, [](V a, V b) { return min(a, b); });
}
template <typename V>
  requires(std::same_as<V, int> || std::same_as<V, unsigned>)
V __reduce_max_sync(unsigned mask, V value, Location where = Location::current()) {
  return cuda_emulator::reduce("__reduce_max_sync", mask, value, where, [](V a, V b) { return max(a, b); });
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, Location where = Location::current()) {
  return cuda_emulator::reduce("__reduce_and_sync", mask, value, where, [](unsigned a, unsigned b) { return a & b; });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, Location where = Location::current()) {
  return cuda_emulator::reduce("__reduce_or_sync", mask, value, where, [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value, Location where = Location::current()) {
  return cuda_emulator::reduce("__reduce_xor_sync", mask, value, where, [](unsigned a, unsigned b) { return a ^ b; });
}

inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}
inline int __popc(unsigned bits) {
  return std::popcount(bits);
}
inline int __popcll(unsigned long long bits) {
  return std::popcount(bits);
}
inline int __clz(int bits) {
  return std::countl_zero(unsigned(bits));
}

inline int __float_as_int(float x) {
  return std::bit_cast<int>(x);
}
inline unsigned __float_as_uint(float x) {
  return std::bit_cast<unsigned>(x);
}
inline float __int_as_float(int bits) {
  return std::bit_cast<float>(bits);
}
inline float __uint_as_float(unsigned bits) {
  return std::bit_cast<float>(bits);
}

// As accurate as the C library; CUDA's are less so.
inline float __expf(float x) {
  return expf(x);
}
inline float __logf(float x) {
  return logf(x);
}
inline float __log2f(float x) {
  return log2f(x);
}
inline float __fdividef(float x, float y) {
  return x / y;
}
inline float __fmaf_rn(float x, float y, float z) {
  return fmaf(x, y, z);
}
inline float rsqrtf(float x) {
  return 1.0f / sqrtf(x);
}
