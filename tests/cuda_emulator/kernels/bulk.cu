// Bulk copies and their barriers in shared memory; from sm_90 on.
#include <cooperative_groups.h>
#include <cuda/ptx>

#include <cstdint>

#include "dynamic_shared.h"
#include "kernel.h"

namespace {

namespace cg = cooperative_groups;
namespace ptx = cuda::ptx;
using pdl::cuda::dynamic_shared_memory;

__device__ void initialise(uint64_t* barrier, uint32_t count) {
  ptx::mbarrier_init(barrier, count);
  ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
}

__device__ void load(void* shared, const void* global, int bytes, uint64_t* barrier) {
  ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, barrier, uint32_t(bytes));
  ptx::cp_async_bulk(ptx::space_cluster, ptx::space_global, shared, global, uint32_t(bytes), barrier);
}

__device__ void wait(uint64_t* barrier, unsigned parity) {
  while (!ptx::mbarrier_try_wait_parity(barrier, parity)) continue;
}

enum class Mistake {
  none,
  no_wait,
  wait_without_loop,
  wrong_parity,
  no_release,
  too_few_bytes,
  too_many_bytes,
  early_overwrite,
  no_barrier,
  no_wait_before_return,
  wait_for_reading,
  no_commit,
  early_return,
};

// Tiles of 64 numbers through two buffers: the first warp's first thread loads, and the other warps share the numbers.
// They return the buffer by arriving at its second barrier.
template <Mistake kMistake>
__global__ void tile_sums(int* output, const int* input, int n) {
  constexpr int kTile = 64, kStages = 2;
  __shared__ __align__(16) int tiles[kStages][kTile];
  __shared__ uint64_t full[kStages], empty[kStages];
  constexpr bool kWaits = kMistake != Mistake::no_wait && kMistake != Mistake::wrong_parity;
  const int consumers = int(blockDim.x) - 32;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      initialise(full + stage, 1);
      initialise(empty + stage, uint32_t(consumers));
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int tile = 0; tile < n; ++tile) {
      const int stage = tile % kStages, round = tile / kStages;
      // The wait for the round before the first one is over at once.
      wait(kMistake == Mistake::no_release ? full + stage : empty + stage, unsigned(round + 1) % 2);
      const int bytes = kTile * int(sizeof(int));
      const int expected = kMistake == Mistake::too_few_bytes    ? bytes - 16
                           : kMistake == Mistake::too_many_bytes ? bytes + 16
                                                                 : bytes;
      ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, full + stage,
                                     uint32_t(expected));
      ptx::cp_async_bulk(ptx::space_cluster, ptx::space_global, tiles[stage], input + tile * kTile, uint32_t(bytes),
                         full + stage);
    }
  }
  if (threadIdx.x >= 32) {
    int sum = 0;
    for (int tile = 0; tile < n; ++tile) {
      const int stage = tile % kStages, round = tile / kStages;
      const unsigned parity = unsigned(round + (kMistake == Mistake::wrong_parity ? 1 : 0)) % 2;
      if (kMistake == Mistake::wait_without_loop) {
        ptx::mbarrier_try_wait_parity(full + stage, parity);
      } else if (kMistake != Mistake::no_wait) {
        wait(full + stage, parity);
      }
      for (int i = int(threadIdx.x) - 32; i < kTile; i += consumers) {
        sum = int(unsigned(sum) + unsigned(tiles[stage][i]) * unsigned(tile + 1));
      }
      if (kWaits) ptx::mbarrier_arrive(empty + stage);
    }
    atomicAdd(output, sum);
  }
  // Without waits for two tiles: must not be caught by its return, or by the barriers that it confuses, alone.
  if (!kWaits) {
    __syncthreads();
    for (int stage = 0; stage < kStages; ++stage) wait(full + stage, 0);
  }
}

