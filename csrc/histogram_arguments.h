// Shared by the histogram op on all devices: its output table, and the checks that keep memory safe.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace pdl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The same names as in pdl_ext/counts.py.
struct CountTable {
  int64_t* counts;
  int64_t* ignored;
  int64_t* out_of_range;
  // The number of all tokens given, by which a histogram that loses or invents one is detected.
  int64_t* seen;
};

inline CountTable checked_table(const Tensor& counts, const Tensor& ignored, const Tensor& out_of_range,
                                const Tensor& seen, const Tensor& tokens) {
  STD_TORCH_CHECK(counts.dim() == 1 && counts.scalar_type() == ScalarType::Long && counts.is_contiguous(),
                  "counts must be contiguous int64 with shape [V]");
  for (const Tensor* total : {&ignored, &out_of_range, &seen}) {
    STD_TORCH_CHECK(
        total->numel() == 1 && total->scalar_type() == ScalarType::Long && total->device() == counts.device(),
        "ignored, out_of_range and seen must be int64 with one element, on the counts' device");
  }
  STD_TORCH_CHECK(tokens.is_contiguous(), "tokens must be contiguous");
  STD_TORCH_CHECK(tokens.device() == counts.device(), "tokens must be on the counts' device");
  const auto data = [](const Tensor& total) { return static_cast<int64_t*>(total.mutable_data_ptr()); };
  return {data(counts), data(ignored), data(out_of_range), data(seen)};
}

// Calls f with a pointer to the tokens in their own dtype.
template <typename F>
void dispatch_tokens(const Tensor& tokens, F&& f) {
  const void* data = tokens.const_data_ptr();
  switch (tokens.scalar_type()) {
    case ScalarType::Byte:
      return f(static_cast<const uint8_t*>(data));
    case ScalarType::UInt16:
      return f(static_cast<const uint16_t*>(data));
    case ScalarType::Int:
      return f(static_cast<const int32_t*>(data));
    case ScalarType::UInt32:
      return f(static_cast<const uint32_t*>(data));
    case ScalarType::Long:
      return f(static_cast<const int64_t*>(data));
    default:
      STD_TORCH_CHECK(false, "tokens must be uint8, uint16, int32, uint32 or int64");
  }
}

}  // namespace pdl
