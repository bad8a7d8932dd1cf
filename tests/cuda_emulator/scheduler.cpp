#include "scheduler.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "async_copy.h"
#include "fault_handler.h"
#include "mbarrier.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_emulator {

Scheduler scheduler;

namespace {

constexpr size_t kStack = 16 * kPage;
// Stacks are allocated for so many fibers at once.
constexpr int kChunk = 1024;
// The running one of several blocks gives way to another one after one in so many warps.
constexpr int kBlockSwitch = 4;
// Of blocks that run side by side.
constexpr int kMostBlocks = 16;

bool same_place(const Location& a, const Location& b) {
  return a.line() == b.line() && a.column() == b.column() && strcmp(a.file_name(), b.file_name()) == 0;
}

}  // namespace

std::string describe(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

std::string describe(const Location& where) {
  return std::string(where.file_name()) + ":" + std::to_string(where.line());
}

// How many clusters run side by side.
size_t clusters_at_once(int cluster_size, uint64_t clusters) {
  const char* number = getenv("PDL_EXT_EMULATOR_AT_ONCE");
  const int wanted = number != nullptr ? std::max(1, atoi(number)) : 1;
  return size_t(std::min<uint64_t>(clusters, std::clamp(kMostBlocks / cluster_size, 1, wanted)));
}

// The fibers' stacks, each above a page that must not be touched.
void Scheduler::prepare(const Launch& launch, int blocks) {
  threads_ = int(launch.block.x * launch.block.y * launch.block.z);
  const int warps = (threads_ + kWarp - 1) / kWarp;
  fibers_per_block_ = warps * kWarp;
  cluster_dim_ = launch.cluster;
  warps_.resize(warps);
  std::iota(warps_.begin(), warps_.end(), 0);
  const size_t fibers = size_t(blocks) * fibers_per_block_;
  while (stacks_.size() * kChunk < fibers) {
    void* memory = mmap(nullptr, kChunk * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("CUDA emulator: no memory for the stacks of 1024 threads");
    stacks_.push_back(static_cast<char*>(memory));
    for (int i = 0; i < kChunk; ++i) mprotect(stacks_.back() + i * kStack, kPage, PROT_NONE);
    fibers_.resize(stacks_.size() * kChunk);
  }
}

void Scheduler::enter() {
  for (;;) {
    (*scheduler.thread_)();
    async_copies.thread_returns();
    scheduler.wait(State::done, nullptr, {});
    scheduler.yield();
  }
}

__attribute__((noinline)) void Scheduler::resume(Fiber& fiber) {
  current_ = &fiber;
  threadIdx = fiber.index;
  if (_setjmp(scheduler_) == 0) {
    if (fiber.started) _longjmp(fiber.context, 1);
    fiber.started = true;
    getcontext(&start_);
    const int i = index_of(fiber);
    start_.uc_stack.ss_sp = stacks_[i / kChunk] + i % kChunk * kStack + kPage;
    start_.uc_stack.ss_size = kStack - kPage;
    start_.uc_link = nullptr;
    makecontext(&start_, &Scheduler::enter, 0);
    setcontext(&start_);
  }
  if (shared_memory.dynamic() != 0 && fault_.empty()) check_canaries();
  current_ = nullptr;
  if (!fault_.empty()) throw std::runtime_error(fault_);
}

__attribute__((noinline)) void Scheduler::yield() {
  if (_setjmp(current_->context) == 0) _longjmp(scheduler_, 1);
}

void Scheduler::fail(const std::string& what) {
  const std::string message = "CUDA emulator: " + what + " in block " + describe(blockIdx);
  if (current_ == nullptr) throw std::runtime_error(message);
  fault_ = message + ", thread " + describe(current_->index);
  _longjmp(scheduler_, 1);
}

void Scheduler::fail(const std::string& what, Location where) {
  fail(what + " at " + describe(where));
}

void Scheduler::check_canaries() {
  if (shared_memory.intact(rank_)) return;
  const std::string until = current_->state == State::done
                                ? std::string("it returned")
                                : std::string(current_->operation) + " at " + describe(current_->where);
  fault_ = "CUDA emulator: write past the end of the dynamic shared memory (" +
           std::to_string(shared_memory.dynamic()) + " bytes) before " + until + " in block " + describe(blockIdx) +
           ", thread " + describe(current_->index);
}

void Scheduler::wait(State state, const char* operation, Location where) {
  Fiber& self = *current_;
  Block& block = block_of(self);
  self.state = state;
  self.operation = operation;
  self.where = where;
  const int thread = index_of(self) - block.first;
  block.ready_lanes[thread / kWarp] &= ~(1u << thread % kWarp);
  --block.ready;
  block.at_barrier += state == State::at_barrier;
  block.done += state == State::done;
}

void Scheduler::make_ready(Fiber& fiber) {
  Block& block = block_of(fiber);
  fiber.state = State::ready;
  const int thread = index_of(fiber) - block.first;
  block.ready_lanes[thread / kWarp] |= 1u << thread % kWarp;
  ++block.ready;
}

int Scheduler::barrier(const char* operation, int predicate, Location where) {
  Block& block = block_of(*current_);
  current_->predicate = predicate;
  wait(State::at_barrier, operation, where);
  yield();
  return block.votes;
}

void Scheduler::meet(const char* operation, unsigned mask, const void* input, void* output, Location where,
                     const Finish& finish) {
  Fiber* self = current_;
  Fiber* warp = &fibers_[index_of(*self) / kWarp * kWarp];
  if ((mask >> (self - warp) & 1u) == 0) {
    fail(std::string(operation) + " at " + describe(where) + " with a mask that leaves the calling lane out");
  }
  wait(State::in_warp, operation, where);
  self->mask = mask;
  self->input = input;
  self->output = output;
  const void* inputs[kWarp] = {};
  void* outputs[kWarp] = {};
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1u) == 0) continue;
    const Fiber& other = warp[lane];
    if (other.state != State::in_warp) return yield();
    if (other.mask != mask || !same_place(other.where, where)) {
      fail(std::string(operation) + " at " + describe(where) + " meets " + other.operation + " at " +
           describe(other.where) + " of lane " + std::to_string(lane));
    }
    inputs[lane] = other.input;
    outputs[lane] = other.output;
  }
  finish(inputs, outputs);
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1u) != 0) make_ready(warp[lane]);
  }
  // The last lane to arrive has no right to be the first to leave.
  yield();
}

