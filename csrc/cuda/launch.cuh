// The only place that launches kernels: on the tensor's device, on PyTorch's current stream, checked. What a launch can
// ask the device about stands here too.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

#include "device.cuh"

namespace pdl::cuda {

struct Grid {
  int64_t blocks;
  int threads;
  int shared_bytes = 0;
};

// Makes a tensor's device current for as long as it lives, and knows the stream to launch on.
class Launcher {
 public:
  explicit Launcher(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), const Grid& grid, Arguments... arguments) const {
    if (grid.blocks == 0) return;
    allow_shared(kernel, grid.shared_bytes);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
    config.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
    config.stream = stream_;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
  }

  int attribute(cudaDeviceAttr attribute) const {
    int device = 0, value = 0;
    STD_CUDA_CHECK(cudaGetDevice(&device));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
    return value;
  }

  // Of such blocks, as many as the whole device holds at once.
  template <typename Kernel>
  int64_t resident_blocks(Kernel* kernel, int threads, int shared_bytes) const {
    allow_shared(kernel, shared_bytes);
    int of_multiprocessor = 0;
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_multiprocessor, kernel, threads, shared_bytes));
    return int64_t(of_multiprocessor) * attribute(cudaDevAttrMultiProcessorCount);
  }

 private:
  template <typename Kernel>
  static void allow_shared(Kernel* kernel, int bytes) {
    constexpr int kWithoutAsking = 48 * 1024;
    if (bytes <= kWithoutAsking) return;
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// Kernels stride over what exceeds the grid.
inline int64_t grid_for(int64_t work) {
  return std::min<int64_t>(work, 0x7fffffff);
}

}  // namespace pdl::cuda
