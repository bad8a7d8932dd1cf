// Stands in for CUDA's header of this name (see ../README.md).
#pragma once

#include "../async_copy.h"
#include "cuda_runtime.h"

// Copies the first size_and_align - zfill bytes, and writes zeros for the rest.
inline void __pipeline_memcpy_async(void* __restrict__ dst_shared, const void* __restrict__ src_global,
                                    size_t size_and_align, size_t zfill = 0, Location where = Location::current()) {
  cuda_emulator::pipeline_copy(dst_shared, src_global, size_and_align, zfill, where);
}

inline void __pipeline_commit(Location where = Location::current()) {
  cuda_emulator::pipeline_commit(where);
}

// Waits for all groups that this thread committed but the last `prior` ones.
inline void __pipeline_wait_prior(size_t prior, Location where = Location::current()) {
  cuda_emulator::pipeline_wait_prior(prior, where);
}
