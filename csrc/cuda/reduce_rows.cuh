// From the saved rows to each row's term or their sum, and to the factors that the gradient needs. One block does it,
// always in the same order.
#pragma once

#include "launch.cuh"
#include "rows.cuh"

namespace pdl::cuda {

constexpr int kReduceThreads = 512;
// The number of rows that a thread loads before it uses any: one block has little else to hide its loads with.
template <typename A>
constexpr int kRowsAtOnce = 32 / int(sizeof(A));

// use(i, load(i)) for each row; the block's threads take rows in turns.
template <int kRowsAtOnce, typename Load, typename Use>
__device__ __forceinline__ void for_each_row(int64_t count, Load load, Use use) {
  for (int64_t first = threadIdx.x; first < count; first += kRowsAtOnce * blockDim.x) {
    decltype(load(first)) loaded[kRowsAtOnce];
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) loaded[k] = load(min(first + k * blockDim.x, count - 1));
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
      if (first + k * blockDim.x < count) use(first + k * blockDim.x, loaded[k]);
    }
  }
}

// upstream: the upstream gradient for the factors, or nullptr for 1. It may be in `factors`.
template <typename T>
__global__ void __launch_bounds__(kReduceThreads, 1)
    reduce_kernel(Rows<T> rows, Reduction reduction, const Accumulator<T>* normalizer, const Accumulator<T>* upstream,
                  Accumulator<T>* factors, Accumulator<T>* loss) {
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
  wait_for_previous_kernel();
  __shared__ A of_term;
  RowSums sums;
  if (reduction != Reduction::none || normalize) {
    for_each_row<kRowsAtOnce<A>>(rows.count, load, [&](int64_t, const Row& row) {
      if (row.counted) sums.add(row.token_weight, row.row_weight, row.ce, row.lse, row.modulation);
    });
    sums = block_sum(sums);
  }
  if (threadIdx.x == 0) {
    const Factors<double> found = factors_of(reduction, sums, normalizer, normalize);
    auto stored = found.as<A>();
    if (upstream != nullptr) stored.upstream = *upstream;
    stored.store(factors);
    if (reduction != Reduction::none) *loss = A(reduced_loss(sums, found, double(rows.options.z_loss)));
    of_term = A(found.weighted);
  }
  if (reduction != Reduction::none) return;
  __syncthreads();
  const A weighted = of_term;
  for_each_row<kRowsAtOnce<A>>(rows.count, load, [&](int64_t i, const Row& row) {
    loss[i] = row.counted ? row_term(row.row_weight * weighted, row.ce, row.lse, rows.options) : A(0);
  });
}

// The factors before any row has been read. They depend only on targets and weights; with a sum or a given normalizer
// they depend on neither.
template <typename T>
__global__ void __launch_bounds__(kReduceThreads, 1)
    factors_kernel(Rows<T> rows, Reduction reduction, const Accumulator<T>* normalizer, const Accumulator<T>* upstream,
                   Accumulator<T>* factors) {
  using A = Accumulator<T>;
  struct Row {
    bool counted;
    A token_weight, row_weight;
  };
  let_next_kernel_start();
  RowSums sums;
  if (reduction != Reduction::sum && normalizer == nullptr) {
    for_each_row<kRowsAtOnce<A>>(
        rows.count,
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
  auto found = factors_of(reduction, sums, normalizer, false).template as<A>();
  if (upstream != nullptr) found.upstream = *upstream;
  found.store(factors);
}

}  // namespace pdl::cuda
