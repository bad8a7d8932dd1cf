// Dynamic shared memory, in the form that the emulator knows.
#pragma once

#include <cuda_runtime.h>

namespace pdl::cuda {

template <typename T>
__device__ __forceinline__ T* dynamic_shared_memory() {
  extern __shared__ uint4 pdl_dynamic_shared[];
  return reinterpret_cast<T*>(pdl_dynamic_shared);
}

}  // namespace pdl::cuda
