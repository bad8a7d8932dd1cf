// Conversion of blocks of 16-bit floats, by the processor's own instructions where it has them. The compiler puts them
// into no plain loop; but a block on the stack, which a plain loop fills, it keeps in registers.
//
// Those instructions round to nearest even and keep NaN as float16.h does, but for vcvtne2ps2bf16, which takes
// subnormals as 0.
#pragma once

#include "capability.h"
#include "float16.h"

#ifdef PDL_SIMD_TARGETS
#include <immintrin.h>
#endif

namespace pdl::cpu {

constexpr int kBlock = 32;

#ifdef PDL_SIMD_TARGETS
namespace detail {

// Functions with a target attribute of their own, which can be called, if not inlined, from anywhere. The masks are
// full: GCC 12 warns of its own unmasked ones.
__attribute__((target(PDL_TARGET_AVX2))) inline void widen_avx2(const Float16* x, float* y) {
  for (int k = 0; k < kBlock; k += 8) {
    _mm256_storeu_ps(y + k, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + k))));
  }
}
__attribute__((target(PDL_TARGET_AVX2))) inline void narrow_avx2(const float* x, Float16* y) {
  for (int k = 0; k < kBlock; k += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + k),
                     _mm256_cvtps_ph(_mm256_loadu_ps(x + k), _MM_FROUND_TO_NEAREST_INT));
  }
}

__attribute__((target(PDL_TARGET_AVX512))) inline void widen_avx512(const Float16* x, float* y) {
  for (int k = 0; k < kBlock; k += 16) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + k));
    _mm512_storeu_ps(y + k, _mm512_maskz_cvtph_ps(0xffff, half));
  }
}
__attribute__((target(PDL_TARGET_AVX512))) inline void narrow_avx512(const float* x, Float16* y) {
  for (int k = 0; k < kBlock; k += 16) {
    const __m256i half = _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(x + k), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + k), half);
  }
}

__attribute__((target(PDL_TARGET_AVX512))) inline void widen_avx512(const BFloat16* x, float* y) {
  for (int k = 0; k < kBlock; k += 16) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + k));
    const __m512i wide = _mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, half), 16);
    _mm512_storeu_ps(y + k, _mm512_castsi512_ps(wide));
  }
}
__attribute__((target(PDL_TARGET_AVX512_BF16))) inline void narrow_avx512_bf16(const float* x, BFloat16* y) {
  const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + 16), _mm512_loadu_ps(x));
  __builtin_memcpy(y, &both, sizeof both);
}

}  // namespace detail
#endif

template <Capability kCapability, typename T>
PDL_INLINE void widen_block(Instructions<kCapability>, const T* x, float* y) {
#ifdef PDL_SIMD_TARGETS
  if constexpr (kCapability >= Capability::avx512) return detail::widen_avx512(x, y);
  if constexpr (std::is_same_v<T, Float16> && kCapability == Capability::avx2) return detail::widen_avx2(x, y);
#endif
#pragma omp simd
  for (int k = 0; k < kBlock; ++k) y[k] = widen(x[k]);
}

// kNumber: as narrow_number does.
template <bool kNumber, Capability kCapability, typename T>
PDL_INLINE void narrow_block(Instructions<kCapability>, const float* x, T* y) {
#ifdef PDL_SIMD_TARGETS
  if constexpr (std::is_same_v<T, Float16> && kCapability >= Capability::avx512) return detail::narrow_avx512(x, y);
  if constexpr (std::is_same_v<T, Float16> && kCapability == Capability::avx2) return detail::narrow_avx2(x, y);
  if constexpr (std::is_same_v<T, BFloat16> && kCapability == Capability::avx512_bf16) {
    return detail::narrow_avx512_bf16(x, y);
  }
#endif
#pragma omp simd
  for (int k = 0; k < kBlock; ++k) y[k] = kNumber ? narrow_number<T>(x[k]) : narrow<T>(x[k]);
}

// y[j] = f(x[j], j) for j < n. y may be x.
template <bool kNumber, Capability kCapability, typename X, typename T, typename F>
PDL_INLINE void map(Instructions<kCapability> instructions, const X* x, T* y, int64_t n, F f) {
  int64_t j = 0;
  if constexpr (sizeof(T) == 2) {
    for (; j + kBlock <= n; j += kBlock) {
      alignas(64) float wide[kBlock], result[kBlock];
      const float* z = wide;
      if constexpr (std::is_same_v<X, float>) {
        z = x + j;
      } else {
        widen_block(instructions, x + j, wide);
      }
#pragma omp simd
      for (int k = 0; k < kBlock; ++k) result[k] = f(z[k], j + k);
      narrow_block<kNumber>(instructions, result, y + j);
    }
  }
#pragma omp simd
  for (int64_t k = j; k < n; ++k) {
    const auto result = f(widen(x[k]), k);
    y[k] = kNumber ? narrow_number<T>(result) : narrow<T>(result);
  }
}

}  // namespace pdl::cpu
