// Shared by the loss ops on all devices: their arguments, the checks that keep memory safe, and their outputs. Python
// raises the friendly errors, which name the user's argument. The errors here are for direct callers of the ops.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "allocate.h"
#include "row_loss.h"
#include "targets.h"

namespace pdl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Entries of the normalizer tensor: the denominators of the weighted term and of the z-loss term.
constexpr int64_t kNormalizers = 2;
// With this limit an index within a row, plus one stride, fits into 32 bits.
constexpr int64_t kMaxVocabSize = int64_t(1) << 30;

// The logits are the V columns from first_id on of a vocabulary; other processes may hold the rest.
struct VocabularyShard {
  int64_t first_id;
  int64_t vocab_size;
};

template <typename A>
const A* data_or_null(const OptionalTensor& tensor) {
  return tensor ? static_cast<const A*>(tensor->const_data_ptr()) : nullptr;
}

// The token weight of each row's target: from a table [V], from one weight a row [N, 1], or 1.
template <typename A>
struct TokenWeights {
  const float* weights;
  bool of_rows;

  PDL_INLINE A at(int64_t i, int64_t target) const {
    return weights != nullptr ? A(weights[of_rows ? i : target]) : A(1);
  }
};

// The inputs of a loss besides the logits.
struct LossInputs {
  Tensor targets;
  OptionalTensor token_weight;
  OptionalTensor row_weight;
  OptionalTensor logit_offset;
  OptionalTensor normalizer;
  LossOptions options;

  bool is_plain() const { return pdl::is_plain(options, data_or_null<float>(logit_offset)); }

  // stats: whether the call also returns the statistics of its rows.
  Loop loop(bool stats) const {
    if (!is_plain()) return Loop::general;
    return stats || needs_entropy(options.modulation) ? Loop::entropy : Loop::plain;
  }

  bool smooths_by_class() const {
    return options.label_smoothing_weight == SmoothingWeight::of_class && options.label_smoothing != 0.0;
  }

  template <typename A>
  TokenWeights<A> token_weights() const {
    return {data_or_null<float>(token_weight), token_weight && token_weight->dim() == 2};
  }

  template <typename A>
  ClassWeights<A> class_weights() const {
    return {smooths_by_class() ? data_or_null<float>(token_weight) : nullptr};
  }

  template <typename A>
  LogitTransform<A> transform() const {
    return LogitTransform<A>::of(options, data_or_null<float>(logit_offset));
  }

  Targets ids() const { return {targets.const_data_ptr(), targets.scalar_type() == ScalarType::Int}; }
};

