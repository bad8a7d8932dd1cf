// One source, three instruction sets: `simd_parallel_for` runs a loop body that was compiled for AVX-512, AVX2 and
// the baseline, and picks one when the process starts. The body is a plain lambda; `flatten` pulls it, and all it
// calls, into a function that carries the target attribute, where the compiler vectorises it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PDL_SIMD_TARGETS 1
#endif

namespace pdl::cpu {

enum class Capability { baseline, avx2, avx512 };

// The best that this processor has, or less where PDL_EXT_CPU_CAPABILITY=default|avx2|avx512 asks for less.
Capability capability();
const char* capability_name();

namespace detail {

template <typename Body>
__attribute__((flatten)) void run_baseline(const Body& body, int64_t begin, int64_t end) {
  body(begin, end);
}

#ifdef PDL_SIMD_TARGETS
template <typename Body>
__attribute__((flatten, target("avx2,fma,f16c,bmi,bmi2"))) void run_avx2(const Body& body, int64_t begin, int64_t end) {
  body(begin, end);
}

template <typename Body>
__attribute__((
    flatten, target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,prefer-vector-width=512"))) void
run_avx512(const Body& body, int64_t begin, int64_t end) {
  body(begin, end);
}
#endif

}  // namespace detail

// body(begin, end) over parts of [0, n) on PyTorch's own threads; an element costs about `cost` logits.
template <typename Body>
void simd_parallel_for(int64_t n, int64_t cost, const Body& body) {
  constexpr int64_t kGrain = 32768;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cost));
  [[maybe_unused]] const Capability chosen = capability();
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
#ifdef PDL_SIMD_TARGETS
    if (chosen == Capability::avx512) return detail::run_avx512(body, begin, end);
    if (chosen == Capability::avx2) return detail::run_avx2(body, begin, end);
#endif
    detail::run_baseline(body, begin, end);
  });
}

}  // namespace pdl::cpu
