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
// Entries of the normalizer tensor: the denominators of the weighted term and of the z-loss term.
constexpr int64_t kNormalizers = 2;
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

// The logits are columns [first_id, first_id + V) of a vocabulary, which other processes may hold the rest of.
struct VocabularySlice {
  int64_t first_id;
  int64_t vocab_size;
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

inline void check_targets(const Tensor& targets) {
  STD_TORCH_CHECK(targets.is_contiguous(), "targets must be contiguous");
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long || targets.scalar_type() == ScalarType::Int,
                  "targets must be int64 or int32");
}

inline void check_loss_arguments(const Tensor& logits, const Tensor& targets, const OptionalTensor& token_weight,
                                 const OptionalTensor& row_weight, const OptionalTensor& logit_offset,
                                 const OptionalTensor& normalizer = std::nullopt) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits must have shape [N, V]");
  const int64_t rows = logits.size(0), vocab_size = logits.size(1);
  STD_TORCH_CHECK(vocab_size >= 1 && vocab_size <= kMaxVocabSize, "logits must have 1 <= V <= 2^30");
  STD_TORCH_CHECK(logits.stride(1) == 1 || vocab_size == 1, "logits must have a last dimension of stride 1");
  check_targets(targets);
  STD_TORCH_CHECK(targets.numel() == rows, "targets must be one a row");
  STD_TORCH_CHECK(targets.device() == logits.device(), "targets must be on the logits' device");
  check_table(token_weight, "token_weight", logits, vocab_size, ScalarType::Float);
  check_table(logit_offset, "logit_offset", logits, vocab_size, ScalarType::Float);
  check_table(row_weight, "row_weight", logits, rows, accumulator_dtype(logits.scalar_type()));
  check_table(normalizer, "normalizer", logits, kNormalizers, accumulator_dtype(logits.scalar_type()));
}

inline void check_rows(const Tensor& rows, const Tensor& targets) {
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(0) == kRowOutputs && rows.size(1) == targets.numel() &&
                      rows.is_contiguous() && rows.device() == targets.device(),
                  "rows must be what loss_forward returned");
}

// Without grad_loss the upstream gradient of a scalar reduction is 1.
inline void check_saved_rows(const Tensor& logits, const Tensor& targets, const Tensor& rows, const Tensor& totals,
                             const OptionalTensor& grad_loss, Reduction reduction, const VocabularySlice& slice) {
  const ScalarType dtype = accumulator_dtype(logits.scalar_type());
  check_rows(rows, targets);
  STD_TORCH_CHECK(rows.scalar_type() == dtype, "rows must be what loss_forward returned");
  STD_TORCH_CHECK(totals.dim() == 1 && totals.size(0) == kTotals && totals.is_contiguous() &&
                      totals.scalar_type() == dtype && totals.device() == logits.device(),
                  "totals must be what loss_forward returned");
  STD_TORCH_CHECK(
      !grad_loss || (grad_loss->scalar_type() == dtype && grad_loss->device() == logits.device() &&
                     (reduction == Reduction::none ? grad_loss->dim() == 1 && grad_loss->size(0) == logits.size(0)
                                                   : grad_loss->numel() == 1)),
      "grad_loss must have the loss's shape, dtype and device");
  STD_TORCH_CHECK(slice.first_id >= 0 && slice.vocab_size >= logits.size(1) && slice.vocab_size <= kMaxVocabSize &&
                      slice.first_id <= slice.vocab_size - logits.size(1),
                  "the logits must be a slice of the vocabulary");
}

inline void check_reduce_arguments(const Tensor& rows, const Tensor& targets, const OptionalTensor& row_weight,
                                   const OptionalTensor& normalizer) {
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Float || rows.scalar_type() == ScalarType::Double,
                  "rows must be float32 or float64");
  check_targets(targets);
  check_rows(rows, targets);
  check_table(row_weight, "row_weight", rows, targets.numel(), rows.scalar_type());
  check_table(normalizer, "normalizer", rows, kNormalizers, rows.scalar_type());
}

// Of what an op writes to.
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

inline void check_scale_arguments(const Tensor& gradient, const Tensor& factor) {
  check_rows_apart(gradient, "gradient");
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

inline Tensor allocate_loss(const Tensor& like, int64_t n, Reduction reduction, ScalarType dtype) {
  return reduction == Reduction::none ? allocate(like, {n}, dtype) : allocate(like, {}, dtype);
}

inline LossOutputs allocate_loss_outputs(const Tensor& logits, Reduction reduction, bool predict) {
  const int64_t n = logits.size(0);
  const ScalarType dtype = accumulator_dtype(logits.scalar_type());
  return {allocate_loss(logits, n, reduction, dtype), allocate(logits, {kRowOutputs, n}, dtype),
          allocate(logits, {kTotals}, dtype), allocate(logits, {predict ? n : 0}, ScalarType::Long)};
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
