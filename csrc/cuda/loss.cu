// Weighted cross-entropy on CUDA.
//
// statistics_kernel fuses the logit transform, softmax statistics, argmax and the row's losses: reads e*N*V bytes.
// totals_kernel sums the rows in one block, always in the same order: reads at most 28*N bytes.
// gradient_kernel fuses the softmax, the gradient and the transform's derivative: reads and writes e*N*V bytes each;
// its output may be the logits themselves.
//
// Regimes: a row a block, 128 threads for short rows and 512 for long ones; accesses of 16 bytes for any V and any
// alignment, four of them under way in a thread, element by element only where gradient and logits are misaligned
// differently. Rows of ignored targets are not read. Only pointers and scalars are passed, and nothing is read back, so
// a step can be captured in a graph.
#include <torch/csrc/stable/library.h>

#include "../loss_arguments.h"
#include "block_reduce.cuh"
#include "launch.cuh"
#include "vector_access.cuh"

namespace pdl::cuda {
namespace {

constexpr int kLongRow = 4096;
constexpr int kShortRowThreads = 128;
constexpr int kLongRowThreads = 512;
constexpr int kTotalsThreads = 1024;
// Vectors that a thread has under way at once; docs/kernels.md has the count of instructions.
constexpr int kPacks = 4;

int threads_for(int64_t vocab_size) {
  return vocab_size <= kLongRow ? kShortRowThreads : kLongRowThreads;
}

template <typename T, typename I>
struct Rows {
  const T* logits;
  int64_t stride;
  int64_t count;
  int vocab_size;
  const I* targets;
  int64_t ignore_index;
  const Accumulator<T>* row_weight;

