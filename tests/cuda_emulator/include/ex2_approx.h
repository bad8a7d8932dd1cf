// The special function unit's 2^x, which csrc/portable.h takes as PDL_EX2_APPROX: included before every source.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace cuda_emulator {

// 0 where the result would be subnormal, and exact where x is whole. Elsewhere it is rounded, and one in four is off by
// a unit in the last place, in a direction from a hash of x. The card's own error is documented as up to two units.
inline float ex2_approx(float x) {
  const float result = std::exp2(x);
  if (result < 0x1p-126f) return 0.0f;
  if (!(result < INFINITY) || x == std::floor(x)) return result;
  uint32_t hash = std::bit_cast<uint32_t>(x) * 2654435761u;
  hash ^= hash >> 15;
  hash *= 2246822519u;
  hash ^= hash >> 13;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(result) + (hash % 8u == 0) - (hash % 8u == 1));
}

}  // namespace cuda_emulator

#define PDL_EX2_APPROX(x) cuda_emulator::ex2_approx(x)
