// Thread block clusters with distributed shared memory; from sm_90 on.
#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>

#include <utility>

#include "dynamic_shared.h"
#include "kernel.h"

namespace {

namespace cg = cooperative_groups;
using pdl::cuda::dynamic_shared_memory;

enum class Mistake { none, no_first_barrier, no_second_barrier, no_last_barrier, split_barrier };

// For n rows of one number a thread: the sums over the cluster's threads, to each block.
template <Mistake kMistake>
__global__ void cluster_sums(int* output, const int* input, int n) {
  __shared__ int sum_of_block;
  int* sum_of_row = dynamic_shared_memory<int>();
  const cg::cluster_group cluster = cg::this_cluster();
  const int threads = int(cluster.num_threads());
  const int cluster_number = int(blockIdx.x / cluster.num_blocks());
  // All blocks have started.
  cluster.sync();
  for (int row = 0; row < n; ++row) {
    if (threadIdx.x == 0) sum_of_block = 0;
    __syncthreads();
    atomicAdd(&sum_of_block, input[(cluster_number * n + row) * threads + int(cluster.thread_rank())]);
    if constexpr (kMistake == Mistake::split_barrier) {
      auto token = cluster.barrier_arrive();
      cluster.barrier_wait(std::move(token));
    } else if (kMistake != Mistake::no_first_barrier) {
      cluster.sync();
    } else {
      __syncthreads();
    }
    if (threadIdx.x < cluster.num_blocks()) {
      sum_of_row[threadIdx.x] = *cluster.map_shared_rank(&sum_of_block, int(threadIdx.x));
    }
    if (kMistake != Mistake::no_second_barrier && (kMistake != Mistake::no_last_barrier || row + 1 < n)) {
      cluster.sync();
    } else {
      __syncthreads();
    }
    if (threadIdx.x == 0) {
      int sum = 0;
      for (unsigned block = 0; block < cluster.num_blocks(); ++block) sum += sum_of_row[block];
      output[int(blockIdx.x) * n + row] = sum;
    }
  }
  if (kMistake == Mistake::no_second_barrier) cluster.sync();
}

// A histogram of 64 bins in the first block's dynamic shared memory.
__global__ void cluster_histogram(int* output, const int* input, int n) {
  int* bins = dynamic_shared_memory<int>();
  const cg::cluster_group cluster = cg::this_cluster();
  if (threadIdx.x < 64) bins[threadIdx.x] = 0;
  cluster.sync();
  int* first = cluster.map_shared_rank(bins, 0);
  for (int i = int(cluster.thread_rank()); i < n; i += int(cluster.num_threads())) atomicAdd(first + input[i], 1);
  cluster.sync();
  if (cluster.block_rank() == 0 && threadIdx.x < 64) output[threadIdx.x] = bins[threadIdx.x];
}

// Where a block is: rank, size, own index in the cluster, first thread.
__global__ void cluster_places(unsigned* output, const int*, int) {
  const cg::cluster_group cluster = cg::this_cluster();
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  unsigned* mine = output + block * 6;
  if (threadIdx.x != 0) return;
  const dim3 index = cluster.block_index();
  mine[0] = cluster.block_rank();
  mine[1] = cluster.num_blocks();
  mine[2] = index.x;
  mine[3] = index.y;
  mine[4] = index.z;
  mine[5] = cluster.thread_rank();
}

// The second warp of a block may write after the first has told the cluster: only a barrier of all threads helps.
template <bool kAll>
__global__ void cluster_neighbours(int* output, const int*, int) {
  __shared__ int values[64];
  const cg::cluster_group cluster = cg::this_cluster();
  const int rank = int(cluster.block_rank());
  cluster.sync();
  values[threadIdx.x] = rank * 64 + int(threadIdx.x);
  if (kAll) {
    cluster.sync();
  } else {
    __syncthreads();
  }
  const int next = (rank + 1) % int(cluster.num_blocks());
  output[rank * 64 + int(threadIdx.x)] = cluster.map_shared_rank(values, next)[63 - threadIdx.x];
  cluster.sync();
}

__global__ void thread_without_cluster_barrier(int*, const int*, int) {
  const cg::cluster_group cluster = cg::this_cluster();
  if (cluster.block_rank() != 1 || threadIdx.x != 7) cluster.sync();
}

__global__ void block_without_cluster_barrier(int*, const int*, int) {
  const cg::cluster_group cluster = cg::this_cluster();
  if (cluster.block_rank() != 1) cluster.sync();
}

__global__ void wait_without_arrival(int*, const int*, int) {
  cg::this_cluster().barrier_wait();
}

__global__ void two_arrivals(int*, const int*, int) {
  cg::this_cluster().barrier_arrive();
  cg::this_cluster().barrier_arrive();
}

__global__ void rank_outside_cluster(int*, const int*, int n) {
  __shared__ int value;
  *cg::this_cluster().map_shared_rank(&value, n) = 1;
}

__global__ void map_of_global_memory(int* output, const int*, int) {
  *cg::this_cluster().map_shared_rank(output, 0) = 1;
}

__global__ void write_before_the_start(int*, const int*, int) {
  __shared__ int values[32];
  const cg::cluster_group cluster = cg::this_cluster();
  cluster.map_shared_rank(values, 1 - int(cluster.block_rank()))[threadIdx.x] = 1;
  cluster.sync();
}

__global__ void copy_to_neighbour(int*, const int* input, int) {
  __shared__ int value;
  __pipeline_memcpy_async(cg::this_cluster().map_shared_rank(&value, 1 - int(blockIdx.x)), input, 4);
}

// Past the end of the next block's dynamic shared memory.
__global__ void write_to_neighbour_at(int*, const int*, int n) {
  const cg::cluster_group cluster = cg::this_cluster();
  cluster.sync();
  if (cluster.block_rank() == 0 && threadIdx.x == 3) cluster.map_shared_rank(dynamic_shared_memory<int>(), 1)[n] = 1;
  cluster.sync();
}

const kernels::Register kernels_of_clusters({
    {"cluster_sums", cluster_sums<Mistake::none>},
    {"cluster_sums_by_arrival", cluster_sums<Mistake::split_barrier>},
    {"cluster_sums_without_first_barrier", cluster_sums<Mistake::no_first_barrier>},
    {"cluster_sums_without_second_barrier", cluster_sums<Mistake::no_second_barrier>},
    {"cluster_sums_without_last_barrier", cluster_sums<Mistake::no_last_barrier>},
    {"cluster_histogram", cluster_histogram},
    {"cluster_places", cluster_places},
    {"cluster_neighbours", cluster_neighbours<true>},
    {"cluster_neighbours_without_barrier", cluster_neighbours<false>},
    {"thread_without_cluster_barrier", thread_without_cluster_barrier},
    {"block_without_cluster_barrier", block_without_cluster_barrier},
    {"wait_without_arrival", wait_without_arrival},
    {"two_arrivals", two_arrivals},
    {"rank_outside_cluster", rank_outside_cluster},
    {"map_of_global_memory", map_of_global_memory},
    {"write_before_the_start", write_before_the_start},
    {"copy_to_neighbour", copy_to_neighbour},
    {"write_to_neighbour_at", write_to_neighbour_at},
});

}  // namespace
