// Histogram of token ids on the CPU: one read of the ids in their own dtype, no pre-pass over them.
//
// A token is added to one of the totals, each of which is a place: no branch that the data decide. Few ids, or one
// thread: straight into the 64-bit totals. Many ids: each part counts into a table of its own, and adds it to the
// totals at its end.
#include <torch/csrc/stable/library.h>

#include <mutex>
#include <vector>

#include "../histogram_arguments.h"
#include "check_ids.h"

namespace pdl::cpu {
namespace {

// How many tokens are read before any of them is counted: a compiler may not read past a count that is written, since
// that might be the next token. Measured with 16-bit ids: two thirds of the time of one by one.
constexpr int kAtOnce = 8;

template <typename T>
inline int64_t* place_of(T token, int64_t vocab_size, int64_t ignore_index, const TokenTotals& totals) {
  const int64_t id = static_cast<int64_t>(token);
  int64_t* const rejected = id == ignore_index ? totals.ignored : totals.out_of_range;
  const bool counted = (static_cast<uint64_t>(id) < static_cast<uint64_t>(vocab_size)) & (id != ignore_index);
  return counted ? totals.counts + id : rejected;
}

template <typename T>
void count_part(const T* tokens, int64_t n, int64_t vocab_size, int64_t ignore_index, const TokenTotals& totals) {
  int64_t i = 0;
  for (; i + kAtOnce <= n; i += kAtOnce) {
    int64_t* places[kAtOnce];
    for (int k = 0; k < kAtOnce; ++k) places[k] = place_of(tokens[i + k], vocab_size, ignore_index, totals);
    for (int k = 0; k < kAtOnce; ++k) ++*places[k];
  }
  for (; i < n; ++i) ++*place_of(tokens[i], vocab_size, ignore_index, totals);
}

template <typename T>
void count(const T* tokens, int64_t n, int64_t vocab_size, int64_t ignore_index, const TokenTotals& totals) {
  *totals.seen += n;
  const int64_t parts = torch::stable::get_num_threads();
  // A private table costs two passes over V entries, so it has to be earned.
  if (parts == 1 || n < 8 * vocab_size) return count_part(tokens, n, vocab_size, ignore_index, totals);
  std::mutex adding;
  torch::stable::parallel_for(0, n, (n + parts - 1) / parts, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> table(vocab_size + 2);
    int64_t* const rejected = table.data() + vocab_size;
    count_part(tokens + begin, end - begin, vocab_size, ignore_index, {table.data(), rejected, rejected + 1, nullptr});
    const std::lock_guard<std::mutex> lock(adding);
    for (int64_t t = 0; t < vocab_size; ++t) totals.counts[t] += table[t];
    *totals.ignored += rejected[0];
    *totals.out_of_range += rejected[1];
  });
}

void count_tokens_(Tensor counts, Tensor ignored, Tensor out_of_range, Tensor seen, Tensor tokens, int64_t ignore_index,
                   bool strict) {
  const TokenTotals totals = checked_totals(counts, ignored, out_of_range, seen, tokens);
  dispatch_tokens(tokens, [&](const auto* ids) {
    if (strict) check_ids("tokens", ids, tokens.numel(), counts.size(0), ignore_index);
    count(ids, tokens.numel(), counts.size(0), ignore_index, totals);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pdl_ext, CPU, m) {
  m.impl("count_tokens_", TORCH_BOX(&count_tokens_));
}

}  // namespace pdl::cpu
