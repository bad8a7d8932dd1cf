// What the tests call: launches, and what the runtime says of the device.
#include <cstdio>
#include <exception>

#include "kernel.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

struct Request {
  unsigned grid[3], block[3], cluster[3];  // no attribute for a cluster of 0
  unsigned dynamic_shared;
  int max_dynamic_shared, any_cluster_size;  // attributes of the kernel that are set if they are not negative
};

namespace {

cudaLaunchConfig_t config_of(const Request& request, cudaLaunchAttribute* cluster) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(request.grid[0], request.grid[1], request.grid[2]);
  config.blockDim = dim3(request.block[0], request.block[1], request.block[2]);
  config.dynamicSmemBytes = request.dynamic_shared;
  cluster->id = cudaLaunchAttributeClusterDimension;
  cluster->val.clusterDim.x = request.cluster[0];
  cluster->val.clusterDim.y = request.cluster[1];
  cluster->val.clusterDim.z = request.cluster[2];
  config.attrs = cluster;
  config.numAttrs = request.cluster[0] != 0;
  return config;
}

cudaError_t set_attributes(const void* kernel, const Request& request) {
  if (request.max_dynamic_shared >= 0) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, request.max_dynamic_shared);
    if (error != cudaSuccess) return error;
  }
  if (request.any_cluster_size < 0) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, request.any_cluster_size);
}

}  // namespace

// Leaves the message of a kernel's fault, or "".
EXPORT int cuda_emulator_launch(const char* name, const Request* request, void* output, const void* input, int n,
                                char* message, size_t size) {
  message[0] = 0;
  try {
    const kernels::Kernel& kernel = kernels::all().at(name);
    if (const cudaError_t error = set_attributes(kernel.address, *request)) return error;
    cudaLaunchAttribute cluster = {};
    const cudaLaunchConfig_t config = config_of(*request, &cluster);
    if (const cudaError_t error = kernel.launch(&config, output, input, n)) return error;
    return cudaDeviceSynchronize();
  } catch (const std::exception& error) {
    snprintf(message, size, "%s", error.what());
    return cudaSuccess;
  }
}

EXPORT int cuda_emulator_device_attribute(int attribute, int* value) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  return cudaDeviceGetAttribute(value, cudaDeviceAttr(attribute), device);
}

// Blocks a multiprocessor, clusters on the device, and the most blocks a cluster.
EXPORT int cuda_emulator_occupancy(const char* name, const Request* request, int* results) {
  const kernels::Kernel& kernel = kernels::all().at(name);
  if (const cudaError_t error = set_attributes(kernel.address, *request)) return error;
  cudaLaunchAttribute cluster = {};
  cudaLaunchConfig_t config = config_of(*request, &cluster);
  const int threads = int(request->block[0] * request->block[1] * request->block[2]);
  cudaError_t error =
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(results, kernel.address, threads, request->dynamic_shared);
  if (error != cudaSuccess || config.numAttrs == 0) return error;
  error = cudaOccupancyMaxActiveClusters(results + 1, kernel.address, &config);
  if (error != cudaSuccess) return error;
  return cudaOccupancyMaxPotentialClusterSize(results + 2, kernel.address, &config);
}

// The last error's number before and after it is asked for, and its name.
EXPORT void cuda_emulator_last_error(int* results, char* name, size_t size) {
  results[0] = cudaPeekAtLastError();
  snprintf(name, size, "%s", cudaGetErrorName(cudaGetLastError()));
  results[1] = cudaGetLastError();
}

// Copies and sets memory on the device.
EXPORT int cuda_emulator_copy_and_set(void* destination, const void* source, size_t bytes, int value, size_t set) {
  if (const cudaError_t error = cudaMemcpyAsync(destination, source, bytes, cudaMemcpyDeviceToDevice, nullptr)) {
    return error;
  }
  if (const cudaError_t error = cudaMemsetAsync(destination, value, set, nullptr)) return error;
  return cudaStreamSynchronize(nullptr);
}

// Of a kernel: the most dynamic shared memory that it may have.
EXPORT int cuda_emulator_max_dynamic_shared(const char* name) {
  cudaFuncAttributes attributes = {};
  if (cudaFuncGetAttributes(&attributes, kernels::all().at(name).address) != cudaSuccess) return -1;
  return attributes.maxDynamicSharedSizeBytes;
}

EXPORT int cuda_emulator_carveout_changes() {
  return cuda_emulator::carveout_changes();
}
