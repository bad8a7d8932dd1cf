// How this library was built, for `pdl-ext info`.
#pragma once

namespace pdl {

// The compute capabilities that the CUDA kernels were compiled for ("800,900"), "" in a build without them.
const char* cuda_architectures();

}  // namespace pdl
