#include "mbarrier.h"

#include <cstring>
#include <map>

#include "async_copy.h"
#include "scheduler.h"

namespace cuda_emulator {
namespace {

constexpr int kCountBits = 20;
constexpr int kMax = (1 << kCountBits) - 1;
// At the top of the word; poison has 3 there, and zeros have 0.
constexpr uint64_t kValid = 1;

// Once in so many times, a wait that has to wait gives up instead.
constexpr int kPatience = 8;

// What the 8 bytes in shared memory hold.
struct Mbarrier {
  int expected;  // arrivals a phase
  int pending;   // arrivals
  int bytes;     // pending; may be negative until they are expected
  unsigned parity;
};

struct Initialised {
  int fiber;
  bool fenced;
};
std::map<Place, Initialised> initialised;

uint64_t pack(const Mbarrier& mbarrier) {
  return uint64_t(mbarrier.expected) | uint64_t(mbarrier.pending) << kCountBits |
         uint64_t(mbarrier.bytes + kMax) << 2 * kCountBits | uint64_t(mbarrier.parity) << (3 * kCountBits + 1) |
         kValid << 62;
}

Mbarrier unpack(uint64_t word) {
  return {int(word & kMax), int(word >> kCountBits & kMax), int(word >> 2 * kCountBits & (2 * kMax + 1)) - kMax,
          unsigned(word >> (3 * kCountBits + 1) & 1)};
}

uint64_t load(Place place) {
  uint64_t word;
  memcpy(&word, shared_memory.at(place), sizeof(word));
  return word;
}

void store(Place place, const Mbarrier& mbarrier) {
  const uint64_t word = pack(mbarrier);
  memcpy(shared_memory.at(place), &word, sizeof(word));
}

Place find(const char* operation, const uint64_t* address, Location where) {
  check_aligned(address, sizeof(uint64_t), operation, where);
  const std::optional<Place> place = shared_memory.find(address);
  if (!place || !shared_memory.holds(*place, sizeof(uint64_t))) {
    fail(std::string(operation) + " on an address outside of shared memory", where);
  }
  return *place;
}

Place find_initialised(const char* operation, const uint64_t* address, Location where) {
  const Place place = find(operation, address, where);
  if (load(place) >> 62 != kValid || !initialised.contains(place)) {
    fail(std::string(operation) + " on an mbarrier that is not initialised", where);
  }
  return place;
}

Place find_own(const char* operation, const uint64_t* address, Location where) {
  const Place place = find_initialised(operation, address, where);
  if (place.rank != scheduler.rank()) fail(std::string(operation) + " on another block's mbarrier", where);
  return place;
}

void store_or_complete(Place place, Mbarrier mbarrier) {
  const bool complete = mbarrier.pending == 0 && mbarrier.bytes == 0;
  if (complete) {
    mbarrier.pending = mbarrier.expected;
    mbarrier.parity ^= 1;
  }
  store(place, mbarrier);
  if (!complete) return;
  async_copies.complete(place);
  scheduler.wake(place);
}

void arrive(const char* operation, Place place, uint32_t count, uint32_t bytes, Location where) {
  Mbarrier mbarrier = unpack(load(place));
  if (int64_t(bytes) + mbarrier.bytes > kMax) {
    fail(std::string(operation) + " expects more than the " + std::to_string(kMax) + " bytes of a phase", where);
  }
  if (count > uint32_t(mbarrier.pending)) {
    fail(std::string(operation) + " arrives more often than the " + std::to_string(mbarrier.expected) +
             " times of a phase",
         where);
  }
  mbarrier.bytes += int(bytes);
  mbarrier.pending -= int(count);
  store_or_complete(place, mbarrier);
}

}  // namespace

void mbarrier_init(uint64_t* address, uint32_t count, Location where) {
  constexpr const char* kName = "mbarrier_init";
  require_capability(80, kName, where);
  const Place place = find(kName, address, where);
  if (place.rank != scheduler.rank()) fail("mbarrier_init in another block's shared memory", where);
  if (count == 0 || count > uint32_t(kMax)) {
    fail("mbarrier_init with a count that is not from 1 to " + std::to_string(kMax), where);
  }
  if (load(place) >> 62 == kValid && initialised.contains(place)) {
    fail("mbarrier_init of an mbarrier that is initialised already", where);
  }
  store(place, {int(count), int(count), 0, 0});
  initialised[place] = {scheduler.current_fiber(), false};
}

uint64_t mbarrier_arrive(const char* operation, uint64_t* address, uint32_t count, uint32_t bytes, Location where) {
  require_capability(bytes == 0 && count == 1 ? 80 : 90, operation, where);
  const Place place = find_own(operation, address, where);
  const uint64_t token = load(place);
  arrive(operation, place, count, bytes, where);
  return token;
}

void mbarrier_arrive_in_cluster(const char* operation, uint64_t* address, uint32_t count, uint32_t bytes,
                                Location where) {
  require_capability(90, operation, where);
  arrive(operation, find_fenced_mbarrier(operation, address, where), count, bytes, where);
}

bool mbarrier_try_wait_parity(uint64_t* address, uint32_t parity, Location where) {
  constexpr const char* kName = "mbarrier_try_wait_parity";
  require_capability(90, kName, where);
  if (parity > 1) fail("mbarrier_try_wait_parity with a parity that is not 0 or 1", where);
  const Place place = find_own(kName, address, where);
  if (unpack(load(place)).parity == parity && scheduler.random(kPatience) == 0) return false;
  while (unpack(load(place)).parity == parity) scheduler.wait_at_mbarrier(kName, place.offset, where);
  async_copies.observe(place);
  return true;
}

void fence_mbarrier_init(const char* operation, Location where) {
  require_capability(90, operation, where);
  for (auto& [place, by] : initialised) {
    if (by.fiber == scheduler.current_fiber()) by.fenced = true;
  }
}

Place find_fenced_mbarrier(const char* operation, const uint64_t* address, Location where) {
  const Place place = find_initialised(operation, address, where);
  if (!initialised[place].fenced) {
    fail(std::string(operation) + " on an mbarrier without a fence_mbarrier_init after its initialisation", where);
  }
  return place;
}

void mbarrier_complete_tx(Place place, size_t bytes) {
  Mbarrier mbarrier = unpack(load(place));
  if (mbarrier.bytes - int64_t(bytes) < -kMax) {
    scheduler.fail("copies of more than the " + std::to_string(kMax) + " bytes of an mbarrier's phase");
  }
  mbarrier.bytes -= int(bytes);
  store_or_complete(place, mbarrier);
}

std::string describe_mbarrier(Place place) {
  const Mbarrier mbarrier = unpack(load(place));
  return std::to_string(mbarrier.pending) + " arrivals and " + std::to_string(mbarrier.bytes) + " bytes to come";
}

void reset_mbarriers() {
  initialised.clear();
}

}  // namespace cuda_emulator
