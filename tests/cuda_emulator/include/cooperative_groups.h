// Stands in for CUDA's header of this name: the block and the cluster (see ../README.md).
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

class thread_block {
 public:
  static void sync(Location where = Location::current()) { cuda_emulator::barrier("thread_block.sync", 0, where); }
  static unsigned thread_rank() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }
  static unsigned num_threads() { return blockDim.x * blockDim.y * blockDim.z; }
};

inline thread_block this_thread_block() {
  return {};
}

class cluster_group {
 public:
  using arrival_token = struct {};

  static void sync(Location where = Location::current()) {
    cuda_emulator::cluster_arrive("cluster.sync", where);
    cuda_emulator::cluster_wait("cluster.sync", where);
  }
  static arrival_token barrier_arrive(Location where = Location::current()) {
    cuda_emulator::cluster_arrive("cluster.barrier_arrive", where);
    return {};
  }
  static void barrier_wait(Location where = Location::current()) {
    cuda_emulator::cluster_wait("cluster.barrier_wait", where);
  }
  static void barrier_wait(arrival_token&&, Location where = Location::current()) { barrier_wait(where); }

  static unsigned block_rank() { return cuda_emulator::cluster_rank(); }
  static unsigned num_blocks() {
    const dim3 blocks = dim_blocks();
    return blocks.x * blocks.y * blocks.z;
  }
  static dim3 dim_blocks() { return cuda_emulator::cluster_dim(); }
  static dim3 block_index() {
    const dim3 blocks = dim_blocks();
    return {blockIdx.x % blocks.x, blockIdx.y % blocks.y, blockIdx.z % blocks.z};
  }
  static unsigned thread_rank() { return block_rank() * thread_block::num_threads() + thread_block::thread_rank(); }
  static unsigned num_threads() { return num_blocks() * thread_block::num_threads(); }

  // The same variable in the shared memory of another block of the cluster.
  template <typename T>
  static T* map_shared_rank(T* address, int rank, Location where = Location::current()) {
    return static_cast<T*>(cuda_emulator::map_shared_rank(address, rank, where));
  }
};

inline cluster_group this_cluster(Location where = Location::current()) {
  cuda_emulator::require_capability(90, "this_cluster", where);
  return {};
}

}  // namespace cooperative_groups