// Doubles n numbers a block in shared memory and stores them from there.
template <Mistake kMistake>
__global__ void doubled(int* output, const int* input, int n) {
  int* values = dynamic_shared_memory<int>();
  const int first = int(blockIdx.x) * n;
  for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) values[i] = 2 * input[first + i];
  ptx::fence_proxy_async(ptx::space_shared);
  if (kMistake != Mistake::no_barrier) __syncthreads();
  if (threadIdx.x == 0) {
    ptx::cp_async_bulk(ptx::space_global, ptx::space_shared, output + first, values, uint32_t(n) * 4);
    if (kMistake != Mistake::no_commit) ptx::cp_async_bulk_commit_group();
    if (kMistake == Mistake::none || kMistake == Mistake::no_commit) {
      ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>{});
    }
    // What is waited for may be overwritten.
    if (kMistake != Mistake::no_wait_before_return) values[0] = values[n - 1] = -7;
    if (kMistake != Mistake::no_wait_before_return) ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>{});
  }
}

// Stores and reads back: only the wait for the writing will do.
template <Mistake kMistake>
__global__ void read_back(int* output, const int* input, int n) {
  int* values = dynamic_shared_memory<int>();
  for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) values[i] = input[i];
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::cp_async_bulk(ptx::space_global, ptx::space_shared, output, values, uint32_t(n) * 4);
    ptx::cp_async_bulk_commit_group();
    if (kMistake == Mistake::wait_for_reading) {
      ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>{});
    } else {
      ptx::cp_async_bulk_wait_group(ptx::n32_t<0>{});
    }
    // Volatile, as nvcc knows nothing of what the copy writes.
    output[n] = static_cast<volatile int*>(output)[n - 1];
  }
}

// The softmax of a row of n floats, which stays in the shared memory of one cluster. The bytes of a block's share are a
// multiple of 16.
template <Mistake kMistake>
__global__ void cluster_softmax(float* output, const float* input, int n) {
  struct Statistics {
    float max, sum;
  };
  __shared__ uint64_t barrier;
  __shared__ Statistics of_block;
  __shared__ float of_thread[64];
  float* row = dynamic_shared_memory<float>();
  const cg::cluster_group cluster = cg::this_cluster();
  const int blocks = int(cluster.num_blocks()), rank = int(cluster.block_rank());
  const int part = n / blocks, thread = int(threadIdx.x);
  const int64_t first = int64_t(blockIdx.x) / blocks * n + rank * part;
  if (thread == 0) {
    initialise(&barrier, 1);
    load(row, input + first, part * 4, &barrier);
  }
  // All blocks have started.
  cluster.sync();
  wait(&barrier, 0);
  float max = -INFINITY;
  for (int i = thread; i < part; i += int(blockDim.x)) max = fmaxf(max, row[i]);
  of_thread[thread] = max;
  __syncthreads();
  for (int i = 0; i < int(blockDim.x); ++i) max = fmaxf(max, of_thread[i]);
  __syncthreads();
  float sum = 0;
  for (int i = thread; i < part; i += int(blockDim.x)) {
    row[i] = expf(row[i] - max);
    sum += row[i];
  }
  of_thread[thread] = sum;
  __syncthreads();
  if (thread == 0) {
    sum = 0;
    for (int i = 0; i < int(blockDim.x); ++i) sum += of_thread[i];
    of_block = {max, sum};
  }
  if (kMistake == Mistake::no_barrier) {
    __syncthreads();
  } else {
    cluster.sync();
  }
  float row_max = -INFINITY, row_sum = 0;
  for (int block = 0; block < blocks; ++block) row_max = fmaxf(row_max, cluster.map_shared_rank(&of_block, block)->max);
  for (int block = 0; block < blocks; ++block) {
    const Statistics other = *cluster.map_shared_rank(&of_block, block);
    row_sum += other.sum * expf(other.max - row_max);
  }
  if (kMistake != Mistake::early_return) cluster.sync();
  const float scale = expf(max - row_max) / row_sum;
  for (int i = thread; i < part; i += int(blockDim.x)) row[i] *= scale;
  ptx::fence_proxy_async(ptx::space_shared);
  __syncthreads();
  if (thread == 0) {
    ptx::cp_async_bulk(ptx::space_global, ptx::space_shared, output + first, row, uint32_t(part) * 4);
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>{});
  }
}

