#include "emulator.h"

#include <link.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_emulator {
namespace {

constexpr int kWarp = 32;
constexpr size_t kPage = 4096;
constexpr size_t kStack = 16 * kPage;

enum class State { ready, at_barrier, in_warp, done };

struct Fiber {
  jmp_buf context;
  ucontext_t start;
  bool started = false;
  State state = State::done;
  uint3 index{};
  // What a fiber that is not ready waits for.
  const char* operation = nullptr;
  unsigned mask = 0;
  const void* input = nullptr;
  void* output = nullptr;
  Location where;
};

std::string describe(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

std::string describe(const Location& where) {
  return std::string(where.file_name()) + ":" + std::to_string(where.line());
}

bool same_place(const Location& a, const Location& b) {
  return a.line() == b.line() && a.column() == b.column() && strcmp(a.file_name(), b.file_name()) == 0;
}

// The block that is running. Fibers switch by _setjmp and _longjmp, which cost no system call; ucontext gives each its
// stack. A fiber outlives its block and runs the next one, unless a fault left it in the middle.
class Scheduler {
 public:
  void run(const dim3& grid, const dim3& block, const std::function<void()>& thread);
  void barrier(Location where);
  void meet(const char* operation, unsigned mask, const void* input, void* output, Location where,
            const Finish& finish);
  [[noreturn]] void fail(const std::string& what);
  bool running() const { return current_ != nullptr; }
  int lane() const { return int(current_ - fibers_.data()) % kWarp; }

 private:
  static void enter();
  void prepare(int threads);
  void run_block();
  void resume(Fiber& fiber);
  void yield();
  bool run_warp(int warp);
  void release_barrier();
  void wait(State state, const char* operation, Location where);
  [[noreturn]] void report_deadlock();
  int warp_of(const Fiber& fiber) const { return int(&fiber - fibers_.data()) / kWarp; }

  std::vector<Fiber> fibers_;
  std::vector<int> warps_;
  int threads_ = 0;
  char* stacks_ = nullptr;
  const std::function<void()>* thread_ = nullptr;
  Fiber* current_ = nullptr;
  jmp_buf scheduler_;
  std::string fault_;
  std::minstd_rand random_;
};

Scheduler scheduler;

// The fibers' stacks, each above a page that must not be touched.
void Scheduler::prepare(int threads) {
  constexpr int kMaxThreads = 1024;
  if (stacks_ == nullptr) {
    void* memory = mmap(nullptr, kMaxThreads * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("CUDA emulator: no memory for the stacks of 1024 threads");
    stacks_ = static_cast<char*>(memory);
    for (int i = 0; i < kMaxThreads; ++i) mprotect(stacks_ + i * kStack, kPage, PROT_NONE);
    fibers_.resize(kMaxThreads);
  }
  threads_ = threads;
}

void Scheduler::enter() {
  for (;;) {
    (*scheduler.thread_)();
    scheduler.current_->state = State::done;
    scheduler.yield();
  }
}

__attribute__((noinline)) void Scheduler::resume(Fiber& fiber) {
  current_ = &fiber;
  threadIdx = fiber.index;
  if (_setjmp(scheduler_) == 0) {
    if (fiber.started) _longjmp(fiber.context, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    const size_t i = &fiber - fibers_.data();
    fiber.start.uc_stack.ss_sp = stacks_ + i * kStack + kPage;
    fiber.start.uc_stack.ss_size = kStack - kPage;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, &Scheduler::enter, 0);
    setcontext(&fiber.start);
  }
  current_ = nullptr;
}

__attribute__((noinline)) void Scheduler::yield() {
  if (_setjmp(current_->context) == 0) _longjmp(scheduler_, 1);
}

// Never returns to the fiber that it is called from.
void Scheduler::fail(const std::string& what) {
  fault_ = "CUDA emulator: " + what + " in block " + describe(blockIdx) + ", thread " + describe(current_->index);
  _longjmp(scheduler_, 1);
}

void Scheduler::wait(State state, const char* operation, Location where) {
  current_->state = state;
  current_->operation = operation;
  current_->where = where;
}

void Scheduler::barrier(Location where) {
  wait(State::at_barrier, "__syncthreads", where);
  yield();
}

void Scheduler::meet(const char* operation, unsigned mask, const void* input, void* output, Location where,
                     const Finish& finish) {
  Fiber* self = current_;
  Fiber* warp = &fibers_[warp_of(*self) * kWarp];
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
    if ((mask >> lane & 1u) != 0) warp[lane].state = State::ready;
  }
  // The last lane to arrive has no right to be the first to leave.
  yield();
}

// Whether any lane got further.
bool Scheduler::run_warp(int warp) {
  int order[kWarp];
  std::iota(order, order + kWarp, 0);
  bool any = false;
  for (bool moved = true; moved;) {
    moved = false;
    std::shuffle(order, order + kWarp, random_);
    for (const int lane : order) {
      Fiber& fiber = fibers_[warp * kWarp + lane];
      if (fiber.state != State::ready) continue;
      resume(fiber);
      if (!fault_.empty()) return true;
      moved = any = true;
    }
  }
  return any;
}

void Scheduler::release_barrier() {
  const Fiber& first = fibers_[0];
  for (int i = 0; i < threads_; ++i) {
    Fiber& fiber = fibers_[i];
    if (fiber.state != State::at_barrier) report_deadlock();
    if (!same_place(fiber.where, first.where)) {
      throw std::runtime_error("CUDA emulator: __syncthreads at " + describe(fiber.where) + " meets that at " +
                               describe(first.where) + " in block " + describe(blockIdx) + ", thread " +
                               describe(fiber.index));
    }
  }
  for (int i = 0; i < threads_; ++i) fibers_[i].state = State::ready;
}

void Scheduler::report_deadlock() {
  std::string message = "CUDA emulator: deadlock in block " + describe(blockIdx);
  int left_out = 0, done = 0;
  std::string last;
  for (int i = 0, listed = 0; i < threads_; ++i) {
    const Fiber& fiber = fibers_[i];
    if (fiber.state == State::done) {
      ++done;
      continue;
    }
    const std::string reason = std::string(fiber.operation) + " at " + describe(fiber.where);
    if (reason == last || ++listed > 4) {
      ++left_out;
      continue;
    }
    message += "; thread " + describe(fiber.index) + " waits in " + reason;
    last = reason;
  }
  throw std::runtime_error(message + "; " + std::to_string(left_out) + " more wait, " + std::to_string(done) +
                           " have returned");
}

// The shared variables of all kernels: this module's thread-local segment, where nothing else lives.
struct SharedMemory {
  void* data = nullptr;
  size_t size = 0;
};

thread_local char some_shared_variable = 0;

SharedMemory shared_memory() {
  // Makes sure that the segment exists in this thread.
  *const_cast<volatile char*>(&some_shared_variable) = 0;
  SharedMemory memory;
  const auto visit = [](dl_phdr_info* info, size_t, void* result) {
    const auto here = reinterpret_cast<uintptr_t>(&shared_memory);
    bool ours = false;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& header = info->dlpi_phdr[i];
      const uintptr_t start = info->dlpi_addr + header.p_vaddr;
      ours = ours || (header.p_type == PT_LOAD && here >= start && here < start + header.p_memsz);
    }
    if (!ours) return 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      if (info->dlpi_phdr[i].p_type == PT_TLS) {
        *static_cast<SharedMemory*>(result) = {info->dlpi_tls_data, info->dlpi_phdr[i].p_memsz};
      }
    }
    return 1;
  };
  dl_iterate_phdr(visit, &memory);
  if (memory.data == nullptr) throw std::runtime_error("CUDA emulator: cannot find the shared variables");
  return memory;
}

