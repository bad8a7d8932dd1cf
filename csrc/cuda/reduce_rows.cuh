// From the saved rows to each row's term or their sum, and to the factors that the gradient needs. One block does it,
// always in the same order: that of reduce_kernel, or the last block of the rows.
#pragma once

#include "launch.cuh"
#include "rows.cuh"

namespace pdl::cuda {

constexpr int kReduceThreads = 512;
// The number of rows that a thread loads before it uses any: one block has little else to hide its loads with.
template <typename A>
constexpr int kRowsAtOnce = 32 / int(sizeof(A));

// use(i, load(i)) for each row of one of `threads` threads, which take rows in turns.
template <int kRowsAtOnce, typename Load, typename Use>
__device__ __forceinline__ void for_each_row(int64_t count, unsigned thread, unsigned threads, Load load, Use use) {
  for (int64_t first = thread; first < count; first += kRowsAtOnce * threads) {
    decltype(load(first)) loaded[kRowsAtOnce];
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) loaded[k] = load(min(first + k * threads, count - 1));
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
      if (first + k * threads < count) use(first + k * threads, loaded[k]);
    }
  }
}

// Where the loss and the factors go, and what they take beside the rows. `upstream` of the factors: what a gradient was
// computed for, or nullptr for 1. It may lie in `factors`.
template <typename A>
struct Reduced {
  Reduction reduction;
  const A* normalizer;
  const A* upstream;
  A* factors;
  A* loss;
};

// By one block. sum_over(load, add): the sum over the rows, valid in thread 0.
template <int kRowsAtOnce, typename T, typename SumOver>
__device__ __forceinline__ void write_reduced(const Rows<T>& rows, const Reduced<Accumulator<T>>& to,
                                              SumOver sum_over) {
  using A = Accumulator<T>;
  struct Row {
    bool counted;
    A token_weight, row_weight, ce, lse, modulation;
  };
  const auto load = [&](int64_t i) -> Row {
    const SavedRow<A> saved = rows.saved(i);
    return {rows.targets[i] != rows.ignore_index,
            saved.token_weight,
            rows.row_weight_at(i),
            saved.modulated_ce(),
            saved.lse(),
            saved.modulation};
  };
  const bool normalize = rows.options.modulation_normalize;
  __shared__ A of_term;
  RowSums sums;
  if (to.reduction != Reduction::none || normalize) {
    sums = sum_over(load, [](RowSums& sums, const Row& row) {
      if (row.counted) sums.add(row.token_weight, row.row_weight, row.ce, row.lse, row.modulation);
    });
  }
  if (threadIdx.x == 0) {
    const Factors<double> found = factors_of(to.reduction, sums, to.normalizer, normalize);
    auto stored = found.as<A>();
    if (to.upstream != nullptr) stored.upstream = *to.upstream;
    stored.store(to.factors);
    if (to.reduction != Reduction::none) *to.loss = A(reduced_loss(sums, found, double(rows.options.z_loss)));
    of_term = A(found.weighted);
  }
  if (to.reduction != Reduction::none) return;
  __syncthreads();
  const A weighted = of_term;
  for_each_row<kRowsAtOnce>(rows.count, threadIdx.x, blockDim.x, load, [&](int64_t i, const Row& row) {
    to.loss[i] = row.counted ? row_term(row.row_weight * weighted, row.ce, row.lse, rows.options) : A(0);
  });
}

template <typename T>
__global__ void __launch_bounds__(kReduceThreads, 1)
    reduce_kernel(Rows<T> rows, Reduction reduction, const Accumulator<T>* normalizer, const Accumulator<T>* upstream,
                  Accumulator<T>* factors, Accumulator<T>* loss) {
  using A = Accumulator<T>;
  wait_for_previous_kernel();
  write_reduced<kRowsAtOnce<A>>(rows, Reduced<A>{reduction, normalizer, upstream, factors, loss},
                                [&](auto load, auto add) {
                                  RowSums sums;
                                  for_each_row<kRowsAtOnce<A>>(rows.count, threadIdx.x, blockDim.x, load,
                                                               [&](int64_t, const auto& row) { add(sums, row); });
                                  return block_sum(sums);
                                });
}

// Who does that behind the rows: reduce_kernel, or the block that has written the last row. That is a launch less, and
// for each row a fence and an atomic addition. A card has to decide between them: docs/kernels.md.
enum class ReducedBy { kernel, last_block };
#if !defined(PDL_REDUCED_BY)
#define PDL_REDUCED_BY kernel
#endif
constexpr ReducedBy kReducedBy = ReducedBy::PDL_REDUCED_BY;

