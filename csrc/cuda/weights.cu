// Token weights on CUDA: the table of w(t) from the counts. Three launches compute sums of the counts, the mean of the
// weights, and the weights. They pass their sums in memory, so that nothing is read back. Reads 8*V bytes three times
// (L2 after the first), writes 4*V. Each block sums the partial sums of all blocks itself, always in the same order.
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

// As many blocks as a card runs at once, and no more than the threads with which a block adds up their sums.
constexpr int kThreads = 512;
constexpr int64_t kMaxBlocks = 256;

struct WeightSums {
  double weights;
  double shares;

  __device__ WeightSums operator+(const WeightSums& other) const {
    return {weights + other.weights, shares + other.shares};
  }
};

__device__ __forceinline__ WeightSums shifted_down(const WeightSums& sums, int distance) {
  return {shuffle_down(sums.weights, distance), shuffle_down(sums.shares, distance)};
}

struct Scratch {
  CountSums* of_blocks;  // [blocks]
  CountSums* counts;     // their sum
  WeightSums* sums;      // [blocks]

  static constexpr int64_t kWords = 2 * (kMaxBlocks + 1) + 2 * kMaxBlocks;
  explicit Scratch(int64_t* words)
      : of_blocks(reinterpret_cast<CountSums*>(words)),
        counts(of_blocks + kMaxBlocks),
        sums(reinterpret_cast<WeightSums*>(counts + 1)) {}
};

// The sum of `partial` over the grid, for every thread of the block.
template <typename V>
__device__ V grid_sum(const V* partial) {
  __shared__ V sum;
  V mine{};
  for (int i = threadIdx.x; i < int(gridDim.x); i += blockDim.x) mine = mine + partial[i];
  mine = block_sum(mine);
  if (threadIdx.x == 0) sum = mine;
  __syncthreads();
  // Any later write to it comes after the barriers of another block_sum, which every thread reaches after this line.
  return sum;
}

// f(t, counts[t]) for each entry; a thread loads two at once.
template <typename F>
__device__ __forceinline__ void for_each_entry(const int64_t* counts, int64_t vocab_size, F f) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t t = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; t < vocab_size; t += 2 * stride) {
    const int64_t count = counts[t], next = counts[min(t + stride, vocab_size - 1)];
    f(t, count);
    if (t + stride < vocab_size) f(t + stride, next);
  }
}

__global__ void __launch_bounds__(kThreads)
    counts_kernel(const int64_t* counts, const float* fixed, PowerLaw law, Scratch scratch) {
  CountSums sums{};
  for_each_entry(counts, law.vocab_size,
                 [&](int64_t t, int64_t count) { sums = sums + law.sums_of(count, is_fixed(fixed, t)); });
  sums = block_sum(sums);
  if (threadIdx.x == 0) scratch.of_blocks[blockIdx.x] = sums;
}

__global__ void __launch_bounds__(kThreads)
    mean_kernel(const int64_t* counts, const float* fixed, PowerLaw law, Scratch scratch) {
  const CountSums of_counts = grid_sum(scratch.of_blocks);
  if (blockIdx.x == 0 && threadIdx.x == 0) *scratch.counts = of_counts;
  const int64_t total = of_counts.total;
  const WeightScale scale = law.scale(of_counts);
  WeightSums sums{};
  for_each_entry(counts, law.vocab_size, [&](int64_t t, int64_t count) {
    const double share = is_fixed(fixed, t) ? 0.0 : law.share(count, total);
    sums.weights += share == 0.0 ? 0.0 : share * law.weight(count, scale);
    sums.shares += share;
  });
  sums = block_sum(sums);
  if (threadIdx.x == 0) scratch.sums[blockIdx.x] = sums;
}

__global__ void __launch_bounds__(kThreads)
    weights_kernel(const int64_t* counts, const float* blend, const float* fixed, PowerLaw law, Scratch scratch,
                   float* weights) {
  const WeightScale scale = law.scale(*scratch.counts);
  const WeightSums sums = grid_sum(scratch.sums);
  const double mean = law.mean(sums.weights, sums.shares);
  const double mix = blend != nullptr ? double(*blend) : 1.0;
  for_each_entry(counts, law.vocab_size, [&](int64_t t, int64_t count) {
    weights[t] = is_fixed(fixed, t) ? fixed[t] : blended(law.weight(count, scale), mean, mix);
  });
}

Tensor token_weights(Tensor counts_tensor, OptionalTensor blend, OptionalTensor fixed_tensor, double alpha,
                     double epsilon, double smoothing, bool relative, int64_t normalize, double max_weight) {
  check_weights_arguments(counts_tensor, blend, fixed_tensor);
  const int64_t vocab_size = counts_tensor.size(0);
  const PowerLaw law{alpha, epsilon, smoothing, relative, Normalize(normalize), max_weight, vocab_size};
  const Launcher launch(counts_tensor);
  const Grid grid{std::min<int64_t>(kMaxBlocks, (vocab_size + kThreads - 1) / kThreads), kThreads};
  const Tensor memory = allocate(counts_tensor, {Scratch::kWords}, ScalarType::Long);
  const Scratch scratch(static_cast<int64_t*>(memory.mutable_data_ptr()));
  const Tensor result = allocate(counts_tensor, counts_tensor.sizes(), ScalarType::Float);
  const int64_t* counts = static_cast<const int64_t*>(counts_tensor.const_data_ptr());
  const float* fixed = fixed_tensor ? static_cast<const float*>(fixed_tensor->const_data_ptr()) : nullptr;
  const float* mix = blend ? static_cast<const float*>(blend->const_data_ptr()) : nullptr;
  launch(counts_kernel, grid, counts, fixed, law, scratch);
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
