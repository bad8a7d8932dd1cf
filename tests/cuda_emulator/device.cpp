// The emulated card: its attributes and limits, and the calls of CUDA's runtime that ask for them.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "include/cuda_runtime.h"

namespace cuda_emulator {
namespace {

constexpr int kKiB = 1024;
constexpr int kSharedWithoutOptin = 48 * kKiB;
// A kernel's own __shared__ variables count, too; how many bytes they take is not known here, and cudaFuncGetAttributes
// says 0.
constexpr int kAssumedStatic = 2 * kKiB;
constexpr int kMaxThreads = 1024;
constexpr int kRegisters = 65536;
constexpr int kPortableCluster = 8;
constexpr int kMaxCluster = 16;
// Few, so that persistent grids have to stride.
constexpr int kMultiprocessors = 4;

struct Device {
  const char* name;
  int capability;  // 10 * major + minor
  int threads;     // a multiprocessor
  int blocks;      // a multiprocessor
  int shared;      // a multiprocessor, bytes
  int reserved;    // of that, for each block
  int optin;       // the most that a block may have
  int l2;          // bytes

  bool has_clusters() const { return capability >= 90; }
};

constexpr Device kDevices[] = {
    {"sm_75", 75, 1024, 16, 64 * kKiB, 0, 64 * kKiB, 4096 * kKiB},
    {"sm_80", 80, 2048, 32, 164 * kKiB, kKiB, 163 * kKiB, 40960 * kKiB},
    {"sm_90", 90, 2048, 32, 228 * kKiB, kKiB, 227 * kKiB, 51200 * kKiB},
    {"sm_100", 100, 2048, 32, 228 * kKiB, kKiB, 227 * kKiB, 129024 * kKiB},
};

const Device& device() {
  const char* name = getenv("PDL_EXT_EMULATOR_DEVICE");
  if (name == nullptr) name = "sm_90";
  for (const Device& device : kDevices) {
    if (strcmp(device.name, name) == 0) return device;
  }
  throw std::runtime_error(std::string("CUDA emulator: PDL_EXT_EMULATOR_DEVICE names no device that it knows: ") +
                           name);
}

int multiprocessors() {
  const char* number = getenv("PDL_EXT_EMULATOR_MULTIPROCESSORS");
  return number == nullptr ? kMultiprocessors : atoi(number);
}

// What the module was built for, 10 * major + minor: less than the device's where PDL_EXT_EMULATOR_PTX says so.
int built_for() {
  const char* name = getenv("PDL_EXT_EMULATOR_PTX");
  return name == nullptr ? device().capability : atoi(name);
}

struct Function {
  int max_dynamic = kSharedWithoutOptin - kAssumedStatic;
  bool any_cluster_size = false;
  // The share of shared memory that the kernel prefers, in percent; -1 is no preference.
  int carveout = -1;
};

// Not thread-local: all that is belongs to the kernels.
std::mutex mutex;
// The devices that the environment has named so far, by number.
std::map<std::string, int> numbers;
std::map<std::pair<int, const void*>, Function> functions;
std::atomic<cudaError_t> last_error = cudaSuccess;
// Of the last kernel, and how often a kernel had another one than the kernel before it.
std::atomic<int> last_carveout = -1, changes = 0;

// Another device has another number, as on a machine with several cards.
int current_device() {
  const std::string name =
      std::string(device().name) + " " + std::to_string(multiprocessors()) + " " + std::to_string(built_for());
  const std::lock_guard<std::mutex> lock(mutex);
  return numbers.try_emplace(name, int(numbers.size())).first->second;
}

Function& function_of(const void* kernel, int number) {
  return functions[{number, kernel}];
}

Function function(const void* kernel) {
  const int number = current_device();
  const std::lock_guard<std::mutex> lock(mutex);
  return function_of(kernel, number);
}

cudaError_t record(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const int number = current_device();
  const std::lock_guard<std::mutex> lock(mutex);
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      if (value < 0 || value > device().optin) return cudaErrorInvalidValue;
      function_of(kernel, number).max_dynamic = value;
      return cudaSuccess;
    case cudaFuncAttributePreferredSharedMemoryCarveout:
      if (value < -1 || value > 100) return cudaErrorInvalidValue;
      function_of(kernel, number).carveout = value;
      return cudaSuccess;
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      if (!device().has_clusters()) return cudaErrorNotSupported;
      function_of(kernel, number).any_cluster_size = value != 0;
      return cudaSuccess;
  }
  return cudaErrorNotSupported;
}

cudaError_t get_attribute(int* value, cudaDeviceAttr attribute, int number) {
  if (number != current_device()) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = kMaxThreads;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = kSharedWithoutOptin;
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = 32;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = multiprocessors();
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = device().l2;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = device().threads;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = device().capability / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = device().capability % 10;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = device().shared;
      return cudaSuccess;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      *value = kRegisters;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device().optin;
      return cudaSuccess;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      *value = device().blocks;
      return cudaSuccess;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = device().reserved;
      return cudaSuccess;
    case cudaDevAttrClusterLaunch:
      *value = device().has_clusters();
      return cudaSuccess;
  }
  return cudaErrorNotSupported;
}

