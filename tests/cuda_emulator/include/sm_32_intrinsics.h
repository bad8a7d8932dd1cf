// Stands in for CUDA's header of this name: loads and stores with cache hints, over CUDA's types (see ../README.md).
#pragma once

#include <type_traits>

#include "../emulator.h"

namespace cuda_emulator {

template <typename V, typename... Types>
constexpr bool is_one_of = (std::is_same_v<V, Types> || ...);

// The headers of the 16-bit floats add theirs.
template <typename V>
constexpr bool has_cache_hints = (std::is_arithmetic_v<V> && sizeof(V) <= 8) ||
                                 is_one_of<V, int2, int4, uint2, uint4, float2, float4, double2, longlong2, ulonglong2>;

}  // namespace cuda_emulator

#define LOAD(name)                                                                               \
  template <typename V>                                                                          \
    requires cuda_emulator::has_cache_hints<V>                                                   \
  V name(const V* address, cuda_emulator::Location where = cuda_emulator::Location::current()) { \
    cuda_emulator::check_aligned(address, sizeof(V), #name, where);                              \
    return *address;                                                                             \
  }
#define STORE(name)                                                               \
  template <typename V>                                                           \
    requires cuda_emulator::has_cache_hints<V>                                    \
  void name(V* address, std::type_identity_t<V> value,                            \
            cuda_emulator::Location where = cuda_emulator::Location::current()) { \
    cuda_emulator::check_aligned(address, sizeof(V), #name, where);               \
    *address = value;                                                             \
  }

LOAD(__ldg)
LOAD(__ldca)
LOAD(__ldcg)
LOAD(__ldcs)
LOAD(__ldlu)
LOAD(__ldcv)
STORE(__stcg)
STORE(__stcs)
STORE(__stwb)
STORE(__stwt)

#undef LOAD
#undef STORE
