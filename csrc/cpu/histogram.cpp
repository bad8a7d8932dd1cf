// Histogram of token ids on the CPU: one read of the ids in their own dtype, no pre-pass over them.
//
// Few ids, or one thread: straight into the 64-bit totals, fastest where all of them lie in one tensor. Many ids: each
// part counts into a table of its own, with two extra bins that take what is ignored and what is out of range without a
// branch, and adds it to the totals at its end.
#include <torch/csrc/stable/library.h>

#include <mutex>
#include <vector>

#include "../histogram_arguments.h"
#include "check_ids.h"

namespace pdl::cpu {
namespace {

template <typename T>
inline int64_t bin_of(T token, int64_t vocab_size, int64_t ignore_index) {
  const int64_t id = static_cast<int64_t>(token);
  const int64_t rejected = vocab_size + (id == ignore_index ? 0 : 1);
  const bool counted = (static_cast<uint64_t>(id) < static_cast<uint64_t>(vocab_size)) & (id != ignore_index);
  return counted ? id : rejected;
}

template <typename T>
void count(const T* tokens, int64_t n, int64_t vocab_size, int64_t ignore_index, const TokenTotals& totals) {
  int64_t* const counts = totals.counts;
  *totals.seen += n;
  const int64_t parts = torch::stable::get_num_threads();
  // A private table costs two passes over V entries, so it has to be earned.
  if (parts == 1 || n < 8 * vocab_size) {
    if (totals.ignored == counts + vocab_size && totals.out_of_range == totals.ignored + 1) {
      // A bin is a place: no choice of one for each id.
      for (int64_t i = 0; i < n; ++i) ++counts[bin_of(tokens[i], vocab_size, ignore_index)];
      return;
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t bin = bin_of(tokens[i], vocab_size, ignore_index);
      int64_t* slot = bin < vocab_size ? counts + bin : bin == vocab_size ? totals.ignored : totals.out_of_range;
      *slot += 1;
    }
    return;
  }
  std::mutex adding;
  torch::stable::parallel_for(0, n, (n + parts - 1) / parts, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> table(vocab_size + 2);
    for (int64_t i = begin; i < end; ++i) ++table[bin_of(tokens[i], vocab_size, ignore_index)];
    const std::lock_guard<std::mutex> lock(adding);
    for (int64_t t = 0; t < vocab_size; ++t) counts[t] += table[t];
    *totals.ignored += table[vocab_size];
    *totals.out_of_range += table[vocab_size + 1];
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
