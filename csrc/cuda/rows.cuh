// The rows of a batch for the kernels of the loss, and the work of each kernel on its share of a row. That is the
// statistics, the row's losses, or the gradient.
#pragma once

#include "../loss_arguments.h"
#include "block_reduce.cuh"
#include "vector_access.cuh"

namespace pdl::cuda {

// Macros set the choices that only a card can decide: docs/testing.md has the variants.
#if !defined(PDL_PACKS)
#define PDL_PACKS 4
#endif
#if !defined(PDL_ROWS_OF_MULTIPROCESSOR)
#define PDL_ROWS_OF_MULTIPROCESSOR 3
#endif

// The number of vectors that a thread has in flight; docs/kernels.md has the count of instructions. float64 has no
// registers for more than two.
template <typename T>
constexpr int kPacks = sizeof(T) == 8 ? 2 : PDL_PACKS;
// The threads of a block with a row or a share of one. The second number is how many such blocks a multiprocessor must
// hold: one loads while another reduces. float64 has no registers for the third, and its throughput does not need one.
constexpr int kLongRowThreads = 256;
constexpr int kRowsOfMultiprocessor = PDL_ROWS_OF_MULTIPROCESSOR;
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
  TokenWeights<A> token_weights;
  const A* row_weight;
  LogitTransform<A> transform;
  ClassWeights<A> class_weights;
  RowOptions<A> options;
  A* saved_rows;       // [SavedRow::kNumbers, count]
  int64_t* predicted;  // or nullptr

  __device__ bool in_vocabulary(int64_t target) const { return target >= 0 && target < vocab_size; }
  __device__ A row_weight_at(int64_t i) const { return row_weight != nullptr ? row_weight[i] : A(1); }
  __device__ SavedRow<A> saved(int64_t i) const { return SavedRow<A>::load(saved_rows, count, i); }
  template <bool kPlain>
  __device__ A z(A x, int j) const {
    return kPlain ? x : transform.apply(x, j);
  }
  template <typename Statistics>
  __device__ SavedRow<A> loss_of(const Statistics& statistics, A z_target, A token_weight) const {
    return row_loss(statistics, z_target, token_weight, options);
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
          .token_weights = inputs.token_weights<A>(),
          .row_weight = data_or_null<A>(inputs.row_weight),
          .transform = inputs.transform<A>(),
          .class_weights = inputs.class_weights<A>(),
          .options = RowOptions<A>::of(inputs.options, vocab_size),
          .saved_rows = static_cast<A*>(saved_rows.mutable_data_ptr()),
          .predicted = nullptr};
}

// Adds one element, in column j of `x`.
template <Loop kLoop, typename T, typename A>
__device__ __forceinline__ void add_element(StatisticsOf<kLoop, A>& row, const Rows<T>& rows, const T* x, int j,
                                            A centre) {
  const A z = rows.template z<kIsPlain<kLoop>>(widen(x[j]), j);
  // exp(z - z) is 1, but NaN for infinity, whose row has no loss. The 1 of -inf vanishes beside any finite number.
  const A sum = z == infinity<A>() ? not_a_number<A>() : A(1);
  StatisticsOf<kLoop, A> element;
  element.max = z;
  element.sum = sum;
  if constexpr (kLoop != Loop::plain) element.argmax = j;
  if constexpr (!kIsPlain<kLoop>) {
    element.class_weight = rows.class_weights.at(j);
    element.centred = ClassWeights<A>::times(element.class_weight, z - centre);
  }
  row = merge(row, element);
}

// The larger of `number` and the largest number of the packs, or `number` if all are NaN.
template <typename T, int kCount>
__device__ __forceinline__ float largest_of(const Pack<T> (&packs)[kCount], float number) {
  uint32_t of_pack[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const PackWords<T> words(packs[i]);
    of_pack[i] = words.word[0];
#pragma unroll
    for (int k = 1; k < words.kCount; ++k) of_pack[i] = larger_pair<T>(of_pack[i], words.word[k]);
  }
  uint32_t largest = of_pack[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) largest = larger_pair<T>(largest, of_pack[i]);
  const float2 pair = widen_pair<T>(largest);
  return larger(pair.x, larger(pair.y, number));
}

