// Memory for the results of an op and for its scratch data.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>

namespace pdl {

// An uninitialised tensor on the device of `like`. Not torch::stable::new_empty, which looks up its op by name: that
// takes a microsecond more, four times per loss.
inline torch::stable::Tensor allocate_strided(const torch::stable::Tensor& like,
                                              torch::headeronly::IntHeaderOnlyArrayRef shape,
                                              torch::headeronly::IntHeaderOnlyArrayRef strides,
                                              torch::headeronly::ScalarType dtype) {
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type, device_index, &result));
  return torch::stable::Tensor(result);
}

// A contiguous tensor.
inline torch::stable::Tensor allocate(const torch::stable::Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
                                      torch::headeronly::ScalarType dtype) {
  std::array<int64_t, 2> strides;
  STD_TORCH_CHECK(shape.size() <= strides.size(), "a tensor of at most two dimensions is expected");
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= std::max<int64_t>(shape[d], 1)) strides[d] = stride;
  return allocate_strided(like, shape, {strides.data(), shape.size()}, dtype);
}

}  // namespace pdl
