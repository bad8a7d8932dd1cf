// Barriers in shared memory that count arrivals and bytes, and go from phase to phase.
#pragma once

#include "emulator.h"
#include "shared_memory.h"

namespace cuda_emulator {

void mbarrier_init(uint64_t* address, uint32_t count, Location where);
// Expects more bytes, then arrives so many times. Returns the phase's token.
uint64_t mbarrier_arrive(const char* operation, uint64_t* address, uint32_t count, uint32_t bytes, Location where);
void mbarrier_arrive_in_cluster(const char* operation, uint64_t* address, uint32_t count, uint32_t bytes,
                                Location where);
bool mbarrier_try_wait_parity(uint64_t* address, uint32_t parity, Location where);
// What copies and other blocks see of an mbarrier: nothing, until the thread that initialised it has passed one.
void fence_mbarrier_init(const char* operation, Location where);

Place find_fenced_mbarrier(const char* operation, const uint64_t* address, Location where);
void mbarrier_complete_tx(Place place, size_t bytes);
// What its phase waits for.
std::string describe_mbarrier(Place place);
void reset_mbarriers();

}  // namespace cuda_emulator
