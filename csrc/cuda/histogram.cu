// Histogram of token ids on CUDA: one read of the ids in their own dtype, no pre-pass, nothing read back.
//
// Equal ids within a warp are counted together, so that a run of one id costs one atomic for 32 tokens; what is ignored
// or out of range is counted in registers and added once a warp. Integer additions make the result the same every time.
// One regime so far: every id goes to the 64-bit totals in global memory, served by L2.
#include <torch/csrc/stable/library.h>

#include "../histogram_arguments.h"
#include "launch.cuh"

namespace pdl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kTokensPerThread = 8;

__device__ __forceinline__ int64_t warp_sum(int64_t value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += shuffle_down(value, distance);
  return value;
}

template <typename T>
__global__ void count_kernel(const T* tokens, int64_t n, int64_t vocab_size, int64_t ignore_index, int64_t* counts,
                             int64_t* ignored, int64_t* out_of_range) {
  const int lane = threadIdx.x % kWarp;
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  int64_t to_ignored = 0, to_out_of_range = 0;
  // A warp stays together until its last token: the lanes past the end take part with nothing to count.
  for (int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x - lane; first < n; first += stride) {
    const int64_t i = first + lane;
    const bool present = i < n;
    const int64_t id = present ? static_cast<int64_t>(tokens[i]) : 0;
    const bool is_ignored = present && id == ignore_index;
    const bool counted = present && !is_ignored && id >= 0 && id < vocab_size;
    to_ignored += is_ignored;
    to_out_of_range += present && !is_ignored && !counted;
    const unsigned equal = lanes_with_equal(counted ? static_cast<unsigned long long>(id) : ~0ull);
    if (counted && lane == __ffs(equal) - 1) atomic_add(counts + id, __popc(equal));
  }
  to_ignored = warp_sum(to_ignored);
  to_out_of_range = warp_sum(to_out_of_range);
  if (lane == 0) {
    if (to_ignored != 0) atomic_add(ignored, to_ignored);
    if (to_out_of_range != 0) atomic_add(out_of_range, to_out_of_range);
  }
}

void count_tokens_(Tensor counts, Tensor ignored, Tensor out_of_range, Tensor tokens, int64_t ignore_index,
                   bool strict) {
  STD_TORCH_CHECK(!strict, "strict counting would have to wait for the device; TokenFrequency.update does it");
  check_histogram_arguments(counts, ignored, out_of_range, tokens);
  const Launcher launch(counts);
  dispatch_tokens(tokens, [&]<typename T>(const T* ids) {
    const int64_t n = tokens.numel();
    const int64_t per_block = kThreads * kTokensPerThread;
    launch(count_kernel<T>, grid_for((n + per_block - 1) / per_block), kThreads, ids, n, counts.size(0), ignore_index,
           static_cast<int64_t*>(counts.mutable_data_ptr()), static_cast<int64_t*>(ignored.mutable_data_ptr()),
           static_cast<int64_t*>(out_of_range.mutable_data_ptr()));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pdl_ext, CUDA, m) {
  m.impl("count_tokens_", TORCH_BOX(&count_tokens_));
}

}  // namespace pdl::cuda