template <Loop kLoop, typename T, int kCount, typename A>
__device__ __forceinline__ void add_packs(StatisticsOf<kLoop, A>& row, const Rows<T>& rows,
                                          const Pack<T> (&packs)[kCount], int first, int step, A centre) {
  constexpr bool kPlain = kIsPlain<kLoop>;
  A z[kCount][kVector<T>];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    widen(packs[i], z[i]);
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) z[i][k] = rows.template z<kPlain>(z[i][k], first + i * step + k);
  }
  A max = row.max;
  if constexpr (kPlain && kComparesPairs<T>) {
    max = largest_of(packs, max);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int k = 0; k < kVector<T>; ++k) max = larger(z[i][k], max);
    }
  }
  if constexpr (kLoop != Loop::plain) {
    if (rows.predicted != nullptr && max > row.max) {
      // In reverse order, so that the first of equal numbers is found last. Numbers without a transform are taken from
      // their packs again: otherwise they would occupy registers until here.
#pragma unroll
      for (int i = kCount - 1; i >= 0; --i) {
#pragma unroll
        for (int k = kVector<T> - 1; k >= 0; --k) {
          if ((kPlain ? widen(packs[i].value[k]) : z[i][k]) == max) row.argmax = first + i * step + k;
        }
      }
    }
  }
  const A shift = exp_shift(max);
  if constexpr (kLoop != Loop::plain) row.scaled = scaled_relative_to(row, shift);
  A sums[kCount] = {};
  const bool of_class = !kPlain && rows.class_weights.of_class != nullptr;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) {
      const A below = z[i][k] - shift, e = exp_nonpositive(below);
      sums[i] += e;
      if constexpr (kLoop != Loop::plain) row.scaled += e * finite_log_ratio(below);
      if constexpr (!kPlain) {
        if (!of_class) row.centred += z[i][k] - centre;
      }
    }
  }
  if constexpr (!kPlain) {
    if (of_class) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
#pragma unroll
        for (int k = 0; k < kVector<T>; ++k) {
          const A weight = rows.class_weights.at(first + i * step + k);
          row.centred += ClassWeights<A>::times(weight, z[i][k] - centre);
          row.class_weight += weight;
        }
      }
    }
  }
  row.sum *= exp_nonpositive(row.max - shift);
#pragma unroll
  for (int i = 0; i < kCount; ++i) row.sum += sums[i];
  row.max = max;
}

struct Merge {
  template <typename Statistics>
  __device__ __forceinline__ Statistics operator()(const Statistics& a, const Statistics& b) const {
    return merge(a, b);
  }
};

// Adds the thread's share of the elements outside of vectors. They come last in all kernels: so the bits are the same,
// and of equal numbers the first one is found.
template <Loop kLoop, typename T, typename A>
__device__ __forceinline__ void add_outside(StatisticsOf<kLoop, A>& row, const Rows<T>& rows, const T* x,
                                            const PackRange<T>& range, A centre) {
  range.for_each_outside(rows.vocab_size, [&](int j) { add_element<kLoop>(row, rows, x, j, centre); });
}

// The statistics of the thread's share of a range of a row, read from memory.
template <Loop kLoop, typename T, typename A>
__device__ __forceinline__ StatisticsOf<kLoop, A> statistics_of_share(const Rows<T>& rows, const T* x,
                                                                      const PackRange<T>& range, A centre) {
  StatisticsOf<kLoop, A> row;
  for_each_pack<kPacks<T>>(x, range, [&](const auto& packs, int first, int step) {
    add_packs<kLoop>(row, rows, packs, first, step, centre);
  });
  add_outside<kLoop>(row, rows, x, range, centre);
  return row;
}

// The data of a row's target. They are loaded before the row is read, and not waited for until they are used. Thread 0
// has both. The other threads have the logit in the general loop, which needs it.
template <typename T, Loop kLoop>
struct RowTarget {
  using A = Accumulator<T>;

  int target;
  T logit;
  A token_weight;

  __device__ __forceinline__ RowTarget(const Rows<T>& rows, const T* x, int64_t i, int target) : target(target) {
    if (!kIsPlain<kLoop> || threadIdx.x == 0) logit = x[target];
    if (threadIdx.x == 0) token_weight = rows.token_weights.at(i, target);
  }

  __device__ __forceinline__ A z(const Rows<T>& rows) const {
    return rows.template z<kIsPlain<kLoop>>(widen(not_before(logit)), target);
  }
  __device__ __forceinline__ A centre(const Rows<T>& rows) const {
    return kIsPlain<kLoop> ? A(0) : smoothing_centre(z(rows));
  }
};

