// Asynchronous copies. Each reads its source at one random moment and writes its destination at a later one, both
// between its issue and the wait for it. So a missing wait and a source that changes too early give wrong results.
#pragma once

#include <vector>

#include "emulator.h"
#include "shared_memory.h"

namespace cuda_emulator {

// Of __pipeline_memcpy_async: groups of a thread.
void pipeline_copy(void* shared, const void* global, size_t bytes, size_t zeros, Location where);
void pipeline_commit(Location where);
void pipeline_wait_prior(size_t prior, Location where);

// Of cp_async_bulk: loads count bytes off an mbarrier, stores form groups of a thread.
void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* mbarrier, Location where);
void bulk_store(void* global, const void* shared, uint32_t bytes, Location where);
void bulk_commit_group(Location where);
// Of st_async: a value goes into the shared memory of a block of the cluster, and counts off an mbarrier there.
void store_async(void* shared, const void* value, uint32_t bytes, uint64_t* mbarrier, Location where);
// Until the stores of all groups but the last `prior` have read their source, or also written.
void bulk_wait_group(unsigned prior, bool written, Location where);

struct Copy {
  enum class Kind { pipeline, load, store };
  enum class Stage { issued, read, written };

  Kind kind;
  Stage stage = Stage::issued;
  Place shared;
  char* global;
  size_t bytes;
  size_t zeros = 0;
  Place mbarrier{};
  Location where;
  int fiber = 0;
  unsigned group = 0;
  // A load whose mbarrier has completed the phase; a store whose group was waited for.
  bool released = false;
  std::vector<char> data{};
};

// Those of the cluster that runs, until they are both done and waited for.
class AsyncCopies {
 public:
  void reset();
  void issue(Copy copy);
  // Lets some time pass: copies may get further.
  void progress();
  // Whether there was a copy that could get further.
  bool advance_one();
  // For the running thread: copies of the groups before `group` get as far as `stage`.
  void wait(Copy::Kind kind, unsigned group, Copy::Stage stage);
  // The phase that an mbarrier's loads belong to is over; a thread has seen that.
  void complete(Place mbarrier);
  void observe(Place mbarrier);
  // Faults if there are copies that nobody waited for.
  void thread_returns();
  void block_returns(int rank);
  void cluster_returns();

 private:
  void advance(Copy& copy);

  std::vector<Copy> copies_;
  size_t unfinished_ = 0;
  unsigned hurry_ = 1;
};

extern AsyncCopies async_copies;

}  // namespace cuda_emulator
