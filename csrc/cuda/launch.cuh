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
  // Blocks along y: shares of a row.
  int shares = 1;
  // Blocks along x that form a thread block cluster.
  int cluster = 1;
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
    allow(kernel, grid);
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = config_of(grid, &attribute);
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
  }

  // Zeroes the first `width` bytes of rows that begin `pitch` bytes from one another.
  void zero(void* address, int64_t pitch, int64_t width, int64_t rows) const {
    STD_CUDA_CHECK(cudaMemset2DAsync(address, size_t(pitch), 0, size_t(width), size_t(rows), stream_));
  }

  int attribute(cudaDeviceAttr attribute) const {
    int device = 0, value = 0;
    STD_CUDA_CHECK(cudaGetDevice(&device));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
    return value;
  }

  // Of such blocks, as many as the whole device holds at once.
  template <typename Kernel>
  int64_t resident_blocks(Kernel* kernel, const Grid& grid) const {
    allow(kernel, grid);
    int of_multiprocessor = 0;
    STD_CUDA_CHECK(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_multiprocessor, kernel, grid.threads, grid.shared_bytes));
    return int64_t(of_multiprocessor) * attribute(cudaDevAttrMultiProcessorCount);
  }

  // Whether the device holds at least one such cluster; no, if it refuses clusters of that size.
  template <typename Kernel>
  bool fits(Kernel* kernel, const Grid& grid) const {
    if (grid.cluster == 1) return true;
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = config_of(grid, &attribute);
    int clusters = 0;
    if (try_to_allow(kernel, grid) == cudaSuccess &&
        cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess) {
      return clusters > 0;
    }
    // Or the next launch would find the error.
    cudaGetLastError();
    return false;
  }

  // Of the kernel as it was compiled: its ptxVersion, 10 * major + minor of the architecture, is less than the device's
  // where the driver compiles what was built for older cards.
  template <typename Kernel>
  cudaFuncAttributes attributes_of(Kernel* kernel) const {
    cudaFuncAttributes attributes;
    STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
    return attributes;
  }

 private:
  cudaLaunchConfig_t config_of(const Grid& grid, cudaLaunchAttribute* cluster) const {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(grid.blocks), static_cast<unsigned>(grid.shares));
    config.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
    config.stream = stream_;
    if (grid.cluster > 1) {
      cluster->id = cudaLaunchAttributeClusterDimension;
      cluster->val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
      config.attrs = cluster;
      config.numAttrs = 1;
    }
    return config;
  }

  // What a kernel may only have if it is asked for.
  template <typename Kernel>
  cudaError_t try_to_allow(Kernel* kernel, const Grid& grid) const {
    // Without asking it is 48 KiB together with the kernel's own variables, which are far fewer than the rest of them.
    constexpr int kSharedWithoutAsking = 32 * 1024, kClusterWithoutAsking = 8;
    cudaError_t error = cudaSuccess;
    if (grid.shared_bytes > kSharedWithoutAsking) {
      cudaFuncAttributes attributes;
      error = cudaFuncGetAttributes(&attributes, kernel);
      if (error == cudaSuccess) {
        // All that there is, and not what this launch needs: another thread may be about to launch with more.
        const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - int(attributes.sharedSizeBytes);
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
      }
      if (error == cudaSuccess) {
        // Of L1: grids are planned for as many such blocks as shared memory has room for.
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                     cudaSharedmemCarveoutMaxShared);
      }
    }
    if (error == cudaSuccess && grid.cluster > kClusterWithoutAsking) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    return error;
  }

  template <typename Kernel>
  void allow(Kernel* kernel, const Grid& grid) const {
    STD_CUDA_CHECK(try_to_allow(kernel, grid));
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// Kernels stride over what exceeds the grid.
inline int64_t grid_for(int64_t work) {
  return std::min<int64_t>(work, 0x7fffffff);
}

}  // namespace pdl::cuda
