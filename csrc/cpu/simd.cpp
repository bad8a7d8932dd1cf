#include "simd.h"

#include <cstdlib>
#include <string_view>

#include <torch/headeronly/util/Exception.h>

namespace pdl::cpu {
namespace {

Capability supported() {
#ifdef PDL_SIMD_TARGETS
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512) return __builtin_cpu_supports("avx512bf16") ? Capability::avx512_bf16 : Capability::avx512;
  if (avx2) return Capability::avx2;
#endif
  return Capability::baseline;
}

Capability chosen() {
  const Capability best = supported();
  const char* asked = std::getenv("PDL_EXT_CPU_CAPABILITY");
  if (asked == nullptr) return best;
  const std::string_view name(asked);
  STD_TORCH_CHECK(name == "default" || name == "avx2" || name == "avx512" || name == "avx512_bf16",
                  "PDL_EXT_CPU_CAPABILITY is '", asked, "', expected 'default', 'avx2', 'avx512' or 'avx512_bf16'");
  const Capability wanted = name == "avx512_bf16" ? Capability::avx512_bf16
                            : name == "avx512"    ? Capability::avx512
                            : name == "avx2"      ? Capability::avx2
                                                  : Capability::baseline;
  return std::min(wanted, best);
}

}  // namespace

Capability capability() {
  static const Capability value = chosen();
  return value;
}

const char* capability_name() {
  switch (capability()) {
    case Capability::avx512_bf16:
      return "AVX512_BF16";
    case Capability::avx512:
      return "AVX512";
    case Capability::avx2:
      return "AVX2";
    default:
      return "DEFAULT";
  }
}

}  // namespace pdl::cpu
