// Blocks of 16-bit floats: their conversion, by the processor's own instructions where it has them, and exp. The
// compiler puts them into no plain loop; but a block on the stack, which a plain loop fills, it keeps in registers.
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

alignas(64) inline constexpr float kRootsOfTwo[32] = {
    0x1.000000p+0f, 0x1.059b0ep+0f, 0x1.0b5586p+0f, 0x1.11301ep+0f, 0x1.172b84p+0f, 0x1.1d4874p+0f, 0x1.2387a6p+0f,
    0x1.29e9e0p+0f, 0x1.306fe0p+0f, 0x1.371a74p+0f, 0x1.3dea64p+0f, 0x1.44e086p+0f, 0x1.4bfdaep+0f, 0x1.5342b6p+0f,
    0x1.5ab07ep+0f, 0x1.6247ecp+0f, 0x1.6a09e6p+0f, 0x1.71f75ep+0f, 0x1.7a1148p+0f, 0x1.82589ap+0f, 0x1.8ace54p+0f,
    0x1.93737cp+0f, 0x1.9c4918p+0f, 0x1.a5503cp+0f, 0x1.ae89fap+0f, 0x1.b7f770p+0f, 0x1.c199bep+0f, 0x1.cb720ep+0f,
    0x1.d5818ep+0f, 0x1.dfc974p+0f, 0x1.ea4afap+0f, 0x1.f50766p+0f,
};

// exp_nonpositive with a table, 2^(i / 32), that two registers hold, and a parabola: 6 instead of 12 instructions for
// the units that multiply and compare, which bound the loss in 16 bits. Within 2 ulp + |x| / 2^26, of which the second
// is the rounding of log2(e).
__attribute__((target(PDL_TARGET_AVX512))) inline void exp_avx512(const float* x, float* y) {
  const __m512 low = _mm512_load_ps(kRootsOfTwo), high = _mm512_load_ps(kRootsOfTwo + 16);
  const __m512 scale = _mm512_set1_ps(32 * 1.44269504088896341f), round = _mm512_set1_ps(12582912.0f);
  for (int k = 0; k < kBlock; k += 16) {
    const __m512 z = _mm512_loadu_ps(x + k);
    // As in exp_nonpositive, but of thirty-seconds: the low 5 bits are the table's index, and those above the exponent.
    const __m512 shifted = _mm512_fmadd_ps(z, scale, round);
    const __m512i bits = _mm512_castps_si512(shifted);
    const __m512 r = _mm512_fmsub_ps(z, scale, _mm512_sub_ps(shifted, round));
    // 2^(r / 32) - 1 for |r| <= 1/2; the first coefficient takes what it can of the third power, too.
    const __m512 p =
        _mm512_mul_ps(_mm512_fmadd_ps(r, _mm512_set1_ps(2.34596198e-04f), _mm512_set1_ps(2.16611670e-02f)), r);
    const __m512i root = _mm512_castps_si512(_mm512_maskz_permutex2var_ps(0xffff, low, bits, high));
    const __m512i exponent = _mm512_maskz_slli_epi32(0xffff, _mm512_and_si512(bits, _mm512_set1_epi32(~31)), 18);
    const __m512 power = _mm512_castsi512_ps(_mm512_add_epi32(root, exponent));
    const __mmask16 normal = _mm512_cmp_ps_mask(z, _mm512_set1_ps(-87.3365f), _CMP_NLT_UQ);
    _mm512_storeu_ps(y + k, _mm512_maskz_fmadd_ps(normal, power, p, power));
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

// y = exp(x), as exp_nonpositive.
template <Capability kCapability>
PDL_INLINE void exp_block(Instructions<kCapability>, const float* x, float* y) {
#ifdef PDL_SIMD_TARGETS
  if constexpr (kCapability >= Capability::avx512) return detail::exp_avx512(x, y);
#endif
#pragma omp simd
  for (int k = 0; k < kBlock; ++k) y[k] = exp_nonpositive(x[k]);
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

// y[j] = f(x[j], j), or with kExp f(exp(argument(x[j])), j), for j < n. y may be x.
template <bool kNumber, bool kExp, Capability kCapability, typename X, typename T, typename Argument, typename F>
PDL_INLINE void map_blocks(Instructions<kCapability> instructions, const X* x, T* y, int64_t n, Argument argument,
                           F f) {
  // Without instructions for it, rounding to bfloat16 costs least in one loop with the rest.
  constexpr bool kInBlocks =
      std::is_same_v<T, Float16> || (std::is_same_v<T, BFloat16> && kCapability >= Capability::avx512);
  int64_t j = 0;
  if constexpr (kInBlocks) {
    for (; j + kBlock <= n; j += kBlock) {
      alignas(64) float wide[kBlock], result[kBlock];
      const float* z = wide;
      if constexpr (std::is_same_v<X, float>) {
        z = x + j;
      } else {
        widen_block(instructions, x + j, wide);
      }
      if constexpr (kExp) {
#pragma omp simd
        for (int k = 0; k < kBlock; ++k) result[k] = argument(z[k]);
        exp_block(instructions, result, wide);
        z = wide;
      }
#pragma omp simd
      for (int k = 0; k < kBlock; ++k) result[k] = f(z[k], j + k);
      narrow_block<kNumber>(instructions, result, y + j);
    }
  }
#pragma omp simd
  for (int64_t k = j; k < n; ++k) {
    const auto z = widen(x[k]);
    const auto result = kExp ? f(exp_nonpositive(argument(z)), k) : f(z, k);
    y[k] = kNumber ? narrow_number<T>(result) : narrow<T>(result);
  }
}

// y[j] = f(x[j], j) for j < n. y may be x.
template <bool kNumber, Capability kCapability, typename X, typename T, typename F>
PDL_INLINE void map(Instructions<kCapability> instructions, const X* x, T* y, int64_t n, F f) {
  map_blocks<kNumber, false>(instructions, x, y, n, [](auto z) { return z; }, f);
}

// y[j] = f(exp(argument(x[j])), j) for j < n. y may be x.
template <bool kNumber, Capability kCapability, typename X, typename T, typename Argument, typename F>
PDL_INLINE void map_exp(Instructions<kCapability> instructions, const X* x, T* y, int64_t n, Argument argument, F f) {
  map_blocks<kNumber, true>(instructions, x, y, n, argument, f);
}

}  // namespace pdl::cpu