void Scheduler::cluster_arrive(const char* operation, Location where) {
  Fiber& self = *current_;
  if (self.arrived) fail(std::string(operation) + " without a wait since the last arrival", where);
  Cluster& cluster = clusters_[rank_ / cluster_size()];
  self.arrived = true;
  self.cluster_phase = cluster.phase;
  if (++cluster.arrived < threads_ * cluster_size()) return;
  cluster.arrived = 0;
  ++cluster.phase;
  const int first = rank_ / cluster_size() * cluster_size();
  for (int rank = first; rank < first + cluster_size(); ++rank) {
    const Block& block = blocks_[rank];
    for (int i = block.first; i < block.first + threads_; ++i) {
      if (fibers_[i].state == State::at_cluster_barrier) make_ready(fibers_[i]);
    }
  }
}

void Scheduler::cluster_wait(const char* operation, Location where) {
  Fiber& self = *current_;
  if (!self.arrived) fail(std::string(operation) + " without an arrival before it", where);
  self.operation = operation;
  self.where = where;
  if (self.cluster_phase == clusters_[rank_ / cluster_size()].phase) wait(State::at_cluster_barrier, operation, where);
  // The last thread to arrive has no right to be the first to leave.
  yield();
  self.arrived = false;
}

void Scheduler::wait_at_mbarrier(const char* operation, size_t offset, Location where) {
  current_->mbarrier = offset;
  wait(State::at_mbarrier, operation, where);
  yield();
}

void Scheduler::wake(Place mbarrier) {
  const int first = blocks_[mbarrier.rank].first;
  for (int i = first; i < first + threads_; ++i) {
    if (fibers_[i].state == State::at_mbarrier && fibers_[i].mbarrier == mbarrier.offset) make_ready(fibers_[i]);
  }
}

void Scheduler::give_way() {
  if (!several_blocks()) return;
  gives_way_ = true;
  // Half of them for so long that others get to their ends.
  blocks_[rank_].rests = random(2) == 0;
  yield();
}

// As far as the warp can go.
void Scheduler::run_warp(Block& block, int warp) {
  int order[kWarp];
  std::iota(order, order + kWarp, 0);
  while (block.ready_lanes[warp] != 0) {
    std::shuffle(order, order + kWarp, random_);
    for (const int lane : order) {
      if ((block.ready_lanes[warp] >> lane & 1u) == 0) continue;
      resume(fibers_[block.first + warp * kWarp + lane]);
      async_copies.progress();
      if (gives_way_) return;
    }
  }
}