// What the rows' kernels do for it. Thread 0 calls row_written() behind each row that it writes, and keeps the result
// of the last one. Then all threads of its block call end(). Their launch has kSharedBytes at least.
template <ReducedBy, typename A>
struct RowReducer;

template <typename A>
struct RowReducer<ReducedBy::kernel, A> {
  static constexpr int kSharedBytes = 0;

  explicit RowReducer(const Reduced<A>&) {}

  static bool reduces(int64_t) { return false; }
  __device__ void clear() const {}
  __device__ uint32_t row_written(int64_t) const { return 0; }
  template <typename T>
  __device__ void end(const Rows<T>&, uint32_t) const {}
};

template <typename A>
struct RowReducer<ReducedBy::last_block, A> {
  static constexpr int kSharedBytes = kReduceThreads / kWarp * int(sizeof(RowSums));
  // Fewer than in reduce_kernel: the registers are those of a kernel of rows.
  static constexpr int kRowsAtOnce = 16 / int(sizeof(A));

  Reduced<A> to;

  explicit RowReducer(const Reduced<A>& to) : to(to) {}

  // Of no rows there is no last one. Beyond 32 bits the counter starts again before the last one.
  __host__ __device__ static bool reduces(int64_t rows) { return rows > 0 && rows <= int64_t(~0u); }

  // Rows are counted where the loss will be: memory of this call alone, whichever streams and graphs run beside it. The
  // last block writes over it, and the next call clears it before its first row, so that a replay does so too.
  __host__ __device__ uint32_t* counter() const { return reinterpret_cast<uint32_t*>(to.loss); }
  // By one thread of a kernel before that of the rows.
  __device__ void clear() const { *counter() = 0; }

  __device__ uint32_t row_written(int64_t rows) const { return arrive(counter(), uint32_t(rows)); }

  template <typename T>
  __device__ void end(const Rows<T>& rows, uint32_t rows_before) const {
    const bool is_last = threadIdx.x == 0 && reduces(rows.count) && rows_before == uint32_t(rows.count - 1);
    // Before the barrier, which hands on to the block what this thread sees behind it.
    if (is_last) fence_behind_arrivals();
    // Behind it no thread reads what it kept of a row in the launch's shared memory.
    if (__syncthreads_or(is_last) == 0) return;
    // Another block may still be about to read the factors of one call. They are written again with the bits that
    // factors_kernel gave them, except for the correction, which no gradient needs.
    write_reduced<kRowsAtOnce>(rows, to, [&](auto load, auto add) {
      return block_sum_of(kReduceThreads, dynamic_shared_memory<RowSums>(), [&](int thread) {
        RowSums sums;
        for_each_row<kRowsAtOnce>(rows.count, thread, kReduceThreads, load,
                                  [&](int64_t, const auto& row) { add(sums, row); });
        return sums;
      });
    });
  }
};

template <typename T>
using Reducer = RowReducer<kReducedBy, Accumulator<T>>;

// The factors before any row has been read. They depend only on targets and weights; with a sum or a given normalizer
// they depend on neither.
template <typename T>
__global__ void __launch_bounds__(kReduceThreads, 1)
    factors_kernel(Rows<T> rows, Reduction reduction, const Accumulator<T>* normalizer, const Accumulator<T>* upstream,
                   Accumulator<T>* factors, Reducer<T> reducer) {
  using A = Accumulator<T>;
  struct Row {
    bool counted;
    A token_weight, row_weight;
  };
  let_next_kernel_start();
  RowSums sums;
  if (reduction != Reduction::sum && normalizer == nullptr) {
    for_each_row<kRowsAtOnce<A>>(
        rows.count, threadIdx.x, blockDim.x,
        [&](int64_t i) -> Row {
          const int64_t target = rows.targets[i];
          const A weight = rows.in_vocabulary(target) ? rows.token_weights.at(i, target) : not_a_number<A>();
          return {target != rows.ignore_index, weight, rows.row_weight_at(i)};
        },
        [&](int64_t, const Row& row) {
          if (row.counted) sums.add_weight(row.token_weight, row.row_weight);
        });
    sums = block_sum(sums);
  }
  if (threadIdx.x > 0) return;
  reducer.clear();
  auto found = factors_of(reduction, sums, normalizer, false).template as<A>();
  if (upstream != nullptr) found.upstream = *upstream;
  found.store(factors);
}

}  // namespace pdl::cuda
