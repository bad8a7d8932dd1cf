// The only place that launches kernels: on the tensor's device, on PyTorch's current stream, with checks. Queries of
// the device that launches need are also here.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

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
  // Whether the launch prefers shared memory over L1, as launches with much shared memory do. A multiprocessor drains
  // between kernels that differ in this.
  bool wants_shared = false;
  // Whether blocks may start while the previous kernel runs, after that kernel has called let_next_kernel_start(). All
  // of them then call wait_for_previous_kernel() before they use its results.
  bool starts_early = false;
};

// The settings made in the driver, and its answers, for each kernel on each device: a query takes as long as a launch.
class DriverMemory {
 public:
  struct Kernel {
    cudaFuncAttributes attributes = {};
    int most_shared = 0;
    bool wants_shared = false;
    bool any_cluster = false;
  };

  static DriverMemory& instance() {
    static DriverMemory memory;
    return memory;
  }

  // Calls `use` with the record of the kernel on the current device, under a lock.
  template <typename Use>
  cudaError_t use(const void* address, Use use) {
    int device = 0;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    const std::lock_guard<std::mutex> lock(mutex_);
    auto found = kernels_.find({device, address});
    if (found == kernels_.end()) {
      Kernel kernel;
      if (const cudaError_t error = cudaFuncGetAttributes(&kernel.attributes, address)) return error;
      found = kernels_.emplace(std::pair(device, address), kernel).first;
    }
    return use(found->second);
  }

  // The result of ask() for the kernel in such a grid, or its earlier result.
  template <typename Ask>
  int64_t answer(const void* address, const Grid& grid, Ask ask) {
    int device = 0;
    STD_CUDA_CHECK(cudaGetDevice(&device));
    const Question question{device, address, grid.threads, grid.shared_bytes, grid.cluster};
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (const auto found = answers_.find(question); found != answers_.end()) return found->second;
    }
    const int64_t answer = ask();
    const std::lock_guard<std::mutex> lock(mutex_);
    // A limit for callers whose rows have another length in each call.
    constexpr size_t kMost = 4096;
    if (answers_.size() >= kMost) answers_.clear();
    answers_.emplace(question, answer);
    return answer;
  }

 private:
  using Question = std::tuple<int, const void*, int, int, int>;

  std::mutex mutex_;
  std::map<std::pair<int, const void*>, Kernel> kernels_;
  std::map<Question, int64_t> answers_;
};

