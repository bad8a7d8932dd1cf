// PyTorch's header of this name, with one change: csrc/cuda's registrations for CUDA as ops of pdl_ext become CPU
// kernels of the same ops of pdl_ext_emulated.
#pragma once

#include_next <torch/csrc/stable/library.h>

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, k, m) _STABLE_TORCH_LIBRARY_IMPL(ns##_emulated, CPU, m, C10_UID)
