// Weighted cross-entropy and its gradient in one call, on the CPU: memory is read once and written once.
//
// Each exponential is computed once. Until the row's sum is known it is kept in a buffer of V numbers per thread, which
// fits into L2. If the gradient overwrites logits of the accumulator's type, it is kept there instead.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "check_ids.h"
#include "loss.h"
#include "rows.h"

namespace pdl::cpu {
namespace {

// A larger gradient leaves the caches before it is read again, so its stores bypass them.
constexpr int64_t kStreamedBytes = int64_t(1) << 25;

template <typename T>
bool is_streamed(const Logits<T>& logits, const T* gradients) {
  return gradients != logits.data && logits.rows * logits.vocab_size * int64_t(sizeof(T)) > kStreamedBytes;
}

template <Loop kLoop, typename T>
void forward_with_gradient(const Forward<T>& call, Accumulator<T> upstream, T* gradients, int64_t gradient_stride) {
  using A = Accumulator<T>;
  constexpr bool kPlain = kIsPlain<kLoop>;
  constexpr int64_t kWidth = kTile<kPlain, T>;
  const int64_t vocab_size = call.logits.vocab_size;
  const Factors<A> factors = call.factors_ahead(upstream);
  const bool streamed = is_streamed(call.logits, gradients);
  // The transform's derivative needs the logits a second time, so they must not be overwritten yet.
  const bool keep_in_gradient = kPlain && std::is_same_v<T, A> && gradients == call.logits.data;
  simd_parallel_for<kIsBFloat16<T>>(call.logits.rows, vocab_size, [&](int64_t begin, int64_t end, auto instructions) {
    std::vector<A> tile_origin((vocab_size + kWidth - 1) / kWidth);
    const std::unique_ptr<A[]> buffer(keep_in_gradient ? nullptr : new A[vocab_size]);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t target = call.targets[i];
      T* gradient = gradients + i * gradient_stride;
      if (target == call.ignore_index) {
        call.ignore_row(i);
        std::fill_n(gradient, vocab_size, narrow<T>(A(0)));
        continue;
      }
      const T* x = call.logits.row(i);
      const A x_target = widen(x[target]);
      const A z_target = call.z_of(x, target);
      A* kept = buffer.get();
      if constexpr (std::is_same_v<T, A>) {
        if (keep_in_gradient) kept = gradient;
      }
      const auto statistics =
          row_statistics<kLoop, true>(instructions, x, vocab_size, call.transform, call.class_weights,
                                      smoothing_centre(z_target), call.predicted != nullptr, kept, tile_origin.data());
      const auto saved = call.finish_row(i, statistics, z_target);
      const auto row = gradient_row(saved, call.row_weight_at(i), upstream, factors, call.options);
      for (int64_t first = 0; first < vocab_size; first += kWidth) {
        tile_gradient<kPlain>(instructions, x, kept + first, tile_origin[first / kWidth], gradient, first,
                              std::min(kWidth, vocab_size - first), call.transform, call.class_weights, row, streamed);
      }
      gradient[target] = target_gradient<kPlain, T>(x_target, z_target, call.transform, row);
    }
    if (streamed) finish_streaming();
  });
  call.finish(upstream);
}

// With the gradient for the upstream gradient `upstream`, or for 1.
LossOutputs loss_and_gradient_into(const Tensor& logits, const Tensor& gradient, const LossInputs& inputs,
                                   const OptionalTensor& upstream, bool stats) {
  check_loss_arguments(logits, inputs);
  check_gradient(logits, gradient, inputs.options.reduction);
  check_scalar(upstream, "upstream", logits);
  // The mean of a modulation is known only after all rows.
  if (Shares(logits.size(0), logits.size(1)).of_row > 1 || inputs.options.modulation_normalize) {
    const LossOutputs outputs = loss_forward_outputs(logits, inputs, upstream, stats);
    loss_backward_into(std::nullopt, logits, inputs, outputs.saved_rows, outputs.factors, {0, logits.size(1)},
                       gradient);
    return outputs;
  }
  const LossOutputs outputs = allocate_loss_outputs(logits, inputs.options.reduction, stats);
  dispatch_logits<BFloat16, Float16>(logits, [&]<typename T>(T) {
    const Forward<T> call(logits, inputs, stats, outputs);
    check_ids("targets", call.targets, call.logits.rows, call.logits.vocab_size, call.ignore_index);
    T* gradients = static_cast<T*>(gradient.mutable_data_ptr());
    dispatch_loop(inputs.loop(stats), [&]<Loop kLoop>() {
      forward_with_gradient<kLoop>(call, upstream_of(upstream, call), gradients, gradient.stride(0));
    });
  });
  return outputs;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> loss_and_gradient_(Tensor logits, Tensor gradient, Tensor targets,
                                                              OptionalTensor token_weight, OptionalTensor row_weight,
                                                              OptionalTensor logit_offset, OptionalTensor normalizer,
                                                              std::vector<double> options, bool stats) {
  const LossInputs inputs{.targets = targets,
                          .token_weight = token_weight,
                          .row_weight = row_weight,
                          .logit_offset = logit_offset,
                          .normalizer = normalizer,
                          .options = LossOptions::unpack(options)};
  const LossOutputs outputs = loss_and_gradient_into(logits, gradient, inputs, std::nullopt, stats);
  return {outputs.loss, outputs.saved_rows, outputs.factors, outputs.predicted};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> loss_and_gradient(
    Tensor logits, Tensor targets, OptionalTensor token_weight, OptionalTensor row_weight, OptionalTensor logit_offset,
    OptionalTensor normalizer, OptionalTensor upstream, std::vector<double> options, bool stats) {
  const LossInputs inputs{.targets = targets,
                          .token_weight = token_weight,
                          .row_weight = row_weight,
                          .logit_offset = logit_offset,
                          .normalizer = normalizer,
                          .options = LossOptions::unpack(options)};
  const Tensor gradient = allocate_gradient(logits);
  const LossOutputs outputs = loss_and_gradient_into(logits, gradient, inputs, upstream, stats);
  return {outputs.loss, outputs.saved_rows, outputs.factors, outputs.predicted, gradient};
}

void scale_(Tensor gradient, Tensor factor) {
  check_rows_apart(gradient, "gradient");
  check_scalar(factor, "factor", gradient);
  dispatch_logits<BFloat16, Float16>(gradient, [&]<typename T>(T) {
    using A = Accumulator<T>;
    const A by = *static_cast<const A*>(factor.const_data_ptr());
    if (by == A(1)) return;
    T* gradients = static_cast<T*>(gradient.mutable_data_ptr());
    const int64_t stride = gradient.stride(0);
    const Shares shares(gradient.size(0), gradient.size(1));
    simd_parallel_for<kIsBFloat16<T>>(shares.count(), shares.size, [&](int64_t begin, int64_t end, auto instructions) {
      for (int64_t s = begin; s < end; ++s) {
        T* row = gradients + shares.row(s) * stride;
        T* first = row + shares.first(s);
        map<false>(instructions, first, first, shares.last(s) - shares.first(s), [&](A g, int64_t) { return g * by; });
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pdl_ext, CPU, m) {
  m.impl("loss_and_gradient", TORCH_BOX(&loss_and_gradient));
  m.impl("loss_and_gradient_", TORCH_BOX(&loss_and_gradient_));
  m.impl("scale_", TORCH_BOX(&scale_));
}

}  // namespace pdl::cpu
