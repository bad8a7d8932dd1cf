// Blocks of 16-bit floats: their exp and their conversion, with the processor's own instructions if it has them.
// Compilers do not emit these instructions from plain loops. They do keep a small array on the stack in registers. So a
// plain loop fills such an array, and intrinsics convert it.
//
// The conversions round to nearest even and keep NaN as float16.h does. The exception is vcvtne2ps2bf16, which treats
// subnormals as 0.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../row_loss.h"
#include "capability.h"
#include "float16.h"

#ifdef PDL_SIMD_TARGETS
#include <immintrin.h>
#endif

namespace pdl::cpu {

constexpr int kBlock = 32;

// How many thirty-seconds of ln 2 are in 1.
constexpr float kStepsOfExp = 32 * 1.44269504088896341f;

#ifdef PDL_SIMD_TARGETS
namespace detail {

// Functions with a target attribute of their own may be called from anywhere, even if they are not inlined. The masks
// are full: GCC 12 warns about its own unmasked intrinsics.
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

__attribute__((target(PDL_TARGET_AVX2))) inline __m256 load_avx2(const float* x) {
  return _mm256_loadu_ps(x);
}
__attribute__((target(PDL_TARGET_AVX2))) inline __m256 load_avx2(const Float16* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
__attribute__((target(PDL_TARGET_AVX2))) inline __m256 load_avx2(const BFloat16* x) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

// The bits of 2^(i / 8), less i in the place of those that the exponent brings with it.
alignas(32) inline constexpr int32_t kEighthsOfOctave[8] = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                                                            0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};

// exp_nonpositive, with a table in one register: two thirds of its instructions, and also within 2 ulp. For 16-bit
// numbers it takes still fewer, within 2 ulp + |x| / 2^26, where the second term is the rounding error of log2(e).
template <typename T>
__attribute__((target(PDL_TARGET_AVX2))) inline __m256 exp_avx2(__m256 x) {
  const __m256 scale = _mm256_set1_ps(8 * 1.44269504088896341f), round = _mm256_set1_ps(12582912.0f);
  const __m256 shifted = _mm256_fmadd_ps(x, scale, round);
  const __m256 n = _mm256_sub_ps(shifted, round);
  __m256 r, p;
  if constexpr (sizeof(T) == 2) {
    // 2^(r / 8) - 1 for |r| <= 1/2.
    r = _mm256_fmsub_ps(x, scale, n);
    p = _mm256_fmadd_ps(r, _mm256_set1_ps(1.08420849e-04f), _mm256_set1_ps(3.75402556e-03f));
    p = _mm256_mul_ps(_mm256_fmadd_ps(p, r, _mm256_set1_ps(8.66433978e-02f)), r);
  } else {
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f / 8), x);
    r = _mm256_fmadd_ps(n, _mm256_set1_ps(2.12194440e-4f / 8), r);
    // exp(r) - 1 for |r| <= ln 2 / 16.
    p = _mm256_fmadd_ps(r, _mm256_set1_ps(1.0f / 24), _mm256_set1_ps(1.0f / 6));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
    p = _mm256_fmadd_ps(_mm256_mul_ps(p, r), r, r);
  }
  const __m256i bits = _mm256_castps_si256(shifted);
  const __m256i table = _mm256_load_si256(reinterpret_cast<const __m256i*>(kEighthsOfOctave));
  const __m256i root = _mm256_permutevar8x32_epi32(table, bits);
  const __m256 power = _mm256_castsi256_ps(_mm256_add_epi32(root, _mm256_slli_epi32(bits, 20)));
  const __m256 e = _mm256_fmadd_ps(power, p, power);
  return _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_set1_ps(-87.3365f), _CMP_LT_OQ), e);
}

__attribute__((target(PDL_TARGET_AVX2))) inline float sum_of_lanes_avx2(__m256 x) {
  __m128 sums = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  sums = _mm_add_ps(sums, _mm_movehl_ps(sums, sums));
  return _mm_cvtss_f32(_mm_add_ss(sums, _mm_movehdup_ps(sums)));
}