// Makes a tensor's device current while this object exists, and holds the stream to launch on.
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
    STD_CUDA_CHECK(allow(address_of(kernel), grid));
    cudaLaunchAttribute attributes[kMostAttributes];
    cudaLaunchConfig_t config = config_of(grid, attributes);
    // Drivers before 12.3 cannot capture such a launch.
    if (grid.starts_early && !is_capturing()) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
  }

  // Zeroes the first `width` bytes of rows that begin `pitch` bytes apart.
  void zero(void* address, int64_t pitch, int64_t width, int64_t rows) const {
    STD_CUDA_CHECK(cudaMemset2DAsync(address, size_t(pitch), 0, size_t(width), size_t(rows), stream_));
  }

  int attribute(cudaDeviceAttr attribute) const {
    int device = 0, value = 0;
    STD_CUDA_CHECK(cudaGetDevice(&device));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
    return value;
  }

  // The number of such blocks that a multiprocessor holds at once; 0 if it refuses them, or clusters of that size.
  template <typename Kernel>
  int64_t resident_blocks_of_multiprocessor(Kernel* kernel, const Grid& grid) const {
    return DriverMemory::instance().answer(address_of(kernel), grid, [&]() -> int64_t {
      int blocks = 0, clusters = 1;
      cudaError_t error = allow(address_of(kernel), grid);
      if (error == cudaSuccess) {
        error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, grid.threads, grid.shared_bytes);
      }
      if (error == cudaSuccess && grid.cluster > 1) {
        cudaLaunchAttribute attributes[kMostAttributes];
        const cudaLaunchConfig_t config = config_of(grid, attributes);
        error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
      }
      if (error == cudaSuccess) return clusters > 0 ? blocks : 0;
      // Clears the error: otherwise the next launch would report it.
      cudaGetLastError();
      // These errors are permanent; any other is not remembered.
      const bool refused = error == cudaErrorInvalidValue || error == cudaErrorInvalidConfiguration ||
                           error == cudaErrorInvalidClusterSize || error == cudaErrorNotSupported;
      if (!refused) STD_CUDA_CHECK(error);
      return 0;
    });
  }

  // The number that the whole device holds at once.
  template <typename Kernel>
  int64_t resident_blocks(Kernel* kernel, const Grid& grid) const {
    return resident_blocks_of_multiprocessor(kernel, grid) * attribute(cudaDevAttrMultiProcessorCount);
  }

  // Whether device and kernel support the features of sm_90: clusters, and kernels that start early. The driver may
  // have compiled a kernel for this device that was built for an older one.
  template <typename Kernel>
  bool is_hopper(Kernel* kernel) const {
    constexpr int kHopper = 90;
    int built_for = 0;
    STD_CUDA_CHECK(DriverMemory::instance().use(address_of(kernel), [&](const DriverMemory::Kernel& known) {
      built_for = known.attributes.ptxVersion;
      return cudaSuccess;
    }));
    return built_for >= kHopper && attribute(cudaDevAttrClusterLaunch) != 0;
  }

 private:
  template <typename... Parameters>
  static const void* address_of(void (*kernel)(Parameters...)) {
    return reinterpret_cast<const void*>(kernel);
  }

  bool is_capturing() const {
    cudaStreamCaptureStatus status;
    STD_CUDA_CHECK(cudaStreamIsCapturing(stream_, &status));
    return status != cudaStreamCaptureStatusNone;
  }

  static constexpr int kMostAttributes = 2;

  cudaLaunchConfig_t config_of(const Grid& grid, cudaLaunchAttribute* attributes) const {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(grid.blocks), static_cast<unsigned>(grid.shares));
    config.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
    config.stream = stream_;
    config.attrs = attributes;
    if (grid.cluster > 1) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
    }
    return config;
  }

  // Requests the resources that a kernel gets only on request, unless that was done before.
  cudaError_t allow(const void* kernel, const Grid& grid) const {
    // Without a request the limit is 48 KiB, including the kernel's own variables, which take far less than the
    // difference.
    constexpr int kSharedWithoutAsking = 32 * 1024, kClusterWithoutAsking = 8;
    const bool much_shared = grid.shared_bytes > kSharedWithoutAsking;
    const bool large_cluster = grid.cluster > kClusterWithoutAsking;
    const bool wants_shared = grid.wants_shared || much_shared;
    if (!much_shared && !large_cluster && !wants_shared) return cudaSuccess;
    return DriverMemory::instance().use(kernel, [&](DriverMemory::Kernel& known) {
      if (much_shared && grid.shared_bytes > known.most_shared) {
        // The maximum, not just the need of this launch: another thread may be about to launch with more. The driver's
        // size of the kernel's own memory may include its reserved memory of each block.
        const int all = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - int(known.attributes.sharedSizeBytes);
        const int most = std::max(all, grid.shared_bytes);
        if (const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most)) {
          return error;
        }
        known.most_shared = most;
      }
      if (wants_shared && !known.wants_shared) {
        // Grids are planned for as many such blocks as shared memory has room for.
        if (const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                                    cudaSharedmemCarveoutMaxShared)) {
          return error;
        }
        known.wants_shared = true;
      }
      if (large_cluster && !known.any_cluster) {
        if (const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)) {
          return error;
        }
        known.any_cluster = true;
      }
      return cudaSuccess;
    });
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// The limit of a grid. Kernels use a strided loop for work beyond it, which tests reach by a smaller limit.
constexpr int64_t kMostBlocks = 0x7fffffff;
#if !defined(PDL_MOST_BLOCKS)
#define PDL_MOST_BLOCKS kMostBlocks
#endif

inline int64_t grid_for(int64_t work) {
  return std::min<int64_t>(work, PDL_MOST_BLOCKS);
}

}  // namespace pdl::cuda
