// The targets of the rows, for host and device.
#pragma once

#include <cstdint>

#include "portable.h"

namespace pdl {

// A kernel reads one target a row. So the ids' type is a branch, the same for all rows, and not a template parameter.
struct Targets {
  const void* ids;
  bool is_int32;

  PDL_INLINE int64_t operator[](int64_t i) const {
    return is_int32 ? static_cast<const int32_t*>(ids)[i] : static_cast<const int64_t*>(ids)[i];
  }
};

}  // namespace pdl
