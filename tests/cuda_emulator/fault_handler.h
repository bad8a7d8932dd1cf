#pragma once

#include <signal.h>

#include <vector>

namespace cuda_emulator {

// While it lives, an access to memory that is not there is a fault of the thread that runs; on a stack of its own,
// since that thread's may be what overflowed.
class FaultHandler {
 public:
  FaultHandler();
  ~FaultHandler();
  FaultHandler(const FaultHandler&) = delete;

 private:
  std::vector<char> memory_;
  stack_t former_stack_{};
  struct sigaction former_[2]{};
};

}  // namespace cuda_emulator
