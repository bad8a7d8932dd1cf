// A block's access to a row in vectors of 16 bytes, whatever the row's alignment and length. The elements before the
// first 16-byte boundary and after the last one are visited one by one.
#pragma once

#include "cluster.cuh"

namespace pdl::cuda {

constexpr int kVectorBytes = 16;

template <typename T>
constexpr int kVector = kVectorBytes / int(sizeof(T));

template <typename T>
struct Pack {
  T value[kVector<T>];
};

__device__ __forceinline__ uint4 load_vector(const void* aligned) {
  return *static_cast<const uint4*>(aligned);
}

template <typename T>
__device__ __forceinline__ Pack<T> pack_of(const uint4& raw) {
  Pack<T> pack;
  memcpy(&pack, &raw, kVectorBytes);
  return pack;
}

template <typename T>
__device__ __forceinline__ Pack<T> load_pack(const T* aligned) {
  return pack_of<T>(load_vector(aligned));
}

template <typename T>
__device__ __forceinline__ void store_pack(T* aligned, const Pack<T>& pack) {
  uint4 raw;
  memcpy(&raw, &pack, kVectorBytes);
  // Written once and not read again. nvcc would turn a plain assignment into four accesses.
  __stcs(reinterpret_cast<uint4*>(aligned), raw);
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

// The whole vectors of one of `shares` equal shares of a row, from begin to before end; the share's threads take them
// in turns. The elements before the first and after the last vector of the row belong to the first share.
template <typename T>
struct PackRange {
  int row_begin;
  int row_end;
  int begin;
  int end;
  bool has_outside;

  __device__ __forceinline__ PackRange(const T* data, int size, int share = 0, int shares = 1)
      : PackRange(data, size, share, [shares](int packs) { return (packs + shares - 1) / shares; }) {}

  __device__ __forceinline__ PackRange(const T* data, int size, const Cluster& cluster)
      : PackRange(data, size, cluster.rank(),
                  [&](int packs) { return (packs + cluster.blocks - 1) >> cluster.log2_blocks; }) {}

  __device__ __forceinline__ int first_of_thread() const { return begin + int(threadIdx.x) * kVector<T>; }
  __device__ __forceinline__ int step() const { return int(blockDim.x) * kVector<T>; }

  // Whether this thread visits element j of a row of `size`; j may be any number.
  __device__ __forceinline__ bool visits(int j, int size) const {
    if (j >= begin && j < end) return unsigned(j - begin) / kVector<T> % blockDim.x == threadIdx.x;
    return visits_outside(j, size);
  }
  // The same if the threads take the elements of the vectors in turns.
  __device__ __forceinline__ bool visits_by_elements(int j, int size) const {
    if (j >= begin && j < end) return unsigned(j - begin) % blockDim.x == threadIdx.x;
    return visits_outside(j, size);
  }

  // on_element(j) for each element outside of the vectors.
  template <typename OnElement>
  __device__ __forceinline__ void for_each_outside(int size, OnElement on_element) const {
    if (!has_outside) return;
    for (int j = threadIdx.x; j < row_begin; j += blockDim.x) on_element(j);
    for (int j = row_end + threadIdx.x; j < size; j += blockDim.x) on_element(j);
  }

 private:
  __device__ __forceinline__ bool visits_outside(int j, int size) const {
    if (!has_outside || j < 0 || j >= size) return false;
    if (j < row_begin) return unsigned(j) % blockDim.x == threadIdx.x;
    return j >= row_end && unsigned(j - row_end) % blockDim.x == threadIdx.x;
  }

  template <typename OfShare>
  __device__ __forceinline__ PackRange(const T* data, int size, int share, OfShare of_share)
      : row_begin(misaligned_head(data, size)), has_outside(share == 0) {
    const int packs = (size - row_begin) / kVector<T>, most = of_share(packs);
    row_end = row_begin + packs * kVector<T>;
    begin = row_begin + min(packs, share * most) * kVector<T>;
    end = row_begin + min(packs, (share + 1) * most) * kVector<T>;
  }
};

// The block's threads share the range. They call on_packs(packs, first, step), where element k of packs[i] is number
// first + i * step + k, and on_element(j) for each element outside of whole vectors. A thread has kPacks loads in
// flight before it uses any, or as many as remain.
template <int kPacks, typename T, typename OnPacks, typename OnElement>
__device__ __forceinline__ void for_each_pack(const T* data, int size, const PackRange<T>& range, OnPacks on_packs,
                                              OnElement on_element) {
  const int step = range.step();
  int first = range.first_of_thread();
  for (; first + (kPacks - 1) * step < range.end; first += kPacks * step) {
    Pack<T> packs[kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) packs[i] = load_pack(data + first + i * step);
    on_packs(packs, first, step);
  }
  // Not as packs, whose 16-bit values nvcc would keep in a register each.
  uint4 rest[kPacks - 1] = {};
#pragma unroll
  for (int i = 0; i < kPacks - 1; ++i) {
    if (first + i * step < range.end) rest[i] = load_vector(data + first + i * step);
  }
#pragma unroll
  for (int i = 0; i < kPacks - 1; ++i) {
    if (first + i * step >= range.end) break;
    Pack<T> packs[1] = {pack_of<T>(rest[i])};
    on_packs(packs, first + i * step, step);
  }
  range.for_each_outside(size, on_element);
}

}  // namespace pdl::cuda