inline ScalarType accumulator_dtype(ScalarType logits) {
  return logits == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_table(const OptionalTensor& table, const char* name, const Tensor& like, int64_t size,
                        ScalarType dtype) {
  if (!table) return;
  STD_TORCH_CHECK(table->dim() == 1 && table->size(0) == size && table->is_contiguous(), name,
                  " must be contiguous with shape [", size, "]");
  STD_TORCH_CHECK(table->scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(table->device() == like.device(), name, " must be on the logits' device");
}

inline void check_column(const Tensor& column, const char* name, const Tensor& like, int64_t rows, ScalarType dtype) {
  STD_TORCH_CHECK(column.size(0) == rows && column.size(1) == 1 && column.is_contiguous(), name,
                  " must be contiguous with shape [", rows, ", 1]");
  STD_TORCH_CHECK(column.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(column.device() == like.device(), name, " must be on the logits' device");
}

inline void check_targets(const Tensor& targets) {
  STD_TORCH_CHECK(targets.is_contiguous(), "targets must be contiguous");
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long || targets.scalar_type() == ScalarType::Int,
                  "targets must be int64 or int32");
}

inline void check_loss_arguments(const Tensor& logits, const LossInputs& inputs) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits must have shape [N, V]");
  const int64_t rows = logits.size(0), vocab_size = logits.size(1);
  STD_TORCH_CHECK(vocab_size >= 1 && vocab_size <= kMaxVocabSize, "logits must have 1 <= V <= 2^30");
  STD_TORCH_CHECK(logits.stride(1) == 1 || vocab_size == 1, "logits must have a last dimension of stride 1");
  check_targets(inputs.targets);
  STD_TORCH_CHECK(inputs.targets.numel() == rows, "targets must be one a row");
  STD_TORCH_CHECK(inputs.targets.device() == logits.device(), "targets must be on the logits' device");
  const ScalarType dtype = accumulator_dtype(logits.scalar_type());
  if (inputs.token_weight && inputs.token_weight->dim() == 2) {
    STD_TORCH_CHECK(!inputs.smooths_by_class(), "token_weight of rows cannot be that of classes");
    check_column(*inputs.token_weight, "token_weight", logits, rows, ScalarType::Float);
  } else {
    check_table(inputs.token_weight, "token_weight", logits, vocab_size, ScalarType::Float);
    STD_TORCH_CHECK(inputs.token_weight || !inputs.smooths_by_class(), "label smoothing by class needs token_weight");
  }
  check_table(inputs.logit_offset, "logit_offset", logits, vocab_size, ScalarType::Float);
  check_table(inputs.row_weight, "row_weight", logits, rows, dtype);
  check_table(inputs.normalizer, "normalizer", logits, kNormalizers, dtype);
}

inline void check_saved_rows(const Tensor& saved_rows, const Tensor& targets, ScalarType dtype) {
  STD_TORCH_CHECK(saved_rows.dim() == 2 && saved_rows.size(0) == SavedRow<float>::kNumbers &&
                      saved_rows.size(1) == targets.numel() && saved_rows.is_contiguous() &&
                      saved_rows.scalar_type() == dtype && saved_rows.device() == targets.device(),
                  "saved_rows must be what loss_forward returned");
}

// Without grad_loss the upstream gradient of a scalar reduction is that in the factors.
inline void check_backward_arguments(const Tensor& logits, const LossInputs& inputs, const Tensor& saved_rows,
                                     const Tensor& factors, const OptionalTensor& grad_loss,
                                     const VocabularyShard& shard) {
  check_loss_arguments(logits, inputs);
  const ScalarType dtype = accumulator_dtype(logits.scalar_type());
  check_saved_rows(saved_rows, inputs.targets, dtype);
  STD_TORCH_CHECK(factors.dim() == 1 && factors.size(0) == Factors<float>::kNumbers && factors.is_contiguous() &&
                      factors.scalar_type() == dtype && factors.device() == logits.device(),
                  "factors must be what loss_forward returned");
  const bool of_rows = inputs.options.reduction == Reduction::none;
  STD_TORCH_CHECK(!grad_loss || (grad_loss->scalar_type() == dtype && grad_loss->device() == logits.device() &&
                                 (of_rows ? grad_loss->dim() == 1 && grad_loss->size(0) == logits.size(0)
                                          : grad_loss->numel() == 1)),
                  "grad_loss must have the loss's shape, dtype and device");
  STD_TORCH_CHECK(shard.first_id >= 0 && shard.vocab_size >= logits.size(1) && shard.vocab_size <= kMaxVocabSize &&
                      shard.first_id <= shard.vocab_size - logits.size(1),
                  "the logits must be a shard of the vocabulary");
}

inline void check_complete_arguments(const Tensor& saved_rows) {
  const ScalarType dtype = saved_rows.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "saved_rows must be float32 or float64");
  STD_TORCH_CHECK(
      saved_rows.dim() == 2 && saved_rows.size(0) == SavedRow<float>::kNumbers && saved_rows.is_contiguous(),
      "saved_rows must have the shape of what loss_forward returns");
}