// sum_of_exp_blocks.
template <bool kKeep, bool kEntropy, typename T>
__attribute__((target(PDL_TARGET_AVX2))) inline float sum_of_exp_avx2(const T* x, int64_t n, float max, float* kept,
                                                                      int64_t ahead, float* scaled) {
  constexpr int kLine = 64 / sizeof(T), kSums = kBlock / 8;
  const __m256 largest = _mm256_set1_ps(max), least = _mm256_set1_ps(finite_log_ratio(-infinity<float>()));
  __m256 sums[kSums] = {}, scaled_sums[2] = {};
  for (int64_t j = 0; j < n; j += kBlock) {
    for (int k = 0; k < kBlock; k += kLine) __builtin_prefetch(x + j + k + ahead);
    for (int part = 0; part < kSums; ++part) {
      const __m256 below = _mm256_sub_ps(load_avx2(x + j + 8 * part), largest);
      const __m256 e = exp_avx2<T>(below);
      if (kKeep) _mm256_storeu_ps(kept + j + 8 * part, e);
      sums[part] = _mm256_add_ps(sums[part], e);
      if (kEntropy) {
        // Of NaN it is `least`, and e is NaN.
        scaled_sums[part % 2] = _mm256_fmadd_ps(e, _mm256_max_ps(below, least), scaled_sums[part % 2]);
      }
    }
  }
  if (kEntropy) *scaled = sum_of_lanes_avx2(_mm256_add_ps(scaled_sums[0], scaled_sums[1]));
  return sum_of_lanes_avx2(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
}

template <int kBytes>
__attribute__((target(PDL_TARGET_AVX2))) inline void stream_avx2(const void* x, void* y) {
  const auto* from = static_cast<const __m256i*>(x);
  auto* to = static_cast<__m256i*>(y);
  for (int k = 0; k < kBytes / 32; ++k) _mm256_stream_si256(to + k, _mm256_load_si256(from + k));
}

template <int kBytes>
__attribute__((target(PDL_TARGET_AVX512))) inline void stream_avx512(const void* x, void* y) {
  const auto* from = static_cast<const __m512i*>(x);
  auto* to = static_cast<__m512i*>(y);
  for (int k = 0; k < kBytes / 64; ++k) _mm512_stream_si512(to + k, _mm512_load_si512(from + k));
}

__attribute__((target(PDL_TARGET_AVX512))) inline __m512 widen_half_avx512(const float* x, int half) {
  return _mm512_loadu_ps(x + 16 * half);
}
__attribute__((target(PDL_TARGET_AVX512))) inline __m512 widen_half_avx512(const Float16* x, int half) {
  const void* place = x + 16 * half;
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(static_cast<const __m256i*>(place)));
}
__attribute__((target(PDL_TARGET_AVX512))) inline void narrow_avx512(const float* x, Float16* y) {
  for (int k = 0; k < kBlock; k += 16) {
    const __m256i half = _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(x + k), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + k), half);
  }
}

// The half of a register's 32-bit lanes for 16-bit numbers: the upper one, which makes a bfloat16 a float.
alignas(64) inline constexpr int16_t kUpperHalves[2][32] = {
    {0, 0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0, 7, 0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15},
    {0, 16, 0, 17, 0, 18, 0, 19, 0, 20, 0, 21, 0, 22, 0, 23, 0, 24, 0, 25, 0, 26, 0, 27, 0, 28, 0, 29, 0, 30, 0, 31},
};

__attribute__((target(PDL_TARGET_AVX512))) inline __m512 widen_half_avx512(const BFloat16* x, int half) {
  const __m512i places = _mm512_load_si512(kUpperHalves[half]);
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, places, _mm512_loadu_si512(x)));
}

// The bits of 2^(i / 32), less i in the place of those that the exponent brings with it.
alignas(64) inline constexpr int32_t kRootsOfTwo[32] = {
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
    0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
    0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
    0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3,
};

