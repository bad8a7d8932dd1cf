#include "async_copy.h"

#include <algorithm>
#include <cstring>

#include "mbarrier.h"
#include "scheduler.h"

namespace cuda_emulator {

AsyncCopies async_copies;

namespace {

// In some clusters copies are delayed until the waits, in others they are fast. These are the powers of two that limit
// the number of their steps while one thread runs.
constexpr unsigned kHurries = 5;

// Where the memory is not there, the fault is the thread's that issues the copy.
void touch(const void* memory, size_t bytes) {
  const volatile char* const first = static_cast<const char*>(memory);
  for (size_t i = 0; i < bytes; i += kPage) (void)first[i];
  if (bytes != 0) (void)first[bytes - 1];
}

Place check_ends(const char* operation, const void* shared, const void* global, size_t bytes, size_t alignment,
                 Location where) {
  check_aligned(shared, alignment, operation, where);
  check_aligned(global, alignment, operation, where);
  const std::optional<Place> place = shared_memory.find(shared);
  if (!place)
    fail(std::string(operation) + " with an address outside of shared memory in the place of one in it", where);
  if (!shared_memory.holds(*place, bytes)) {
    fail(std::string(operation) + " past the end of shared memory", where);
  }
  if (shared_memory.find(global)) {
    fail(std::string(operation) + " with an address in shared memory in the place of one outside of it", where);
  }
  touch(global, bytes);
  return *place;
}

std::string never_waited(const Copy& copy) {
  return "an asynchronous copy that was never waited for, issued at " + describe(copy.where);
}

}  // namespace

void AsyncCopies::reset() {
  copies_.clear();
  unfinished_ = 0;
  hurry_ = 1u << scheduler.random(kHurries);
}

void AsyncCopies::issue(Copy copy) {
  copy.fiber = scheduler.current_fiber();
  copies_.push_back(std::move(copy));
  ++unfinished_;
}

void AsyncCopies::advance(Copy& copy) {
  if (copy.stage == Copy::Stage::issued) {
    const char* const source = copy.kind == Copy::Kind::store ? shared_memory.at(copy.shared) : copy.global;
    copy.data.assign(copy.bytes, 0);
    memcpy(copy.data.data(), source, copy.bytes - copy.zeros);
    copy.stage = Copy::Stage::read;
    return;
  }
  memcpy(copy.kind == Copy::Kind::store ? copy.global : shared_memory.at(copy.shared), copy.data.data(), copy.bytes);
  copy.stage = Copy::Stage::written;
  copy.data = {};
  --unfinished_;
  if (copy.kind == Copy::Kind::load) mbarrier_complete_tx(copy.mbarrier, copy.bytes);
}

bool AsyncCopies::advance_one() {
  if (unfinished_ == 0) return false;
  size_t i = scheduler.random(unsigned(copies_.size()));
  while (copies_[i].stage == Copy::Stage::written) i = (i + 1) % copies_.size();
  advance(copies_[i]);
  return true;
}

void AsyncCopies::progress() {
  if (unfinished_ == 0) return;
  for (unsigned steps = scheduler.random(hurry_); steps > 0; --steps) advance_one();
}

void AsyncCopies::wait(Copy::Kind kind, unsigned group, Copy::Stage stage) {
  const int fiber = scheduler.current_fiber();
  for (Copy& copy : copies_) {
    if (copy.fiber != fiber || copy.kind != kind || copy.group >= group) continue;
    while (copy.stage < stage) advance(copy);
    copy.released = true;
  }
  std::erase_if(copies_, [](const Copy& copy) {
    return copy.stage == Copy::Stage::written && copy.released && copy.kind != Copy::Kind::load;
  });
}

void AsyncCopies::complete(Place mbarrier) {
  for (Copy& copy : copies_) {
    if (copy.kind == Copy::Kind::load && copy.mbarrier == mbarrier && copy.stage == Copy::Stage::written) {
      copy.released = true;
    }
  }
}

void AsyncCopies::observe(Place mbarrier) {
  std::erase_if(copies_, [&](const Copy& copy) {
    return copy.kind == Copy::Kind::load && copy.mbarrier == mbarrier && copy.released;
  });
}

void AsyncCopies::thread_returns() {
  if (copies_.empty()) return;
  const int fiber = scheduler.current_fiber();
  for (const Copy& copy : copies_) {
    if (copy.fiber == fiber && copy.kind != Copy::Kind::load && !copy.released) {
      scheduler.fail("return with " + never_waited(copy));
    }
  }
}

void AsyncCopies::block_returns(int rank) {
  for (const Copy& copy : copies_) {
    if (copy.kind == Copy::Kind::load && copy.shared.rank == rank) {
      scheduler.fail("return of all threads with " + never_waited(copy) + ",");
    }
  }
}

void AsyncCopies::cluster_returns() {
  while (advance_one()) continue;
}

void pipeline_copy(void* shared, const void* global, size_t bytes, size_t zeros, Location where) {
  constexpr const char* kName = "__pipeline_memcpy_async";
  require_capability(80, kName, where);
  if (bytes != 4 && bytes != 8 && bytes != 16) {
    fail(std::string(kName) + " of " + std::to_string(bytes) + " bytes, which are not 4, 8 or 16", where);
  }
  if (zeros > bytes) fail(std::string(kName) + " with more zeros than bytes", where);
  const Place place = check_ends(kName, shared, global, bytes, bytes, where);
  if (place.rank != scheduler.rank()) fail(std::string(kName) + " into another block's shared memory", where);
  async_copies.issue({.kind = Copy::Kind::pipeline,
                      .shared = place,
                      .global = static_cast<char*>(const_cast<void*>(global)),
                      .bytes = bytes,
                      .zeros = zeros,
                      .where = where,
                      .group = scheduler.current().pipeline_groups});
}

void pipeline_commit(Location where) {
  require_capability(80, "__pipeline_commit", where);
  ++scheduler.current().pipeline_groups;
}

void pipeline_wait_prior(size_t prior, Location where) {
  require_capability(80, "__pipeline_wait_prior", where);
  // CUDA's header knows no more.
  prior = std::min<size_t>(prior, 8);
  const unsigned groups = scheduler.current().pipeline_groups;
  async_copies.wait(Copy::Kind::pipeline, groups - std::min<unsigned>(groups, prior), Copy::Stage::written);
}

void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* mbarrier, Location where) {
  constexpr const char* kName = "cp_async_bulk";
  require_capability(90, kName, where);
  if (bytes % 16 != 0) fail("cp_async_bulk of " + std::to_string(bytes) + " bytes, which is no multiple of 16", where);
  const Place place = check_ends(kName, shared, global, bytes, 16, where);
  const Place barrier = find_fenced_mbarrier(kName, mbarrier, where);
  if (barrier.rank != place.rank) fail("cp_async_bulk with an mbarrier of another block than its destination", where);
  async_copies.issue({.kind = Copy::Kind::load,
                      .shared = place,
                      .global = static_cast<char*>(const_cast<void*>(global)),
                      .bytes = bytes,
                      .mbarrier = barrier,
                      .where = where});
}

