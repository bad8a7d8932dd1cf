// bfloat16 and float16 as bits, converted by integer arithmetic that the compiler turns into vector code; rounding is
// to nearest even, NaN stays NaN.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "../portable.h"

namespace pdl::cpu {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

PDL_INLINE double widen(double x) {
  return x;
}
PDL_INLINE float widen(float x) {
  return x;
}
PDL_INLINE float widen(BFloat16 x) {
  return std::bit_cast<float>(uint32_t(x.bits) << 16);
}
PDL_INLINE float widen(Float16 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  // 2^112 changes the exponent's bias from 15 to 127, and makes subnormals normal.
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = magnitude >= (0x7c00u << 13) ? 0x7f800000u : 0u;
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | special | sign);
}

// Integers in the order of the numbers, with any NaN below -infinity. A vector holds twice as many of them as of
// floats.
template <typename T>
constexpr int kAboveInfinity = std::is_same_v<T, BFloat16> ? 0x7f : 0x3ff;

template <typename T>
PDL_INLINE int16_t order(T x) {
  const int16_t bits = int16_t(x.bits);
  return int16_t((bits ^ ((bits >> 15) & 0x7fff)) + kAboveInfinity<T>);
}
template <typename T>
PDL_INLINE T of_order(int16_t key) {
  const int16_t ordered = int16_t(key - kAboveInfinity<T>);
  return {uint16_t(ordered ^ ((ordered >> 15) & 0x7fff))};
}

template <typename T>
PDL_INLINE T narrow(Accumulator<T> x);

template <>
PDL_INLINE double narrow<double>(double x) {
  return x;
}
template <>
PDL_INLINE float narrow<float>(float x) {
  return x;
}
template <>
PDL_INLINE BFloat16 narrow<BFloat16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  return {uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
}
template <>
PDL_INLINE Float16 narrow<Float16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the float unit itself rounds: adding 0.5 aligns the result's last bit with float16's subnormal one.
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  return {uint16_t(sign | (magnitude >= (143u << 23) ? special : finite))};
}

// narrow of a number, or of a NaN whose mantissa does not carry into the sign: PyTorch's NaN, and any from bfloat16.
template <typename T>
PDL_INLINE T narrow_number(Accumulator<T> x) {
  return narrow<T>(x);
}
template <>
PDL_INLINE BFloat16 narrow_number<BFloat16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

}  // namespace pdl::cpu
