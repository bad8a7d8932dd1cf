// Stands in for CUDA's header of this name: the subset that csrc/cuda uses, for g++ (see ../README.md).
#pragma once

struct __half {
  _Float16 value;
};

inline float __half2float(__half x) {
  return static_cast<float>(x.value);
}

// Rounds to nearest even.
inline __half __float2half_rn(float x) {
  return {static_cast<_Float16>(x)};
}
