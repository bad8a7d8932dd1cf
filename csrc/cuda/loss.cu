// Weighted cross-entropy on CUDA, by two calls.
//
// statistics_kernel fuses the logit transform, softmax statistics, argmax and the row's losses: reads e*N*V bytes.
// reduce_kernel sums the rows in one block, always in the same order: reads at most 32*N bytes (56*N in float64).
// gradient_kernel fuses the softmax, the gradient and the transform's derivative: reads and writes e*N*V bytes each;
// its output may be the logits themselves.
//
// correct_gradient_kernel does the same, but only if the upstream gradient is not the expected one.
//
// Regimes: a row a block, 128 threads for short rows and 256 for long ones. Gradients of fewer rows than
// multiprocessors are divided into shares. Statistics are not, so that those of a row do not depend on the number of
// rows. Their block takes the shares of loss_and_gradient's blocks one after the other, for the bits of that call.
// Accesses have 16 bytes for any V and any alignment, and each thread has several in flight. They are element by
// element only if gradient and logits are misaligned differently. Rows of ignored targets are not read. Only pointers
// and scalars are passed, and nothing is read back, so a step can be captured in a graph.
#include <torch/csrc/stable/library.h>

#include "loss.h"
#include "reduce_rows.cuh"

namespace pdl::cuda {
namespace {

constexpr int kCompleteThreads = 128;

// divided: the blocks among which a call of loss_and_gradient divides a row. The statistics have the bits of that call.
template <typename T, Loop kLoop>
__global__ void __launch_bounds__(kLongRowThreads, kResident<T>)
    statistics_kernel(Rows<T> rows, Cluster divided, Reducer<T> reducer) {
  using A = Accumulator<T>;
  using Statistics = StatisticsOf<kLoop, A>;
  uint32_t rows_before = 0;
  for (int64_t i = blockIdx.x; i < rows.count; i += gridDim.x) {
    const int64_t target = rows.targets[i];
    const bool counted = target != rows.ignore_index;
    if (!counted || !rows.in_vocabulary(target)) {
      if (threadIdx.x == 0) {
        write_row_without_target(rows, i, counted ? not_a_number<A>() : A(0));
        rows_before = reducer.row_written(rows.count);
      }
      continue;
    }
    const T* x = rows.logits + i * rows.stride;
    const RowTarget<T, kLoop> of_target(rows, x, i, int(target));
    const A centre = of_target.centre(rows);
    const Statistics row = block_reduce_of_shares<kMaxCluster, kLongRowThreads>(
        divided.blocks,
        [&](int rank) {
          const PackRange<T> range(x, rows.vocab_size, rank, divided);
          return statistics_of_share<kLoop>(rows, x, range, centre);
        },
        Statistics(), Merge());
    const A z_target = of_target.z(rows);
    if (threadIdx.x == 0) {
      write_row(rows, i, rows.loss_of(row, z_target, of_target.token_weight), argmax_of(row));
      rows_before = reducer.row_written(rows.count);
    }
  }
  reducer.end(rows, rows_before);
}

// One thread for each row.
template <typename A>
__global__ void complete_rows_kernel(A* saved_rows, int64_t count, RowOptions<A> options) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  auto row = SavedRow<A>::load(saved_rows, count, i);
  complete_row(row, options);
  row.store(saved_rows, count, i);
}

template <bool kPlain, typename T, typename A>
__device__ __forceinline__ void write_gradients(const Rows<T>& rows, const A* upstream, int64_t upstream_stride,
                                                const Factors<A>& factors, int64_t first_id, T* gradients,
                                                int64_t gradient_stride) {
  for (int64_t i = blockIdx.x; i < rows.count; i += gridDim.x) {
    T* gradient = gradients + i * gradient_stride;
    const int64_t id = rows.targets[i];
    if (id == rows.ignore_index) {
      fill_row(gradient, rows.vocab_size, PackRange<T>(gradient, rows.vocab_size, int(blockIdx.y), int(gridDim.y)),
               narrow<T>(A(0)));
      continue;
    }
    const A grad = upstream != nullptr ? upstream[i * upstream_stride] : factors.upstream;
    const auto row = gradient_row(rows.saved(i), rows.row_weight_at(i), grad, factors, rows.options);
    const T* x = rows.logits + i * rows.stride;
    const PackRange<T> range(x, rows.vocab_size, int(blockIdx.y), int(gridDim.y));
    // The id of another shard is no column here. An id out of range may be truncated to a column; the row's statistics
    // are then NaN, and so is its whole gradient.
    write_gradient<kPlain>(rows, x, gradient, range, int(id - first_id), row);
  }
}

template <typename T, bool kPlain>
__global__ void gradient_kernel(Rows<T> rows, const Accumulator<T>* upstream, int64_t upstream_stride,
                                const Accumulator<T>* factors, int64_t first_id, T* gradients,
                                int64_t gradient_stride) {
  write_gradients<kPlain>(rows, upstream, upstream_stride, Factors<Accumulator<T>>::load(factors), first_id, gradients,
                          gradient_stride);
}

// expected: where the upstream gradient is stored as the expected one of the next call, or nullptr.
template <typename T, bool kPlain>
__global__ void correct_gradient_kernel(Rows<T> rows, const Accumulator<T>* upstream,
                                        const Accumulator<T>* saved_factors, Accumulator<T>* expected, T* gradients,
                                        int64_t gradient_stride) {
  if (expected != nullptr && threadIdx.x == 0 && blockIdx.x == 0 && blockIdx.y == 0) *expected = *upstream;
  const auto factors = Factors<Accumulator<T>>::load(saved_factors);
  if (same_bits(factors.upstream, *upstream)) return;
  write_gradients<kPlain>(rows, upstream, 0, factors, 0, gradients, gradient_stride);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> loss_forward(Tensor logits, Tensor targets, OptionalTensor token_weight,
                                                        OptionalTensor row_weight, OptionalTensor logit_offset,
                                                        OptionalTensor normalizer, std::vector<double> options,
                                                        bool stats) {
  const LossInputs inputs{.targets = targets,
                          .token_weight = token_weight,
                          .row_weight = row_weight,
                          .logit_offset = logit_offset,
                          .normalizer = normalizer,
                          .options = LossOptions::unpack(options)};
  check_loss_arguments(logits, inputs);
  const LossOutputs outputs = loss_forward_outputs(logits, inputs, std::nullopt, stats);
  return {outputs.loss, outputs.saved_rows, outputs.factors, outputs.predicted};
}

Tensor loss_backward(Tensor grad_loss, Tensor logits, Tensor targets, Tensor saved_rows, Tensor factors,
                     OptionalTensor token_weight, OptionalTensor row_weight, OptionalTensor logit_offset,
                     std::vector<double> options, int64_t first_id, int64_t vocab_size) {
  const LossInputs inputs{.targets = targets,
                          .token_weight = token_weight,
                          .row_weight = row_weight,
                          .logit_offset = logit_offset,
                          .options = LossOptions::unpack(options)};
  const Tensor grad_logits = allocate_gradient(logits);
  loss_backward_into(grad_loss, logits, inputs, saved_rows, factors, {first_id, vocab_size}, grad_logits);
  return grad_logits;
}

void loss_backward_(Tensor grad_loss, Tensor logits, Tensor targets, Tensor saved_rows, Tensor factors,
                    OptionalTensor token_weight, OptionalTensor row_weight, OptionalTensor logit_offset,
                    std::vector<double> options, int64_t first_id, int64_t vocab_size) {
  const LossInputs inputs{.targets = targets,
                          .token_weight = token_weight,
                          .row_weight = row_weight,
                          .logit_offset = logit_offset,
                          .options = LossOptions::unpack(options)};
  check_rows_apart(logits, "logits");
  loss_backward_into(grad_loss, logits, inputs, saved_rows, factors, {first_id, vocab_size}, logits);
}

void correct_gradient_(Tensor gradient, OptionalTensor expected, Tensor grad_loss, Tensor logits, Tensor targets,
                       Tensor saved_rows, Tensor factors, OptionalTensor token_weight, OptionalTensor row_weight,
                       OptionalTensor logit_offset, std::vector<double> options) {
  const LossInputs inputs{.targets = targets,
                          .token_weight = token_weight,
                          .row_weight = row_weight,
                          .logit_offset = logit_offset,
                          .options = LossOptions::unpack(options)};
  check_correction_arguments(gradient, expected, grad_loss, logits, inputs, saved_rows, factors);
  const Launcher launch(logits);
  dispatch_logits<__nv_bfloat16, __half>(logits, [&]<typename T>(T) {
    using A = Accumulator<T>;
    const Rows<T> rows = rows_of<T>(logits, inputs, saved_rows, logits.size(1));
    const auto kernel = inputs.is_plain() ? correct_gradient_kernel<T, true> : correct_gradient_kernel<T, false>;
    // The fewest blocks that keep memory busy, since mostly they find the expected number and return.
    const int64_t multiprocessors = launch.attribute(cudaDevAttrMultiProcessorCount);
    const Grid grid{.blocks = std::min(rows.count, 2 * multiprocessors),
                    .threads = threads_for(rows.vocab_size),
                    .shares = shares_of_row(launch, logits),
                    .wants_shared = keeps_rows_on_chip(launch, logits)};
    launch(kernel, grid, rows, static_cast<const A*>(grad_loss.const_data_ptr()),
           static_cast<const A*>(factors.const_data_ptr()),
           expected ? static_cast<A*>(expected->mutable_data_ptr()) : nullptr,
           static_cast<T*>(gradient.mutable_data_ptr()), gradient.stride(0));
  });
}

void complete_rows_(Tensor saved_rows, std::vector<double> numbers, int64_t vocab_size) {
  const LossOptions options = LossOptions::unpack(numbers);
  check_complete_arguments(saved_rows);
  const Launcher launch(saved_rows);
  const int64_t count = saved_rows.size(1);
  const Grid grid{(count + kCompleteThreads - 1) / kCompleteThreads, kCompleteThreads};
  const auto run = [&]<typename A>(A) {
    launch(complete_rows_kernel<A>, grid, static_cast<A*>(saved_rows.mutable_data_ptr()), count,
           RowOptions<A>::of(options, vocab_size));
  };
  saved_rows.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
}

std::tuple<Tensor, Tensor> reduce_rows(Tensor saved_rows, Tensor targets, OptionalTensor row_weight,
                                       OptionalTensor normalizer, std::vector<double> options) {
  const LossInputs inputs{
      .targets = targets, .row_weight = row_weight, .normalizer = normalizer, .options = LossOptions::unpack(options)};
  check_reduce_arguments(saved_rows, inputs);
  const Launcher launch(saved_rows);
  const ScalarType dtype = saved_rows.scalar_type();
  const Tensor loss = allocate_loss(saved_rows, targets.numel(), inputs.options.reduction, dtype);
  const Tensor factors = allocate(saved_rows, {Factors<float>::kNumbers}, dtype);
  const auto run = [&]<typename A>(A) {
    Rows<A> rows{};
    rows.count = targets.numel();
    rows.targets = inputs.ids();
    rows.ignore_index = inputs.options.ignore_index;
    rows.row_weight = data_or_null<A>(row_weight);
    rows.options = RowOptions<A>::of(inputs.options, 0);
    rows.saved_rows = static_cast<A*>(saved_rows.mutable_data_ptr());
    // As the kernels of chunks do, and those of a modulation's rows, whose mean is known only here.
    const Grid one_block{.blocks = 1, .threads = kReduceThreads, .wants_shared = true};
    launch(reduce_kernel<A>, one_block, rows, inputs.options.reduction, data_or_null<A>(normalizer), nullptr,
           static_cast<A*>(factors.mutable_data_ptr()), static_cast<A*>(loss.mutable_data_ptr()));
  };
  dtype == ScalarType::Double ? run(double{}) : run(float{});
  return {loss, factors};
}

}  // namespace

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

LossOutputs loss_forward_outputs(const Tensor& logits, const LossInputs& inputs, const OptionalTensor& upstream,
                                 bool stats) {
  const Launcher launch(logits);
  const LossOutputs outputs = allocate_loss_outputs(logits, inputs.options.reduction, stats);
  dispatch_logits<__nv_bfloat16, __half>(logits, [&]<typename T>(T) {
    using A = Accumulator<T>;
    Rows<T> rows = rows_of<T>(logits, inputs, outputs.saved_rows, logits.size(1));
    if (stats) rows.predicted = static_cast<int64_t*>(outputs.predicted.mutable_data_ptr());
    const Reduced<A> reduced{.reduction = inputs.options.reduction,
                             .normalizer = data_or_null<A>(inputs.normalizer),
                             .upstream = data_or_null<A>(upstream),
                             .factors = static_cast<A*>(outputs.factors.mutable_data_ptr()),
                             .loss = static_cast<A*>(outputs.loss.mutable_data_ptr())};
    const Reducer<T> reducer(reduced);
    if constexpr (kReducedBy == ReducedBy::last_block) {
      // No kernel runs before that of the rows.
      if (rows.count > 0) launch.zero(reducer.counter(), sizeof(uint32_t), sizeof(uint32_t), 1);
    }
    dispatch_loop(inputs.loop(stats), [&]<Loop kLoop>() {
      const Grid grid{grid_for(rows.count), threads_for(rows.vocab_size), Reducer<T>::kSharedBytes};
      const Cluster divided(std::max(blocks_with_row_on_chip(launch, logits, kLoop), 1));
      launch(statistics_kernel<T, kLoop>, grid, rows, divided, reducer);
    });
    if (Reducer<T>::reduces(rows.count)) return;
    const Grid one_block{.blocks = 1, .threads = kReduceThreads, .starts_early = launch.is_hopper(reduce_kernel<T>)};
    launch(reduce_kernel<T>, one_block, rows, reduced.reduction, reduced.normalizer, reduced.upstream, reduced.factors,
           reduced.loss);
  });
  return outputs;
}

void loss_backward_into(const OptionalTensor& grad_loss, const Tensor& logits, const LossInputs& inputs,
                        const Tensor& saved_rows, const Tensor& factors, const VocabularyShard& shard,
                        const Tensor& grad_logits) {
  check_backward_arguments(logits, inputs, saved_rows, factors, grad_loss, shard);
  const Launcher launch(logits);
  dispatch_logits<__nv_bfloat16, __half>(logits, [&]<typename T>(T) {
    using A = Accumulator<T>;
    const Rows<T> rows = rows_of<T>(logits, inputs, saved_rows, shard.vocab_size);
    const auto kernel = inputs.is_plain() ? gradient_kernel<T, true> : gradient_kernel<T, false>;
    const Grid grid{grid_for(rows.count), threads_for(rows.vocab_size), 0, shares_of_row(launch, logits)};
    launch(kernel, grid, rows, data_or_null<A>(grad_loss),
           inputs.options.reduction == Reduction::none && grad_loss ? grad_loss->stride(0) : 0,
           static_cast<const A*>(factors.const_data_ptr()), shard.first_id,
           static_cast<T*>(grad_logits.mutable_data_ptr()), grad_logits.stride(0));
  });
}

STABLE_TORCH_LIBRARY_IMPL(pdl_ext, CUDA, m) {
  m.impl("loss_forward", TORCH_BOX(&loss_forward));
  m.impl("loss_backward", TORCH_BOX(&loss_backward));
  m.impl("loss_backward_", TORCH_BOX(&loss_backward_));
  m.impl("correct_gradient_", TORCH_BOX(&correct_gradient_));
  m.impl("complete_rows_", TORCH_BOX(&complete_rows_));
  m.impl("reduce_rows", TORCH_BOX(&reduce_rows));
}

}  // namespace pdl::cuda
