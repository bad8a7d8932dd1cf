// Histogram of token ids on the CPU: one read of the ids in their own dtype, no pre-pass over them.
//
// The counter of a token is selected without a branch, since no processor can predict which ids are ignored or out of
// range. Few ids, or one thread: straight into the 64-bit totals. Many ids: each part counts into a table of its own,
// and adds it to the totals at its end.
//
// Calls that add to the same counts take turns here, since not every caller can hold a lock: a compiled graph cannot.
#include <torch/csrc/stable/library.h>

#ifndef _WIN32
#include <pthread.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <new>

#include "../histogram_arguments.h"
#include "check_ids.h"

namespace pdl::cpu {
namespace {

// The number of tokens that are read before any of them is counted. A compiler may not move a read before the write of
// a count, since the count might overlap the next token.
constexpr int kAtOnce = 8;

// Selected by the counts' address, so that calls with other counts rarely wait for each other.
constexpr int kTurnBits = 6;
std::array<std::mutex, 1 << kTurnBits> turns;

std::mutex& turn_of(const int64_t* counts) {
  // Addresses differ only in a few of their bits; the highest bits of the product depend on all of them.
  return turns[(reinterpret_cast<uintptr_t>(counts) * 0x9E3779B97F4A7C15u) >> (64 - kTurnBits)];
}

#ifndef _WIN32
// The threads that held the locks at the time of a fork do not exist in the child.
[[maybe_unused]] const int new_turns_in_a_child = pthread_atfork(nullptr, nullptr, [] {
  for (std::mutex& turn : turns) new (&turn) std::mutex;
});
#endif

// The numbers of tokens outside the vocabulary: adjacent bins, so that adding one gives the second.
struct Rejected {
  int64_t bins[2] = {0, 0};
  int64_t* out_of_range() { return &bins[0]; }
  int64_t* ignored() { return &bins[1]; }
};

// kMayBeIgnored: a token may be ignore_index, and that is outside the vocabulary.
template <bool kMayBeIgnored, typename T>
void count_part(const T* tokens, int64_t n, int64_t vocab_size, int64_t ignore_index, int64_t* counts,
                Rejected& rejected) {
  int64_t* const out_of_range = rejected.out_of_range();
  const auto bin_of = [=](T token) {
    const int64_t id = static_cast<int64_t>(token);
    int64_t* bin = static_cast<uint64_t>(id) < static_cast<uint64_t>(vocab_size) ? counts + id : out_of_range;
    if constexpr (kMayBeIgnored) bin += id == ignore_index;
    return bin;
  };
  int64_t i = 0;
  for (; i + kAtOnce <= n; i += kAtOnce) {
    int64_t* bins[kAtOnce];
    for (int k = 0; k < kAtOnce; ++k) bins[k] = bin_of(tokens[i + k]);
    for (int k = 0; k < kAtOnce; ++k) ++*bins[k];
  }
  for (; i < n; ++i) ++*bin_of(tokens[i]);
}

template <bool kMayBeIgnored, typename T>
void count_parts(const T* tokens, int64_t n, int64_t vocab_size, int64_t ignore_index, int64_t* counts,
                 Rejected& rejected, int64_t parts) {
  // A private table costs two passes over V entries, so it needs enough tokens to be worth it.
  if (parts == 1 || n < 8 * vocab_size) {
    return count_part<kMayBeIgnored>(tokens, n, vocab_size, ignore_index, counts, rejected);
  }
  // Allocated at once, so that nothing is counted if memory is short.
  const std::unique_ptr<int64_t[]> tables(new int64_t[parts * vocab_size]);
  std::atomic<int64_t> used = 0;
  std::mutex adding;
  torch::stable::parallel_for(0, n, (n + parts - 1) / parts, [&](int64_t begin, int64_t end) {
    int64_t* const table = tables.get() + used++ * vocab_size;
    std::fill_n(table, vocab_size, 0);
    Rejected others;
    count_part<kMayBeIgnored>(tokens + begin, end - begin, vocab_size, ignore_index, table, others);
    const std::lock_guard<std::mutex> lock(adding);
    for (int64_t t = 0; t < vocab_size; ++t) counts[t] += table[t];
    *rejected.out_of_range() += *others.out_of_range();
    *rejected.ignored() += *others.ignored();
  });
}

template <typename T>
void count(const T* tokens, int64_t n, int64_t vocab_size, int64_t ignore_index, const CountTable& totals,
           int64_t parts) {
  Rejected rejected;
  if (0 <= ignore_index && ignore_index < vocab_size) {
    // Counted with the rest, and subtracted again.
    int64_t* const count = totals.counts + ignore_index;
    const int64_t before = *count;
    count_parts<false>(tokens, n, vocab_size, ignore_index, totals.counts, rejected, parts);
    *totals.ignored += *count - before;
    *count = before;
  } else if (static_cast<int64_t>(static_cast<T>(ignore_index)) == ignore_index) {
    count_parts<true>(tokens, n, vocab_size, ignore_index, totals.counts, rejected, parts);
  } else {
    count_parts<false>(tokens, n, vocab_size, ignore_index, totals.counts, rejected, parts);
  }
  *totals.ignored += *rejected.ignored();
  *totals.out_of_range += *rejected.out_of_range();
  *totals.seen += n;
}

void count_tokens_(Tensor counts, Tensor ignored, Tensor out_of_range, Tensor seen, Tensor tokens, int64_t ignore_index,
                   bool strict, bool alone) {
  const CountTable totals = checked_table(counts, ignored, out_of_range, seen, tokens);
  dispatch_tokens(tokens, [&](const auto* ids) {
    if (strict) check_ids("tokens", ids, tokens.numel(), counts.size(0), ignore_index);
    if (alone) return count(ids, tokens.numel(), counts.size(0), ignore_index, totals, 1);
    const std::lock_guard<std::mutex> lock(turn_of(totals.counts));
    count(ids, tokens.numel(), counts.size(0), ignore_index, totals, torch::stable::get_num_threads());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pdl_ext, CPU, m) {
  m.impl("count_tokens_", TORCH_BOX(&count_tokens_));
}

}  // namespace pdl::cpu
