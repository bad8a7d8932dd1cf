// Histogram of token ids on CUDA: one read of the ids in their own dtype, no pre-pass, nothing read back.
//
// Regimes, chosen by the sizes alone:
// - Few tokens, as in a training step: equal ids within a warp are counted together. They are added to the 64-bit
//   totals in global memory, which L2 serves.
// - Many: a block on every multiprocessor keeps 32-bit counters of 58,080 ids (sm_90) in its shared memory. It reads
//   ids in accesses of 16 bytes, and adds its counters to the totals at the end. A larger vocabulary is shared by a
//   group of up to eight blocks. They read the same ids at about the same time, so that all but the first find them in
//   L2. The cost does not depend on which ids are frequent.
// - Many, of a still larger vocabulary: ids without a counter in the group are added to the totals directly. A run of
//   one id in a thread is one addition. A byte-pair vocabulary is ordered by merges, so these ids are rare.
// Least traffic: the ids once, and 8 bytes read and written for each id that occurs. Integer additions make the result
// reproducible.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <type_traits>
#include <utility>

#include "../histogram_arguments.h"
#include "launch.cuh"
#include "vector_access.cuh"

namespace pdl::cuda {
namespace {

constexpr int kThreads = 256;
// For the kernel without a table: 2,048 threads, the most of any multiprocessor.
constexpr int64_t kBlocksOfMultiprocessor = 8;
// The number of batches that a thread of the other kernel has in flight. With two it loads one while it counts the
// other, but only half as many threads have enough registers. Only a card can decide: docs/kernels.md.
#if !defined(PDL_HISTOGRAM_BATCHES)
#define PDL_HISTOGRAM_BATCHES 1
#endif
constexpr int kBatches = PDL_HISTOGRAM_BATCHES;
constexpr int kOnChipThreads = 1024 / kBatches;
// Counters after a block's own, for ids without a counter, so that no addition needs a branch. There is one for each
// lane: otherwise the additions would be serialised.
constexpr uint32_t kSpareCounters = kWarp;
// About the number of ids that a group counts in a launch: fewer than a counter of 32 bits holds.
constexpr int64_t kMaxIdsOfGroup = int64_t(1) << 31;
// The most blocks that share a vocabulary. L2 delivers about twice the bandwidth of memory: more blocks would take
// longer than ids without counters do.
constexpr int64_t kMaxGroup = 8;
// The packs of a batch: enough to keep memory busy, few enough for the code of 16 ids.
template <typename T>
constexpr int kBatch = 16 / kVector<T>;
// From this number of tokens per counter on, counting on chip saves more than the final sum of its counters costs.
constexpr int64_t kTokensPerCounter = 2;

// The vocabulary's size in words as narrow as the ids; a negative id becomes one that is too large.
template <typename T>
struct Vocabulary {
  using Word = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

  Word size;
  bool ignores;
  Word ignored;

  Vocabulary(int64_t vocab_size, int64_t ignore_index)
      : size(Word(std::min<uint64_t>(vocab_size, std::numeric_limits<Word>::max()))),
        ignores(std::in_range<T>(ignore_index)),
        ignored(Word(T(ignore_index))) {}

