// g++'s undefined behaviour sanitizer calls these; all of their data begins with the place in the source.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "scheduler.h"

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
