// The blocks of a thread block cluster (sm_90), and the exchange of their values.
#pragma once

#include <cooperative_groups.h>
#include <cuda/ptx>

#include "block_reduce.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define PDL_HAS_CLUSTERS
#endif

namespace pdl::cuda {

namespace ptx = ::cuda::ptx;

// The number of blocks that share a row.
#if !defined(PDL_LEAST_CLUSTER)
#define PDL_LEAST_CLUSTER 2
#endif
constexpr int kLeastCluster = PDL_LEAST_CLUSTER, kMaxCluster = 16;

// `blocks` is a power of two, and 1 in a launch without clusters.
struct Cluster {
  int blocks;
  // A shift by this replaces a division by `blocks`, which takes 20 instructions.
  int log2_blocks;

  explicit Cluster(int blocks) : blocks(blocks), log2_blocks(std::countr_zero(unsigned(blocks))) {}

#if defined(PDL_HAS_CLUSTERS)
  __device__ int rank() const { return blocks == 1 ? 0 : int(cooperative_groups::this_cluster().block_rank()); }
  __device__ void arrive() const {
    if (blocks > 1) cooperative_groups::this_cluster().barrier_arrive();
  }
  // Orders the thread's reads only; its writes may not be visible yet.
  __device__ void arrive_relaxed() const {
#if defined(__CUDA_ARCH__)
    if (blocks > 1) __cluster_barrier_arrive_relaxed();
#else
    arrive();
#endif
  }
  __device__ void wait() const {
    if (blocks > 1) cooperative_groups::this_cluster().barrier_wait();
  }
  // The same variable in the shared memory of another block.
  template <typename V>
  __device__ V* of_rank(V* variable, int rank) const {
    return cooperative_groups::this_cluster().map_shared_rank(variable, rank);
  }
#else
  __device__ int rank() const { return 0; }
  __device__ void arrive() const {}
  __device__ void arrive_relaxed() const {}
  __device__ void wait() const {}
  template <typename V>
  __device__ V* of_rank(V* variable, int) const {
    return variable;
  }
#endif
};

// How blocks merge the values of their threads 0. They call begin(), then for each row merged() and after_reads(), or
// skip(), and then end(). After merged() a block may overwrite data that the others read before it.
//
// - barrier: each block leaves its value in its shared memory, and reads the others' after a barrier. The arrival at
//   the barrier is a fence of the whole card's memory. A second barrier keeps a block from leaving before it is read.
// - messages: each block sends its value to all others, and waits for theirs to arrive. This needs no fence and no
//   second barrier, but a cluster has only one row.
//
// Only a card can decide between them: docs/kernels.md.
enum class Exchange { barrier, messages };
#if !defined(PDL_EXCHANGE)
#define PDL_EXCHANGE barrier
#endif
constexpr Exchange kExchange = Exchange::PDL_EXCHANGE;

template <Exchange, typename V>
struct ClusterExchange;

template <typename V>
struct ClusterExchange<Exchange::barrier, V> {
  V of_block;

  __device__ void begin(const Cluster&) {}
  __device__ void skip(const Cluster&) {}

  template <typename Combine>
  __device__ V merged(const Cluster& cluster, V value, Combine combine) {
    if (cluster.blocks == 1) return value;
    if (threadIdx.x == 0) of_block = value;
    cluster.arrive();
    cluster.wait();
    if (threadIdx.x < kWarp) {
      value = int(threadIdx.x) < cluster.blocks ? *cluster.of_rank(&of_block, threadIdx.x) : V();
      value = warp_reduce(value, combine, cluster.blocks);
    }
    return value;
  }

  // Called after a barrier of the block: the other blocks' values are read.
  __device__ void after_reads(const Cluster& cluster) { cluster.arrive_relaxed(); }
  __device__ void end(const Cluster& cluster) { cluster.wait(); }
};

#if !defined(PDL_HAS_CLUSTERS)
// Each cluster has a single block.
template <typename V>
struct ClusterExchange<Exchange::messages, V> : ClusterExchange<Exchange::barrier, V> {};
#else
template <typename V>
struct ClusterExchange<Exchange::messages, V> {
  static constexpr int kWords = (sizeof(V) + 15) / 16 * 4;
  struct alignas(16) Message {
    int words[kWords];
  };

  Message own;
  Message of_block[kMaxCluster];
  uint64_t arrived;

  __device__ void begin(const Cluster& cluster) {
    if (cluster.blocks == 1) return;
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(&arrived, 1);
      ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
      ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &arrived,
                                     uint32_t(cluster.blocks * sizeof(Message)));
    }
    cluster.arrive_relaxed();
  }

  // Waits until all blocks exist to which others may still write.
  __device__ void skip(const Cluster& cluster) { cluster.wait(); }

  template <typename Combine>
  __device__ V merged(const Cluster& cluster, V value, Combine combine) {
    if (cluster.blocks == 1) return value;
    if (threadIdx.x == 0) memcpy(own.words, &value, sizeof value);
    cluster.wait();
    if (threadIdx.x >= kWarp) return value;
    __syncwarp();
    const int lane = int(threadIdx.x);
    if (lane < cluster.blocks) {
      Message& place = cluster.of_rank(this, lane)->of_block[cluster.rank()];
      uint64_t* const counter = &cluster.of_rank(this, lane)->arrived;
#pragma unroll
      for (int k = 0; k < kWords; k += 4) {
        const int words[4] = {own.words[k], own.words[k + 1], own.words[k + 2], own.words[k + 3]};
        ptx::st_async(&place.words[k], words, counter);
      }
    }
    while (!ptx::mbarrier_try_wait_parity(ptx::sem_acquire, ptx::scope_cluster, &arrived, 0)) continue;
    value = V();
    if (lane < cluster.blocks) memcpy(&value, of_block[lane].words, sizeof value);
    return warp_reduce(value, combine, cluster.blocks);
  }

  // No other block reads this block's memory, and all messages to it have arrived.
  __device__ void after_reads(const Cluster&) {}
  __device__ void end(const Cluster&) {}
};
#endif

}  // namespace pdl::cuda
