// Weighted cross-entropy on CUDA, by two calls.
//
// statistics_kernel fuses the logit transform, softmax statistics, argmax and the row's losses: reads e*N*V bytes.
// totals_kernel sums the rows in one block, always in the same order: reads at most 28*N bytes (48*N in float64).
// gradient_kernel fuses the softmax, the gradient and the transform's derivative: reads and writes e*N*V bytes each;
// its output may be the logits themselves.
//
// Regimes: a row a block, 128 threads for short rows and 256 for long ones; fewer rows than multiprocessors are cut
// into parts, whose statistics finish_rows_kernel merges. Accesses of 16 bytes for any V and any alignment, several
// of them under way in a thread, element by element only where gradient and logits are misaligned differently. Rows of
// ignored targets are not read. Only pointers and scalars are passed, and nothing is read back, so a step can be
// captured in a graph.
#include <torch/csrc/stable/library.h>

#include "loss.h"
#include "loss_totals.cuh"

namespace pdl::cuda {
namespace {

constexpr int kFinishThreads = 128;

// Each block of a row takes its part, blockIdx.y; `parts` [count, gridDim.y] holds what they find if there are several.
template <typename T, typename I, bool kPlain>
__global__ void __launch_bounds__(kLongRowThreads, kResident<T>)
    statistics_kernel(Rows<T, I> rows, RowStatistics<Accumulator<T>>* parts) {
  using A = Accumulator<T>;
  for (int64_t i = blockIdx.x; i < rows.count; i += gridDim.x) {
    const int64_t target = rows.targets[i];
    const bool counted = target != rows.ignore_index;
    if (!counted || !rows.in_vocabulary(target)) {
      if (threadIdx.x == 0 && blockIdx.y == 0) {
        write_row_without_target(rows, i, counted ? not_a_number<A>() : A(0));
      }
      continue;
    }
    const T* x = rows.logits + i * rows.stride;
    const A z_target = rows.template z<kPlain>(widen(x[target]), int(target));
    const PackRange<T> range(x, rows.vocab_size, int(blockIdx.y), int(gridDim.y));
    const auto row = merged_over_block(statistics_of_share<kPlain>(rows, x, range, smoothing_centre(z_target)));
    if (threadIdx.x == 0) {
      if (parts != nullptr) {
        parts[i * gridDim.y + blockIdx.y] = row;
      } else {
        write_row(rows, i, target, row, row_loss(row, z_target, int64_t(rows.vocab_size), rows.label_smoothing));
      }
    }
  }
}

// A warp a row.
template <typename T, typename I, bool kPlain>
__global__ void finish_rows_kernel(Rows<T, I> rows, const RowStatistics<Accumulator<T>>* parts, int count_of_parts) {
  using A = Accumulator<T>;
  const int lane = threadIdx.x % kWarp;
  const int64_t i = int64_t(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (i >= rows.count) return;
  const int64_t target = rows.targets[i];
  // Such a row is written already.
  if (target == rows.ignore_index || !rows.in_vocabulary(target)) return;
  RowStatistics<A> row;
  for (int part = lane; part < count_of_parts; part += kWarp) row = merge(row, parts[i * count_of_parts + part]);
  row = warp_reduce(row, [](const auto& a, const auto& b) { return merge(a, b); });
  if (lane == 0) {
    const A z_target = rows.template z<kPlain>(widen(rows.logits[i * rows.stride + target]), int(target));
    write_row(rows, i, target, row, row_loss(row, z_target, int64_t(rows.vocab_size), rows.label_smoothing));
  }
}

template <typename T, typename I, bool kPlain>
__global__ void gradient_kernel(Rows<T, I> rows, const Accumulator<T>* upstream, int64_t upstream_stride,
                                const Accumulator<T>* saved, VocabularySlice slice, T* gradients,
                                int64_t gradient_stride) {
  using A = Accumulator<T>;
  const Totals<A> sums{saved[0], saved[1], saved[2]};
  for (int64_t i = blockIdx.x; i < rows.count; i += gridDim.x) {
    T* gradient = gradients + i * gradient_stride;
    const int64_t id = rows.targets[i];
    if (id == rows.ignore_index) {
      fill_row(gradient, rows.vocab_size, PackRange<T>(gradient, rows.vocab_size, int(blockIdx.y), int(gridDim.y)),
               narrow<T>(A(0)));
      continue;
    }
    const A max = rows.outputs[kMax * rows.count + i], log_sum = rows.outputs[kLogSum * rows.count + i];
    const A weight = rows.outputs[kTokenWeight * rows.count + i] * rows.factor(i);
    const A factor = upstream != nullptr ? upstream[i * upstream_stride] : A(1);
    const RowScalars<A> scalars = row_scalars(factor, weight, rows.z_loss, max + log_sum, sums);
    const GradientRow<A> row(max, exp(-log_sum), scalars, rows.label_smoothing, slice.vocab_size);
    const T* x = rows.logits + i * rows.stride;
    const PackRange<T> range(x, rows.vocab_size, int(blockIdx.y), int(gridDim.y));
    // In another slice an id is that of no column. Out of range it may be cut to one: then the row's statistics are
    // NaN, and so is all of its gradient.
    write_gradient<kPlain>(rows, x, gradient, range, int(id - slice.first_id), row);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> loss_forward(Tensor logits, Tensor targets, OptionalTensor token_weight,
                                                        OptionalTensor row_weight, OptionalTensor logit_offset,
                                                        OptionalTensor normalizer, int64_t reduction,
                                                        int64_t ignore_index, double label_smoothing, double z_loss,
                                                        double logit_scale, double softcap, bool predict) {
  check_loss_arguments(logits, targets, token_weight, row_weight, logit_offset, normalizer);
  const LossOutputs outputs = loss_forward_outputs(
      logits, targets, token_weight, row_weight, logit_offset, normalizer,
      {Reduction(reduction), ignore_index, label_smoothing, z_loss, logit_scale, softcap}, predict);
  return {outputs.loss, outputs.rows, outputs.totals, outputs.predicted};
}

// Logits may be columns of a wider tensor: rows of their gradient lie as far from 16-byte boundaries as theirs, or it
// would be read and written element by element. What lies between is zero, since a product may read it. The twin of the
// fake kernel in pdl_ext/_ops.py.
Tensor allocate_gradient(const Tensor& logits) {
  const int64_t rows = logits.size(0), vocab_size = logits.size(1), bytes = logits.element_size();
  const int64_t between = std::max<int64_t>(logits.stride(0) - vocab_size, 0) % (16 / bytes);
  const int64_t stride = vocab_size + between;
  const Tensor gradient = allocate_strided(logits, logits.sizes(), {stride, 1}, logits.scalar_type());
  if (between > 0 && rows > 1) {
    Launcher(logits).zero(static_cast<char*>(gradient.mutable_data_ptr()) + vocab_size * bytes, stride * bytes,
                          between * bytes, rows - 1);
  }
  return gradient;
}

Tensor loss_backward(Tensor grad_loss, Tensor logits, Tensor targets, Tensor rows, Tensor totals,
                     OptionalTensor row_weight, OptionalTensor logit_offset, int64_t reduction, int64_t ignore_index,
                     double label_smoothing, double z_loss, double logit_scale, double softcap, int64_t first_id,
                     int64_t vocab_size) {
  const Tensor grad_logits = allocate_gradient(logits);
  loss_backward_into(grad_loss, logits, targets, rows, totals, row_weight, logit_offset,
                     {Reduction(reduction), ignore_index, label_smoothing, z_loss, logit_scale, softcap},
                     {first_id, vocab_size}, grad_logits);
  return grad_logits;
}

void loss_backward_(Tensor grad_loss, Tensor logits, Tensor targets, Tensor rows, Tensor totals,
                    OptionalTensor row_weight, OptionalTensor logit_offset, int64_t reduction, int64_t ignore_index,
                    double label_smoothing, double z_loss, double logit_scale, double softcap, int64_t first_id,
                    int64_t vocab_size) {
  check_rows_apart(logits, "logits");
  loss_backward_into(grad_loss, logits, targets, rows, totals, row_weight, logit_offset,
                     {Reduction(reduction), ignore_index, label_smoothing, z_loss, logit_scale, softcap},
                     {first_id, vocab_size}, logits);
}

std::tuple<Tensor, Tensor> reduce_rows(Tensor rows_tensor, Tensor targets, OptionalTensor row_weight,
                                       OptionalTensor normalizer, int64_t reduction, int64_t ignore_index,
                                       double z_loss) {
  check_reduce_arguments(rows_tensor, targets, row_weight, normalizer);
  const Launcher launch(rows_tensor);
  const ScalarType dtype = rows_tensor.scalar_type();
  const Tensor loss = allocate_loss(rows_tensor, targets.numel(), Reduction(reduction), dtype);
  const Tensor totals = allocate(rows_tensor, {kTotals}, dtype);
  const auto run = [&]<typename A>(A) {
    const auto of_targets = [&]<typename I>(I) {
      Rows<A, I> rows{};
      rows.count = targets.numel();
      rows.targets = static_cast<const I*>(targets.const_data_ptr());
      rows.ignore_index = ignore_index;
      rows.row_weight = data_or_null<A>(row_weight);
      rows.z_loss = A(z_loss);
      rows.outputs = static_cast<A*>(rows_tensor.mutable_data_ptr());
      launch(totals_kernel<A, I>, Grid{1, kTotalsThreads}, rows, Reduction(reduction), data_or_null<A>(normalizer),
             static_cast<A*>(totals.mutable_data_ptr()), static_cast<A*>(loss.mutable_data_ptr()));
    };
    targets.scalar_type() == ScalarType::Int ? of_targets(int32_t{}) : of_targets(int64_t{});
  };
  dtype == ScalarType::Double ? run(double{}) : run(float{});
  return {loss, totals};
}

}  // namespace

LossOutputs loss_forward_outputs(const Tensor& logits, const Tensor& targets, const OptionalTensor& token_weight,
                                 const OptionalTensor& row_weight, const OptionalTensor& logit_offset,
                                 const OptionalTensor& normalizer, const LossOptions& options, bool predict) {
  const Launcher launch(logits);
  const LossOutputs outputs = allocate_loss_outputs(logits, options.reduction, predict);
  dispatch_loss<__nv_bfloat16, __half>(logits, targets, [&]<typename T, typename I>(T, I) {
    using A = Accumulator<T>;
    Rows<T, I> rows = rows_of<T, I>(logits, targets, token_weight, row_weight, logit_offset, options, outputs.rows);
    A* loss = static_cast<A*>(outputs.loss.mutable_data_ptr());
    if (predict) rows.predicted = static_cast<int64_t*>(outputs.predicted.mutable_data_ptr());
    const bool plain = options.is_plain(logit_offset);
    const auto statistics = plain ? statistics_kernel<T, I, true> : statistics_kernel<T, I, false>;
    const int count_of_parts = parts_of_row(launch, logits);
    Grid grid{grid_for(rows.count), threads_for(rows.vocab_size)};
    if (count_of_parts == 1) {
      launch(statistics, grid, rows, nullptr);
    } else {
      constexpr int64_t kSize = sizeof(RowStatistics<A>) / sizeof(A);
      const Tensor scratch =
          allocate(logits, {rows.count * count_of_parts * kSize}, accumulator_dtype(logits.scalar_type()));
      auto* parts = static_cast<RowStatistics<A>*>(scratch.mutable_data_ptr());
      grid.parts = count_of_parts;
      launch(statistics, grid, rows, parts);
      constexpr int64_t kRowsOfBlock = kFinishThreads / kWarp;
      launch(plain ? finish_rows_kernel<T, I, true> : finish_rows_kernel<T, I, false>,
             Grid{(rows.count + kRowsOfBlock - 1) / kRowsOfBlock, kFinishThreads}, rows, parts, count_of_parts);
    }
    launch(totals_kernel<T, I>, Grid{1, kTotalsThreads}, rows, options.reduction, data_or_null<A>(normalizer),
           static_cast<A*>(outputs.totals.mutable_data_ptr()), loss);
  });
  return outputs;
}

void loss_backward_into(const OptionalTensor& grad_loss, const Tensor& logits, const Tensor& targets,
                        const Tensor& rows_tensor, const Tensor& totals_tensor, const OptionalTensor& row_weight,
                        const OptionalTensor& logit_offset, const LossOptions& options, const VocabularySlice& slice,
                        const Tensor& grad_logits) {
  check_loss_arguments(logits, targets, std::nullopt, row_weight, logit_offset);
  check_saved_rows(logits, targets, rows_tensor, totals_tensor, grad_loss, options.reduction, slice);
  const Launcher launch(logits);
  dispatch_loss<__nv_bfloat16, __half>(logits, targets, [&]<typename T, typename I>(T, I) {
    using A = Accumulator<T>;
    const Rows<T, I> rows =
        rows_of<T, I>(logits, targets, std::nullopt, row_weight, logit_offset, options, rows_tensor);
    const auto kernel = options.is_plain(logit_offset) ? gradient_kernel<T, I, true> : gradient_kernel<T, I, false>;
    const Grid grid{grid_for(rows.count), threads_for(rows.vocab_size), 0, parts_of_row(launch, logits)};
    launch(kernel, grid, rows, data_or_null<A>(grad_loss),
           options.reduction == Reduction::none && grad_loss ? grad_loss->stride(0) : 0,
           static_cast<const A*>(totals_tensor.const_data_ptr()), slice,
           static_cast<T*>(grad_logits.mutable_data_ptr()), grad_logits.stride(0));
  });
}

STABLE_TORCH_LIBRARY_IMPL(pdl_ext, CUDA, m) {
  m.impl("loss_forward", TORCH_BOX(&loss_forward));
  m.impl("loss_backward", TORCH_BOX(&loss_backward));
  m.impl("loss_backward_", TORCH_BOX(&loss_backward_));
  m.impl("reduce_rows", TORCH_BOX(&reduce_rows));
}

}  // namespace pdl::cuda
