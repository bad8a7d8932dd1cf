// What the loss ops share between devices: their arguments, the checks that keep memory safe, and their outputs.
// Friendly errors that name the user's argument are Python's; these are for whoever calls the ops directly.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "allocate.h"
#include "row_loss.h"

namespace pdl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Rows of the statistics tensor [kRowOutputs, N].
enum RowOutput { kMax, kLogSum, kNll, kCe, kTokenWeight, kRowOutputs };
// Entries of the totals tensor: the fields of Totals, in order.
constexpr int64_t kTotals = 3;
// So that an index within a row, and one stride more, fit into 32 bits.
constexpr int64_t kMaxVocabSize = int64_t(1) << 30;

struct LossOptions {
  Reduction reduction;
  int64_t ignore_index;
  double label_smoothing;
  double z_loss;
  double logit_scale;
  double softcap;

  // Plain rows need neither the sum of z nor a transform, and the kernels have a leaner loop for them.
  bool is_plain(const OptionalTensor& logit_offset) const {
    return label_smoothing == 0.0 && logit_scale == 1.0 && softcap == 0.0 && !logit_offset.has_value();
  }

  template <typename A>
  LogitTransform<A> transform(const OptionalTensor& logit_offset) const {
    return {A(logit_scale), A(softcap),
            logit_offset ? static_cast<const float*>(logit_offset->const_data_ptr()) : nullptr};
  }
};

inline ScalarType accumulator_dtype(ScalarType logits) {
  return logits == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_table(const OptionalTensor& table, const char* name, const Tensor& logits, int64_t size,
                        ScalarType dtype) {
  if (!table) return;
  STD_TORCH_CHECK(table->dim() == 1 && table->size(0) == size && table->is_contiguous(), name,
                  " must be contiguous with shape [", size, "]");
  STD_TORCH_CHECK(table->scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(table->device() == logits.device(), name, " must be on the logits' device");
}

inline void check_loss_arguments(const Tensor& logits, const Tensor& targets, const OptionalTensor& token_weight,
                                 const OptionalTensor& row_weight, const OptionalTensor& logit_offset,
                                 const OptionalTensor& normalizer = std::nullopt) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits must have shape [N, V]");
  const int64_t rows = logits.size(0), vocab_size = logits.size(1);
  STD_TORCH_CHECK(vocab_size >= 1 && vocab_size <= kMaxVocabSize, "logits must have 1 <= V <= 2^30");
  STD_TORCH_CHECK(logits.stride(1) == 1 || vocab_size == 1, "logits must have a last dimension of stride 1");
  STD_TORCH_CHECK(targets.dim() == 1 && targets.size(0) == rows && targets.is_contiguous(),
                  "targets must be contiguous with shape [N]");
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long || targets.scalar_type() == ScalarType::Int,
                  "targets must be int64 or int32");
  STD_TORCH_CHECK(targets.device() == logits.device(), "targets must be on the logits' device");
  check_table(token_weight, "token_weight", logits, vocab_size, ScalarType::Float);
  check_table(logit_offset, "logit_offset", logits, vocab_size, ScalarType::Float);
  check_table(row_weight, "row_weight", logits, rows, accumulator_dtype(logits.scalar_type()));
  STD_TORCH_CHECK(!normalizer || (normalizer->numel() == 1 &&
                                  normalizer->scalar_type() == accumulator_dtype(logits.scalar_type()) &&
                                  normalizer->device() == logits.device()),
                  "normalizer must be one number of the loss's dtype, on the logits' device");
}

// Without grad_loss the upstream gradient of a scalar reduction is 1.
inline void check_saved_rows(const Tensor& logits, const Tensor& rows, const Tensor& totals,
                             const OptionalTensor& grad_loss, Reduction reduction) {
  const ScalarType dtype = accumulator_dtype(logits.scalar_type());
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(0) == kRowOutputs && rows.size(1) == logits.size(0) &&
                      rows.is_contiguous() && rows.scalar_type() == dtype && rows.device() == logits.device(),
                  "rows must be what loss_forward returned");
  STD_TORCH_CHECK(totals.dim() == 1 && totals.size(0) == kTotals && totals.is_contiguous() &&
                      totals.scalar_type() == dtype && totals.device() == logits.device(),
                  "totals must be what loss_forward returned");
  STD_TORCH_CHECK(
      !grad_loss || (grad_loss->scalar_type() == dtype && grad_loss->device() == logits.device() &&
                     (reduction == Reduction::none ? grad_loss->dim() == 1 && grad_loss->size(0) == logits.size(0)
                                                   : grad_loss->numel() == 1)),
      "grad_loss must have the loss's shape, dtype and device");
}

inline void check_gradient(const Tensor& logits, const Tensor& gradient, Reduction reduction) {
  STD_TORCH_CHECK(reduction != Reduction::none, "a gradient at once needs a scalar reduction");
  STD_TORCH_CHECK(gradient.dim() == 2 && gradient.size(0) == logits.size(0) && gradient.size(1) == logits.size(1) &&
                      gradient.scalar_type() == logits.scalar_type() && gradient.device() == logits.device() &&
                      (gradient.stride(1) == 1 || gradient.size(1) == 1) &&
                      (gradient.stride(0) >= gradient.size(1) || gradient.size(0) <= 1),
                  "gradient must be like the logits, with rows that do not overlap");
}

inline void check_scale_arguments(const Tensor& gradient, const Tensor& factor) {
  STD_TORCH_CHECK(gradient.dim() == 2 && (gradient.stride(1) == 1 || gradient.size(1) == 1) &&
                      gradient.size(1) <= kMaxVocabSize &&
                      (gradient.stride(0) >= gradient.size(1) || gradient.size(0) <= 1),
                  "gradient must have shape [N, V] and rows that do not overlap");
  STD_TORCH_CHECK(factor.numel() == 1 && factor.scalar_type() == accumulator_dtype(gradient.scalar_type()) &&
                      factor.device() == gradient.device(),
                  "factor must be one number of the loss's dtype, on the gradient's device");
}

struct LossOutputs {
  Tensor loss;
  Tensor rows;
  Tensor totals;
  Tensor predicted;
};

inline LossOutputs allocate_loss_outputs(const Tensor& logits, Reduction reduction, bool predict) {
  const int64_t n = logits.size(0);
  const ScalarType dtype = accumulator_dtype(logits.scalar_type());
  return {reduction == Reduction::none ? allocate(logits, {n}, dtype) : allocate(logits, {}, dtype),
          allocate(logits, {kRowOutputs, n}, dtype), allocate(logits, {kTotals}, dtype),
          allocate(logits, {predict ? n : 0}, ScalarType::Long)};
}

// Calls f with a value of the logits' type; the 16-bit ones differ between devices.
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

// Calls f with values of the logits' and the targets' types.
template <typename BFloat16, typename Float16, typename F>
void dispatch_loss(const Tensor& logits, const Tensor& targets, F&& f) {
  dispatch_logits<BFloat16, Float16>(logits, [&]<typename T>(T) {
    if (targets.scalar_type() == ScalarType::Int) {
      f(T{}, int32_t{});
    } else {
      f(T{}, int64_t{});
    }
  });
}

template <typename A>
const A* data_or_null(const OptionalTensor& tensor) {
  return tensor ? static_cast<const A*>(tensor->const_data_ptr()) : nullptr;
}

}  // namespace pdl