  __device__ bool in_vocabulary(int64_t target) const { return target >= 0 && target < vocab_size; }
};

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
      max = z[i][k] > max ? z[i][k] : max;
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

template <typename T, typename I, bool kPlain>
__global__ void statistics_kernel(Rows<T, I> rows, LogitTransform<Accumulator<T>> transform, const float* token_weight,
                                  Accumulator<T> label_smoothing, Accumulator<T> z_loss, Accumulator<T>* outputs,
                                  int64_t* predicted, Accumulator<T>* loss_of_row) {
  using A = Accumulator<T>;
  for (int64_t i = blockIdx.x; i < rows.count; i += gridDim.x) {
    const int64_t target = rows.targets[i];
    const bool counted = target != rows.ignore_index;
    if (!counted || !rows.in_vocabulary(target)) {
      if (threadIdx.x == 0) {
        const A fill = counted ? not_a_number<A>() : A(0);
        for (int k = 0; k < kRowOutputs; ++k) outputs[k * rows.count + i] = fill;
        if (predicted != nullptr) predicted[i] = -1;
        if (loss_of_row != nullptr) loss_of_row[i] = fill;
      }
      continue;
    }
    const T* x = rows.logits + i * rows.stride;
    const A x_target = widen(x[target]);
    const A z_target = kPlain ? x_target : transform.apply(x_target, target);
    const A centre = smoothing_centre(z_target);
    RowStatistics<A> row;
    for_each_pack<kPacks>(
        x, rows.vocab_size,
        [&](const auto& packs, int first, int step) {
          add_packs<kPlain>(row, packs, first, step, predicted != nullptr, transform, centre);
        },
        [&](int j) {
          const A value = widen(x[j]);
          add_element<kPlain>(row, kPlain ? value : transform.apply(value, j), j, centre);
        });
    row = block_reduce(row, RowStatistics<A>(), [](const auto& a, const auto& b) { return merge(a, b); });
    if (threadIdx.x == 0) {
      const RowLoss<A> loss = row_loss(row, z_target, int64_t(rows.vocab_size), label_smoothing);
      const A weight = token_weight != nullptr ? A(token_weight[target]) : A(1);
      outputs[kMax * rows.count + i] = row.max;
      outputs[kLogSum * rows.count + i] = loss.log_sum;
      outputs[kNll * rows.count + i] = loss.nll;
      outputs[kCe * rows.count + i] = loss.ce;
      outputs[kTokenWeight * rows.count + i] = weight;
      if (predicted != nullptr) predicted[i] = row.argmax;
      if (loss_of_row != nullptr) {
        const A row_weight = rows.row_weight != nullptr ? rows.row_weight[i] : A(1);
        loss_of_row[i] = row_term(weight * row_weight, loss.ce, z_loss, row.max + loss.log_sum);
      }
    }
  }
}

template <typename A, typename I>
__global__ void __launch_bounds__(kTotalsThreads)
    totals_kernel(const A* outputs, const A* row_weight, const I* targets, int64_t count, int64_t ignore_index,
                  Reduction reduction, A z_loss, const A* normalizer, A* saved, A* loss) {
  RowSums sums;
  if (reduction != Reduction::none) {
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
      if (targets[i] == ignore_index) continue;
      const double factor = row_weight != nullptr ? double(row_weight[i]) : 1.0;
      sums.add(double(outputs[kTokenWeight * count + i]) * factor, outputs[kCe * count + i],
               outputs[kMax * count + i] + outputs[kLogSum * count + i]);
    }
    sums.weighted_ce = block_sum(sums.weighted_ce);
    sums.weight = block_sum(sums.weight);
    sums.lse_squares = block_sum(sums.lse_squares);
    sums.rows = block_sum(sums.rows);
  }
  if (threadIdx.x == 0) {
    const double divisor = normalizer != nullptr ? double(*normalizer) : 0.0;
    const Totals<double> factors = totals(reduction, sums, normalizer != nullptr ? &divisor : nullptr);
    saved[0] = A(factors.weighted);
    saved[1] = A(factors.rows);
    saved[2] = A(factors.correction);
    if (reduction != Reduction::none) *loss = A(reduced_loss(sums, factors, z_loss));
  }
}

template <typename T>
__device__ __forceinline__ void fill_row(T* gradient, int vocab_size, T fill) {
  Pack<T> pack;
#pragma unroll
  for (int k = 0; k < kVector<T>; ++k) pack.value[k] = fill;
  const PackRange<T> range(gradient, vocab_size);
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

// No __restrict__: the gradient may lie where the logits are, and each thread reads an element before it writes it.
template <typename T, typename I, bool kPlain>
__global__ void gradient_kernel(Rows<T, I> rows, LogitTransform<Accumulator<T>> transform,
                                const Accumulator<T>* upstream, int64_t upstream_stride, const Accumulator<T>* outputs,
                                const Accumulator<T>* saved, Accumulator<T> label_smoothing, Accumulator<T> z_loss,
                                T* gradients, int64_t gradient_stride) {
  using A = Accumulator<T>;
  const Totals<A> sums{saved[0], saved[1], saved[2]};
  for (int64_t i = blockIdx.x; i < rows.count; i += gridDim.x) {
    T* gradient = gradients + i * gradient_stride;
    const int64_t id = rows.targets[i];
    if (id == rows.ignore_index) {
      fill_row(gradient, rows.vocab_size, narrow<T>(A(0)));
      continue;
    }
    // Out of range it may be cut to another one: that row's statistics are NaN, and so is all of its gradient.
    const int target = int(id);
    const A max = outputs[kMax * rows.count + i], log_sum = outputs[kLogSum * rows.count + i];
    const A weight = outputs[kTokenWeight * rows.count + i] * (rows.row_weight != nullptr ? rows.row_weight[i] : A(1));
    const RowScalars<A> scalars = row_scalars(upstream[i * upstream_stride], weight, z_loss, max + log_sum, sums);
    const GradientRow<A> row(max, log_sum, scalars, label_smoothing, rows.vocab_size);
    const T* x = rows.logits + i * rows.stride;
    const auto element = [&](int j) { gradient[j] = gradient_of<kPlain>(x[j], j, target, transform, row); };
    if (equally_aligned<T>(x, gradient)) {
      for_each_pack<kPacks>(
          x, rows.vocab_size,
          [&]<int kCount>(Pack<T>(&packs)[kCount], int first, int step) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
              const int begin = first + i * step;
#pragma unroll
              for (int k = 0; k < kVector<T>; ++k) {
                T& value = packs[i].value[k];
                value = gradient_of<kPlain>(value, begin + k, target, transform, row);
              }
              store_pack(gradient + begin, packs[i]);
            }
          },
          element);
    } else {
      for (int j = threadIdx.x; j < rows.vocab_size; j += blockDim.x) element(j);
    }
  }
}

