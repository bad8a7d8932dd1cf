// Shared by host and device code: function qualifiers, the accumulator of a logits dtype, exp, tanh and power.
//
// On the host exp, tanh and power are branch-free polynomials, so that a plain loop over them becomes vector code. On
// the device exp uses the special function unit. The other two are CUDA's own there. exp and tanh of float64 are those
// of the standard library.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

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

// Unlike ==, it is false for zeros of different sign and true for equal NaNs.
template <typename A>
PDL_INLINE bool same_bits(A a, A b) {
  using Bits = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;
  return std::bit_cast<Bits>(a) == std::bit_cast<Bits>(b);
}

template <typename A>
PDL_INLINE constexpr A not_a_number() {
  return std::numeric_limits<A>::quiet_NaN();
}

// The larger of a value and a number; the number if the value is NaN. On the device one instruction in float32.
PDL_INLINE float larger(float value, float number) {
#if defined(__CUDA_ARCH__)
  return fmaxf(value, number);
#else
  return value > number ? value : number;
#endif
}
PDL_INLINE double larger(double value, double number) {
  return value > number ? value : number;
}

constexpr float kLog2E = 1.44269504088896341f;

// 2^x; on the device 0 where the result would be subnormal. PDL_EX2_APPROX replaces the instruction when it is
// emulated.
PDL_INLINE float exp2_approximate(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#elif defined(PDL_EX2_APPROX)
  return PDL_EX2_APPROX(x);
#else
  return exp2f(x);
#endif
}

// exp(x) for x <= 0, -inf or NaN; 0 where the result would be subnormal. Within 2 ulp on the host. On the device the
// rounding of x log2(e) adds |x| / 2^24, as much as the subtraction that computed x. It takes 2 instructions, expf
// takes 8.
PDL_INLINE float exp_nonpositive(float x) {
#if defined(__CUDA_ARCH__) || defined(PDL_EX2_APPROX)
  return exp2_approximate(x * kLog2E);
#else
  // Adding 1.5 * 2^23 rounds to an integer and leaves that integer in the low bits of the sum.
  constexpr float kRound = 12582912.0f;
  const float shifted = x * kLog2E + kRound;
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

// exp_nonpositive(x) without that rounding error, and 0 for NaN on the device. It takes 5 instructions.
PDL_INLINE float exp_compensated(float x) {
#if defined(__CUDA_ARCH__) || defined(PDL_EX2_APPROX)
  // Far below any number with a nonzero exponential: otherwise infinity - infinity would give NaN.
  x = fmaxf(x, -200.0f);
  const float e = exp_nonpositive(x);
  return fmaf(e, fmaf(x * kLog2E, -0.693147180559945309f, x), e);
#else
  return exp_nonpositive(x);
#endif
}

PDL_INLINE double exp_compensated(double x) {
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

// For an integer that is not negative. The host converts its halves. Each goes into the low bits of a double whose
// exponent gives it its position, since vector units before AVX-512 cannot convert int64.
PDL_INLINE double to_double(int64_t x) {
#if defined(__CUDA_ARCH__)
  return double(x);
#else
  const uint64_t bits = uint64_t(x);
  const double high = std::bit_cast<double>((bits >> 32) | 0x4530000000000000u);
  const double low = std::bit_cast<double>((bits & 0xffffffffu) | 0x4330000000000000u);
  return (high - 0x1.00000001p84) + low;
#endif
}

// x^y for x > 0, and 1 for y = 0; a subnormal x counts as the smallest normal number. The relative error is below 1e-14
// (1 + |y log2 x|). Beyond the range of float64 the result is infinity or 0. The shifts are of unsigned numbers, which
// AVX2 also has.
PDL_INLINE double power(double x, double y) {
#if defined(__CUDA_ARCH__)
  return y == 0.0 ? 1.0 : exp2(y * log2(x));
#else
  // x = m 2^e with m around 1; log m as a series in (m - 1) / (m + 1).
  constexpr uint64_t kSqrtHalf = 0x3fe6a09e667f3bcdu;
  constexpr uint64_t kOffset = 2048;
  const double normal = x < std::numeric_limits<double>::min() ? std::numeric_limits<double>::min() : x;
  const uint64_t bits = std::bit_cast<uint64_t>(normal);
  const uint64_t exponent = (bits - kSqrtHalf + (kOffset << 52)) >> 52;
  const double m = std::bit_cast<double>(bits - ((exponent - kOffset) << 52));
  const double e = to_double(int64_t(exponent)) - double(kOffset);
  const double s = (m - 1.0) / (m + 1.0);
  const double q = s * s;
  double p = 1.0 / 19;
  p = p * q + 1.0 / 17;
  p = p * q + 1.0 / 15;
  p = p * q + 1.0 / 13;
  p = p * q + 1.0 / 11;
  p = p * q + 1.0 / 9;
  p = p * q + 1.0 / 7;
  p = p * q + 1.0 / 5;
  p = p * q + 1.0 / 3;
  p = p * q + 1.0;
  double z = y * (e + s * p * 2.8853900817779268);
  z = z < -1100.0 ? -1100.0 : z;
  z = z > 1100.0 ? 1100.0 : z;
  // Rounded to an integer, which is then in the low bits.
  constexpr double kRound = 6755399441055744.0;
  const double shifted = z + kRound;
  const double r = (z - (shifted - kRound)) * 0.69314718055994531;
  double t = 1.0 / 6227020800.0;
  t = t * r + 1.0 / 479001600.0;
  t = t * r + 1.0 / 39916800.0;
  t = t * r + 1.0 / 3628800.0;
  t = t * r + 1.0 / 362880.0;
  t = t * r + 1.0 / 40320.0;
  t = t * r + 1.0 / 5040.0;
  t = t * r + 1.0 / 720.0;
  t = t * r + 1.0 / 120.0;
  t = t * r + 1.0 / 24.0;
  t = t * r + 1.0 / 6.0;
  t = t * r + 0.5;
  t = t * r + 1.0;
  t = t * r + 1.0;
  // In two factors, since the exponent may be outside the range of float64.
  const uint64_t n = std::bit_cast<uint64_t>(shifted) - std::bit_cast<uint64_t>(kRound) + kOffset;
  const uint64_t half = n >> 1;
  return t * std::bit_cast<double>((half + 1023 - kOffset / 2) << 52) *
         std::bit_cast<double>((n - half + 1023 - kOffset / 2) << 52);
#endif
}

}  // namespace pdl
