// PyTorch's header of this name, except that behind a tensor which an op allocates lie bytes that no kernel may change.
#pragma once

#include_next <torch/csrc/stable/ops.h>

namespace torch::stable {

Tensor new_empty_with_canary(const Tensor& like, headeronly::IntHeaderOnlyArrayRef shape,
                             std::optional<headeronly::ScalarType> dtype = std::nullopt);

}  // namespace torch::stable

#define new_empty new_empty_with_canary