// exp(x - origin) of a T, with a table of 2^(i / 32) in two registers and a short polynomial.
//
// For 16-bit numbers the origin is `steps` thirty-seconds of ln 2: a whole number costs no subtraction. x is not much
// larger than that. This takes half of exp_nonpositive's instructions on the units that multiply and compare, which
// limit the loss in 16 bits. The result is within 2 ulp + |x| / 2^26, where the second term is the rounding error of
// log2(e). For other numbers the origin is 0, and the result is within 2 ulp.
template <typename T>
__attribute__((target(PDL_TARGET_AVX512))) inline __m512 exp_avx512(__m512 x, float steps) {
  const __m512i low = _mm512_load_si512(kRootsOfTwo), high = _mm512_load_si512(kRootsOfTwo + 16);
  const __m512 scale = _mm512_set1_ps(kStepsOfExp), round = _mm512_set1_ps(12582912.0f - steps);
  // As in exp_nonpositive, but in thirty-seconds: the low 5 bits are the table's index, the others the exponent.
  const __m512 shifted = _mm512_fmadd_ps(x, scale, round);
  const __m512i bits = _mm512_castps_si512(shifted);
  const __m512 n = _mm512_sub_ps(shifted, round);
  __m512 r, p;
  if constexpr (sizeof(T) == 2) {
    // 2^(r / 32) - 1 for |r| <= 1/2; the first coefficient approximates the third power, too.
    r = _mm512_fmsub_ps(x, scale, n);
    p = _mm512_mul_ps(_mm512_fmadd_ps(r, _mm512_set1_ps(2.34596198e-04f), _mm512_set1_ps(2.16611670e-02f)), r);
  } else {
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f / 32), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f / 32), r);
    // exp(r) - 1 for |r| <= ln 2 / 64.
    p = _mm512_fmadd_ps(r, _mm512_set1_ps(1.0f / 6), _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, r);
  }
  const __m512i root = _mm512_maskz_permutex2var_epi32(0xffff, low, bits, high);
  const __m512 power = _mm512_castsi512_ps(_mm512_add_epi32(root, _mm512_maskz_slli_epi32(0xffff, bits, 18)));
  const __m512 lowest = _mm512_set1_ps(steps * (1 / kStepsOfExp) - 87.3365f);
  return _mm512_maskz_fmadd_ps(_mm512_cmp_ps_mask(x, lowest, _CMP_NLT_UQ), power, p, power);
}

template <typename T>
__attribute__((target(PDL_TARGET_AVX512))) inline void widen_block_avx512(const T* x, float* y) {
  for (int half = 0; half < 2; ++half) _mm512_storeu_ps(y + 16 * half, widen_half_avx512(x, half));
}

__attribute__((target(PDL_TARGET_AVX512))) inline float exp_of_one_avx512(float x, float steps) {
  return _mm512_cvtss_f32(exp_avx512<BFloat16>(_mm512_set1_ps(x), steps));
}

// sum_of_exp_blocks; the compiler would keep the plain version in memory.
template <bool kKeep, bool kEntropy, typename T>
__attribute__((target(PDL_TARGET_AVX512))) inline float sum_of_exp_avx512(const T* x, int64_t n, float steps, float max,
                                                                          float* kept, int64_t ahead, float* scaled) {
  constexpr int kLine = 64 / sizeof(T);
  const __m512 largest = _mm512_set1_ps(max), least = _mm512_set1_ps(finite_log_ratio(-infinity<float>()));
  __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  __m512 scaled_sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t j = 0; j < n; j += kBlock) {
    for (int k = 0; k < kBlock; k += kLine) __builtin_prefetch(x + j + k + ahead);
    for (int half = 0; half < 2; ++half) {
      const __m512 wide = widen_half_avx512(x + j, half), below = _mm512_sub_ps(wide, largest);
      const __m512 e = exp_avx512<T>(sizeof(T) == 2 ? wide : below, steps);
      if (kKeep) _mm512_storeu_ps(kept + j + 16 * half, e);
      sums[half] = _mm512_add_ps(sums[half], e);
      if (kEntropy) {
        // Of NaN it is `least`, and e is NaN.
        scaled_sums[half] = _mm512_fmadd_ps(e, _mm512_maskz_max_ps(0xffff, below, least), scaled_sums[half]);
      }
    }
  }
  if (kEntropy) *scaled = _mm512_reduce_add_ps(_mm512_add_ps(scaled_sums[0], scaled_sums[1]));
  return _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
}

