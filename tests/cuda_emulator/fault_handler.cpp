#include "fault_handler.h"

#include <cstdio>

#include "scheduler.h"
#include "shared_memory.h"

namespace cuda_emulator {
namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS};

void on_signal(int number, siginfo_t* info, void*) {
  if (!scheduler.running()) {
    // Not of our making: the instruction runs again, and the fault takes its course.
    signal(number, SIG_DFL);
    return;
  }
  const std::optional<Place> place = shared_memory.find(info->si_addr);
  const std::string owner = place && place->rank >= 0 ? describe(scheduler.block(place->rank).index) : "";
  if (const auto reason = shared_memory.explain(info->si_addr, owner)) scheduler.fail(*reason);
  char text[64];
  snprintf(text, sizeof(text), "invalid access to address %p", info->si_addr);
  scheduler.fail(text);
}

}  // namespace

FaultHandler::FaultHandler() : memory_(8 * kPage + SIGSTKSZ) {
  stack_t stack = {};
  stack.ss_sp = memory_.data();
  stack.ss_size = memory_.size();
  sigaltstack(&stack, &former_stack_);
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &action, &former_[i]);
}

FaultHandler::~FaultHandler() {
  for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &former_[i], nullptr);
  sigaltstack(&former_stack_, nullptr);
}

}  // namespace cuda_emulator
