// Stands in for CUDA's header of this name: the subset that csrc/cuda uses, for g++ (see ../README.md).
#pragma once

#include <bit>
#include <cstdint>

#include "cuda_runtime.h"

struct __half {
  _Float16 value;
};

struct alignas(4) __half2 {
  __half x, y;
};

template <>
inline constexpr bool cuda_emulator::can_be_shuffled<__half> = true;
template <>
inline constexpr bool cuda_emulator::can_be_shuffled<__half2> = true;
template <>
inline constexpr bool cuda_emulator::has_cache_hints<__half> = true;
template <>
inline constexpr bool cuda_emulator::has_cache_hints<__half2> = true;

inline unsigned short __half_as_ushort(__half x) {
  return std::bit_cast<uint16_t>(x);
}
inline __half __ushort_as_half(unsigned short bits) {
  return std::bit_cast<__half>(bits);
}

inline float __half2float(__half x) {
  return static_cast<float>(x.value);
}

// Rounds to nearest even; every NaN becomes CUDA's.
inline __half __float2half_rn(float x) {
  if (x != x) return __ushort_as_half(0x7fff);
  return {static_cast<_Float16>(x)};
}
inline __half __float2half(float x) {
  return __float2half_rn(x);
}

inline float2 __half22float2(__half2 x) {
  return {__half2float(x.x), __half2float(x.y)};
}
inline float __low2float(__half2 x) {
  return __half2float(x.x);
}
inline float __high2float(__half2 x) {
  return __half2float(x.y);
}
inline __half2 __halves2half2(__half x, __half y) {
  return {x, y};
}
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline __half2 __float22half2_rn(float2 x) {
  return __floats2half2_rn(x.x, x.y);
}

// The larger of two numbers, or the number if one of them is NaN.
inline __half __hmax(__half a, __half b) {
  return __float2half_rn(fmaxf(__half2float(a), __half2float(b)));
}
inline __half2 __hmax2(__half2 a, __half2 b) {
  return {__hmax(a.x, b.x), __hmax(a.y, b.y)};
}
