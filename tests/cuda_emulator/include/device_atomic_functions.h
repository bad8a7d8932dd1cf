// Replaces CUDA's header of this name (see ../README.md), with CUDA's overloads of the atomics: other types are refused
// here, too. One fiber runs at a time, hence plain operations are atomic.
#pragma once

#include <algorithm>

#include "../emulator.h"

namespace cuda_emulator {

template <typename V, typename Change>
V atomic(const char* operation, V* address, Location where, Change change) {
  check_aligned(address, sizeof(V), operation, where);
  const V before = *address;
  *address = change(before);
  return before;
}

}  // namespace cuda_emulator

// Integers wrap, hence the unsigned sum.
#define ATOMIC(name, V, change)                                                                                  \
  inline V name(V* address, V value, cuda_emulator::Location where = cuda_emulator::Location::current()) {       \
    return cuda_emulator::atomic(#name, address, where, [=]([[maybe_unused]] V before) -> V { return change; }); \
  }
#define ATOMIC_CAS(V)                                                                                \
  inline V atomicCAS(V* address, V compare, V value,                                                 \
                     cuda_emulator::Location where = cuda_emulator::Location::current()) {           \
    return cuda_emulator::atomic("atomicCAS", address, where,                                        \
                                 [=](V before) -> V { return before == compare ? value : before; }); \
  }
#define ATOMIC_ON_INTEGERS(name, change) \
  ATOMIC(name, int, change)              \
  ATOMIC(name, unsigned, change)         \
  ATOMIC(name, unsigned long long, change)

ATOMIC(atomicAdd, int, int(unsigned(before) + unsigned(value)))
ATOMIC(atomicAdd, unsigned, before + value)
ATOMIC(atomicAdd, unsigned long long, before + value)
ATOMIC(atomicAdd, float, before + value)
ATOMIC(atomicAdd, double, before + value)
ATOMIC_ON_INTEGERS(atomicMin, std::min(before, value))
ATOMIC(atomicMin, long long, std::min(before, value))
ATOMIC_ON_INTEGERS(atomicMax, std::max(before, value))
ATOMIC(atomicMax, long long, std::max(before, value))
ATOMIC_ON_INTEGERS(atomicExch, value)
ATOMIC(atomicExch, float, value)
ATOMIC_ON_INTEGERS(atomicAnd, before& value)
ATOMIC_ON_INTEGERS(atomicOr, before | value)
ATOMIC_ON_INTEGERS(atomicXor, before ^ value)
ATOMIC_CAS(int)
ATOMIC_CAS(unsigned)
ATOMIC_CAS(unsigned long long)

#undef ATOMIC
#undef ATOMIC_CAS
#undef ATOMIC_ON_INTEGERS
