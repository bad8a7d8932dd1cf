// Stands in for CUDA's header of this name: the subset that csrc/cuda uses, for g++ (see ../README.md).
#pragma once

#include <bit>
#include <cstdint>

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

template <>
inline constexpr bool cuda_emulator::can_be_shuffled<__nv_bfloat16> = true;
template <>
inline constexpr bool cuda_emulator::can_be_shuffled<__nv_bfloat162> = true;
template <>
inline constexpr bool cuda_emulator::has_cache_hints<__nv_bfloat16> = true;
template <>
inline constexpr bool cuda_emulator::has_cache_hints<__nv_bfloat162> = true;

inline float __bfloat162float(__nv_bfloat16 x) {
  return std::bit_cast<float>(uint32_t(x.bits) << 16);
}

// Rounds to nearest even; every NaN becomes CUDA's.
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (x != x) return {0x7fff};
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float x) {
  return __float2bfloat16_rn(x);
}
inline __nv_bfloat16 __float2bfloat16_rz(float x) {
  if (x != x) return {0x7fff};
  return {uint16_t(std::bit_cast<uint32_t>(x) >> 16)};
}

inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) {
  return x.bits;
}
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  return {bits};
}

inline float2 __bfloat1622float2(__nv_bfloat162 x) {
  return {__bfloat162float(x.x), __bfloat162float(x.y)};
}
inline float __low2float(__nv_bfloat162 x) {
  return __bfloat162float(x.x);
}
inline float __high2float(__nv_bfloat162 x) {
  return __bfloat162float(x.y);
}
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) {
  return {x, y};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 x) {
  return __floats2bfloat162_rn(x.x, x.y);
}

// The larger of two numbers, or the number if one of them is NaN.
inline __nv_bfloat16 __hmax(__nv_bfloat16 a, __nv_bfloat16 b) {
  return __float2bfloat16_rn(fmaxf(__bfloat162float(a), __bfloat162float(b)));
}
inline __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {__hmax(a.x, b.x), __hmax(a.y, b.y)};
}