// Every block writes a number into the first one's memory and arrives at its barrier.
template <Mistake kMistake>
__global__ void gather_by_arrival(int* output, const int* input, int) {
  __shared__ uint64_t barrier;
  __shared__ int numbers[16];
  const cg::cluster_group cluster = cg::this_cluster();
  const int rank = int(cluster.block_rank()), blocks = int(cluster.num_blocks());
  if (rank == 0 && threadIdx.x == 0) initialise(&barrier, uint32_t(blocks));
  cluster.sync();
  if (threadIdx.x == 0) {
    cluster.map_shared_rank(numbers, 0)[rank] = input[rank];
    uint64_t* first = cluster.map_shared_rank(&barrier, 0);
    ptx::mbarrier_arrive(ptx::sem_release, ptx::scope_cluster, ptx::space_cluster, first);
  }
  if (rank == 0) {
    if (kMistake != Mistake::no_wait) {
      while (!ptx::mbarrier_try_wait_parity(ptx::sem_acquire, ptx::scope_cluster, &barrier, 0)) continue;
    }
    if (int(threadIdx.x) < blocks) output[threadIdx.x] = numbers[threadIdx.x];
  }
  cluster.sync();
}

// Every block sends four numbers to all of them.
template <Mistake kMistake>
__global__ void messages_to_all(int* output, const int* input, int) {
  struct alignas(16) Message {
    int words[4];
  };
  __shared__ uint64_t barrier;
  __shared__ Message messages[16];
  const cg::cluster_group cluster = cg::this_cluster();
  const int rank = int(cluster.block_rank()), blocks = int(cluster.num_blocks());
  if (threadIdx.x == 0) {
    initialise(&barrier, 1);
    ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &barrier,
                                   uint32_t(blocks * sizeof(Message)));
  }
  cluster.sync();
  const int to = int(threadIdx.x);
  if (to < blocks) {
    const int* own = input + 4 * rank;
    const int words[4] = {own[0], own[1], own[2], own[3]};
    ptx::st_async(cluster.map_shared_rank(messages, to)[rank].words, words, cluster.map_shared_rank(&barrier, to));
  }
  if (kMistake != Mistake::no_wait) {
    while (!ptx::mbarrier_try_wait_parity(ptx::sem_acquire, ptx::scope_cluster, &barrier, 0)) continue;
  }
  for (int i = to; i < 4 * blocks; i += int(blockDim.x)) output[4 * blocks * rank + i] = messages[i / 4].words[i % 4];
  if (kMistake == Mistake::no_wait) wait(&barrier, 0);
}

__global__ void mbarrier_not_initialised(int*, const int*, int) {
  __shared__ uint64_t barrier;
  ptx::mbarrier_arrive(&barrier);
}

__global__ void mbarrier_initialised_by_all(int*, const int*, int) {
  __shared__ uint64_t barrier;
  ptx::mbarrier_init(&barrier, 1);
}

__global__ void mbarrier_of_nobody(int*, const int*, int) {
  __shared__ uint64_t barrier;
  ptx::mbarrier_init(&barrier, 0);
}

__global__ void mbarrier_in_global_memory(int* output, const int*, int) {
  ptx::mbarrier_init(reinterpret_cast<uint64_t*>(output), 1);
}

__global__ void misaligned_mbarrier(int*, const int*, int) {
  __shared__ uint64_t barriers[2];
  ptx::mbarrier_init(reinterpret_cast<uint64_t*>(reinterpret_cast<char*>(barriers) + 4), 1);
}

__global__ void too_many_arrivals(int*, const int*, int) {
  __shared__ uint64_t barrier;
  if (threadIdx.x == 0) initialise(&barrier, 2);
  __syncthreads();
  if (threadIdx.x < 2)
    ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &barrier, 16);
  __syncthreads();
  if (threadIdx.x == 9) ptx::mbarrier_arrive(&barrier);
}

__global__ void too_many_bytes_expected(int*, const int*, int) {
  __shared__ uint64_t barrier;
  if (threadIdx.x == 0) {
    initialise(&barrier, 2);
    ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &barrier, 1 << 19);
    ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &barrier, 1 << 19);
  }
}

