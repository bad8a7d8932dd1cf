// Weighted cross-entropy and its gradient in one call, on CUDA: over the logits or into another buffer, for the
// expected upstream gradient. Least traffic: e*N*V bytes read and e*N*V written.
//
// factors_kernel sums the weights, whose sum is the denominator of the gradient: reads at most 20*N bytes.
// on_chip_kernel, which starts meanwhile, and cached_kernel fuse transform, softmax statistics, losses and gradient.
// reduce_kernel sums the rows' losses: reads at most 32*N bytes (56*N in float64).
// scale_kernel multiplies a gradient by an upstream one that is read on the device, unless it is 1: 2*e*N*V bytes.
//
// Regimes, chosen by the sizes and the device:
// - on_chip_kernel: the row stays in shared memory between its two passes. Each thread copies its own vectors there
//   asynchronously, so that the only barrier is that of the reduction. A multiprocessor holds three rows, or shares of
//   them, so that one loads while others compute and store. Longer rows are divided over a cluster of up to 16 blocks
//   (sm_90), up to 262,144 logits of bfloat16 or float32. These blocks merge their statistics through distributed
//   shared memory.
// - cached_kernel: otherwise a block takes a row, and its second pass finds the row in L2. As many rows are processed
//   at once as fit into half of L2, but at least one for each multiprocessor. Written data are evicted first.
#include <torch/csrc/stable/library.h>

#include "loss.h"
#include "reduce_rows.cuh"

