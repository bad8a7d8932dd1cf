// PyTorch's header of this name, except that what csrc/cuda registers for CUDA as an op of pdl_ext becomes the CPU
// kernel of the same op of pdl_ext_emulated.
#pragma once

#include_next <torch/csrc/stable/library.h>

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, k, m) _STABLE_TORCH_LIBRARY_IMPL(ns##_emulated, CPU, m, C10_UID)