// One thread's results of a row, in shared memory. The block's threads need the gradient's numbers. The others would
// take registers until they are written.
template <typename A>
struct RowResults {
  SavedRow<A> saved;
  GradientRow<A> gradient;
  int argmax;
};

// Called by one thread.
template <typename T, typename A>
__device__ __forceinline__ void write_row(const Rows<T>& rows, int64_t i, const SavedRow<A>& row, int argmax) {
  row.store(rows.saved_rows, rows.count, i);
  if (rows.predicted != nullptr) rows.predicted[i] = argmax;
}

// Writes a row without a target in the vocabulary: zeros if it is ignored, else NaN. Called by one thread.
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

// The type that computes the gradient off the target.
template <bool kPlain, typename T>
using OffTarget = std::conditional_t<kPlain && sizeof(T) == 2, GradientRowOfHalves, GradientRow<Accumulator<T>>>;

// The gradient off the target.
template <bool kPlain, typename T>
__device__ __forceinline__ T gradient_of(const Rows<T>& rows, T logit, int j, const OffTarget<kPlain, T>& row) {
  const Accumulator<T> x = widen(logit);
  if constexpr (kPlain) {
    return narrow<T>(row.off_target(x));
  } else {
    const auto g = row.off_target(rows.transform.apply(x, j), rows.class_weights.at(j));
    return narrow<T>(g * rows.transform.derivative(x));
  }
}

// The target's logit, in the thread that visits it. At the end that thread writes the target's gradient again, so that
// the loops need not know the target.
template <typename T>
struct TargetElement {
  int column;
  bool is_mine;
  T logit;

  // Read before anything is written, since the gradient may overwrite the logits. A target that is no column may be any
  // number.
  __device__ __forceinline__ TargetElement(const T* x, int target, bool is_mine) : column(target), is_mine(is_mine) {
    if (is_mine) logit = x[target];
  }

  // Written after everything else of the row.
  template <bool kPlain, typename A>
  __device__ __forceinline__ void write(const Rows<T>& rows, T* gradient, const GradientRow<A>& row) const {
    if (!is_mine) return;
    const A x = widen(not_before(logit));
    const A g = row.at_target(rows.template z<kPlain>(x, column));
    gradient[column] = narrow<T>(kPlain ? g : g * rows.transform.derivative(x));
  }
};

template <bool kPlain, typename T>
__device__ __forceinline__ void turn_into_gradient(const Rows<T>& rows, Pack<T>& pack, int first,
                                                   const OffTarget<kPlain, T>& row) {
  if constexpr (kPlain && sizeof(T) == 2) {
    PackWords<T> words(pack);
#pragma unroll
    for (uint32_t& word : words.word) {
      const float2 z = widen_pair<T>(word);
      word = narrow_pair<T>({row.off_target(z.x), row.off_target(z.y)});
    }
    pack = words.pack();
  } else {
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) {
      pack.value[k] = gradient_of<kPlain, T>(rows, pack.value[k], first + k, row);
    }
  }
}

// The block's share of a row's gradient, from logits in memory. It may overwrite them: each thread reads an element
// before it writes it. `range` is that of the logits.
template <bool kPlain, typename T, typename A>
__device__ __forceinline__ void write_gradient(const Rows<T>& rows, const T* x, T* gradient, const PackRange<T>& range,
                                               int target, const GradientRow<A>& row) {
  const OffTarget<kPlain, T> off_target(row);
  const auto element = [&](int j) { gradient[j] = gradient_of<kPlain, T>(rows, x[j], j, off_target); };
  const bool aligned = equally_aligned<T>(x, gradient);
  const bool is_mine =
      aligned ? range.visits(target, rows.vocab_size) : range.visits_by_elements(target, rows.vocab_size);
  const TargetElement<T> of_target(x, target, is_mine);
  if (aligned) {
    for_each_pack<kPacks<T>>(x, range, [&]<int kCount>(Pack<T>(&packs)[kCount], int first, int step) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int begin = first + i * step;
        turn_into_gradient<kPlain, T>(rows, packs[i], begin, off_target);
        store_pack(gradient + begin, packs[i]);
      }
    });
  } else {
    for (int j = range.begin + threadIdx.x; j < range.end; j += blockDim.x) element(j);
  }
  range.for_each_outside(rows.vocab_size, element);
  of_target.template write<kPlain>(rows, gradient, row);
}

}  // namespace pdl::cuda
