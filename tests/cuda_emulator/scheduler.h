// The threads and blocks that run: see emulator.h for what they are and in which order they do.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <functional>
#include <random>
#include <string>
#include <vector>

#include "emulator.h"
#include "shared_memory.h"

namespace cuda_emulator {

constexpr int kWarp = 32;

enum class State { ready, at_barrier, in_warp, at_cluster_barrier, at_mbarrier, done };

struct Fiber {
  jmp_buf context;
  bool started = false;
  State state = State::done;
  uint3 index{};
  // What a fiber that is not ready waits for.
  const char* operation = nullptr;
  unsigned mask = 0;
  const void* input = nullptr;
  void* output = nullptr;
  int predicate = 0;
  size_t mbarrier = 0;
  Location where;
  // Between its arrival at the cluster's barrier and its wait there.
  bool arrived = false;
  unsigned cluster_phase = 0;
  // Of its asynchronous copies, how many groups it has committed.
  unsigned pipeline_groups = 0;
  unsigned bulk_groups = 0;
};

struct Block {
  uint3 index{};
  int first = 0;  // of its fibers
  // The lanes of each warp, and how many threads, that can run.
  std::vector<unsigned> ready_lanes;
  int ready = 0;
  int at_barrier = 0;
  int done = 0;
  int votes = 0;
  bool finished = false;
  // Until no other block can run.
  bool rests = false;
};

// A cluster among those that run, and its barrier.
struct Cluster {
  int arrived = 0;
  unsigned phase = 0;
};

// Fibers switch by _setjmp and _longjmp, which cost no system call; ucontext gives each its stack. A fiber outlives its
// block and runs the next one, unless a fault left it in the middle.
class Scheduler {
 public:
  void run(const Launch& launch, const std::function<void()>& thread);

  int barrier(const char* operation, int predicate, Location where);
  void meet(const char* operation, unsigned mask, const void* input, void* output, Location where,
            const Finish& finish);
  void cluster_arrive(const char* operation, Location where);
  void cluster_wait(const char* operation, Location where);
  // Until wake() is called for the mbarrier at this offset of the own block's shared memory.
  void wait_at_mbarrier(const char* operation, size_t offset, Location where);
  void wake(Place mbarrier);
  // Where clusters run side by side, others may run now, as far as they can.
  void give_way();

  // Ends the launch, from a fiber or from outside of all.
  [[noreturn]] void fail(const std::string& what);
  [[noreturn]] void fail(const std::string& what, Location where);
  bool running() const { return current_ != nullptr; }

  Fiber& current() { return *current_; }
  int current_fiber() const { return index_of(*current_); }
  Fiber& fiber(int index) { return fibers_[index]; }
  int lane() const { return index_of(*current_) % kWarp; }
  // Of the block among all that run: the blocks of a cluster follow one another.
  int rank() const { return rank_; }
  const dim3& cluster_dim() const { return cluster_dim_; }
  int cluster_size() const { return int(cluster_dim_.x * cluster_dim_.y * cluster_dim_.z); }
  const Block& block(int rank) const { return blocks_[rank]; }
  unsigned random(unsigned bound) { return unsigned(random_() % bound); }

 private:
  static void enter();
  // With room for so many blocks side by side.
  void prepare(const Launch& launch, int blocks);
  void start(const std::vector<uint64_t>& clusters);
  void start_block(int rank, uint64_t cluster);
  void run_clusters();
  Block* choose_block();
  void switch_to(int rank);
  void run_warps(Block& block);
  void run_warp(Block& block, int warp);
  void resume(Fiber& fiber);
  void yield();
  void wait(State state, const char* operation, Location where);
  void make_ready(Fiber& fiber);
  void settle(Block& block);
  bool several_blocks() const { return blocks_.size() > 1; }
  void release_barrier(Block& block);
  void check_canaries();
  [[noreturn]] void report_deadlock();
  int index_of(const Fiber& fiber) const { return int(&fiber - fibers_.data()); }
  Block& block_of(const Fiber& fiber) { return blocks_[index_of(fiber) / fibers_per_block_]; }

  std::vector<Fiber> fibers_;
  std::vector<char*> stacks_;
  std::vector<Block> blocks_;
  std::vector<int> warps_;
  std::vector<int> candidates_;
  int threads_ = 0;
  int fibers_per_block_ = kWarp;
  dim3 cluster_dim_;
  std::vector<Cluster> clusters_;
  int rank_ = 0;
  bool gives_way_ = false;
  const std::function<void()>* thread_ = nullptr;
  Fiber* current_ = nullptr;
  jmp_buf scheduler_;
  ucontext_t start_;
  std::string fault_;
  std::minstd_rand random_;
};

extern Scheduler scheduler;

std::string describe(const uint3& index);
std::string describe(const Location& where);

}  // namespace cuda_emulator
