#include "shared_memory.h"

#include <link.h>
#include <sys/mman.h>

#include <cstring>
#include <stdexcept>

#include "emulator.h"

namespace pdl::cuda {

// What a kernel names by `extern __shared__ uint4 pdl_dynamic_shared[];` in this namespace: room for the most that a
// card gives, 227 KiB, and a page past it. Aligned so that the pages after what a launch asks for can be taken away.
constexpr size_t kDynamicPages = 58;
alignas(cuda_emulator::kPage) thread_local uint4
    pdl_dynamic_shared[kDynamicPages * cuda_emulator::kPage / sizeof(uint4)];

}  // namespace pdl::cuda

namespace cuda_emulator {

SharedMemory shared_memory;

namespace {

constexpr size_t kDynamicRoom = sizeof(pdl::cuda::pdl_dynamic_shared);
constexpr int kMaxBlocks = 16;

// After the dynamic part, up to the end of its page: NaN in every floating-point type, and not what poison is.
constexpr uint16_t kCanary = 0xfff5;

struct Canaries {
  uint16_t words[kPage / sizeof(uint16_t)];
  Canaries() {
    for (uint16_t& word : words) word = kCanary;
  }
};
const Canaries canaries;

// The canary of a part that ends at an odd address begins with the second half of a word.
const char* canary_at(size_t offset) {
  return reinterpret_cast<const char*>(canaries.words) + offset % sizeof(uint16_t);
}

}  // namespace

void SharedMemory::find_segment() {
  // Makes sure that the segment exists in this thread.
  char* const dynamic = const_cast<char*>(reinterpret_cast<volatile char*>(pdl::cuda::pdl_dynamic_shared));
  struct Found {
    const void* dynamic;
    char* segment = nullptr;
    size_t size = 0;
  } found{dynamic};
  const auto visit = [](dl_phdr_info* info, size_t, void* result) {
    Found& found = *static_cast<Found*>(result);
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      if (info->dlpi_phdr[i].p_type != PT_TLS || info->dlpi_tls_data == nullptr) continue;
      char* const segment = static_cast<char*>(info->dlpi_tls_data);
      if (found.dynamic < segment || found.dynamic >= segment + info->dlpi_phdr[i].p_memsz) continue;
      found.segment = segment;
      found.size = info->dlpi_phdr[i].p_memsz;
      return 1;
    }
    return 0;
  };
  dl_iterate_phdr(visit, &found);
  if (found.segment == nullptr || reinterpret_cast<uintptr_t>(dynamic) % kPage != 0) {
    throw std::runtime_error("CUDA emulator: cannot find the shared variables");
  }
  segment_ = found.segment;
  size_ = found.size;
  dynamic_start_ = dynamic - segment_;
}

void SharedMemory::begin(int blocks, size_t dynamic) {
  find_segment();
  dynamic_ = dynamic;
  blocks_ = blocks;
  if (blocks > 1 && copies_ == nullptr) {
    // Pages at the same places as in the segment, and one between two copies.
    stride_ = (size_ + 2 * kPage - 1) / kPage * kPage;
    void* memory =
        mmap(nullptr, kMaxBlocks * stride_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("CUDA emulator: no memory for the shared memory of a cluster");
    copies_ = static_cast<char*>(memory);
  }
  protect_guard(segment_, PROT_NONE);
}

void SharedMemory::end() {
  // The C library takes the segment back when the thread ends.
  protect_guard(segment_, PROT_READ | PROT_WRITE);
}

void SharedMemory::protect_guard(char* memory, int protection) const {
  mprotect(memory + dynamic_start_ + dynamic_pages(), kDynamicRoom - dynamic_pages(), protection);
}

void SharedMemory::poison() const {
  char* const dynamic = segment_ + dynamic_start_;
  memset(segment_, 0xff, dynamic_start_ + dynamic_);
  memcpy(dynamic + dynamic_, canary_at(dynamic_), dynamic_pages() - dynamic_);
  memset(dynamic + kDynamicRoom, 0xff, size_ - dynamic_start_ - kDynamicRoom);
}

void SharedMemory::reset() {
  current_ = -1;
  started_ = 0;
  if (blocks_ > 1) mprotect(copies_, blocks_ * stride_, PROT_NONE);
}

void SharedMemory::transfer(char* to, const char* from) const {
  memcpy(to, from, dynamic_start_ + dynamic_pages());
  const size_t after = dynamic_start_ + kDynamicRoom;
  memcpy(to + after, from + after, size_ - after);
}

void SharedMemory::enter(int rank) {
  if (rank == current_) return;
  if (current_ >= 0) transfer(copy_of(current_), segment_);
  current_ = rank;
  if ((started_ >> rank & 1u) != 0) return transfer(segment_, copy_of(rank));
  started_ |= 1u << rank;
  poison();
  if (blocks_ == 1) return;
  mprotect(copy_of(rank), stride_, PROT_READ | PROT_WRITE);
  protect_guard(copy_of(rank), PROT_NONE);
}

void SharedMemory::leave(int rank) {
  if (blocks_ == 1) return;
  if (rank == current_) current_ = -1;
  mprotect(copy_of(rank), stride_, PROT_NONE);
}

char* SharedMemory::at(Place place) const {
  return (place.rank == current_ ? segment_ : copy_of(place.rank)) + place.offset;
}

std::optional<Place> SharedMemory::find(const void* address) const {
  const char* const byte = static_cast<const char*>(address);
  if (byte >= segment_ && byte < segment_ + size_) return Place{current_, size_t(byte - segment_)};
  if (blocks_ == 1 || byte < copies_ || byte >= copies_ + blocks_ * stride_) return std::nullopt;
  const size_t offset = byte - copies_;
  return Place{int(offset / stride_), offset % stride_};
}

bool SharedMemory::holds(Place place, size_t bytes) const {
  const size_t end = place.offset + bytes;
  if (place.offset < dynamic_start_) return end <= dynamic_start_;
  if (place.offset >= dynamic_start_ + kDynamicRoom) return end <= size_;
  return end <= dynamic_start_ + dynamic_;
}

std::optional<std::string> SharedMemory::explain(const void* address, const std::string& owner) const {
  const std::optional<Place> place = find(address);
  if (!place) return std::nullopt;
  if (place->offset >= dynamic_start_ && place->offset < dynamic_start_ + kDynamicRoom && !holds(*place, 1)) {
    return "access past the end of the dynamic shared memory (" + std::to_string(dynamic_) + " bytes)";
  }
  const bool started = place->rank < 0 || (started_ >> place->rank & 1u) != 0;
  return "access to the shared memory of block " + owner + ", which has " + (started ? "returned" : "not started");
}

bool SharedMemory::intact(int rank) const {
  const size_t rest = dynamic_pages() - dynamic_;
  return rest == 0 || memcmp(at({rank, dynamic_start_ + dynamic_}), canary_at(dynamic_), rest) == 0;
}

}  // namespace cuda_emulator
