// Bytes behind every tensor that an op allocates, looked at after each launch until the op ends.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulator.h"

namespace {

using torch::stable::Tensor;

constexpr int64_t kBytes = 256;
constexpr unsigned char kCanary = 0xa5;

struct Canary {
  // Keeps the memory as long as it is looked at.
  Tensor whole;
  const unsigned char* begin;
};

std::vector<Canary> canaries;

}  // namespace

namespace cuda_emulator {

void check_canaries() {
  for (const Canary& canary : canaries) {
    for (int64_t i = 0; i < kBytes; ++i) {
      if (canary.begin[i] == kCanary) continue;
      canaries.clear();
      throw std::runtime_error("CUDA emulator: a kernel wrote " + std::to_string(i) +
                               " bytes past the end of a tensor that the op allocated");
    }
  }
}

void forget_canaries() {
  canaries.clear();
}

}  // namespace cuda_emulator

// Linked with -Bsymbolic, so that this wins over what libtorch_cpu has.
extern "C" AOTITorchError aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides,
                                                   int32_t dtype, int32_t, int32_t, AtenTensorHandle* result) {
  std::vector<int64_t> larger(sizes, sizes + dims);
  // Rows may lie apart.
  if (dims == 2) larger[1] = std::max(larger[1], strides[0]);
  if (dims == 0) larger.push_back(1);
  int64_t row = 1;
  for (size_t i = 1; i < larger.size(); ++i) row *= larger[i];
  // One-byte elements are the smallest.
  const int64_t length = larger[0];
  larger[0] += kBytes / std::max<int64_t>(row, 1) + 1;
  using torch::stable::detail::from, torch::stable::detail::to;
  Tensor whole = torch::stable::empty(larger, to<torch::headeronly::ScalarType>(from(dtype)));
  Tensor part = torch::stable::narrow(whole, 0, 0, length);
  auto* begin = static_cast<unsigned char*>(whole.mutable_data_ptr()) + length * row * whole.element_size();
  if (row > 0) {
    memset(begin, kCanary, kBytes);
    canaries.push_back({whole, begin});
  }
  if (dims == 0) part = torch::stable::select(part, 0, 0);
  if (dims == 2) part = torch::stable::narrow(part, 1, 0, sizes[1]);
  return aoti_torch_new_tensor_handle(part.get(), result);
}
