// A block's walk over a row in accesses of 16 bytes, whatever the row's alignment and length: the elements before the
// first 16-byte boundary and after the last one are visited one by one.
#pragma once

#include "device.cuh"

namespace pdl::cuda {

constexpr int kVectorBytes = 16;

template <typename T>
constexpr int kVector = kVectorBytes / int(sizeof(T));

template <typename T>
struct Pack {
  T value[kVector<T>];
};

template <typename T>
__device__ __forceinline__ Pack<T> load_pack(const T* aligned) {
  const uint4 raw = *reinterpret_cast<const uint4*>(aligned);
  Pack<T> pack;
  memcpy(&pack, &raw, kVectorBytes);
  return pack;
}

template <typename T>
__device__ __forceinline__ void store_pack(T* aligned, const Pack<T>& pack) {
  uint4 raw;
  memcpy(&raw, &pack, kVectorBytes);
  *reinterpret_cast<uint4*>(aligned) = raw;
}

// Elements before the first 16-byte boundary.
template <typename T>
__device__ __forceinline__ int misaligned_head(const T* data, int size) {
  const int past = int(reinterpret_cast<uintptr_t>(data) % kVectorBytes);
  return min(size, past == 0 ? 0 : (kVectorBytes - past) / int(sizeof(T)));
}

template <typename T>
__device__ __forceinline__ bool equally_aligned(const T* a, const T* b) {
  return (reinterpret_cast<uintptr_t>(a) - reinterpret_cast<uintptr_t>(b)) % kVectorBytes == 0;
}

// on_pack(first) for each whole vector, on_element(j) for each element outside of them; the block shares the work.
template <typename T, typename OnPack, typename OnElement>
__device__ __forceinline__ void for_each_pack(const T* data, int size, OnPack on_pack, OnElement on_element) {
  const int head = misaligned_head(data, size);
  const int packs = (size - head) / kVector<T>;
  const int tail = head + packs * kVector<T>;
  for (int j = threadIdx.x; j < head; j += blockDim.x) on_element(j);
#pragma unroll 4
  for (int pack = threadIdx.x; pack < packs; pack += blockDim.x) on_pack(head + pack * kVector<T>);
  for (int j = tail + threadIdx.x; j < size; j += blockDim.x) on_element(j);
}

}  // namespace pdl::cuda
