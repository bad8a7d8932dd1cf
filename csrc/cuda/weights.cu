// Token weights on CUDA: the table of w(t) from the counts, in three launches that hand their sums on in memory, so
// that nothing is read back: total of the counts, mean of the weights, weights. Reads 8*V bytes three times (L2 after
// the first), writes 4*V. Each block sums the partial sums of all blocks itself, in the same order every time.
#include <torch/csrc/stable/library.h>

#include "../build_info.h"
#include "../token_weights.h"
#include "../weights_arguments.h"
#include "block_reduce.cuh"
#include "launch.cuh"

#define PDL_STRINGIZE_ALL(...) #__VA_ARGS__
#define PDL_STRINGIZE(...) PDL_STRINGIZE_ALL(__VA_ARGS__)

namespace pdl {

const char* cuda_architectures() {
#ifdef __CUDA_ARCH_LIST__
  return PDL_STRINGIZE(__CUDA_ARCH_LIST__);
#else
  return "unknown";
#endif
}

namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 256;

struct Scratch {
  int64_t* totals;      // [blocks]
  double* weight_sums;  // [blocks]
  double* share_sums;   // [blocks]
};

// The sum of `partial` over the grid, for every thread of the block.
template <typename V>
__device__ V grid_sum(const V* partial) {
  __shared__ V sum;
  V mine = 0;
  for (int i = threadIdx.x; i < int(gridDim.x); i += blockDim.x) mine += partial[i];
  mine = block_sum(mine);
  if (threadIdx.x == 0) sum = mine;
  __syncthreads();
  // Whoever overwrites it first passes the barriers of another block_sum, which every thread reaches after this line.
  return sum;
}

template <typename F>
__device__ __forceinline__ void for_each_entry(int64_t vocab_size, F f) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t t = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; t < vocab_size; t += stride) f(t);
}

__global__ void total_kernel(const int64_t* counts, int64_t vocab_size, Scratch scratch) {
  int64_t total = 0;
  for_each_entry(vocab_size, [&](int64_t t) { total += counts[t]; });
  total = block_sum(total);
  if (threadIdx.x == 0) scratch.totals[blockIdx.x] = total;
}

__global__ void mean_kernel(const int64_t* counts, const float* fixed, PowerLaw law, Scratch scratch) {
  const int64_t total = grid_sum(scratch.totals);
  const double scale = law.frequency_scale(total);
  double weight_sum = 0, share_sum = 0;
  for_each_entry(law.vocab_size, [&](int64_t t) {
    const double share = is_fixed(fixed, t) ? 0.0 : law.share(counts[t], total);
    weight_sum += share == 0.0 ? 0.0 : share * law.weight(counts[t], scale);
    share_sum += share;
  });
  weight_sum = block_sum(weight_sum);
  share_sum = block_sum(share_sum);
  if (threadIdx.x == 0) {
    scratch.weight_sums[blockIdx.x] = weight_sum;
    scratch.share_sums[blockIdx.x] = share_sum;
  }
}

__global__ void weights_kernel(const int64_t* counts, const float* blend, const float* fixed, PowerLaw law,
                               Scratch scratch, float* weights) {
  const double scale = law.frequency_scale(grid_sum(scratch.totals));
  const double mean = law.mean(grid_sum(scratch.weight_sums), grid_sum(scratch.share_sums));
  const double mix = blend != nullptr ? double(*blend) : 1.0;
  for_each_entry(law.vocab_size, [&](int64_t t) {
    weights[t] = is_fixed(fixed, t) ? fixed[t] : blended(law.weight(counts[t], scale), mean, mix);
  });
}

Tensor token_weights(Tensor counts_tensor, OptionalTensor blend, OptionalTensor fixed_tensor, double alpha,
                     double epsilon, double smoothing, bool relative, int64_t normalize, double max_weight) {
  check_weights_arguments(counts_tensor, blend, fixed_tensor);
  const int64_t vocab_size = counts_tensor.size(0);
  const PowerLaw law{alpha, epsilon, smoothing, relative, Normalize(normalize), max_weight, vocab_size};
  const Launcher launch(counts_tensor);
  const Grid grid{std::min<int64_t>(kMaxBlocks, (vocab_size + kThreads - 1) / kThreads), kThreads};
  const Tensor memory = allocate(counts_tensor, {3 * kMaxBlocks}, ScalarType::Long);
  int64_t* words = static_cast<int64_t*>(memory.mutable_data_ptr());
  const Scratch scratch{words, reinterpret_cast<double*>(words + kMaxBlocks),
                        reinterpret_cast<double*>(words + 2 * kMaxBlocks)};
  const Tensor result = allocate(counts_tensor, counts_tensor.sizes(), ScalarType::Float);
  const int64_t* counts = static_cast<const int64_t*>(counts_tensor.const_data_ptr());
  const float* fixed = fixed_tensor ? static_cast<const float*>(fixed_tensor->const_data_ptr()) : nullptr;
  const float* mix = blend ? static_cast<const float*>(blend->const_data_ptr()) : nullptr;
  launch(total_kernel, grid, counts, vocab_size, scratch);
  launch(mean_kernel, grid, counts, fixed, law, scratch);
  launch(weights_kernel, grid, counts, mix, fixed, law, scratch, static_cast<float*>(result.mutable_data_ptr()));
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pdl_ext, CUDA, m) {
  m.impl("token_weights", TORCH_BOX(&token_weights));
}

}  // namespace cuda
}  // namespace pdl