void Scheduler::run_warps(Block& block) {
  gives_way_ = false;
  std::shuffle(warps_.begin(), warps_.end(), random_);
  for (const int warp : warps_) {
    if (block.ready_lanes[warp] == 0) continue;
    run_warp(block, warp);
    if (gives_way_ || (several_blocks() && random(kBlockSwitch) == 0)) return;
  }
}

// What follows when no thread of a block can run.
void Scheduler::settle(Block& block) {
  if (block.at_barrier == threads_) {
    release_barrier(block);
  } else if (block.done == threads_) {
    async_copies.block_returns(rank_);
    shared_memory.leave(rank_);
    block.finished = true;
  }
}

void Scheduler::release_barrier(Block& block) {
  const Fiber& first = fibers_[block.first];
  block.votes = 0;
  block.at_barrier = 0;
  for (int i = block.first; i < block.first + threads_; ++i) {
    Fiber& fiber = fibers_[i];
    if (!same_place(fiber.where, first.where)) {
      throw std::runtime_error("CUDA emulator: " + std::string(fiber.operation) + " at " + describe(fiber.where) +
                               " meets that at " + describe(first.where) + " in block " + describe(block.index) +
                               ", thread " + describe(fiber.index));
    }
    block.votes += fiber.predicate != 0;
    make_ready(fiber);
  }
}

void Scheduler::report_deadlock() {
  std::string message = "CUDA emulator: deadlock in ";
  message += several_blocks() ? "the cluster of block " : "block ";
  message += describe(blocks_[0].index);
  int left_out = 0, done = 0, listed = 0;
  std::string last;
  for (int rank = 0; rank < int(blocks_.size()); ++rank) {
    const Block& block = blocks_[rank];
    for (int i = block.first; i < block.first + threads_; ++i) {
      const Fiber& fiber = fibers_[i];
      if (fiber.state == State::done) {
        ++done;
        continue;
      }
      std::string reason = std::string(fiber.operation) + " at " + describe(fiber.where);
      if (fiber.state == State::at_mbarrier) reason += " (" + describe_mbarrier({rank, fiber.mbarrier}) + ")";
      if (reason == last || ++listed > 4) {
        ++left_out;
        continue;
      }
      message += "; ";
      if (several_blocks()) message += "block " + describe(block.index) + ", ";
      message += "thread " + describe(fiber.index) + " waits in " + reason;
      last = reason;
    }
  }
  throw std::runtime_error(message + "; " + std::to_string(left_out) + " more wait, " + std::to_string(done) +
                           " have returned");
}

// A random one of those that can run.
Block* Scheduler::choose_block() {
  if (!several_blocks()) return blocks_[0].ready > 0 ? &blocks_[0] : nullptr;
  for (const bool resting : {false, true}) {
    candidates_.clear();
    for (int rank = 0; rank < int(blocks_.size()); ++rank) {
      if (blocks_[rank].ready > 0 && blocks_[rank].rests == resting) candidates_.push_back(rank);
    }
    if (!candidates_.empty()) break;
  }
  if (candidates_.empty()) return nullptr;
  switch_to(candidates_[random(unsigned(candidates_.size()))]);
  blocks_[rank_].rests = false;
  return &blocks_[rank_];
}

void Scheduler::switch_to(int rank) {
  shared_memory.enter(rank);
  rank_ = rank;
  blockIdx = blocks_[rank].index;
  if (!shared_memory.intact(rank)) {
    fail("write by another block of the cluster past the end of the dynamic shared memory (" +
         std::to_string(shared_memory.dynamic()) + " bytes)");
  }
}

void Scheduler::start_block(int rank, uint64_t cluster) {
  const dim3 clusters = {gridDim.x / cluster_dim_.x, gridDim.y / cluster_dim_.y, gridDim.z / cluster_dim_.z};
  const unsigned x = unsigned(cluster % clusters.x) * cluster_dim_.x;
  const unsigned y = unsigned(cluster / clusters.x % clusters.y) * cluster_dim_.y;
  const unsigned z = unsigned(cluster / clusters.x / clusters.y) * cluster_dim_.z;
  const unsigned in_cluster = unsigned(rank % cluster_size());
  Block& block = blocks_[rank];
  block.index = {x + in_cluster % cluster_dim_.x, y + in_cluster / cluster_dim_.x % cluster_dim_.y,
                 z + in_cluster / cluster_dim_.x / cluster_dim_.y};
  block.first = rank * fibers_per_block_;
  block.ready_lanes.assign(warps_.size(), 0);
  block.ready = block.at_barrier = block.done = 0;
  block.finished = block.rests = false;
  for (int i = 0; i < fibers_per_block_; ++i) {
    Fiber& fiber = fibers_[block.first + i];
    fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    fiber.arrived = false;
    fiber.pipeline_groups = fiber.bulk_groups = 0;
    fiber.state = State::done;
    if (i < threads_) make_ready(fiber);
  }
}

