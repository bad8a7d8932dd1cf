// The rows of a batch as the kernels of the loss see them, and what each kernel does for its share of one: statistics,
// the row's losses, the gradient.
#pragma once

#include "../loss_arguments.h"
#include "block_reduce.cuh"
#include "vector_access.cuh"

namespace pdl::cuda {

// Vectors that a thread has under way at once; docs/kernels.md has the count of instructions.
constexpr int kPacks = 4;
// Threads of a block that has a row or a share of one, and how many such blocks a multiprocessor must hold at once. One
// loads while another reduces. float64 has no registers for the third, nor the throughput to need one.
constexpr int kLongRowThreads = 256;
constexpr int kRowsOfMultiprocessor = 3;
template <typename T>
constexpr int kResident = sizeof(T) == 8 ? 2 : kRowsOfMultiprocessor;

inline int threads_for(int64_t vocab_size) {
  constexpr int64_t kLongRow = 4096;
  constexpr int kShortRowThreads = 128;
  return vocab_size <= kLongRow ? kShortRowThreads : kLongRowThreads;
}

template <typename T>
struct Rows {
  using A = Accumulator<T>;

  const T* logits;
  int64_t stride;
  int64_t count;
  int vocab_size;  // of these logits, which may be a shard's
  Targets targets;
  int64_t ignore_index;
  const float* token_weight;
  const A* row_weight;
  LogitTransform<A> transform;
  RowOptions<A> options;
  A* saved_rows;       // [SavedRow::kNumbers, count]
  int64_t* predicted;  // or nullptr

  __device__ bool in_vocabulary(int64_t target) const { return target >= 0 && target < vocab_size; }
  __device__ A row_weight_at(int64_t i) const { return row_weight != nullptr ? row_weight[i] : A(1); }
  __device__ A weight_of(int64_t target) const { return token_weight != nullptr ? A(token_weight[target]) : A(1); }
  __device__ SavedRow<A> saved(int64_t i) const { return SavedRow<A>::load(saved_rows, count, i); }
  template <bool kPlain>
  __device__ A z(A x, int j) const {
    return kPlain ? x : transform.apply(x, j);
  }
  __device__ SavedRow<A> loss_of(const RowStatistics<A>& statistics, A z_target, int64_t target) const {
    return row_loss(statistics, z_target, weight_of(target), options);
  }
};

template <typename T>
Rows<T> rows_of(const Tensor& logits, const LossInputs& inputs, const Tensor& saved_rows, int64_t vocab_size) {
  using A = Accumulator<T>;
  return {.logits = static_cast<const T*>(logits.const_data_ptr()),
          .stride = logits.stride(0),
          .count = logits.size(0),
          .vocab_size = int(logits.size(1)),
          .targets = inputs.ids(),
          .ignore_index = inputs.options.ignore_index,
          .token_weight = data_or_null<float>(inputs.token_weight),
          .row_weight = data_or_null<A>(inputs.row_weight),
          .transform = inputs.transform<A>(),
          .options = RowOptions<A>::of(inputs.options, vocab_size),
          .saved_rows = static_cast<A*>(saved_rows.mutable_data_ptr()),
          .predicted = nullptr};
}

template <bool kPlain, typename A>
__device__ __forceinline__ void add_element(RowStatistics<A>& row, A z, int j, A centre) {
  // exp(z - z): not so for infinity, whose row has no loss. The 1 of -inf vanishes beside anything finite.
  const A sum = z == infinity<A>() ? not_a_number<A>() : A(1);
  row = merge(row, RowStatistics<A>{z, sum, kPlain ? A(0) : z - centre, j});
}

template <bool kPlain, typename T, int kPacks, typename A>
__device__ __forceinline__ void add_packs(RowStatistics<A>& row, const Pack<T> (&packs)[kPacks], int first, int step,
                                          bool predict, const LogitTransform<A>& transform, A centre) {
  A z[kPacks][kVector<T>];
  A max = row.max;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) {
      const A x = widen(packs[i].value[k]);
      z[i][k] = kPlain ? x : transform.apply(x, first + i * step + k);
      max = larger(z[i][k], max);
    }
  }
  if (predict && max > row.max) {
    // Backwards, so that the first of equals is the last to be found.
#pragma unroll
    for (int i = kPacks - 1; i >= 0; --i) {
#pragma unroll
      for (int k = kVector<T> - 1; k >= 0; --k) {
        if (z[i][k] == max) row.argmax = first + i * step + k;
      }
    }
  }
  const A shift = exp_shift(max);
  A sums[kPacks] = {};
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) {
      sums[i] += exp_nonpositive(z[i][k] - shift);
      if (!kPlain) row.centred += z[i][k] - centre;
    }
  }
  row.sum *= row.max == max ? A(1) : exp_nonpositive(row.max - shift);