namespace pdl::cuda {
namespace {

// The position of the upstream gradient among the factors.
constexpr int kUpstream = Factors<float>::kNumbers - 1;
constexpr int kScaleThreads = 256;

template <Loop kLoop, int kCount, typename T, typename A>
__device__ __forceinline__ void add_kept(StatisticsOf<kLoop, A>& row, const Rows<T>& rows, const Pack<T>* kept,
                                         int first_pack, int begin, A centre) {
  Pack<T> packs[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) packs[i] = kept[first_pack + i * int(blockDim.x)];
  add_packs<kLoop>(row, rows, packs, begin + first_pack * kVector<T>, int(blockDim.x) * kVector<T>, centre);
}

// Begins to copy the thread's share of the range, its pack p to kept[p], in groups of kPacks. Returns the number of
// groups.
template <typename T>
__device__ __forceinline__ int copy_range(const T* x, const PackRange<T>& range, Pack<T>* kept) {
  const int packs = (range.end - range.begin) / kVector<T>;
  const int stride = int(blockDim.x);
  int p = threadIdx.x, groups = 0;
  // Pointers that advance: an index would be turned into an address of 64 bits for each copy.
  const T* from = x + range.first_of_thread();
  Pack<T>* to = kept + p;
  const auto copy_next = [&] {
    copy_async(to, from);
    to += stride;
    from += range.step();
  };
  for (; p + (kPacks<T> - 1) * stride < packs; p += kPacks<T> * stride, ++groups) {
#pragma unroll
    for (int i = 0; i < kPacks<T>; ++i) copy_next();
    end_group_of_copies();
  }
  // The last group may be empty.
  for (; p < packs; p += stride) copy_next();
  end_group_of_copies();
  return groups + 1;
}

// The statistics of the thread's share of the range, of which this number of groups is being copied.
template <Loop kLoop, typename T, typename A>
__device__ __forceinline__ StatisticsOf<kLoop, A> gather_kept(const Rows<T>& rows, const T* x,
                                                              const PackRange<T>& range, const Pack<T>* kept,
                                                              int groups, A centre) {
  const int packs = (range.end - range.begin) / kVector<T>;
  const int stride = int(blockDim.x);
  StatisticsOf<kLoop, A> row;
  int p = threadIdx.x;
  for (; p + (kPacks<T> - 1) * stride < packs; p += kPacks<T> * stride) {
    wait_for_copies(--groups);
    add_kept<kLoop, kPacks<T>>(row, rows, kept, p, range.begin, centre);
  }
  if (p < packs) wait_for_copies(--groups);
  for (; p < packs; p += stride) add_kept<kLoop, 1>(row, rows, kept, p, range.begin, centre);
  add_outside<kLoop>(row, rows, x, range, centre);
  return row;
}

// The block's share of the gradient, from the data of copy_range.
template <bool kPlain, typename T, typename A>
__device__ __forceinline__ void write_gradient_of_kept(const Rows<T>& rows, const T* x, T* gradient,
                                                       const PackRange<T>& range, const Pack<T>* kept, int target,
                                                       const GradientRow<A>& row) {
  const int packs = (range.end - range.begin) / kVector<T>;
  const OffTarget<kPlain, T> off_target(row);
  const TargetElement<T> of_target(x, target, range.visits(target, rows.vocab_size));
  const int stride = int(blockDim.x);
  const Pack<T>* from = kept + threadIdx.x;
  int first = range.first_of_thread();
  T* to = gradient + first;
  const auto next = [&] {
    Pack<T> pack = *from;
    turn_into_gradient<kPlain, T>(rows, pack, first, off_target);
    from += stride;
    first += range.step();
    return pack;
  };
  if (equally_aligned<T>(x, gradient)) {
#pragma unroll 2
    for (int p = threadIdx.x; p < packs; p += stride, to += range.step()) store_pack(to, next());
  } else {
    for (int p = threadIdx.x; p < packs; p += stride, to += range.step()) {
      const Pack<T> pack = next();
#pragma unroll
      for (int k = 0; k < kVector<T>; ++k) to[k] = pack.value[k];
    }
  }
  range.for_each_outside(rows.vocab_size,
                         [&](int j) { gradient[j] = gradient_of<kPlain, T>(rows, x[j], j, off_target); });
  of_target.template write<kPlain>(rows, gradient, row);
}

// One cluster for each row; `shared_bytes` of the launch hold a block's share of it. Only a cluster of one block may
// have several rows.
template <typename T, Loop kLoop>
__global__ void __launch_bounds__(kLongRowThreads, kResident<T>)
    on_chip_kernel(Rows<T> rows, Cluster cluster, const Accumulator<T>* factors, T* gradients, int64_t gradient_stride,
                   Reducer<T> reducer) {
  using A = Accumulator<T>;
  using Statistics = StatisticsOf<kLoop, A>;
  constexpr bool kPlain = kIsPlain<kLoop>;
  Pack<T>* kept = dynamic_shared_memory<Pack<T>>();
  __shared__ ClusterExchange<kExchange, Statistics> exchange;
  __shared__ A z_of_target;
  __shared__ RowResults<A> of_row;
  exchange.begin(cluster);
  const int rank = cluster.rank();
  uint32_t rows_before = 0;
  const int64_t clusters = gridDim.x >> cluster.log2_blocks;
  for (int64_t i = blockIdx.x >> cluster.log2_blocks; i < rows.count; i += clusters) {
    T* gradient = gradients + i * gradient_stride;
    const int64_t target = rows.targets[i];
    const bool counted = target != rows.ignore_index;
    if (!counted || !rows.in_vocabulary(target)) {
      const A fill = counted ? not_a_number<A>() : A(0);
      if (rank == 0 && threadIdx.x == 0) write_row_without_target(rows, i, fill);
      fill_row(gradient, rows.vocab_size, PackRange<T>(gradient, rows.vocab_size, rank, cluster), narrow<T>(fill));
      exchange.skip(cluster);
      // The next kernel reads the results of the previous one.
      wait_for_previous_kernel();
      if (rank == 0 && threadIdx.x == 0) rows_before = reducer.row_written(rows.count);
      continue;
    }
    const T* x = rows.logits + i * rows.stride;
    const PackRange<T> range(x, rows.vocab_size, rank, cluster);
    const int groups = copy_range(x, range, kept);
    // After the copies, since each of these loads waits for memory.
    const RowTarget<T, kLoop> of_target(rows, x, i, int(target));
    Statistics row = gather_kept<kLoop>(rows, x, range, kept, groups, of_target.centre(rows));
    row = block_reduce(row, Statistics(), Merge());
    // Before the exchange, after which another block may overwrite it.
    if (threadIdx.x == 0) z_of_target = of_target.z(rows);
    wait_for_previous_kernel();
    A row_weight;
    // For the expected upstream gradient.
    Factors<A> expected;
    if (threadIdx.x == 0) {
      row_weight = rows.row_weight_at(i);
      expected = Factors<A>::load(factors);
    }
    row = exchange.merged(cluster, row, Merge());
    if (threadIdx.x == 0) {
      const SavedRow<A> saved = rows.loss_of(row, z_of_target, of_target.token_weight);
      of_row = {saved, gradient_row(saved, row_weight, expected.upstream, expected, rows.options), argmax_of(row)};
    }
    __syncthreads();
    exchange.after_reads(cluster);
    if (rank == 0 && threadIdx.x == 0) {
      write_row(rows, i, of_row.saved, of_row.argmax);
      rows_before = reducer.row_written(rows.count);
    }
    write_gradient_of_kept<kPlain>(rows, x, gradient, range, kept, int(target), of_row.gradient);
    exchange.end(cluster);
  }
  if (rank == 0) reducer.end(rows, rows_before);
}

template <typename T, Loop kLoop>
__global__ void __launch_bounds__(kLongRowThreads, kResident<T> - 1)
    cached_kernel(Rows<T> rows, const Accumulator<T>* factors, T* gradients, int64_t gradient_stride,
                  Reducer<T> reducer) {
  using A = Accumulator<T>;
  using Statistics = StatisticsOf<kLoop, A>;
  constexpr bool kPlain = kIsPlain<kLoop>;
  __shared__ RowResults<A> of_row;
  // For the expected upstream gradient.
  const auto expected = Factors<A>::load(factors);
  uint32_t rows_before = 0;
  for (int64_t i = blockIdx.x; i < rows.count; i += gridDim.x) {
    T* gradient = gradients + i * gradient_stride;
    const int64_t target = rows.targets[i];
    const bool counted = target != rows.ignore_index;
    if (!counted || !rows.in_vocabulary(target)) {
      const A fill = counted ? not_a_number<A>() : A(0);
      if (threadIdx.x == 0) {
        write_row_without_target(rows, i, fill);
        rows_before = reducer.row_written(rows.count);
      }
      fill_row(gradient, rows.vocab_size, PackRange<T>(gradient, rows.vocab_size), narrow<T>(fill));
      continue;
    }
    const T* x = rows.logits + i * rows.stride;
    const RowTarget<T, kLoop> of_target(rows, x, i, int(target));
    const PackRange<T> range(x, rows.vocab_size);
    Statistics row = statistics_of_share<kLoop>(rows, x, range, of_target.centre(rows));
    A row_weight;
    if (threadIdx.x == 0) row_weight = rows.row_weight_at(i);
    row = block_reduce(row, Statistics(), Merge());
    if (threadIdx.x == 0) {
      const SavedRow<A> saved = rows.loss_of(row, of_target.z(rows), of_target.token_weight);
      of_row = {saved, gradient_row(saved, row_weight, expected.upstream, expected, rows.options), argmax_of(row)};
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      write_row(rows, i, of_row.saved, of_row.argmax);
      rows_before = reducer.row_written(rows.count);
    }
    write_gradient<kPlain>(rows, x, gradient, range, int(target), of_row.gradient);
  }
  reducer.end(rows, rows_before);
}

template <typename T>
__global__ void __launch_bounds__(kScaleThreads)
    scale_kernel(T* gradients, int64_t stride, int64_t count, int vocab_size, const Accumulator<T>* factor) {
  const Accumulator<T> by = *factor;
  if (by == Accumulator<T>(1)) return;
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    T* row = gradients + i * stride;
    const PackRange<T> range(row, vocab_size, int(blockIdx.y), int(gridDim.y));
    for_each_pack<kPacks<T>>(row, range, [&]<int kCount>(Pack<T>(&packs)[kCount], int first, int step) {
#pragma unroll
      for (int p = 0; p < kCount; ++p) {
#pragma unroll
        for (int k = 0; k < kVector<T>; ++k) packs[p].value[k] = narrow<T>(widen(packs[p].value[k]) * by);
        store_pack(row + first + p * step, packs[p]);
      }
    });
    range.for_each_outside(vocab_size, [&](int j) { row[j] = narrow<T>(widen(row[j]) * by); });
  }
}

// The grid with which a row stays on chip, or no blocks if that is impossible.
template <typename T, typename Kernel>
Grid on_chip_grid(const Launcher& launch, Kernel* kernel, int64_t rows, int64_t vocab_size) {
  constexpr int kAmpere = 8;
  if (launch.attribute(cudaDevAttrComputeCapabilityMajor) < kAmpere) return {};
  const bool is_hopper = launch.is_hopper(kernel);
  const int64_t of_multiprocessor = launch.attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  const int64_t packs = vocab_size / kVector<T>;
  // If a row cannot be divided that far, two rows a multiprocessor are still better than a second pass over L2.
  for (int resident = kRowsOfMultiprocessor; resident >= 2; --resident) {
    for (int blocks = 1; blocks <= (is_hopper ? kMaxCluster : 1); blocks *= blocks == 1 ? kLeastCluster : 2) {
      const int64_t bytes = (packs + blocks - 1) / blocks * kVectorBytes;
      // A cluster has one row.
      if (bytes > of_multiprocessor / resident || (blocks > 1 && rows > kMostBlocks / blocks)) continue;
      const Grid grid{.blocks = blocks == 1 ? grid_for(rows) : rows * blocks,
                      .threads = threads_for(vocab_size),
                      .shared_bytes = std::max(int(bytes), Reducer<T>::kSharedBytes),
                      .cluster = blocks,
                      .wants_shared = true,
                      .starts_early = is_hopper};
      if (launch.resident_blocks_of_multiprocessor(kernel, grid) >= resident) return grid;
    }
  }
  return {};
}

// With the gradient for the upstream gradient `upstream`, or for 1.
LossOutputs loss_and_gradient_into(const Tensor& logits, const Tensor& gradient, const LossInputs& inputs,
                                   const OptionalTensor& upstream, bool stats) {
  check_loss_arguments(logits, inputs);
  check_gradient(logits, gradient, inputs.options.reduction);
  check_scalar(upstream, "upstream", logits);
  // The mean of a modulation is known only after all rows.
  if (inputs.options.modulation_normalize) {
    const LossOutputs outputs = loss_forward_outputs(logits, inputs, upstream, stats);
    loss_backward_into(std::nullopt, logits, inputs, outputs.saved_rows, outputs.factors, {0, logits.size(1)},
                       gradient);
    return outputs;
  }
  const Launcher launch(logits);
  const LossOutputs outputs = allocate_loss_outputs(logits, inputs.options.reduction, stats);
  dispatch_logits<__nv_bfloat16, __half>(logits, [&]<typename T>(T) {
    using A = Accumulator<T>;
    Rows<T> rows = rows_of<T>(logits, inputs, outputs.saved_rows, logits.size(1));
    if (stats) rows.predicted = static_cast<int64_t*>(outputs.predicted.mutable_data_ptr());
    A* factors = static_cast<A*>(outputs.factors.mutable_data_ptr());
    const A* divisor = data_or_null<A>(inputs.normalizer);
    // The upstream gradient that factors_kernel reads: meanwhile another stream may write what is expected next.
    const Reduced<A> reduced{.reduction = inputs.options.reduction,
                             .normalizer = divisor,
                             .upstream = factors + kUpstream,
                             .factors = factors,
                             .loss = static_cast<A*>(outputs.loss.mutable_data_ptr())};
    const Reducer<T> reducer(reduced);
    T* gradients = static_cast<T*>(gradient.mutable_data_ptr());
    Grid one_block{1, kReduceThreads};
    dispatch_loop(inputs.loop(stats), [&]<Loop kLoop>() {
      const auto on_chip = on_chip_kernel<T, kLoop>;
      const Grid grid = on_chip_grid<T>(launch, on_chip, rows.count, rows.vocab_size);
      one_block.wants_shared = grid.wants_shared;
      launch(factors_kernel<T>, one_block, rows, inputs.options.reduction, divisor, data_or_null<A>(upstream), factors,
             reducer);
      if (grid.blocks > 0) {
        launch(on_chip, grid, rows, Cluster(grid.cluster), factors, gradients, gradient.stride(0), reducer);
        return;
      }
      const auto cached = cached_kernel<T, kLoop>;
      const int64_t half_of_cache = launch.attribute(cudaDevAttrL2CacheSize) / 2;
      Grid in_cache{1, threads_for(rows.vocab_size), Reducer<T>::kSharedBytes};
      // At least one row for each multiprocessor, and no more than run at once.
      in_cache.blocks = std::max<int64_t>(half_of_cache / (rows.vocab_size * int64_t(sizeof(T))),
                                          launch.attribute(cudaDevAttrMultiProcessorCount));
      in_cache.blocks =
          std::min({rows.count, in_cache.blocks, std::max<int64_t>(launch.resident_blocks(cached, in_cache), 1)});
      launch(cached, in_cache, rows, factors, gradients, gradient.stride(0), reducer);
    });
    if (Reducer<T>::reduces(rows.count)) return;
    one_block.starts_early = launch.is_hopper(reduce_kernel<T>);
    launch(reduce_kernel<T>, one_block, rows, reduced.reduction, reduced.normalizer, reduced.upstream, reduced.factors,
           reduced.loss);
  });
  return outputs;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> loss_and_gradient_(Tensor logits, Tensor gradient, Tensor targets,
                                                              OptionalTensor token_weight, OptionalTensor row_weight,
                                                              OptionalTensor logit_offset, OptionalTensor normalizer,
                                                              std::vector<double> options, bool stats) {
  const LossInputs inputs{.targets = targets,
                          .token_weight = token_weight,
                          .row_weight = row_weight,
                          .logit_offset = logit_offset,
                          .normalizer = normalizer,
                          .options = LossOptions::unpack(options)};
  const LossOutputs outputs = loss_and_gradient_into(logits, gradient, inputs, std::nullopt, stats);
  return {outputs.loss, outputs.saved_rows, outputs.factors, outputs.predicted};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> loss_and_gradient(
    Tensor logits, Tensor targets, OptionalTensor token_weight, OptionalTensor row_weight, OptionalTensor logit_offset,
    OptionalTensor normalizer, OptionalTensor upstream, std::vector<double> options, bool stats) {
  const LossInputs inputs{.targets = targets,
                          .token_weight = token_weight,
                          .row_weight = row_weight,
                          .logit_offset = logit_offset,
                          .normalizer = normalizer,
                          .options = LossOptions::unpack(options)};
  const Tensor gradient = allocate_gradient(logits);
  const LossOutputs outputs = loss_and_gradient_into(logits, gradient, inputs, upstream, stats);
  return {outputs.loss, outputs.saved_rows, outputs.factors, outputs.predicted, gradient};
}

void scale_(Tensor gradient, Tensor factor) {
  check_rows_apart(gradient, "gradient");
  check_scalar(factor, "factor", gradient);
  const Launcher launch(gradient);
  dispatch_logits<__nv_bfloat16, __half>(gradient, [&]<typename T>(T) {
    // The fewest blocks that keep memory busy, since mostly they find a 1 and return.
    const int64_t multiprocessors = launch.attribute(cudaDevAttrMultiProcessorCount);
    const Grid grid{.blocks = std::min(gradient.size(0), 2 * multiprocessors),
                    .threads = kScaleThreads,
                    .shares = shares_of_row(launch, gradient),
                    .wants_shared = keeps_rows_on_chip(launch, gradient)};
    launch(scale_kernel<T>, grid, static_cast<T*>(gradient.mutable_data_ptr()), gradient.stride(0), gradient.size(0),
           int(gradient.size(1)), static_cast<const Accumulator<T>*>(factor.const_data_ptr()));
  });
}

}  // namespace

int blocks_with_row_on_chip(const Launcher& launch, const Tensor& logits, Loop loop) {
  int blocks = 0;
  dispatch_logits<__nv_bfloat16, __half>(logits, [&]<typename T>(T) {
    dispatch_loop(loop, [&]<Loop kLoop>() {
      const Grid grid = on_chip_grid<T>(launch, on_chip_kernel<T, kLoop>, logits.size(0), logits.size(1));
      if (grid.blocks > 0) blocks = grid.cluster;
    });
  });
  return blocks;
}

STABLE_TORCH_LIBRARY_IMPL(pdl_ext, CUDA, m) {
  m.impl("loss_and_gradient_", TORCH_BOX(&loss_and_gradient_));
  m.impl("loss_and_gradient", TORCH_BOX(&loss_and_gradient));
  m.impl("scale_", TORCH_BOX(&scale_));
}

}  // namespace pdl::cuda