__global__ void arrival_missing(int*, const int*, int) {
  __shared__ uint64_t barrier;
  if (threadIdx.x == 0) initialise(&barrier, blockDim.x);
  __syncthreads();
  if (threadIdx.x != 3) ptx::mbarrier_arrive(&barrier);
  wait(&barrier, 0);
}

__global__ void mbarrier_without_fence(int*, const int* input, int) {
  __shared__ uint64_t barrier;
  __shared__ uint4 values[4];
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&barrier, 1);
    load(values, input, 64, &barrier);
  }
  __syncthreads();
  wait(&barrier, 0);
}

// A bulk load whose source, destination or size is off by so many bytes.
template <int kSource, int kDestination, int kSize>
__global__ void off_load(int*, const int* input, int) {
  __shared__ uint64_t barrier;
  __shared__ uint4 values[5];
  if (threadIdx.x == 0) {
    initialise(&barrier, 1);
    load(reinterpret_cast<char*>(values) + kDestination, reinterpret_cast<const char*>(input) + kSource, 64 + kSize,
         &barrier);
  }
  __syncthreads();
  wait(&barrier, 0);
}

__global__ void misaligned_bulk_store(int* output, const int*, int) {
  __shared__ uint4 values[4];
  if (threadIdx.x == 2) ptx::cp_async_bulk(ptx::space_global, ptx::space_shared, output + 1, values, 16);
}

__global__ void load_past_the_end(int*, const int* input, int n) {
  __shared__ uint64_t barrier;
  if (threadIdx.x == 0) {
    initialise(&barrier, 1);
    load(dynamic_shared_memory<int>(), input, n, &barrier);
  }
  __syncthreads();
  wait(&barrier, 0);
}

__global__ void load_in_flight(int*, const int* input, int) {
  __shared__ uint64_t barrier;
  __shared__ uint4 values[4];
  if (threadIdx.x == 0) {
    initialise(&barrier, 1);
    load(values, input, 64, &barrier);
  }
}

enum class Foreign { arrival, wait, initialisation, load, store, unfenced_arrival, message, message_to_global };

// What needs the own block's memory, on that of the next block; and an arrival there that comes without a fence.
template <Foreign kWhat>
__global__ void on_neighbour(int* output, const int* input, int) {
  __shared__ uint64_t barrier;
  __shared__ uint4 values[4];
  const cg::cluster_group cluster = cg::this_cluster();
  const int next = (int(cluster.block_rank()) + 1) % int(cluster.num_blocks());
  if (threadIdx.x == 0 && kWhat == Foreign::unfenced_arrival) ptx::mbarrier_init(&barrier, 1);
  if (threadIdx.x == 0 && kWhat != Foreign::unfenced_arrival) initialise(&barrier, 1);
  cluster.sync();
  uint64_t* other = cluster.map_shared_rank(&barrier, next);
  if (threadIdx.x == 0) {
    if (kWhat == Foreign::arrival) ptx::mbarrier_arrive(other);
    if (kWhat == Foreign::wait) wait(other, 0);
    if (kWhat == Foreign::initialisation) ptx::mbarrier_init(other, 1);
    if (kWhat == Foreign::load) {
      ptx::cp_async_bulk(ptx::space_cluster, ptx::space_global, values, input, 64u, other);
    }
    if (kWhat == Foreign::store) {
      ptx::cp_async_bulk(ptx::space_global, ptx::space_shared, output, cluster.map_shared_rank(values, next), 64u);
    }
    const int words[4] = {};
    if (kWhat == Foreign::message) ptx::st_async(reinterpret_cast<int*>(values), words, other);
    if (kWhat == Foreign::message_to_global) ptx::st_async(output, words, &barrier);
    if (kWhat == Foreign::unfenced_arrival) {
      ptx::mbarrier_arrive(ptx::sem_release, ptx::scope_cluster, ptx::space_cluster, other);
    }
  }
  cluster.sync();
}

__global__ void parity_of_two(int*, const int*, int) {
  __shared__ uint64_t barrier;
  if (threadIdx.x == 0) initialise(&barrier, 1);
  __syncthreads();
  wait(&barrier, 2);
}