inline void check_reduce_arguments(const Tensor& saved_rows, const LossInputs& inputs) {
  const ScalarType dtype = saved_rows.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "saved_rows must be float32 or float64");
  check_targets(inputs.targets);
  check_saved_rows(saved_rows, inputs.targets, dtype);
  check_table(inputs.row_weight, "row_weight", saved_rows, inputs.targets.numel(), dtype);
  check_table(inputs.normalizer, "normalizer", saved_rows, kNormalizers, dtype);
}

// For a tensor that an op writes to.
inline void check_rows_apart(const Tensor& written, const char* name) {
  STD_TORCH_CHECK(written.dim() == 2 && (written.stride(1) == 1 || written.size(1) == 1) &&
                      written.size(1) <= kMaxVocabSize &&
                      (written.stride(0) >= written.size(1) || written.size(0) <= 1),
                  name, " must have shape [N, V] and rows that do not overlap");
}

inline void check_gradient(const Tensor& logits, const Tensor& gradient, Reduction reduction) {
  STD_TORCH_CHECK(reduction != Reduction::none, "a gradient at once needs a scalar reduction");
  check_rows_apart(gradient, "gradient");
  STD_TORCH_CHECK(gradient.size(0) == logits.size(0) && gradient.size(1) == logits.size(1) &&
                      gradient.scalar_type() == logits.scalar_type() && gradient.device() == logits.device(),
                  "gradient must be like the logits");
}

// One number on the device: an upstream gradient of a scalar loss, or a factor of one.
inline void check_scalar(const OptionalTensor& number, const char* name, const Tensor& logits) {
  STD_TORCH_CHECK(
      !number || (number->numel() == 1 && number->scalar_type() == accumulator_dtype(logits.scalar_type()) &&
                  number->device() == logits.device()),
      name, " must be one number of the loss's dtype, on the logits' device");
}

// For correct_gradient_: `factors` hold the upstream gradient for which `gradient` was computed.
inline void check_correction_arguments(const Tensor& gradient, const OptionalTensor& expected, const Tensor& grad_loss,
                                       const Tensor& logits, const LossInputs& inputs, const Tensor& saved_rows,
                                       const Tensor& factors) {
  check_backward_arguments(logits, inputs, saved_rows, factors, grad_loss, {0, logits.size(1)});
  check_gradient(logits, gradient, inputs.options.reduction);
  check_scalar(expected, "expected", logits);
}

struct LossOutputs {
  Tensor loss;
  Tensor saved_rows;
  Tensor factors;
  Tensor predicted;
};

inline Tensor allocate_loss(const Tensor& like, int64_t n, Reduction reduction, ScalarType dtype) {
  return reduction == Reduction::none ? allocate(like, {n}, dtype) : allocate(like, {}, dtype);
}

inline LossOutputs allocate_loss_outputs(const Tensor& logits, Reduction reduction, bool stats) {
  const int64_t n = logits.size(0);
  const ScalarType dtype = accumulator_dtype(logits.scalar_type());
  return {allocate_loss(logits, n, reduction, dtype), allocate(logits, {SavedRow<float>::kNumbers, n}, dtype),
          allocate(logits, {Factors<float>::kNumbers}, dtype), allocate(logits, {stats ? n : 0}, ScalarType::Long)};
}

// Calls f with the loop as a template argument.
template <typename F>
void dispatch_loop(Loop loop, F&& f) {
  switch (loop) {
    case Loop::plain:
      return f.template operator()<Loop::plain>();
    case Loop::entropy:
      return f.template operator()<Loop::entropy>();
    case Loop::general:
      return f.template operator()<Loop::general>();
  }
}

// Calls f with a value of the logits' type; the 16-bit types differ between devices.
template <typename BFloat16, typename Float16, typename F>
void dispatch_logits(const Tensor& logits, F&& f) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Float16{});
    default:
      STD_TORCH_CHECK(false, "logits must be float32, bfloat16, float16 or float64");
  }
}

}  // namespace pdl