void Scheduler::run_block() {
  const int warps = (threads_ + kWarp - 1) / kWarp;
  for (int i = 0; i < warps * kWarp; ++i) {
    const unsigned x = i % blockDim.x, y = i / blockDim.x % blockDim.y, z = i / blockDim.x / blockDim.y;
    fibers_[i].index = {x, y, z};
    fibers_[i].state = i < threads_ ? State::ready : State::done;
  }
  const SharedMemory shared = shared_memory();
  memset(shared.data, 0xff, shared.size);
  warps_.resize(warps);
  std::iota(warps_.begin(), warps_.end(), 0);
  const auto is_done = [](const Fiber& fiber) { return fiber.state == State::done; };
  for (;;) {
    std::shuffle(warps_.begin(), warps_.end(), random_);
    for (const int warp : warps_) {
      run_warp(warp);
      if (!fault_.empty()) throw std::runtime_error(fault_);
    }
    if (std::all_of(fibers_.begin(), fibers_.begin() + threads_, is_done)) return;
    release_barrier();
  }
}

// An access to memory that is not there, in a thread whose stack may be what overflowed: hence a stack of its own.
class FaultHandler {
 public:
  FaultHandler() : memory_(4 * kPage + SIGSTKSZ) {
    stack_t stack = {};
    stack.ss_sp = memory_.data();
    stack.ss_size = memory_.size();
    sigaltstack(&stack, &former_stack_);
    struct sigaction action = {};
    action.sa_sigaction = [](int signal, siginfo_t* info, void*) {
      if (!scheduler.running()) {
        // Not of our making: the instruction runs again, and the fault takes its course.
        ::signal(signal, SIG_DFL);
        return;
      }
      char text[64];
      snprintf(text, sizeof(text), "invalid access to address %p", info->si_addr);
      scheduler.fail(text);
    };
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &action, &former_[i]);
  }
  ~FaultHandler() {
    for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &former_[i], nullptr);
    sigaltstack(&former_stack_, nullptr);
  }

 private:
  static constexpr int kSignals[] = {SIGSEGV, SIGBUS};
  std::vector<char> memory_;
  stack_t former_stack_{};
  struct sigaction former_[2]{};
};

