// The instruction sets that loop bodies are compiled for.
#pragma once

#include <type_traits>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PDL_SIMD_TARGETS 1
#define PDL_TARGET_AVX2 "avx2,fma,f16c,bmi,bmi2"
#define PDL_TARGET_AVX512 PDL_TARGET_AVX2 ",avx512f,avx512bw,avx512cd,avx512dq,avx512vl,prefer-vector-width=512"
#define PDL_TARGET_AVX512_BF16 PDL_TARGET_AVX512 ",avx512bf16"
#endif

namespace pdl::cpu {

enum class Capability { baseline, avx2, avx512, avx512_bf16 };

// The type by which a loop body knows its instruction set.
template <Capability kCapability>
using Instructions = std::integral_constant<Capability, kCapability>;

}  // namespace pdl::cpu
