// Shuffles, votes and reductions of a warp; from sm_80 on.
#include "kernel.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;

// Values of all kinds, and a predicate: each third thread.
__global__ void votes(unsigned* output, const int* input, int) {
  const int value = input[threadIdx.x];
  // The odd lanes vote among themselves.
  const unsigned mask = threadIdx.x % 2 == 0 ? 0x55555555u : 0xaaaaaaaau;
  unsigned* mine = output + threadIdx.x * 4;
  if (threadIdx.x % 2 == 0) {
    mine[0] = __any_sync(mask, value > 0) != 0;
    mine[1] = __all_sync(mask, value > 0) != 0;
    mine[2] = __ballot_sync(mask, value > 0);
    mine[3] = __match_any_sync(mask, value);
  } else {
    mine[0] = __any_sync(mask, value > 0) != 0;
    mine[1] = __all_sync(mask, value > 0) != 0;
    mine[2] = __ballot_sync(mask, value > 0);
    mine[3] = __match_any_sync(mask, value);
  }
}

__global__ void reductions(int* output, const int* input, int) {
  const int value = input[threadIdx.x];
  const auto bits = unsigned(value);
  int* mine = output + threadIdx.x * 9;
  mine[0] = __reduce_add_sync(kAll, value);
  mine[1] = __reduce_min_sync(kAll, value);
  mine[2] = __reduce_max_sync(kAll, value);
  mine[3] = int(__reduce_add_sync(kAll, bits));
  mine[4] = int(__reduce_min_sync(kAll, bits));
  mine[5] = int(__reduce_max_sync(kAll, bits));
  mine[6] = int(__reduce_and_sync(kAll, bits));
  mine[7] = int(__reduce_or_sync(kAll, bits));
  mine[8] = int(__reduce_xor_sync(kAll, bits));
}

// All four shuffles, in groups of n lanes.
__global__ void shuffles(double* output, const double* input, int n) {
  const double value = input[threadIdx.x];
  double* mine = output + threadIdx.x * 4;
  mine[0] = __shfl_up_sync(kAll, value, 3, n);
  mine[1] = __shfl_down_sync(kAll, value, 3, n);
  mine[2] = __shfl_xor_sync(kAll, value, 5, n);
  mine[3] = __shfl_sync(kAll, value, 35, n);
}

__global__ void absent_lane(int* output, const int*, int) {
  if (threadIdx.x % 32 != 5) output[0] = __shfl_down_sync(kAll, 1, 1);
}

__global__ void absent_lane_in_vote(int* output, const int*, int) {
  if (threadIdx.x % 32 != 5) output[0] = __any_sync(kAll, 1);
}

__global__ void absent_lane_in_reduction(int* output, const int*, int) {
  if (threadIdx.x % 32 != 5) output[0] = __reduce_add_sync(kAll, 1);
}

__global__ void divergent_shuffles(int* output, const int*, int) {
  if (threadIdx.x % 2 == 0) {
    output[0] = __shfl_down_sync(kAll, 1, 1);
  } else {
    output[0] = __shfl_xor_sync(kAll, 1, 1);
  }
}

__global__ void lane_outside_mask(int* output, const int*, int) {
  output[0] = __shfl_down_sync(0x7fffffffu, 1, 1);
}

const kernels::Register kernels_of_warps({
    {"votes", votes},
    {"reductions", reductions},
    {"shuffles", shuffles},
    {"absent_lane", absent_lane},
    {"absent_lane_in_vote", absent_lane_in_vote},
    {"absent_lane_in_reduction", absent_lane_in_reduction},
    {"divergent_shuffles", divergent_shuffles},
    {"lane_outside_mask", lane_outside_mask},
});

}  // namespace
