// Vector types, 16-bit floats, loads and stores with cache hints, fast arithmetic.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernel.h"

namespace {

static_assert(alignof(uint2) == 8 && alignof(uint4) == 16 && alignof(int2) == 8 && alignof(int4) == 16);
static_assert(alignof(float2) == 8 && alignof(float4) == 16 && alignof(double2) == 16 && alignof(ulonglong2) == 16);
static_assert(sizeof(__half2) == 4 && alignof(__half2) == 4 && alignof(__nv_bfloat162) == 4 && sizeof(__half) == 2);

// The bits of both 16-bit floats, singly and in pairs, and what they are as floats.
__global__ void conversions(float* output, const float2* input, int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  const float2 x = input[i];
  const __nv_bfloat162 b = __float22bfloat162_rn(x);
  const __nv_bfloat162 c = __floats2bfloat162_rn(x.x, x.y);
  const __half2 h = __float22half2_rn(x);
  const __half2 k = __floats2half2_rn(x.x, x.y);
  const float2 from_b = __bfloat1622float2(b), from_h = __half22float2(h);
  float* mine = output + i * 8;
  mine[0] = from_b.x;
  mine[1] = from_b.y;
  mine[2] = from_h.x;
  mine[3] = from_h.y;
  mine[4] = __bfloat162float(__float2bfloat16_rn(x.x));
  mine[5] = __half2float(__float2half_rn(x.y));
  mine[6] = __low2float(c) + __high2float(c);
  mine[7] = __low2float(k) + __high2float(k);
}

// n elements by each load, each store and each type of 16 bytes.
__global__ void hinted_copies(uint4* output, const uint4* input, int n) {
  const int i = int(threadIdx.x);
  if (i >= n) return;
  __stcs(output + i, __ldg(input + i));
  __stcg(reinterpret_cast<int4*>(output) + n + i, __ldcg(reinterpret_cast<const int4*>(input) + i));
  __stwt(reinterpret_cast<float4*>(output) + 2 * n + i, __ldcs(reinterpret_cast<const float4*>(input) + i));
  __stwb(reinterpret_cast<double2*>(output) + 3 * n + i, __ldca(reinterpret_cast<const double2*>(input) + i));
  __stcs(reinterpret_cast<ulonglong2*>(output) + 4 * n + i, __ldlu(reinterpret_cast<const ulonglong2*>(input) + i));
  auto* pairs = reinterpret_cast<uint2*>(output + 5 * n);
  for (int half = 0; half < 2; ++half) {
    __stcs(pairs + 2 * i + half, __ldcs(reinterpret_cast<const uint2*>(input) + 2 * i + half));
  }
  auto* halves = reinterpret_cast<__half2*>(output + 6 * n);
  for (int quarter = 0; quarter < 4; ++quarter) {
    __stcs(halves + 4 * i + quarter, __ldg(reinterpret_cast<const __half2*>(input) + 4 * i + quarter));
  }
  const float4 made = make_float4(1, 2, 3, 4);
  const uint4 bits =
      make_uint4(__float_as_uint(made.x), __float_as_uint(made.y), __float_as_uint(made.z), __float_as_uint(made.w));
  output[7 * n + i] = bits;
}

__global__ void misaligned_load(int* output, const int* input, int) {
  output[0] = __ldg(reinterpret_cast<const int4*>(input + 1)).x;
}

__global__ void misaligned_store(int* output, const int*, int) {
  __stcs(reinterpret_cast<uint2*>(output + 1), make_uint2(1, 2));
}

__global__ void fast_arithmetic(float* output, const float* input, int n) {
  const int i = int(threadIdx.x);
  if (i >= n) return;
  const float x = input[i];
  float* mine = output + i * 7;
  mine[0] = __expf(x);
  mine[1] = __logf(x);
  mine[2] = __fdividef(1.0f, x);
  mine[3] = exp2f(x);
  mine[4] = __fmaf_rn(x, x, -1.0f);
  mine[5] = rsqrtf(x);
  mine[6] = __int_as_float(__float_as_int(x));
}

const kernels::Register kernels_of_vectors({
    {"conversions", conversions},
    {"hinted_copies", hinted_copies},
    {"misaligned_load", misaligned_load},
    {"misaligned_store", misaligned_store},
    {"fast_arithmetic", fast_arithmetic},
});

}  // namespace