cudaError_t check_shared(const Function& function, size_t dynamic) {
  return dynamic <= size_t(std::min(function.max_dynamic, device().optin)) ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t check_block(const dim3& block) {
  const bool fits = block.x >= 1 && block.y >= 1 && block.z >= 1 && block.z <= 64 && block.x <= kMaxThreads &&
                    block.y <= kMaxThreads && uint64_t(block.x) * block.y * block.z <= kMaxThreads;
  return fits ? cudaSuccess : cudaErrorInvalidConfiguration;
}

// The dimensions of a launch's clusters; of one block without the attribute.
cudaError_t find_cluster(const cudaLaunchConfig_t& config, const Function& function, dim3* cluster) {
  *cluster = {};
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeIgnore) continue;
    // Launches end before the next one begins, which is one way to keep that order.
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization && device().capability >= 90) continue;
    if (attribute.id != cudaLaunchAttributeClusterDimension || !device().has_clusters()) return cudaErrorNotSupported;
    const auto [x, y, z] = attribute.val.clusterDim;
    const uint64_t blocks = uint64_t(x) * y * z;
    const unsigned most = function.any_cluster_size ? kMaxCluster : kPortableCluster;
    if (x > most || y > most || z > most || blocks == 0 || blocks > most) return cudaErrorInvalidClusterSize;
    const dim3& grid = config.gridDim;
    if (grid.x % x != 0 || grid.y % y != 0 || grid.z % z != 0) return cudaErrorInvalidClusterSize;
    *cluster = {x, y, z};
  }
  return cudaSuccess;
}

cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel, Launch* launch) {
  const dim3 grid = config.gridDim;
  const bool fits =
      grid.x >= 1 && grid.x <= 0x7fffffffu && grid.y >= 1 && grid.y <= 0xffffu && grid.z >= 1 && grid.z <= 0xffffu;
  if (!fits) return cudaErrorInvalidConfiguration;
  if (const cudaError_t error = check_block(config.blockDim)) return error;
  const Function attributes = function(kernel);
  if (const cudaError_t error = check_shared(attributes, config.dynamicSmemBytes)) return error;
  launch->grid = grid;
  launch->block = config.blockDim;
  launch->dynamic_shared = config.dynamicSmemBytes;
  return find_cluster(config, attributes, &launch->cluster);
}

cudaError_t count_blocks(int* blocks, const void* kernel, int threads, size_t dynamic) {
  *blocks = 0;
  if (threads < 1 || threads > kMaxThreads) return cudaErrorInvalidValue;
  if (check_shared(function(kernel), dynamic) != cudaSuccess) return cudaSuccess;
  const int whole_warps = (threads + 31) / 32 * 32;
  const int shared = int(dynamic) + device().reserved;
  *blocks = std::min(device().blocks, device().threads / whole_warps);
  if (shared > 0) *blocks = std::min(*blocks, device().shared / shared);
  return cudaSuccess;
}