void Scheduler::start(const std::vector<uint64_t>& clusters) {
  clusters_.assign(clusters.size(), {});
  blocks_.resize(clusters.size() * cluster_size());
  for (int rank = 0; rank < int(blocks_.size()); ++rank) start_block(rank, clusters[rank / cluster_size()]);
  shared_memory.reset();
  async_copies.reset();
  reset_mbarriers();
  if (!several_blocks()) switch_to(0);
}

void Scheduler::run_clusters() {
  for (;;) {
    if (Block* block = choose_block()) {
      run_warps(*block);
      if (block->ready == 0) settle(*block);
      continue;
    }
    if (async_copies.advance_one()) continue;
    if (!std::all_of(blocks_.begin(), blocks_.end(), [](const Block& block) { return block.finished; })) {
      report_deadlock();
    }
    async_copies.cluster_returns();
    return;
  }
}

void Scheduler::run(const Launch& launch, const std::function<void()>& thread) {
  const dim3 grid = launch.grid, cluster = launch.cluster;
  const uint64_t clusters = uint64_t(grid.x / cluster.x) * (grid.y / cluster.y) * (grid.z / cluster.z);
  const int cluster_size = int(cluster.x * cluster.y * cluster.z);
  const size_t at_once = clusters_at_once(cluster_size, clusters);
  prepare(launch, int(at_once) * cluster_size);
  gridDim = launch.grid;
  blockDim = launch.block;
  thread_ = &thread;
  fault_.clear();
  const char* seed = getenv("PDL_EXT_EMULATOR_SEED");
  random_.seed(seed != nullptr ? unsigned(atoi(seed)) : 0u);
  const FaultHandler handler;
  shared_memory.begin(int(at_once) * cluster_size, launch.dynamic_shared);
  // Which block comes first is random too, and how far from it the next one lies.
  const uint64_t first = random_() % clusters;
  uint64_t step = 1 + random_() % clusters;
  while (std::gcd(step, clusters) != 1) ++step;
  std::vector<uint64_t> running;
  try {
    for (uint64_t i = 0; i < clusters; i += running.size()) {
      running.resize(size_t(std::min<uint64_t>(at_once, clusters - i)));
      for (size_t k = 0; k < running.size(); ++k) running[k] = (first + (i + k) * step) % clusters;
      start(running);
      run_clusters();
    }
  } catch (...) {
    for (Fiber& fiber : fibers_) fiber.started = false;
    current_ = nullptr;
    shared_memory.end();
    throw;
  }
  shared_memory.end();
}

void run_grid(const Launch& launch, const std::function<void()>& thread) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  scheduler.run(launch, thread);
}

void fail(const std::string& what, Location where) {
  scheduler.fail(what, where);
}

void check_aligned(const void* address, size_t size, const char* operation, Location where) {
  if (reinterpret_cast<uintptr_t>(address) % size == 0) return;
  fail(std::string(operation) + " on an address that is no multiple of " + std::to_string(size), where);
}

int barrier(const char* operation, int predicate, Location where) {
  return scheduler.barrier(operation, predicate, where);
}

int lane() {
  return scheduler.lane();
}

unsigned cluster_rank() {
  return unsigned(scheduler.rank() % scheduler.cluster_size());
}

dim3 cluster_dim() {
  return scheduler.cluster_dim();
}

void cluster_arrive(const char* operation, Location where) {
  scheduler.cluster_arrive(operation, where);
}

void cluster_wait(const char* operation, Location where) {
  scheduler.cluster_wait(operation, where);
}

void* map_shared_rank(const void* address, int rank, Location where) {
  if (rank < 0 || rank >= scheduler.cluster_size()) {
    fail("map_shared_rank to block " + std::to_string(rank) + " of a cluster of " +
             std::to_string(scheduler.cluster_size()),
         where);
  }
  const std::optional<Place> place = shared_memory.find(address);
  if (!place) fail("map_shared_rank of an address outside of shared memory", where);
  const int first = scheduler.rank() / scheduler.cluster_size() * scheduler.cluster_size();
  return shared_memory.at({first + rank, place->offset});
}

void give_way() {
  scheduler.give_way();
}

void meet(const char* operation, unsigned mask, const void* input, void* output, Location where, const Finish& finish) {
  scheduler.meet(operation, mask, input, output, where, finish);
}

}  // namespace cuda_emulator