// More than a phase can count, before any of it is expected.
__global__ void too_many_bytes_copied(int*, const int* input, int n) {
  __shared__ uint64_t barrier;
  if (threadIdx.x == 0) {
    initialise(&barrier, 1);
    for (int i = 0; i < 17; ++i) {
      ptx::cp_async_bulk(ptx::space_cluster, ptx::space_global, dynamic_shared_memory<int>(), input, uint32_t(n),
                         &barrier);
    }
  }
  __syncthreads();
  wait(&barrier, 0);
}

const kernels::Register kernels_of_bulk_copies({
    {"tile_sums", tile_sums<Mistake::none>},
    {"tile_sums_without_wait", tile_sums<Mistake::no_wait>},
    {"tile_sums_with_wait_without_loop", tile_sums<Mistake::wait_without_loop>},
    {"tile_sums_with_wrong_parity", tile_sums<Mistake::wrong_parity>},
    {"tile_sums_without_release", tile_sums<Mistake::no_release>},
    {"tile_sums_with_too_few_bytes", tile_sums<Mistake::too_few_bytes>},
    {"tile_sums_with_too_many_bytes", tile_sums<Mistake::too_many_bytes>},
    {"doubled", doubled<Mistake::none>},
    {"doubled_without_barrier", doubled<Mistake::no_barrier>},
    {"doubled_without_commit", doubled<Mistake::no_commit>},
    {"doubled_with_early_overwrite", doubled<Mistake::early_overwrite>},
    {"doubled_without_wait", doubled<Mistake::no_wait_before_return>},
    {"read_back", read_back<Mistake::none>},
    {"read_back_after_reading", read_back<Mistake::wait_for_reading>},
    {"cluster_softmax", cluster_softmax<Mistake::none>},
    {"cluster_softmax_without_barrier", cluster_softmax<Mistake::no_barrier>},
    {"cluster_softmax_with_early_return", cluster_softmax<Mistake::early_return>},
    {"gather_by_arrival", gather_by_arrival<Mistake::none>},
    {"gather_by_arrival_without_wait", gather_by_arrival<Mistake::no_wait>},
    {"messages_to_all", messages_to_all<Mistake::none>},
    {"messages_to_all_without_wait", messages_to_all<Mistake::no_wait>},
    {"mbarrier_not_initialised", mbarrier_not_initialised},
    {"mbarrier_initialised_by_all", mbarrier_initialised_by_all},
    {"mbarrier_of_nobody", mbarrier_of_nobody},
    {"mbarrier_in_global_memory", mbarrier_in_global_memory},
    {"misaligned_mbarrier", misaligned_mbarrier},
    {"too_many_arrivals", too_many_arrivals},
    {"too_many_bytes_expected", too_many_bytes_expected},
    {"arrival_missing", arrival_missing},
    {"mbarrier_without_fence", mbarrier_without_fence},
    {"bulk_load_from_misaligned", off_load<4, 0, 0>},
    {"bulk_load_to_misaligned", off_load<0, 8, 0>},
    {"bulk_load_of_odd_size", off_load<0, 0, 4>},
    {"misaligned_bulk_store", misaligned_bulk_store},
    {"load_past_the_end", load_past_the_end},
    {"load_in_flight", load_in_flight},
    {"arrival_at_neighbour", on_neighbour<Foreign::arrival>},
    {"wait_at_neighbour", on_neighbour<Foreign::wait>},
    {"mbarrier_init_in_neighbour", on_neighbour<Foreign::initialisation>},
    {"load_with_mbarrier_of_neighbour", on_neighbour<Foreign::load>},
    {"store_from_neighbour", on_neighbour<Foreign::store>},
    {"message_with_mbarrier_of_neighbour", on_neighbour<Foreign::message>},
    {"message_to_global_memory", on_neighbour<Foreign::message_to_global>},
    {"arrival_at_neighbour_without_fence", on_neighbour<Foreign::unfenced_arrival>},
    {"parity_of_two", parity_of_two},
    {"too_many_bytes_copied", too_many_bytes_copied},
});

}  // namespace
