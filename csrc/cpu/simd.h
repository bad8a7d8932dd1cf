// One source, several instruction sets: `simd_parallel_for` runs a loop body that was compiled for each of them, and
// selects one when the process starts. The body is a plain lambda. `flatten` inlines it, with all its calls, into a
// function with the target attribute, where the compiler vectorises it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "capability.h"

namespace pdl::cpu {

// The best capability of this processor, or a lower one set by PDL_EXT_CPU_CAPABILITY=default|avx2|avx512|avx512_bf16.
Capability capability();
const char* capability_name();

namespace detail {

template <typename Body>
__attribute__((flatten)) void run_baseline(const Body& body, int64_t begin, int64_t end) {
  body(begin, end, Instructions<Capability::baseline>());
}

#ifdef PDL_SIMD_TARGETS
template <typename Body>
__attribute__((flatten, target(PDL_TARGET_AVX2))) void run_avx2(const Body& body, int64_t begin, int64_t end) {
  body(begin, end, Instructions<Capability::avx2>());
}

template <typename Body>
__attribute__((flatten, target(PDL_TARGET_AVX512))) void run_avx512(const Body& body, int64_t begin, int64_t end) {
  body(begin, end, Instructions<Capability::avx512>());
}

template <typename Body>
__attribute__((flatten, target(PDL_TARGET_AVX512_BF16))) void run_avx512_bf16(const Body& body, int64_t begin,
                                                                              int64_t end) {
  body(begin, end, Instructions<Capability::avx512_bf16>());
}
#endif

}  // namespace detail

// body(begin, end, instructions) over parts of 0 to n on PyTorch's own threads; an element costs about `cost` logits.
// kBFloat16: whether the body narrows to bfloat16; other bodies are not compiled for those instructions.
template <bool kBFloat16 = false, typename Body>
void simd_parallel_for(int64_t n, int64_t cost, const Body& body) {
  constexpr int64_t kGrain = 32768;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cost));
  [[maybe_unused]] const Capability chosen = capability();
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
#ifdef PDL_SIMD_TARGETS
    if constexpr (kBFloat16) {
      if (chosen == Capability::avx512_bf16) return detail::run_avx512_bf16(body, begin, end);
    }
    if (chosen >= Capability::avx512) return detail::run_avx512(body, begin, end);
    if (chosen == Capability::avx2) return detail::run_avx2(body, begin, end);
#endif
    detail::run_baseline(body, begin, end);
  });
}

}  // namespace pdl::cpu