#pragma unroll
  for (int i = 0; i < kPacks; ++i) row.sum += sums[i];
  row.max = max;
}

template <typename A>
__device__ __forceinline__ RowStatistics<A> merged_over_block(const RowStatistics<A>& row) {
  return block_reduce(row, RowStatistics<A>(), [](const auto& a, const auto& b) { return merge(a, b); });
}

// Of the thread's share of a range of a row, read from memory.
template <bool kPlain, typename T, typename A>
__device__ __forceinline__ RowStatistics<A> statistics_of_share(const Rows<T>& rows, const T* x,
                                                                const PackRange<T>& range, A centre) {
  RowStatistics<A> row;
  for_each_pack<kPacks>(
      x, rows.vocab_size, range,
      [&](const auto& packs, int first, int step) {
        add_packs<kPlain>(row, packs, first, step, rows.predicted != nullptr, rows.transform, centre);
      },
      [&](int j) { add_element<kPlain>(row, rows.template z<kPlain>(widen(x[j]), j), j, centre); });
  return row;
}

// By one thread.
template <typename T, typename A>
__device__ __forceinline__ void write_row(const Rows<T>& rows, int64_t i, const SavedRow<A>& row, int argmax) {
  row.store(rows.saved_rows, rows.count, i);
  if (rows.predicted != nullptr) rows.predicted[i] = argmax;
}

// Of a row without a target in the vocabulary, by one thread: zeros if it is ignored, else NaN.
template <typename T>
__device__ __forceinline__ void write_row_without_target(const Rows<T>& rows, int64_t i, Accumulator<T> fill) {
  write_row(rows, i, SavedRow<Accumulator<T>>::filled(fill), -1);
}

template <typename T>
__device__ __forceinline__ void fill_row(T* gradient, int vocab_size, const PackRange<T>& range, T fill) {
  Pack<T> pack;
#pragma unroll
  for (int k = 0; k < kVector<T>; ++k) pack.value[k] = fill;
  for (int first = range.first_of_thread(); first < range.end; first += range.step())
    store_pack(gradient + first, pack);
  range.for_each_outside(vocab_size, [&](int j) { gradient[j] = fill; });
}

template <bool kPlain, typename T, typename A>
__device__ __forceinline__ T gradient_of(T logit, int j, int target, const LogitTransform<A>& transform,
                                         const GradientRow<A>& row) {
  const A x = widen(logit);
  const A z = kPlain ? x : transform.apply(x, j);
  const A g = j == target ? row.at_target(z) : row.off_target(z);
  return narrow<T>(kPlain ? g : g * transform.derivative(x));
}

// The block's share of a row's gradient, from logits in memory. It may lie where they are: each thread reads an element
// before it writes it. `range` is that of the logits.
template <bool kPlain, typename T, typename A>
__device__ __forceinline__ void write_gradient(const Rows<T>& rows, const T* x, T* gradient, const PackRange<T>& range,
                                               int target, const GradientRow<A>& row) {
  const auto element = [&](int j) { gradient[j] = gradient_of<kPlain>(x[j], j, target, rows.transform, row); };
  if (equally_aligned<T>(x, gradient)) {
    for_each_pack<kPacks>(
        x, rows.vocab_size, range,
        [&]<int kCount>(Pack<T>(&packs)[kCount], int first, int step) {
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            const int begin = first + i * step;
#pragma unroll
            for (int k = 0; k < kVector<T>; ++k) {
              T& value = packs[i].value[k];
              value = gradient_of<kPlain>(value, begin + k, target, rows.transform, row);
            }
            store_pack(gradient + begin, packs[i]);
          }
        },
        element);
  } else {
    for (int j = range.begin + threadIdx.x; j < range.end; j += blockDim.x) element(j);
    range.for_each_outside(rows.vocab_size, element);
  }
}

}  // namespace pdl::cuda