  __device__ bool is_ignored(Word id) const { return ignores && id == ignored; }
};

__device__ __forceinline__ int64_t warp_sum(int64_t value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += shuffle_down(value, distance);
  return value;
}

// Every lane of the warp must call it.
__device__ __forceinline__ void add_rejected(const CountTable& totals, int64_t ignored, int64_t out_of_range) {
  ignored = warp_sum(ignored);
  out_of_range = warp_sum(out_of_range);
  if (threadIdx.x % kWarp == 0) {
    if (ignored != 0) atomic_add(totals.ignored, ignored);
    if (out_of_range != 0) atomic_add(totals.out_of_range, out_of_range);
  }
}

// Adds the number of a launch's tokens, once.
__device__ __forceinline__ void add_seen(const CountTable& totals, int64_t n) {
  if (blockIdx.x == 0 && threadIdx.x == 0) atomic_add(totals.seen, n);
}

template <typename T>
__global__ void count_in_warps_kernel(const T* tokens, int64_t n, Vocabulary<T> vocabulary, CountTable totals) {
  using Word = typename Vocabulary<T>::Word;
  const int lane = threadIdx.x % kWarp;
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  int64_t ignored = 0, out_of_range = 0;
  // A warp stays together until its last token: the lanes past the end take part with nothing to count.
  for (int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x - lane; first < n; first += stride) {
    const bool present = first + lane < n;
    const Word id = present ? Word(tokens[first + lane]) : Word(0);
    const bool is_ignored = present && vocabulary.is_ignored(id);
    const bool counted = present && !is_ignored && id < vocabulary.size;
    ignored += is_ignored;
    out_of_range += present && !is_ignored && !counted;
    const unsigned equal = lanes_with_equal(counted ? static_cast<unsigned long long>(id) : ~0ull);
    if (counted && lane == __ffs(equal) - 1) atomic_add(totals.counts + id, int64_t(__popc(equal)));
  }
  add_rejected(totals, ignored, out_of_range);
  add_seen(totals, n);
}

template <typename T>
__global__ void __launch_bounds__(kOnChipThreads)
    count_on_chip_kernel(const T* tokens, int64_t n, Vocabulary<T> vocabulary, uint32_t counted_by_group,
                         uint32_t group_size, uint32_t counted_by_block, CountTable totals) {
  using Word = typename Vocabulary<T>::Word;
  const uint32_t group = blockIdx.x / group_size, groups = gridDim.x / group_size, member = blockIdx.x % group_size;
  // The ids that this block counts.
  const uint32_t first_id = member * counted_by_block;
  const uint32_t on_chip = min(counted_by_block, counted_by_group - first_id);
  // No overflow: no group gets 2^32 ids in a launch.
  uint32_t* table = dynamic_shared_memory<uint32_t>();
  for (uint32_t i = threadIdx.x; i < on_chip; i += blockDim.x) table[i] = 0;
  __syncthreads();

  const SharedCounters counters(table);
  // The ignored id is counted as well, if it has a counter; it is treated separately in the final sum.
  const Word no_counter = on_chip + threadIdx.x % kSpareCounters;
  const auto count_on_chip = [&](T token) { counters.increment(uint32_t(min(Word(token) - first_id, no_counter))); };

  int64_t ignored = 0, out_of_range = 0;
  // Ids without a counter in any block.
  Word id_of_run = ~Word(0);
  uint32_t length_of_run = 0;
  const auto end_run = [&] {
    if (vocabulary.is_ignored(id_of_run)) {
      ignored += length_of_run;
    } else if (id_of_run < vocabulary.size) {
      atomic_add(totals.counts + id_of_run, int64_t(length_of_run));
    } else {
      out_of_range += length_of_run;
    }
  };
  const auto count_beyond = [&](T token) {
    const Word id = Word(token);
    if (id < counted_by_group) return;
    if (id != id_of_run) {
      end_run();
      id_of_run = id;
      length_of_run = 0;
    }
    ++length_of_run;
  };
  const auto count = [&](T token) {
    count_on_chip(token);
    if (member == 0) count_beyond(token);
  };

  const int head = misaligned_head(tokens, int(std::min<int64_t>(n, kVector<T>)));
  const int64_t packs = (n - head) / kVector<T>;
  if (group == 0) {
    if (int(threadIdx.x) < head) count(tokens[threadIdx.x]);
    const int64_t tail = head + packs * kVector<T>;
    if (threadIdx.x < n - tail) count(tokens[tail + threadIdx.x]);
  }
  const int64_t stride = int64_t(groups) * kBatch<T> * blockDim.x;
  // The members take turns with the ids without a counter; at 0 it is this one's turn.
  uint32_t turns_until_mine = member;
  Pack<T> batches[kBatches][kBatch<T>];
  const auto load = [&](Pack<T>(&batch)[kBatch<T>], int64_t first) {
#pragma unroll
    for (int i = 0; i < kBatch<T>; ++i) {
      const int64_t pack = first + i * blockDim.x;
      if (pack < packs) batch[i] = load_pack(tokens + head + pack * kVector<T>);
    }
  };
  const int64_t begin = int64_t(group) * kBatch<T> * blockDim.x + threadIdx.x;
#pragma unroll
  for (int ahead = 0; ahead < kBatches - 1; ++ahead) load(batches[ahead], begin + ahead * stride);
  for (int64_t first = begin; first < packs; first += stride) {
    load(batches[kBatches - 1], first + (kBatches - 1) * stride);
    const Pack<T>(&batch)[kBatch<T>] = batches[0];
#pragma unroll
    for (int i = 0; i < kBatch<T>; ++i) {
      if (first + i * blockDim.x >= packs) break;
      // In two passes: the first has no branches, and few packs need the second.
      bool all_counted = true;
#pragma unroll
      for (int k = 0; k < kVector<T>; ++k) {
        count_on_chip(batch[i].value[k]);
        all_counted &= Word(batch[i].value[k]) < counted_by_group;
      }
      if (all_counted || turns_until_mine > 0) continue;
#pragma unroll
      for (int k = 0; k < kVector<T>; ++k) count_beyond(batch[i].value[k]);
    }
    turns_until_mine = turns_until_mine == 0 ? group_size - 1 : turns_until_mine - 1;
#pragma unroll
    for (int ahead = 1; ahead < kBatches; ++ahead) {
#pragma unroll
      for (int i = 0; i < kBatch<T>; ++i) batches[ahead - 1][i] = batches[ahead][i];
    }
  }
  end_run();
  add_rejected(totals, ignored, out_of_range);
  add_seen(totals, n);

  __syncthreads();
  // Each group begins at another counter: otherwise all additions to the same totals would be serialised.
  const uint32_t rotation = uint32_t(uint64_t(on_chip) * group / groups);
  for (uint32_t i = threadIdx.x; i < on_chip; i += blockDim.x) {
    const uint32_t at = i + rotation < on_chip ? i + rotation : i + rotation - on_chip, id = first_id + at;
    if (table[at] != 0) atomic_add(vocabulary.is_ignored(id) ? totals.ignored : totals.counts + id, int64_t(table[at]));
  }
}

template <typename T>
void count(const Launcher& launch, const T* ids, int64_t n, int64_t vocab_size, int64_t ignore_index,
           CountTable totals) {
  const Vocabulary<T> vocabulary(vocab_size, ignore_index);
  const int64_t multiprocessors = launch.attribute(cudaDevAttrMultiProcessorCount);
  const int64_t room =
      launch.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) / int64_t(sizeof(uint32_t)) - kSpareCounters;
  // The ids of the vocabulary that T can represent.
  const int64_t possible = std::min(vocab_size, int64_t(std::numeric_limits<T>::max()) + (sizeof(T) < 8));
  const int64_t group = std::max<int64_t>(1, std::min({(possible + room - 1) / room, kMaxGroup, multiprocessors}));
  const int64_t on_chip = std::min((possible + group - 1) / group, room);
  if (n < kTokensPerCounter * multiprocessors * on_chip) {
    // One token a thread, as far as all threads run at once: a thread waits for one token before it loads the next.
    const Grid grid{std::min((n + kThreads - 1) / kThreads, kBlocksOfMultiprocessor * multiprocessors), kThreads};
    launch(count_in_warps_kernel<T>, grid, ids, n, vocabulary, totals);
  } else {
    Grid grid{1, kOnChipThreads, int((on_chip + kSpareCounters) * sizeof(uint32_t))};
    grid.blocks = std::max(launch.resident_blocks(count_on_chip_kernel<T>, grid), group) / group * group;
    const int64_t most = grid.blocks / group * kMaxIdsOfGroup;
    for (int64_t first = 0; first < n; first += most) {
      launch(count_on_chip_kernel<T>, grid, ids + first, std::min(most, n - first), vocabulary,
             uint32_t(std::min(possible, group * on_chip)), uint32_t(group), uint32_t(on_chip), totals);
    }
  }
}

void count_tokens_(Tensor counts, Tensor ignored, Tensor out_of_range, Tensor seen, Tensor tokens, int64_t ignore_index,
                   bool strict, bool /*alone*/) {
  STD_TORCH_CHECK(!strict, "strict counting would have to wait for the device; TokenFrequency.update does it");
  const CountTable totals = checked_table(counts, ignored, out_of_range, seen, tokens);
  const Launcher launch(counts);
  dispatch_tokens(tokens, [&]<typename T>(const T* ids) {
    count(launch, ids, tokens.numel(), counts.size(0), ignore_index, totals);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pdl_ext, CUDA, m) {
  m.impl("count_tokens_", TORCH_BOX(&count_tokens_));
}

}  // namespace pdl::cuda