__attribute__((target(PDL_TARGET_AVX512_BF16))) inline void narrow_avx512_bf16(const float* x, BFloat16* y) {
  const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + 16), _mm512_loadu_ps(x));
  __builtin_memcpy(y, &both, sizeof both);
}

// scale_blocks. The compiler would call the conversion as a function, and keep the rest in memory meanwhile.
template <bool kStreamed>
__attribute__((target(PDL_TARGET_AVX512_BF16))) inline void scale_avx512(const float* x, float factor, float less,
                                                                         BFloat16* y, int64_t n) {
  const __m512 factors = _mm512_set1_ps(factor), subtrahend = _mm512_set1_ps(less);
  for (int64_t j = 0; j < n; j += kBlock) {
    const __m512 low = _mm512_fmsub_ps(_mm512_loadu_ps(x + j), factors, subtrahend);
    const __m512 high = _mm512_fmsub_ps(_mm512_loadu_ps(x + j + 16), factors, subtrahend);
    const auto both = __m512i(_mm512_cvtne2ps_pbh(high, low));
    if (kStreamed) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(y + j), both);
    } else {
      _mm512_storeu_si512(y + j, both);
    }
  }
}
template <bool kStreamed>
__attribute__((target(PDL_TARGET_AVX512))) inline void scale_avx512(const float* x, float factor, float less,
                                                                    Float16* y, int64_t n) {
  const __m512 factors = _mm512_set1_ps(factor), subtrahend = _mm512_set1_ps(less);
  for (int64_t j = 0; j < n; j += 16) {
    const __m512 scaled = _mm512_fmsub_ps(_mm512_loadu_ps(x + j), factors, subtrahend);
    const __m256i half = _mm512_maskz_cvtps_ph(0xffff, scaled, _MM_FROUND_TO_NEAREST_INT);
    auto* const place = reinterpret_cast<__m256i*>(y + j);
    kStreamed ? _mm256_stream_si256(place, half) : _mm256_storeu_si256(place, half);
  }
}
template <bool kStreamed>
__attribute__((target(PDL_TARGET_AVX2))) inline void scale_avx2(const float* x, float factor, float less, Float16* y,
                                                                int64_t n) {
  const __m256 factors = _mm256_set1_ps(factor), subtrahend = _mm256_set1_ps(less);
  for (int64_t j = 0; j < n; j += 8) {
    const __m256 scaled = _mm256_fmsub_ps(_mm256_loadu_ps(x + j), factors, subtrahend);
    const __m128i half = _mm256_cvtps_ph(scaled, _MM_FROUND_TO_NEAREST_INT);
    auto* const place = reinterpret_cast<__m128i*>(y + j);
    kStreamed ? _mm_stream_si128(place, half) : _mm_storeu_si128(place, half);
  }
}

}  // namespace detail
#endif

template <Capability kCapability, typename T>
PDL_INLINE void widen_block(Instructions<kCapability>, const T* x, float* y) {
#ifdef PDL_SIMD_TARGETS
  if constexpr (kCapability >= Capability::avx512) return detail::widen_block_avx512(x, y);
  if constexpr (std::is_same_v<T, Float16> && kCapability == Capability::avx2) return detail::widen_avx2(x, y);
#endif
#pragma omp simd
  for (int k = 0; k < kBlock; ++k) y[k] = widen(x[k]);
}

// The origin to which the exponentials of a tile of T are relative. It is the tile's largest number, or for 16-bit
// numbers a number just below it that exp_avx512 needs.
template <Capability kCapability, typename T>
struct ExpOrigin {
  static constexpr bool kInSteps = kCapability >= Capability::avx512 && sizeof(T) == 2;