void Scheduler::run(const dim3& grid, const dim3& block, const std::function<void()>& thread) {
  prepare(int(block.x * block.y * block.z));
  gridDim = grid;
  blockDim = block;
  thread_ = &thread;
  fault_.clear();
  const char* seed = getenv("PDL_EXT_EMULATOR_SEED");
  random_.seed(seed != nullptr ? unsigned(atoi(seed)) : 0u);
  const FaultHandler handler;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  // Which block comes first is random too.
  const uint64_t first = random_() % blocks;
  try {
    for (uint64_t i = 0; i < blocks; ++i) {
      const uint64_t b = (first + i) % blocks;
      blockIdx = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
      run_block();
    }
  } catch (...) {
    for (Fiber& fiber : fibers_) fiber.started = false;
    current_ = nullptr;
    throw;
  }
}

}  // namespace

void run_grid(const dim3& grid, const dim3& block, const std::function<void()>& thread) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  scheduler.run(grid, block, thread);
}

void barrier(Location where) {
  scheduler.barrier(where);
}

int lane() {
  return scheduler.lane();
}

void meet(const char* operation, unsigned mask, const void* input, void* output, Location where, const Finish& finish) {
  scheduler.meet(operation, mask, input, output, where, finish);
}

}  // namespace cuda_emulator

// g++'s undefined behaviour sanitizer calls these; all of their data begins with the place in the source.
namespace {

struct SanitizedPlace {
  const char* file;
  uint32_t line, column;
};

void sanitizer_failure(const char* what, const void* data) {
  const auto& place = *static_cast<const SanitizedPlace*>(data);
  const std::string message = std::string(what) + " at " + place.file + ":" + std::to_string(place.line);
  if (cuda_emulator::scheduler.running()) cuda_emulator::scheduler.fail(message);
  fprintf(stderr, "CUDA emulator: %s in host code\n", message.c_str());
  abort();
}

}  // namespace

#define SANITIZER_HANDLER(name, what)                         \
  extern "C" void __ubsan_handle_##name##_abort(void* data) { \
    sanitizer_failure(what, data);                            \
  }

SANITIZER_HANDLER(type_mismatch_v1, "misaligned address or null pointer")
SANITIZER_HANDLER(out_of_bounds, "index out of an array's bounds")
SANITIZER_HANDLER(add_overflow, "signed overflow")
SANITIZER_HANDLER(sub_overflow, "signed overflow")
SANITIZER_HANDLER(mul_overflow, "signed overflow")
SANITIZER_HANDLER(negate_overflow, "signed overflow")
SANITIZER_HANDLER(divrem_overflow, "division by zero")
SANITIZER_HANDLER(shift_out_of_bounds, "shift out of bounds")
