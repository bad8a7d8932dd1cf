// Runs CUDA kernels on one CPU thread. Every thread of a block is a fiber. Blocks run one after another, those of a
// cluster in turns. PDL_EXT_EMULATOR_AT_ONCE is the number of clusters, or of blocks without clusters, that run in
// turns.
//
// A fiber runs until it reaches a barrier, a warp-wide operation or a wait. Their order is random, from the seed in
// PDL_EXT_EMULATOR_SEED (0 without it). Warps run in a random order that changes at each barrier, each as far as it
// can, and so do its lanes. So a missing barrier gives a wrong result for most seeds.
//
// Faults end the launch with an exception that names block and thread: see README.md, also for faults that cannot be
// detected.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <string>

#include "include/vector_types.h"

namespace cuda_emulator {

using Location = std::source_location;

struct Launch {
  dim3 grid, block, cluster;
  size_t dynamic_shared = 0;
};

// Runs `thread` for every thread of every block. Throws std::runtime_error on a fault.
void run_grid(const Launch& launch, const std::function<void()>& thread);

// That no kernel wrote past the end of a tensor that the running op allocated; throws std::runtime_error.
void check_canaries();
void forget_canaries();

// How many kernels preferred another share of shared memory than the kernel before them. A card drains before those.
int carveout_changes();

// Ends the launch; never returns to the thread that made the mistake.
[[noreturn]] void fail(const std::string& what, Location where);

// That the emulated device has this compute capability (10 * major + minor), and that an address is a multiple of size.
void require_capability(int capability, const char* operation, Location where);
void check_aligned(const void* address, size_t size, const char* operation, Location where);

// Waits for every thread of the block at this place of the source; returns how many of them brought a predicate.
int barrier(const char* operation, int predicate, Location where);

// Of the running thread, in its warp.
int lane();

// Of the running thread's block, in its cluster; a launch without clusters has one block in each.
unsigned cluster_rank();
dim3 cluster_dim();
// Every thread of the cluster has to arrive once before it waits for the others to have arrived.
void cluster_arrive(const char* operation, Location where);
void cluster_wait(const char* operation, Location where);
void* map_shared_rank(const void* address, int rank, Location where);
// What other blocks may see of the thread, or it of them, before it goes on.
void give_way();

// What the lanes that take part in a warp-wide operation brought along.
template <typename V>
struct Lanes {
  const void* const* inputs;
  unsigned mask;

  bool has(int lane) const { return (mask >> lane & 1u) != 0; }
  const V& operator[](int lane) const { return *static_cast<const V*>(inputs[lane]); }

  // The lanes for whose value a condition holds.
  template <typename Condition>
  unsigned votes(Condition condition) const {
    unsigned result = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if (has(lane) && condition((*this)[lane])) result |= 1u << lane;
    }
    return result;
  }
};

// Waits for the lanes named in mask at this place of the source; the last of them then calls finish(inputs, outputs).
using Finish = std::function<void(const void* const* inputs, void* const* outputs)>;
void meet(const char* operation, unsigned mask, const void* input, void* output, Location where, const Finish& finish);

// A warp-wide operation: each lane gets result_of(what all lanes brought, the lane).
template <typename Result, typename V, typename ResultOf>
Result collective(const char* operation, unsigned mask, const V& value, Location where, ResultOf result_of) {
  Result result;
  meet(operation, mask, &value, &result, where, [&](const void* const* inputs, void* const* outputs) {
    const Lanes<V> lanes{inputs, mask};
    for (int other = 0; other < 32; ++other) {
      if (lanes.has(other)) *static_cast<Result*>(outputs[other]) = result_of(lanes, other);
    }
  });
  return result;
}

// The value of lane `source`, or poison where that lane takes no part.
template <typename V>
V shuffle(const char* operation, unsigned mask, V value, int source, Location where) {
  struct Sent {
    V value;
    int source;
  };
  return collective<V>(operation, mask, Sent{value, source}, where, [](auto lanes, int lane) {
    const int source = lanes[lane].source;
    if (lanes.has(source)) return lanes[source].value;
    V poison;
    memset(&poison, 0xff, sizeof(V));
    return poison;
  });
}

}  // namespace cuda_emulator
