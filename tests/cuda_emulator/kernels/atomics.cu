// Atomics in shared and in global memory.
#include <cstdint>

#include "dynamic_shared.h"
#include "kernel.h"

namespace {

template <typename V>
concept CanBeAdded = requires(V* address, V value) { atomicAdd(address, value); };
template <typename V>
concept CanBeMinimised = requires(V* address, V value) { atomicMin(address, value); };
static_assert(CanBeAdded<int> && CanBeAdded<unsigned long long> && CanBeAdded<double> && CanBeMinimised<long long>);
// CUDA has no such overloads, whatever int64_t is.
static_assert(!CanBeAdded<long> && !CanBeAdded<long long> && !CanBeAdded<short> && !CanBeMinimised<float>);

// Every operation, by all threads of a block on the same numbers, with 16 results a block. They are in shared memory
// for the first block and in global memory for the second. Input: one number from 1 to 30 a thread.
__global__ void atomics(long long* output, const int* input, int) {
  __shared__ long long in_shared_memory[16];
  long long* place = blockIdx.x == 0 ? in_shared_memory : output + 16;
  const int thread = int(threadIdx.x), value = input[thread];
  if (thread == 0) {
    for (int i = 0; i < 16; ++i) place[i] = 0;
    *reinterpret_cast<int*>(place + 5) = 1000;
    *reinterpret_cast<unsigned long long*>(place + 7) = 1000;
    *reinterpret_cast<unsigned*>(place + 9) = ~0u;
  }
  __syncthreads();
  atomicAdd(reinterpret_cast<int*>(place), -value);
  atomicAdd(reinterpret_cast<unsigned*>(place + 1), unsigned(value));
  atomicAdd(reinterpret_cast<unsigned long long*>(place + 2), 1ull << 40);
  atomicAdd(reinterpret_cast<float*>(place + 3), float(value));
  atomicAdd(reinterpret_cast<double*>(place + 4), double(value) / 4);
  atomicMin(reinterpret_cast<int*>(place + 5), value);
  atomicMax(reinterpret_cast<unsigned*>(place + 6), unsigned(value));
  atomicMin(reinterpret_cast<unsigned long long*>(place + 7), static_cast<unsigned long long>(value));
  atomicMax(place + 8, static_cast<long long>(value));
  atomicAnd(reinterpret_cast<unsigned*>(place + 9), ~(1u << value));
  atomicOr(reinterpret_cast<int*>(place + 10), 1 << value);
  atomicXor(reinterpret_cast<unsigned long long*>(place + 11), 1ull << value);
  // Adds by exchanging: each thread takes what is there and puts back more.
  for (unsigned seen = 0, before = 1; seen != before;) {
    seen = before;
    seen = *static_cast<volatile unsigned*>(reinterpret_cast<unsigned*>(place + 12));
    before = atomicCAS(reinterpret_cast<unsigned*>(place + 12), seen, seen + unsigned(value));
  }
  // Each thread swaps its number in; what was there before goes into a sum.
  atomicAdd(reinterpret_cast<int*>(place + 14), atomicExch(reinterpret_cast<int*>(place + 13), value));
  __syncthreads();
  if (blockIdx.x == 0 && thread < 16) output[thread] = place[thread];
}

__global__ void misaligned_atomic(int* output, const int*, int) {
  atomicAdd(reinterpret_cast<unsigned long long*>(output + 1), 1ull);
}

const kernels::Register kernels_of_atomics({
    {"atomics", atomics},
    {"misaligned_atomic", misaligned_atomic},
});

}  // namespace
