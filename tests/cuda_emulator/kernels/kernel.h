// Kernels for the tests of the emulator, which know them by name. They use CUDA's own headers alone, so that nvcc takes
// them too.
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <initializer_list>
#include <map>
#include <string>

namespace kernels {

struct Kernel {
  const void* address;
  std::function<cudaError_t(const cudaLaunchConfig_t*, void* output, const void* input, int n)> launch;

  template <typename Output, typename Input>
  Kernel(void (*kernel)(Output*, const Input*, int))
      : address(reinterpret_cast<const void*>(kernel)),
        launch([=](const cudaLaunchConfig_t* config, void* output, const void* input, int n) {
          return cudaLaunchKernelEx(config, kernel, static_cast<Output*>(output), static_cast<const Input*>(input), n);
        }) {}
};

inline std::map<std::string, Kernel>& all() {
  static std::map<std::string, Kernel> kernels;
  return kernels;
}

struct Register {
  Register(std::initializer_list<std::pair<const std::string, Kernel>> kernels) { all().insert(kernels); }
};

}  // namespace kernels
