#pragma once

#include <signal.h>

#include <vector>

namespace cuda_emulator {

// While this object exists, an access to unmapped memory is a fault of the running thread. The handler has a stack of
// its own, since that thread's may have overflowed.
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