  float max;
  float steps = 0;
  float value = max;
  // exp(max - value) as computed by exp_avx512: a result divided by it is exactly 1 at max.
  float at_max = 1;

  explicit PDL_INLINE ExpOrigin(float max) : max(max) {
#ifdef PDL_SIMD_TARGETS
    if constexpr (kInSteps) {
      if (!in_blocks()) return;
      steps = __builtin_floorf(max * kStepsOfExp);
      value -= __builtin_fmaf(max, kStepsOfExp, -steps) / kStepsOfExp;
      at_max = detail::exp_of_one_avx512(max, steps);
    }
#endif
  }

  // Further away, the rounding error of the origin would affect numbers relative to it.
  PDL_INLINE bool in_blocks() const { return !kInSteps || (max > -1024 && max < 1024); }
};

// The sum of exp(x - origin) over whole blocks, if origin.in_blocks(). With kKeep also each of them in `kept`, with
// kEntropy the sum of exp(x - origin) (x - origin.max) in `scaled`. It also prefetches the memory `ahead`, since the
// processor's own prefetchers see no loads of it. Prefetching past the logits' end is harmless.
template <bool kKeep, bool kEntropy, Capability kCapability, typename T>
PDL_INLINE float sum_of_exp_blocks(Instructions<kCapability> instructions, const T* x, int64_t n,
                                   const ExpOrigin<kCapability, T>& origin, float* kept, int64_t ahead, float* scaled) {
#ifdef PDL_SIMD_TARGETS
  if constexpr (kCapability >= Capability::avx512) {
    return detail::sum_of_exp_avx512<kKeep, kEntropy>(x, n, origin.steps, origin.max, kept, ahead, scaled);
  }
  if constexpr (kCapability == Capability::avx2) {
    return detail::sum_of_exp_avx2<kKeep, kEntropy>(x, n, origin.max, kept, ahead, scaled);
  }
#endif
  constexpr int kSums = kBlock / 2;
  alignas(64) float sums[kSums] = {}, scaled_sums[kSums] = {};
  for (int64_t j = 0; j < n; j += kBlock) {
    __builtin_prefetch(x + j + ahead);
    alignas(64) float wide[kBlock], block[kBlock];
    float* e = kKeep ? kept + j : block;
    widen_block(instructions, x + j, wide);
#pragma omp simd
    for (int k = 0; k < kBlock; ++k) e[k] = exp_nonpositive(wide[k] - origin.max);
    for (int part = 0; part < kBlock; part += kSums) {
#pragma omp simd
      for (int k = 0; k < kSums; ++k) sums[k] += e[part + k];
      if constexpr (kEntropy) {
#pragma omp simd
        for (int k = 0; k < kSums; ++k) {
          scaled_sums[k] += e[part + k] * finite_log_ratio(wide[part + k] - origin.max);
        }
      }
    }
  }
  float sum = 0, sum_of_scaled = 0;
#pragma omp simd reduction(+ : sum, sum_of_scaled)
  for (int k = 0; k < kSums; ++k) {
    sum += sums[k];
    sum_of_scaled += scaled_sums[k];
  }
  if (kEntropy) *scaled = sum_of_scaled;
  return sum;
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

// y = x bypassing the caches, for whole blocks that begin with a cache line.
template <Capability kCapability, typename T>
PDL_INLINE void stream_block(Instructions<kCapability>, const T* x, T* y) {
#ifdef PDL_SIMD_TARGETS
  constexpr int kBytes = kBlock * int(sizeof(T));
  if constexpr (kCapability >= Capability::avx512) return detail::stream_avx512<kBytes>(x, y);
  if constexpr (kCapability == Capability::avx2) return detail::stream_avx2<kBytes>(x, y);
#endif
  __builtin_memcpy(y, x, kBlock * sizeof(T));
}

// y = factor x - less for whole blocks of n numbers, streamed as by stream_block. Returns how many numbers were done:
// none if the processor has no instructions for it.
template <Capability kCapability, typename T>
PDL_INLINE int64_t scale_blocks(Instructions<kCapability>, const Accumulator<T>* x, Accumulator<T> factor,
                                Accumulator<T> less, T* y, int64_t n, bool streamed) {
#ifdef PDL_SIMD_TARGETS
  constexpr bool kBFloat16 = std::is_same_v<T, BFloat16> && kCapability == Capability::avx512_bf16;
  constexpr bool kFloat16 = std::is_same_v<T, Float16> && kCapability >= Capability::avx2;
  if constexpr (kBFloat16 || kFloat16) {
    n = n / kBlock * kBlock;
    if constexpr (kCapability == Capability::avx2) {
      streamed ? detail::scale_avx2<true>(x, factor, less, y, n) : detail::scale_avx2<false>(x, factor, less, y, n);
    } else {
      streamed ? detail::scale_avx512<true>(x, factor, less, y, n) : detail::scale_avx512<false>(x, factor, less, y, n);
    }
    return n;
  }
#endif
  return 0;
}

// After a thread's last stream_block, so that others see what it wrote.
inline void finish_streaming() {
#ifdef PDL_SIMD_TARGETS
  _mm_sfence();
#endif
}

// The number of elements before the first cache line that begins at or after y.
template <typename T>
PDL_INLINE int64_t before_line(const T* y) {
  constexpr int64_t kLine = 64;
  return int64_t(-reinterpret_cast<uintptr_t>(y) % kLine / sizeof(T));
}

// y[j] = f(x[j], j) for j < n. y may be x. kNumber: as narrow_number does. streamed: bypasses the caches, which must
// not hold y. Each element takes the same instructions wherever it is.
template <bool kNumber, Capability kCapability, typename X, typename T, typename F>
PDL_INLINE void map(Instructions<kCapability> instructions, const X* x, T* y, int64_t n, F f, bool streamed = false) {
  // Without instructions for it, rounding to bfloat16 is cheapest in one loop with the rest.
  constexpr bool kInBlocks =
      std::is_same_v<T, Float16> || (std::is_same_v<T, BFloat16> && kCapability >= Capability::avx512);
  const auto element = [&](int64_t j) {
    const auto result = f(widen(x[j]), j);
    return kNumber ? narrow_number<T>(result) : narrow<T>(result);
  };
  const auto block = [&](int64_t j, int count, T* to) {
    if constexpr (kInBlocks) {
      alignas(64) float wide[kBlock], result[kBlock] = {};
      const float* z = wide;
      if constexpr (std::is_same_v<X, float>) {
        z = x + j;
      } else if (count == kBlock) {
        widen_block(instructions, x + j, wide);
      } else {
        for (int k = 0; k < count; ++k) wide[k] = widen(x[j + k]);
      }
#pragma omp simd
      for (int k = 0; k < count; ++k) result[k] = f(z[k], j + k);
      narrow_block<kNumber>(instructions, result, to);
    } else {
#pragma omp simd
      for (int k = 0; k < count; ++k) to[k] = element(j + k);
    }
  };
  const auto part = [&](int64_t begin, int64_t end) {
    alignas(64) T some[kBlock];
    for (int64_t j = begin; j < end; j += kBlock) {
      const int count = int(std::min<int64_t>(kBlock, end - j));
      block(j, count, some);
      std::copy_n(some, count, y + j);
    }
  };
  if (streamed) {
    int64_t j = std::min(before_line(y), n);
    part(0, j);
    for (; j + kBlock <= n; j += kBlock) {
      alignas(64) T whole[kBlock];
      block(j, kBlock, whole);
      stream_block(instructions, whole, y + j);
    }
    part(j, n);
  } else if constexpr (kInBlocks) {
    int64_t j = 0;
    for (; j + kBlock <= n; j += kBlock) block(j, kBlock, y + j);
    part(j, n);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) y[j] = element(j);
  }
}

}  // namespace pdl::cpu
