// What host and device code share: function qualifiers, the accumulator of a logits dtype, exp and tanh.
//
// On the host exp and tanh are branch-free polynomials, so that a plain loop over them becomes vector code; on the
// device exp is the special function unit's and tanh CUDA's own. float64 always takes the library's functions.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define PDL_INLINE __host__ __device__ __forceinline__
#else
#define PDL_INLINE inline __attribute__((always_inline))
#endif

namespace pdl {

template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

template <typename A>
PDL_INLINE constexpr A infinity() {
  return std::numeric_limits<A>::infinity();
}

template <typename A>
PDL_INLINE constexpr A not_a_number() {
  return std::numeric_limits<A>::quiet_NaN();
}

// exp(x) for x <= 0, -inf or NaN; 0 where the result would be subnormal. Within 2 ulp on the host. On the device the
// rounding of x log2(e) adds |x| / 2^24, no more than the subtraction that made x did: 2 instructions, expf takes 8.
PDL_INLINE float exp_nonpositive(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.44269504088896341f));
  return result;
#else
  // Adding 1.5 * 2^23 rounds to an integer and leaves that integer in the low bits of the sum.
  constexpr float kRound = 12582912.0f;
  const float shifted = x * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // A multiplication, not an addition to the exponent's bits: NaN has to stay NaN.
  const uint32_t exponent = (std::bit_cast<uint32_t>(shifted) + 127u) << 23;
  const float result = p * std::bit_cast<float>(exponent);
  return x < -87.3365f ? 0.0f : result;
#endif
}

PDL_INLINE double exp_nonpositive(double x) {
  return exp(x);
}

PDL_INLINE float hyperbolic_tangent(float x) {
#if defined(__CUDA_ARCH__)
  return tanhf(x);
#else
  const float magnitude = x < 0.0f ? -x : x;
  const float square = x * x;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float small = p * square * x + x;
  const float e = exp_nonpositive(-2.0f * magnitude);
  const float positive = (1.0f - e) / (1.0f + e);
  const float large = x < 0.0f ? -positive : positive;
  return magnitude < 0.625f ? small : large;
#endif
}

PDL_INLINE double hyperbolic_tangent(double x) {
  return tanh(x);
}

}  // namespace pdl
