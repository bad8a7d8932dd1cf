// A block's access to a row in vectors of 16 bytes, whatever the row's alignment and length. The elements before the
// first 16-byte boundary and after the last one are visited one by one.
#pragma once

#include "cluster.cuh"

namespace pdl::cuda {

constexpr int kVectorBytes = 16;

template <typename T>
constexpr int kVector = kVectorBytes / int(sizeof(T));

template <typename T>
struct alignas(kVectorBytes) Pack {
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

// The words of a pack of 16-bit numbers, each a pair. Their conversions take fewer instructions than those of numbers.
template <typename T>
struct PackWords {
  static constexpr int kCount = kVectorBytes / int(sizeof(uint32_t));

  uint32_t word[kCount];

  __device__ __forceinline__ explicit PackWords(const Pack<T>& pack) { memcpy(word, &pack, kVectorBytes); }

  __device__ __forceinline__ Pack<T> pack() const {
    Pack<T> pack;
    memcpy(&pack, word, kVectorBytes);
    return pack;
  }
};

// The numbers of a pack in the accumulator's precision.
template <typename T>
__device__ __forceinline__ void widen(const Pack<T>& pack, Accumulator<T> (&numbers)[kVector<T>]) {
  if constexpr (sizeof(T) == 2) {
    const PackWords<T> words(pack);
#pragma unroll
    for (int i = 0; i < words.kCount; ++i) {
      const float2 pair = widen_pair<T>(words.word[i]);
      numbers[2 * i] = pair.x;
      numbers[2 * i + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) numbers[k] = widen(pack.value[k]);
  }
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

  // The share of one of the cluster's blocks.
  __device__ __forceinline__ PackRange(const T* data, int size, int rank, const Cluster& cluster)
      : PackRange(data, size, rank, [&](int packs) { return (packs + cluster.blocks - 1) >> cluster.log2_blocks; }) {}

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

  // on_element(j) for each element outside of the vectors. A block has more threads than a vector has elements.
  template <typename OnElement>
  __device__ __forceinline__ void for_each_outside(int size, OnElement on_element) const {
    if (!has_outside) return;
    const int thread = int(threadIdx.x);
    if (thread < row_begin) on_element(thread);
    if (row_end + thread < size) on_element(row_end + thread);
  }

 private:
  __device__ __forceinline__ bool visits_outside(int j, int size) const {
    if (!has_outside || j < 0 || j >= size) return false;
    if (j < row_begin) return j == int(threadIdx.x);
    return j - row_end == int(threadIdx.x);
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
// first + i * step + k. A thread has kPacks loads in flight before it uses any, or as many as remain. Elements outside
// of whole vectors are left out.
template <int kPacks, typename T, typename OnPacks>
__device__ __forceinline__ void for_each_pack(const T* data, const PackRange<T>& range, OnPacks on_packs) {
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
}

}  // namespace pdl::cuda
