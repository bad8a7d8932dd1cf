// What csrc/cuda takes from a PyTorch with CUDA: the device guard and the stream are no-ops, an
// error becomes a message. Linked with -Bsymbolic, so that these win over what libtorch_cpu has.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include "cuda_runtime.h"

extern "C" {

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  // The op ends here.
  cuda_emulator::forget_canaries();
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char* file, const char*, uint32_t line, bool,
                                        char** message) {
  *message = nullptr;
  if (error != 0) {
    const std::string text = "CUDA emulator: " + std::string(cudaGetErrorName(cudaError_t(error))) + " (" +
                             std::to_string(error) + ") at " + file + ":" + std::to_string(line);
    *message = strdup(text.c_str());
  }
  return AOTI_TORCH_SUCCESS;
}

void torch_c10_cuda_free_error_msg(char* message) {
  free(message);
}
}