void store_async(void* shared, const void* value, uint32_t bytes, uint64_t* mbarrier, Location where) {
  constexpr const char* kName = "st_async";
  require_capability(90, kName, where);
  check_aligned(shared, bytes, kName, where);
  const std::optional<Place> place = shared_memory.find(shared);
  if (!place || !shared_memory.holds(*place, bytes)) fail("st_async to an address outside of shared memory", where);
  const Place barrier = find_fenced_mbarrier(kName, mbarrier, where);
  if (barrier.rank != place->rank) fail("st_async with an mbarrier of another block than its destination", where);
  const auto* const begin = static_cast<const char*>(value);
  async_copies.issue({.kind = Copy::Kind::load,
                      .stage = Copy::Stage::read,
                      .shared = *place,
                      .global = nullptr,
                      .bytes = bytes,
                      .mbarrier = barrier,
                      .where = where,
                      .data = {begin, begin + bytes}});
}

void bulk_store(void* global, const void* shared, uint32_t bytes, Location where) {
  constexpr const char* kName = "cp_async_bulk";
  require_capability(90, kName, where);
  if (bytes % 16 != 0) fail("cp_async_bulk of " + std::to_string(bytes) + " bytes, which is no multiple of 16", where);
  const Place place = check_ends(kName, shared, global, bytes, 16, where);
  if (place.rank != scheduler.rank()) fail("cp_async_bulk from another block's shared memory", where);
  async_copies.issue({.kind = Copy::Kind::store,
                      .shared = place,
                      .global = static_cast<char*>(global),
                      .bytes = bytes,
                      .where = where,
                      .group = scheduler.current().bulk_groups});
}

void bulk_commit_group(Location where) {
  require_capability(90, "cp_async_bulk_commit_group", where);
  ++scheduler.current().bulk_groups;
}

void bulk_wait_group(unsigned prior, bool written, Location where) {
  require_capability(90, "cp_async_bulk_wait_group", where);
  const unsigned groups = scheduler.current().bulk_groups;
  async_copies.wait(Copy::Kind::store, groups - std::min(groups, prior),
                    written ? Copy::Stage::written : Copy::Stage::read);
}

}  // namespace cuda_emulator
