// Weighted cross-entropy on the CPU, by two calls.
//
// Forward fuses the logit transform, the row's statistics, its weight and the reduction, and reads memory once.
// Backward fuses the softmax, the gradient and the transform's derivative, and reads and writes memory once.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "check_ids.h"
#include "huge_pages.h"
#include "loss.h"
#include "rows.h"

namespace pdl::cpu {
namespace {

// `upstream`: the upstream gradient for which the gradient is computed afterwards.
template <Loop kLoop, typename T>
void forward(const Forward<T>& call, Accumulator<T> upstream) {
  using A = Accumulator<T>;
  const Shares shares(call.logits.rows, call.logits.vocab_size);
  std::vector<StatisticsOf<kLoop, A>> of_share(shares.of_row > 1 ? shares.count() : 0);
  const bool predict = call.predicted != nullptr;
  simd_parallel_for(shares.count(), shares.size, [&](int64_t begin, int64_t end, auto instructions) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t i = shares.row(s), target = call.targets[i];
      if (target == call.ignore_index) {
        if (shares.of_row == 1) call.ignore_row(i);
        continue;
      }
      const T* x = call.logits.row(i);
      const A z_target = call.z_of(x, target), centre = smoothing_centre(z_target);
      if (shares.of_row == 1) {
        const auto row = row_statistics<kLoop, false>(instructions, x, call.logits.vocab_size, call.transform,
                                                      call.class_weights, centre, predict);
        call.finish_row(i, row, z_target);
      } else {
        of_share[s] = segment_statistics<kLoop, false>(instructions, x, shares.first(s), shares.last(s), call.transform,
                                                       call.class_weights, centre, predict);
      }
    }
  });
  if (shares.of_row > 1) {
    // With the same instructions as above, which round in the same way.
    simd_parallel_for(shares.rows, shares.of_row, [&](int64_t begin, int64_t end, auto) {
      for (int64_t i = begin; i < end; ++i) {
        if (call.targets[i] == call.ignore_index) {
          call.ignore_row(i);
          continue;
        }
        StatisticsOf<kLoop, A> row;
        for (int64_t s = i * shares.of_row; s < (i + 1) * shares.of_row; ++s) row = merge(row, of_share[s]);
        call.finish_row(i, row, call.z_of(call.logits.row(i), call.targets[i]));
      }
    });
  }
  call.finish(upstream);
}

// The gradient of the columns from begin to before end, where begin is the start of a segment; `gradient` may be x.
template <bool kPlain, Capability kCapability, typename T, typename A>
PDL_INLINE void row_gradient(Instructions<kCapability> instructions, const T* x, T* gradient, int64_t begin,
                             int64_t end, int64_t target, const LogitTransform<A>& transform,
                             const ClassWeights<A>& weights, const GradientRow<A>& row) {
  constexpr int64_t kWidth = kTile<kPlain, T>;
  const bool has_target = target >= begin && target < end;
  // Read before the loop, which may overwrite x.
  const A x_target = has_target ? A(widen(x[target])) : A(0);
  alignas(64) A kept[kWidth];
  for (int64_t first = begin; first < end; first += kWidth) {
    const int64_t n = std::min(kWidth, end - first);
    A max, origin;
    const auto* z = load_tile<kPlain>(x, first, n, transform, kept, &max);
    sum_exponentials<true, false, kPlain>(instructions, z, n, max, kept, &origin, static_cast<A*>(nullptr));
    tile_gradient<kPlain>(instructions, x, kept, origin, gradient, first, n, transform, weights, row, false);
  }
  if (!has_target) return;
  const A z_target = kPlain ? x_target : transform.apply(x_target, target);
  gradient[target] = target_gradient<kPlain, T>(x_target, z_target, transform, row);
}

// Without grad_loss the upstream gradient is that in the factors.
template <bool kPlain, typename T>
void backward(const OptionalTensor& grad_loss, const Tensor& logits_tensor, const LossInputs& inputs,
              const Tensor& saved_rows_tensor, const Tensor& factors_tensor, const VocabularyShard& shard,
              const Tensor& grad_logits) {
  using A = Accumulator<T>;
  const Logits<T> logits(logits_tensor);
  const Targets targets = inputs.ids();
  const auto transform = inputs.transform<A>();
  const auto class_weights = inputs.class_weights<A>();
  const auto options = RowOptions<A>::of(inputs.options, shard.vocab_size);
  const bool of_rows = inputs.options.reduction == Reduction::none && logits.rows > 0;
  const A* upstream = data_or_null<A>(grad_loss);
  const int64_t upstream_stride = of_rows ? grad_loss->stride(0) : 0;
  const A* saved_rows = static_cast<const A*>(saved_rows_tensor.const_data_ptr());
  const auto factors = Factors<A>::load(static_cast<const A*>(factors_tensor.const_data_ptr()));
  const A* row_weight = data_or_null<A>(inputs.row_weight);
  T* gradients = static_cast<T*>(grad_logits.mutable_data_ptr());
  const int64_t gradient_stride = grad_logits.stride(0), ignore_index = inputs.options.ignore_index;

  const Shares shares(logits.rows, logits.vocab_size);
  simd_parallel_for<kIsBFloat16<T>>(shares.count(), shares.size, [&](int64_t begin, int64_t end, auto instructions) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t i = shares.row(s), first = shares.first(s), last = shares.last(s);
      T* gradient = gradients + i * gradient_stride;
      const int64_t target = targets[i];
      if (target < 0 || target >= shard.vocab_size || target == ignore_index) {
        std::fill(gradient + first, gradient + last, narrow<T>(target == ignore_index ? A(0) : not_a_number<A>()));
        continue;
      }
      const auto saved = SavedRow<A>::load(saved_rows, logits.rows, i);
      const A weight = row_weight != nullptr ? row_weight[i] : A(1);
      const A grad = upstream != nullptr ? upstream[i * upstream_stride] : factors.upstream;
      const auto row = gradient_row(saved, weight, grad, factors, options);
      row_gradient<kPlain>(instructions, logits.row(i), gradient, first, last, target - shard.first_id, transform,
                           class_weights, row);
    }
  });
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
  dispatch_logits<BFloat16, Float16>(logits, [&]<typename T>(T) {
    using A = Accumulator<T>;
    const A upstream = *static_cast<const A*>(grad_loss.const_data_ptr());
    if (expected) *static_cast<A*>(expected->mutable_data_ptr()) = upstream;
    if (same_bits(Factors<A>::load(static_cast<const A*>(factors.const_data_ptr())).upstream, upstream)) return;
    loss_backward_into(grad_loss, logits, inputs, saved_rows, factors, {0, logits.size(1)}, gradient);
  });
}