template <typename T, typename I>
Rows<T, I> rows_of(const Tensor& logits, const Tensor& targets, int64_t ignore_index,
                   const OptionalTensor& row_weight) {
  return {static_cast<const T*>(logits.const_data_ptr()),
          logits.stride(0),
          logits.size(0),
          int(logits.size(1)),
          static_cast<const I*>(targets.const_data_ptr()),
          ignore_index,
          data_or_null<Accumulator<T>>(row_weight)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> loss_forward(Tensor logits, Tensor targets, OptionalTensor token_weight,
                                                        OptionalTensor row_weight, OptionalTensor logit_offset,
                                                        OptionalTensor normalizer, int64_t reduction,
                                                        int64_t ignore_index, double label_smoothing, double z_loss,
                                                        double logit_scale, double softcap, bool predict,
                                                        bool /*inplace_backward*/) {
  check_loss_arguments(logits, targets, token_weight, row_weight, logit_offset, normalizer);
  const LossOptions options{Reduction(reduction), ignore_index, label_smoothing, z_loss, logit_scale, softcap};
  const Launcher launch(logits);
  const LossOutputs outputs = allocate_loss_outputs(logits, options.reduction, predict);
  dispatch_loss<__nv_bfloat16, __half>(logits, targets, [&]<typename T, typename I>(T, I) {
    using A = Accumulator<T>;
    const Rows<T, I> rows = rows_of<T, I>(logits, targets, ignore_index, row_weight);
    A* of_rows = static_cast<A*>(outputs.rows.mutable_data_ptr());
    A* loss = static_cast<A*>(outputs.loss.mutable_data_ptr());
    int64_t* predicted = predict ? static_cast<int64_t*>(outputs.predicted.mutable_data_ptr()) : nullptr;
    const auto statistics =
        options.is_plain(logit_offset) ? statistics_kernel<T, I, true> : statistics_kernel<T, I, false>;
    launch(statistics, Grid{grid_for(rows.count), threads_for(rows.vocab_size)}, rows,
           options.transform<A>(logit_offset), data_or_null<float>(token_weight), A(label_smoothing), A(z_loss),
           of_rows, predicted, options.reduction == Reduction::none ? loss : nullptr);
    launch(totals_kernel<A, I>, Grid{1, kTotalsThreads}, of_rows, rows.row_weight, rows.targets, rows.count,
           ignore_index, options.reduction, A(z_loss), data_or_null<A>(normalizer),
           static_cast<A*>(outputs.totals.mutable_data_ptr()), loss);
  });
  return {outputs.loss, outputs.rows, outputs.totals, outputs.predicted};
}

void loss_backward_into(const Tensor& grad_loss, const Tensor& logits, const Tensor& targets, const Tensor& rows_tensor,
                        const Tensor& totals_tensor, const OptionalTensor& row_weight,
                        const OptionalTensor& logit_offset, const LossOptions& options, const Tensor& grad_logits) {
  check_loss_arguments(logits, targets, std::nullopt, row_weight, logit_offset);
  check_saved_rows(logits, rows_tensor, totals_tensor, grad_loss, options.reduction);
  const Launcher launch(logits);
  dispatch_loss<__nv_bfloat16, __half>(logits, targets, [&]<typename T, typename I>(T, I) {
    using A = Accumulator<T>;
    const Rows<T, I> rows = rows_of<T, I>(logits, targets, options.ignore_index, row_weight);
    const auto kernel = options.is_plain(logit_offset) ? gradient_kernel<T, I, true> : gradient_kernel<T, I, false>;
    launch(kernel, Grid{grid_for(rows.count), threads_for(rows.vocab_size)}, rows, options.transform<A>(logit_offset),
           static_cast<const A*>(grad_loss.const_data_ptr()),
           options.reduction == Reduction::none ? grad_loss.stride(0) : 0,
           static_cast<const A*>(rows_tensor.const_data_ptr()), static_cast<const A*>(totals_tensor.const_data_ptr()),
           A(options.label_smoothing), A(options.z_loss), static_cast<T*>(grad_logits.mutable_data_ptr()),
           grad_logits.stride(0));
  });
}

Tensor loss_backward(Tensor grad_loss, Tensor logits, Tensor targets, Tensor rows, Tensor totals,
                     OptionalTensor row_weight, OptionalTensor logit_offset, int64_t reduction, int64_t ignore_index,
                     double label_smoothing, double z_loss, double logit_scale, double softcap) {
  const Tensor grad_logits = torch::stable::new_empty(logits, logits.sizes());
  loss_backward_into(grad_loss, logits, targets, rows, totals, row_weight, logit_offset,
                     {Reduction(reduction), ignore_index, label_smoothing, z_loss, logit_scale, softcap}, grad_logits);
  return grad_logits;
}

void loss_backward_(Tensor grad_loss, Tensor logits, Tensor targets, Tensor rows, Tensor totals,
                    OptionalTensor row_weight, OptionalTensor logit_offset, int64_t reduction, int64_t ignore_index,
                    double label_smoothing, double z_loss, double logit_scale, double softcap) {
  loss_backward_into(grad_loss, logits, targets, rows, totals, row_weight, logit_offset,
                     {Reduction(reduction), ignore_index, label_smoothing, z_loss, logit_scale, softcap}, logits);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pdl_ext, CUDA, m) {
  m.impl("loss_forward", TORCH_BOX(&loss_forward));
  m.impl("loss_backward", TORCH_BOX(&loss_backward));
  m.impl("loss_backward_", TORCH_BOX(&loss_backward_));
}

}  // namespace pdl::cuda
