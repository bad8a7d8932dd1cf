// Shared by the token weight op on all devices: the checks that keep memory safe.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "allocate.h"

namespace pdl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void check_weights_arguments(const Tensor& counts, const OptionalTensor& blend, const OptionalTensor& fixed) {
  STD_TORCH_CHECK(counts.dim() == 1 && counts.scalar_type() == ScalarType::Long && counts.is_contiguous(),
                  "counts must be contiguous int64 with shape [V]");
  if (blend) {
    STD_TORCH_CHECK(
        blend->numel() == 1 && blend->scalar_type() == ScalarType::Float && blend->device() == counts.device(),
        "blend must be one float32 on the counts' device");
  }
  if (fixed) {
    STD_TORCH_CHECK(fixed->dim() == 1 && fixed->size(0) == counts.size(0) &&
                        fixed->scalar_type() == ScalarType::Float && fixed->is_contiguous() &&
                        fixed->device() == counts.device(),
                    "fixed must be contiguous float32 with shape [V], on the counts' device");
  }
}

}  // namespace pdl
