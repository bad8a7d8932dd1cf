// The range check of token ids. It is done before anything is written, so that a bad id changes nothing.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace pdl::cpu {

// Throws std::out_of_range, which Python sees as IndexError, with the first bad id and its position.
template <typename Ids>
void check_ids(const char* argument, const Ids& ids, int64_t n, int64_t vocab_size, int64_t ignore_index) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t id = static_cast<int64_t>(ids[i]);
    if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(vocab_size) && id != ignore_index) {
      throw std::out_of_range(std::string(argument) + ": got " + std::to_string(id) + " at flattened position " +
                              std::to_string(i) + ", expected 0 <= id < " + std::to_string(vocab_size) +
                              " or ignore_index (" + std::to_string(ignore_index) + ")");
    }
  }
}

}  // namespace pdl::cpu