cudaError_t count_clusters(int* clusters, const void* kernel, const cudaLaunchConfig_t* config) {
  *clusters = 0;
  Launch launch;
  if (const cudaError_t error = check(*config, kernel, &launch)) return error;
  if (!device().has_clusters()) return cudaErrorNotSupported;
  int blocks = 0;
  const int threads = int(launch.block.x * launch.block.y * launch.block.z);
  if (const cudaError_t error = count_blocks(&blocks, kernel, threads, launch.dynamic_shared)) return error;
  // A card has more multiprocessors than this one: at least a cluster always fits.
  const int size = int(launch.cluster.x * launch.cluster.y * launch.cluster.z);
  *clusters = std::max(1, multiprocessors() * blocks / size);
  return cudaSuccess;
}

}  // namespace

cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel, Launch* launch) {
  const cudaError_t error = check(config, kernel, launch);
  if (error != cudaSuccess) return record(error);
  const int carveout = function(kernel).carveout;
  if (last_carveout.exchange(carveout) != carveout) ++changes;
  // A card would run it, and the kernel would not know that its block is one of several. Occupancy does not tell.
  const dim3& cluster = launch->cluster;
  const bool clustered = uint64_t(cluster.x) * cluster.y * cluster.z > 1;
  return record(clustered && built_for() < 90 ? cudaErrorNotSupported : cudaSuccess);
}

int carveout_changes() {
  return changes;
}

void require_capability(int capability, const char* operation, Location where) {
  if (device().capability >= capability) return;
  fail(std::string(operation) + " needs a device from sm_" + std::to_string(capability) + " on, not " + device().name,
       where);
}

}  // namespace cuda_emulator

using namespace cuda_emulator;

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    case cudaErrorInvalidClusterSize:
      return "cudaErrorInvalidClusterSize";
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  return cudaGetErrorName(error);
}

cudaError_t cudaGetLastError() {
  return last_error.exchange(cudaSuccess);
}

cudaError_t cudaPeekAtLastError() {
  return last_error;
}

cudaError_t cudaGetDevice(int* device) {
  *device = current_device();
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  return record(device == current_device() ? cudaSuccess : cudaErrorInvalidDevice);
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  return record(get_attribute(value, attribute, device));
}

cudaError_t cudaDeviceSynchronize() {
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaMemset2DAsync(void* address, size_t pitch, int value, size_t width, size_t rows, cudaStream_t) {
  for (size_t i = 0; i < rows; ++i) memset(static_cast<char*>(address) + i * pitch, value, width);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  memset(address, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* destination, const void* source, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  memmove(destination, source, bytes);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  return record(set_attribute(kernel, attribute, value));
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  const Function set = function(kernel);
  *attributes = {};
  attributes->maxThreadsPerBlock = kMaxThreads;
  attributes->numRegs = 32;
  attributes->ptxVersion = built_for();
  attributes->binaryVersion = device().capability;
  attributes->maxDynamicSharedSizeBytes = set.max_dynamic;
  attributes->nonPortableClusterSizeAllowed = set.any_cluster_size;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads,
                                                          size_t dynamic_shared) {
  return record(count_blocks(blocks, kernel, threads, dynamic_shared));
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel, const cudaLaunchConfig_t* config) {
  return record(count_clusters(clusters, kernel, config));
}

cudaError_t cudaOccupancyMaxPotentialClusterSize(int* blocks, const void* kernel, const cudaLaunchConfig_t* config) {
  *blocks = 0;
  if (!device().has_clusters()) return record(cudaErrorNotSupported);
  if (const cudaError_t error = check_block(config->blockDim)) return record(error);
  const Function attributes = function(kernel);
  if (const cudaError_t error = check_shared(attributes, config->dynamicSmemBytes)) return record(error);
  *blocks = attributes.any_cluster_size ? kMaxCluster : kPortableCluster;
  return cudaSuccess;
}
