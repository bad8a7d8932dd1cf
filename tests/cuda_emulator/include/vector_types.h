// Stands in for CUDA's header of this name: the subset that csrc/cuda uses, for g++ (see ../README.md).
#pragma once

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

#define VECTOR_OF_2(name, Element)                \
  struct alignas(2 * sizeof(Element)) name {      \
    Element x, y;                                 \
  };                                              \
  inline name make_##name(Element x, Element y) { \
    return {x, y};                                \
  }

#define VECTOR_OF_4(name, Element)                                      \
  struct alignas(4 * sizeof(Element)) name {                            \
    Element x, y, z, w;                                                 \
  };                                                                    \
  inline name make_##name(Element x, Element y, Element z, Element w) { \
    return {x, y, z, w};                                                \
  }

VECTOR_OF_2(int2, int)
VECTOR_OF_2(uint2, unsigned)
VECTOR_OF_2(float2, float)
VECTOR_OF_2(double2, double)
VECTOR_OF_2(longlong2, long long)
VECTOR_OF_2(ulonglong2, unsigned long long)
VECTOR_OF_4(int4, int)
VECTOR_OF_4(uint4, unsigned)
VECTOR_OF_4(float4, float)

#undef VECTOR_OF_2
#undef VECTOR_OF_4