void complete_rows_(Tensor saved_rows, std::vector<double> numbers, int64_t vocab_size) {
  const LossOptions options = LossOptions::unpack(numbers);
  check_complete_arguments(saved_rows);
  const auto run = [&]<typename A>(A) {
    A* rows = static_cast<A*>(saved_rows.mutable_data_ptr());
    const int64_t n = saved_rows.size(1);
    for (int64_t i = 0; i < n; ++i) {
      auto row = SavedRow<A>::load(rows, n, i);
      complete_row(row, RowOptions<A>::of(options, vocab_size));
      row.store(rows, n, i);
    }
  };
  saved_rows.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
}

std::tuple<Tensor, Tensor> reduce_rows(Tensor saved_rows, Tensor targets, OptionalTensor row_weight,
                                       OptionalTensor normalizer, std::vector<double> options) {
  const LossInputs inputs{
      .targets = targets, .row_weight = row_weight, .normalizer = normalizer, .options = LossOptions::unpack(options)};
  check_reduce_arguments(saved_rows, inputs);
  const ScalarType dtype = saved_rows.scalar_type();
  const Tensor loss = allocate_loss(saved_rows, targets.numel(), inputs.options.reduction, dtype);
  const Tensor factors = allocate(saved_rows, {Factors<float>::kNumbers}, dtype);
  const auto run = [&]<typename A>(A) {
    reduce(static_cast<const A*>(saved_rows.const_data_ptr()), targets.numel(), inputs, A(1),
           static_cast<A*>(factors.mutable_data_ptr()), static_cast<A*>(loss.mutable_data_ptr()));
  };
  dtype == ScalarType::Double ? run(double{}) : run(float{});
  return {loss, factors};
}

}  // namespace

LossOutputs loss_forward_outputs(const Tensor& logits, const LossInputs& inputs, const OptionalTensor& upstream,
                                 bool stats) {
  const LossOutputs outputs = allocate_loss_outputs(logits, inputs.options.reduction, stats);
  dispatch_logits<BFloat16, Float16>(logits, [&]<typename T>(T) {
    const Forward<T> call(logits, inputs, stats, outputs);
    check_ids("targets", call.targets, call.logits.rows, call.logits.vocab_size, call.ignore_index);
    dispatch_loop(inputs.loop(stats), [&]<Loop kLoop>() { forward<kLoop>(call, upstream_of(upstream, call)); });
  });
  return outputs;
}

void loss_backward_into(const OptionalTensor& grad_loss, const Tensor& logits, const LossInputs& inputs,
                        const Tensor& saved_rows, const Tensor& factors, const VocabularyShard& shard,
                        const Tensor& grad_logits) {
  check_backward_arguments(logits, inputs, saved_rows, factors, grad_loss, shard);
  dispatch_logits<BFloat16, Float16>(logits, [&]<typename T>(T) {
    const auto run = inputs.is_plain() ? backward<true, T> : backward<false, T>;
    run(grad_loss, logits, inputs, saved_rows, factors, shard, grad_logits);
  });
}

Tensor allocate_gradient(const Tensor& logits) {
  const Tensor gradient = allocate(logits, logits.sizes(), logits.scalar_type());
  prefer_huge_pages(gradient.mutable_data_ptr(), gradient.numel() * int64_t(gradient.element_size()));
  return gradient;
}

STABLE_TORCH_LIBRARY_IMPL(pdl_ext, CPU, m) {
  m.impl("loss_forward", TORCH_BOX(&loss_forward));
  m.impl("loss_backward", TORCH_BOX(&loss_backward));
  m.impl("loss_backward_", TORCH_BOX(&loss_backward_));
  m.impl("correct_gradient_", TORCH_BOX(&correct_gradient_));
  m.impl("complete_rows_", TORCH_BOX(&complete_rows_));
  m.impl("reduce_rows", TORCH_BOX(&reduce_rows));
}

}  // namespace pdl::cpu
