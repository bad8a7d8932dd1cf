// From the rows' outputs to the loss, in one block and always in the same order: each row's term or their sum, and the
// factors that the gradient needs.
#pragma once

#include "launch.cuh"
#include "rows.cuh"

namespace pdl::cuda {

constexpr int kTotalsThreads = 1024;

__device__ inline void sum_over_block(RowSums& sums) {
  sums.weighted_ce = block_sum(sums.weighted_ce);
  sums.weight = block_sum(sums.weight);
  sums.lse_squares = block_sum(sums.lse_squares);
  sums.rows = block_sum(sums.rows);
}

template <typename A>
__device__ Totals<double> write_totals(Reduction reduction, const RowSums& sums, const A* normalizer, A* saved) {
  const Totals<double> factors = totals(reduction, sums, normalizer);
  saved[0] = A(factors.weighted);
  saved[1] = A(factors.rows);
  saved[2] = A(factors.correction);
  return factors;
}

template <typename T, typename I>
__global__ void __launch_bounds__(kTotalsThreads, 1)
    totals_kernel(Rows<T, I> rows, Reduction reduction, const Accumulator<T>* normalizer, Accumulator<T>* saved,
                  Accumulator<T>* loss) {
  using A = Accumulator<T>;
  RowSums sums;
  const A* outputs = rows.outputs;
  for (int64_t i = threadIdx.x; i < rows.count; i += blockDim.x) {
    const bool counted = rows.targets[i] != rows.ignore_index;
    const A weight = outputs[kTokenWeight * rows.count + i], ce = outputs[kCe * rows.count + i];
    const A lse = outputs[kMax * rows.count + i] + outputs[kLogSum * rows.count + i];
    if (reduction == Reduction::none) {
      loss[i] = counted ? row_term(weight * rows.factor(i), ce, rows.z_loss, lse) : A(0);
    } else if (counted) {
      sums.add(double(weight) * double(rows.factor(i)), ce, lse);
    }
  }
  if (reduction != Reduction::none) sum_over_block(sums);
  if (threadIdx.x == 0) {
    const Totals<double> factors = write_totals(reduction, sums, normalizer, saved);
    if (reduction != Reduction::none) *loss = A(reduced_loss(sums, factors, double(rows.z_loss)));
  }
}

// The factors before any row has been read: they depend on targets and weights alone.
template <typename T, typename I>
__global__ void __launch_bounds__(kTotalsThreads, 1)
    totals_ahead_kernel(Rows<T, I> rows, Reduction reduction, const Accumulator<T>* normalizer, Accumulator<T>* saved) {
  RowSums sums;
  for (int64_t i = threadIdx.x; i < rows.count; i += blockDim.x) {
    const int64_t target = rows.targets[i];
    if (target == rows.ignore_index) continue;
    const Accumulator<T> weight = rows.in_vocabulary(target) ? rows.weight_of(target) : not_a_number<Accumulator<T>>();
    sums.add(double(weight) * double(rows.factor(i)), 0.0, 0.0);
  }
  sum_over_block(sums);
  if (threadIdx.x == 0) write_totals(reduction, sums, normalizer, saved);
}

}  // namespace pdl::cuda
