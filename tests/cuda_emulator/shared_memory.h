// The shared memory of the blocks that run. One of them at a time has it at the addresses of its __shared__ variables.
// The others have theirs in copies of the same layout.
#pragma once

#include <cstddef>
#include <optional>
#include <string>

namespace cuda_emulator {

constexpr size_t kPage = 4096;

// A byte of shared memory, wherever it lies at the moment.
struct Place {
  int rank;  // of the block among those that run
  size_t offset;

  auto operator<=>(const Place&) const = default;
};

class SharedMemory {
 public:
  // For a launch with that many blocks side by side and that much dynamic shared memory a block, on this thread.
  void begin(int blocks, size_t dynamic);
  void end();

  // Before the next clusters: no block has memory.
  void reset();
  // Puts a block's memory where its __shared__ variables are: poison, the first time.
  void enter(int rank);
  // After a block's last thread: what still accesses its memory is at fault.
  void leave(int rank);

  // Where a block's memory lies now.
  char* at(Place place) const;
  std::optional<Place> find(const void* address) const;
  // Whether the static or the requested dynamic part has this many bytes there.
  bool holds(Place place, size_t bytes) const;
  // What is wrong with an access to an address that has no memory, if that is known.
  std::optional<std::string> explain(const void* address, const std::string& owner) const;
  // Whether nothing was written past the end of a block's dynamic shared memory.
  bool intact(int rank) const;
  size_t dynamic() const { return dynamic_; }

 private:
  void find_segment();
  void poison() const;
  char* copy_of(int rank) const { return copies_ + rank * stride_; }
  size_t dynamic_pages() const { return (dynamic_ + kPage - 1) / kPage * kPage; }
  void transfer(char* to, const char* from) const;
  void protect_guard(char* memory, int protection) const;

  char* segment_ = nullptr;   // this module's thread-local variables, which are all of the __shared__ ones
  size_t size_ = 0;           // of the segment
  size_t dynamic_start_ = 0;  // offset of the dynamic part, a multiple of the page
  size_t dynamic_ = 0;        // what the launch asked for
  int blocks_ = 0;
  int current_ = -1;      // the block whose memory is in the segment
  unsigned started_ = 0;  // a bit for each rank
  char* copies_ = nullptr;
  size_t stride_ = 0;
};

extern SharedMemory shared_memory;

}  // namespace cuda_emulator
