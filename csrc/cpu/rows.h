// The rows of a batch for the CPU's loops of the loss, and the work of each loop on its share of a row.
//
// A row is divided into tiles, which stay in L1 between their passes, and tiles form segments. Threads take rows, or
// segments of them if there are fewer rows than threads. A row's statistics are those of its segments, merged in order.
// The division depends on V alone. Each exponential is relative to its tile, whichever thread computes it. So a row's
// loss and gradient have the same bits for any other rows and any number of threads, and by one call or two.
#pragma once

#include <limits>
#include <type_traits>

#include "../loss_arguments.h"
#include "blocks.h"
#include "float16.h"
#include "simd.h"

namespace pdl::cpu {

// The number of bytes by which a tile is prefetched. Under load memory answers after some thousand cycles. While
// exponentials are also stored, the processor itself does not prefetch that far.
constexpr int64_t kBytesAhead = 16384;

// Each tile drains the pipeline, which costs plain 16-bit floats most.
template <bool kPlain, typename T>
constexpr int64_t kTile = kPlain && sizeof(T) == 2 ? 4096 : 1024;

template <typename T>
constexpr bool kIsBFloat16 = std::is_same_v<T, BFloat16>;

template <typename T>
struct Logits {
  const T* data;
  int64_t row_stride;
  int64_t rows;
  int64_t vocab_size;

  explicit Logits(const Tensor& logits)
      : data(static_cast<const T*>(logits.const_data_ptr())),
        row_stride(logits.stride(0)),
        rows(logits.size(0)),
        vocab_size(logits.size(1)) {}

  PDL_INLINE const T* row(int64_t i) const { return data + i * row_stride; }
};

// A multiple of every tile.
constexpr int64_t kSegment = 8192;

// Share s is the columns of row(s) from first(s) to before last(s): all, or a segment if there are fewer rows than
// threads.
struct Shares {
  int64_t rows;
  int64_t vocab_size;
  int64_t of_row = 1;
  int64_t size;

  Shares(int64_t rows, int64_t vocab_size) : rows(rows), vocab_size(vocab_size), size(vocab_size) {
    if (rows >= torch::stable::get_num_threads()) return;
    of_row = (vocab_size + kSegment - 1) / kSegment;
    size = kSegment;
  }

  int64_t count() const { return rows * of_row; }
  int64_t row(int64_t s) const { return s / of_row; }
  int64_t first(int64_t s) const { return std::min(s % of_row * size, vocab_size); }
  int64_t last(int64_t s) const { return std::min(first(s) + size, vocab_size); }
};

// In two halves at once, since each comparison waits for the previous one.
template <typename T>
PDL_INLINE Accumulator<T> largest(const T* x, int64_t n) {
  const int64_t half = n / 2;
  if constexpr (sizeof(T) == 2) {
    // Interpreted as integers, numbers that are not negative keep their order, and negative numbers are in reverse
    // order.
    int16_t top = std::numeric_limits<int16_t>::min(), bottom = std::numeric_limits<int16_t>::max();
    int16_t other_top = top, other_bottom = bottom;
#pragma omp simd reduction(max : top, other_top) reduction(min : bottom, other_bottom)
    for (int64_t j = 0; j < half; ++j) {
      const int16_t bits = int16_t(x[j].bits), other = int16_t(x[half + j].bits);
      top = bits > top ? bits : top;
      bottom = bits < bottom ? bits : bottom;
      other_top = other > other_top ? other : other_top;
      other_bottom = other < other_bottom ? other : other_bottom;
    }
    if (n % 2 != 0) {
      top = std::max(top, int16_t(x[n - 1].bits));
      bottom = std::min(bottom, int16_t(x[n - 1].bits));
    }
    top = std::max(top, other_top);
    bottom = std::min(bottom, other_bottom);
    const Accumulator<T> candidate = widen(T{uint16_t(top >= 0 ? top : bottom)});
    if (candidate == candidate) return candidate;
    int16_t max = order(narrow<T>(-infinity<float>()));
#pragma omp simd reduction(max : max)
    for (int64_t j = 0; j < n; ++j) {
      const int16_t key = order(x[j]);
      max = key > max ? key : max;
    }
    return widen(of_order<T>(max));
  } else {
    T max = -infinity<T>(), other_max = max;
#pragma omp simd reduction(max : max, other_max)
    for (int64_t j = 0; j < half; ++j) {
      max = x[j] > max ? x[j] : max;
      other_max = x[half + j] > other_max ? x[half + j] : other_max;
    }
    if (n % 2 != 0) max = x[n - 1] > max ? x[n - 1] : max;
    return other_max > max ? other_max : max;
  }
}

// The first position of a value that occurs among n numbers; whole blocks are searched at once.
template <typename T>
PDL_INLINE int64_t place_of(const T* x, int64_t n, Accumulator<T> sought) {
  constexpr int64_t kAtOnce = 64;
  int64_t j = 0;
  for (int found = 0; j + kAtOnce <= n; j += kAtOnce) {
#pragma omp simd reduction(| : found)
    for (int64_t k = 0; k < kAtOnce; ++k) found |= widen(x[j + k]) == sought;
    if (found) break;
  }
  while (widen(x[j]) != sought) ++j;
  return j;
}

// z of the n columns from first on, as numbers to be widened: in `buffer`, or in memory if the transform is plain. If
// max is not null it receives the largest of them.
template <bool kPlain, typename T, typename A>
PDL_INLINE auto load_tile(const T* x, int64_t first, int64_t n, const LogitTransform<A>& transform, A* buffer,
                          A* max = nullptr) {
  if constexpr (kPlain) {
    if (max != nullptr) *max = largest(x + first, n);
    return x + first;
  } else {
    // A loop with a check for an offset in each iteration is not vectorised.
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) buffer[j] = transform.without_offset(widen(x[first + j]));
    if (transform.offset != nullptr) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) buffer[j] += A(transform.offset[first + j]);
    }
    if (max != nullptr) *max = largest(buffer, n);
    return static_cast<const A*>(buffer);
  }
}

// The sum of exp(z - max), where max is the largest z; with kEntropy also that of exp(z - max) (z - max) in `scaled`.
// With kKeep also each exp(z - *origin) in `kept`, which may be z. If z is in memory, it also prefetches ahead.
// Prefetching past the logits' end is harmless.
template <bool kKeep, bool kEntropy, bool kInMemory, Capability kCapability, typename T, typename A>
PDL_INLINE A sum_exponentials(Instructions<kCapability> instructions, const T* z, int64_t n, A max, A* kept, A* origin,
                              A* scaled) {
  const A shift = exp_shift(max);
  int64_t j = 0;
  A at_max = 1;
  // In double: where the largest term dominates, the gradient at the target is the small remainder.
  double total = 0, total_scaled = 0;
  if (kKeep) *origin = shift;
  if constexpr (sizeof(T) == 2 || (sizeof(T) == 4 && kCapability >= Capability::avx2)) {
    constexpr int64_t kPart = sizeof(T) == 2 ? kTile<true, T> : 512, kAhead = kInMemory ? kBytesAhead / sizeof(T) : 0;
    const ExpOrigin<kCapability, T> block_origin(shift);
    if (block_origin.in_blocks()) {
      at_max = block_origin.at_max;
      if (kKeep) *origin = block_origin.value;
      const int64_t blocks = n / kBlock * kBlock;
      for (int64_t end; j < blocks; j = end) {
        end = std::min(j + kPart, blocks);
        A part_scaled = 0;
        const A part = sum_of_exp_blocks<kKeep, kEntropy>(instructions, z + j, end - j, block_origin,
                                                          kKeep ? kept + j : nullptr, kAhead, &part_scaled);
        total += part / at_max;
        total_scaled += part_scaled / at_max;
      }
    }
  }
  constexpr int64_t kPart = 128, kLine = 64 / sizeof(T);
  for (int64_t end; j < n; j = end) {
    end = std::min(j + kPart, n);
    if constexpr (kInMemory) {
      for (int64_t k = j; k < end; k += kLine) __builtin_prefetch(z + k + kBytesAhead / sizeof(T));
    }
    A part = 0, part_scaled = 0;
#pragma omp simd reduction(+ : part, part_scaled)
    for (int64_t k = j; k < end; ++k) {
      const A below = widen(z[k]) - shift;
      const A e = exp_nonpositive(below);
      if (kKeep) kept[k] = e * at_max;
      part += e;
      if (kEntropy) part_scaled += e * finite_log_ratio(below);
    }
    total += part;
    total_scaled += part_scaled;
  }
  if (kEntropy) *scaled = A(total_scaled);
  return A(total);
}

// The statistics of the columns from begin to before end. With kKeep also exp(z - its tile's origin) of each element in
// `kept`, and those origins in `tile_origin`; `kept` may be x.
template <Loop kLoop, bool kKeep, Capability kCapability, typename T, typename A>
PDL_INLINE StatisticsOf<kLoop, A> segment_statistics(Instructions<kCapability> instructions, const T* x, int64_t begin,
                                                     int64_t end, const LogitTransform<A>& transform,
                                                     const ClassWeights<A>& weights, A centre, bool predict,
                                                     A* kept = nullptr, A* tile_origin = nullptr) {
  constexpr int64_t kWidth = kTile<kIsPlain<kLoop>, T>;
  constexpr bool kEntropy = kLoop != Loop::plain;
  alignas(64) A buffer[kWidth];
  StatisticsOf<kLoop, A> segment;
  for (int64_t first = begin; first < end; first += kWidth) {
    const int64_t n = std::min(kWidth, end - first);
    A max;
    const auto* z = load_tile<kIsPlain<kLoop>>(x, first, n, transform, buffer, &max);
    StatisticsOf<kLoop, A> tile;
    tile.max = max;
    if constexpr (kLoop != Loop::plain) {
      if (predict && max > segment.max) tile.argmax = int32_t(first + place_of(z, n, max));
    }
    A scaled = 0;
    tile.sum =
        sum_exponentials<kKeep, kEntropy, kIsPlain<kLoop>>(instructions, z, n, max, kKeep ? kept + first : nullptr,
                                                           kKeep ? tile_origin + first / kWidth : nullptr, &scaled);
    if constexpr (kEntropy) tile.scaled = scaled;
    if constexpr (!kIsPlain<kLoop>) {
      A centred = 0, class_weight = 0;
      if (weights.of_class != nullptr) {
#pragma omp simd reduction(+ : centred, class_weight)
        for (int64_t j = 0; j < n; ++j) {
          const A weight = weights.at(first + j);
          centred += ClassWeights<A>::times(weight, z[j] - centre);
          class_weight += weight;
        }
      } else {
#pragma omp simd reduction(+ : centred)
        for (int64_t j = 0; j < n; ++j) centred += z[j] - centre;
      }
      tile.centred = centred;
      tile.class_weight = class_weight;
    }
    segment = merge(segment, tile);
  }
  return segment;
}

// The statistics of a whole row.
template <Loop kLoop, bool kKeep, Capability kCapability, typename T, typename A>
PDL_INLINE StatisticsOf<kLoop, A> row_statistics(Instructions<kCapability> instructions, const T* x, int64_t vocab_size,
                                                 const LogitTransform<A>& transform, const ClassWeights<A>& weights,
                                                 A centre, bool predict, A* kept = nullptr, A* tile_origin = nullptr) {
  StatisticsOf<kLoop, A> row;
  for (int64_t first = 0; first < vocab_size; first += kSegment) {
    row = merge(row, segment_statistics<kLoop, kKeep>(instructions, x, first, std::min(first + kSegment, vocab_size),
                                                      transform, weights, centre, predict, kept, tile_origin));
  }
  return row;
}

// run(f), where f(j) is the weight of class j. If all weights are 1, it has a loop of its own.
template <typename A, typename Run>
PDL_INLINE void for_classes(const ClassWeights<A>& weights, Run run) {
  if (weights.of_class != nullptr) return run([&](int64_t j) { return A(weights.of_class[j]); });
  run([](int64_t) { return A(1); });
}

// The gradient of the n columns from first on, a tile whose exponentials are in `kept`. The target's element is
// computed separately.
template <bool kPlain, Capability kCapability, typename T, typename A>
PDL_INLINE void tile_gradient(Instructions<kCapability> instructions, const T* x, const A* kept, A origin, T* gradient,
                              int64_t first, int64_t n, const LogitTransform<A>& transform,
                              const ClassWeights<A>& weights, const GradientRow<A>& row, bool streamed) {
  const GradientRow<A> of_tile = row.relative_to(origin);
  T* const y = gradient + first;
  if constexpr (kPlain) {
    const auto element = [&](A e, int64_t) { return of_tile.off_target_of(e); };
    const int64_t begin = streamed ? std::min(before_line(y), n) : 0;
    const int64_t end = begin + scale_blocks(instructions, kept + begin, of_tile.a_largest, of_tile.b_smoothed,
                                             y + begin, n - begin, streamed);
    if (end > begin) map<kPlain>(instructions, kept, y, begin, element);
    const int64_t rest = end > begin ? end : 0;
    map<kPlain>(instructions, kept + rest, y + rest, n - rest, element, streamed);
  } else {
    for_classes(weights, [&](auto class_weight) {
      const auto element = [&](A e, int64_t j) {
        return of_tile.off_target_of(e, class_weight(first + j)) * transform.derivative(widen(x[first + j]));
      };
      map<kPlain>(instructions, kept, y, n, element, streamed);
    });
  }
}

template <bool kPlain, typename T, typename A>
PDL_INLINE T target_gradient(A x, A z, const LogitTransform<A>& transform, const GradientRow<A>& row) {
  return narrow<T>(row.at_target(z) * (kPlain ? A(1) : transform.derivative(x)));
}

// From the rows to the loss: each row's term or their sum, and the factors that the gradient needs.
template <typename A>
void reduce(const A* saved_rows, int64_t n, const LossInputs& inputs, A upstream, A* factors, A* loss) {
  const Targets targets = inputs.ids();
  const A* row_weight = data_or_null<A>(inputs.row_weight);
  const LossOptions& options = inputs.options;
  const auto row_options = RowOptions<A>::of(options, 0);
  const auto weight_of = [&](int64_t i) { return row_weight != nullptr ? row_weight[i] : A(1); };
  RowSums sums;
  for (int64_t i = 0; i < n; ++i) {
    if (targets[i] == options.ignore_index) continue;
    const auto row = SavedRow<A>::load(saved_rows, n, i);
    sums.add(row.token_weight, weight_of(i), row.modulated_ce(), row.lse(), row.modulation);
  }
  auto found = factors_of(options.reduction, sums, data_or_null<A>(inputs.normalizer), options.modulation_normalize);
  found.upstream = upstream;
  found.template as<A>().store(factors);
  if (options.reduction != Reduction::none) {
    *loss = A(reduced_loss(sums, found, options.z_loss));
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const auto row = SavedRow<A>::load(saved_rows, n, i);
    const A term = row_term(weight_of(i) * A(found.weighted), row.modulated_ce(), row.lse(), row_options);
    loss[i] = targets[i] != options.ignore_index ? term : A(0);
  }
}

// The arguments that both kinds of forward pass need.
template <typename T>
struct Forward {
  using A = Accumulator<T>;

  const LossInputs& inputs;
  Logits<T> logits;
  Targets targets;
  int64_t ignore_index;
  TokenWeights<A> token_weights;
  const A* row_weight;
  RowOptions<A> options;
  LogitTransform<A> transform;
  ClassWeights<A> class_weights;
  A* saved_rows;
  int64_t* predicted;
  A* factors;
  A* loss;

  Forward(const Tensor& logits_tensor, const LossInputs& inputs, bool stats, const LossOutputs& outputs)
      : inputs(inputs),
        logits(logits_tensor),
        targets(inputs.ids()),
        ignore_index(inputs.options.ignore_index),
        token_weights(inputs.token_weights<A>()),
        row_weight(data_or_null<A>(inputs.row_weight)),
        options(RowOptions<A>::of(inputs.options, logits.vocab_size)),
        transform(inputs.transform<A>()),
        class_weights(inputs.class_weights<A>()),
        saved_rows(static_cast<A*>(outputs.saved_rows.mutable_data_ptr())),
        predicted(stats ? static_cast<int64_t*>(outputs.predicted.mutable_data_ptr()) : nullptr),
        factors(static_cast<A*>(outputs.factors.mutable_data_ptr())),
        loss(static_cast<A*>(outputs.loss.mutable_data_ptr())) {}

  PDL_INLINE A row_weight_at(int64_t i) const { return row_weight != nullptr ? row_weight[i] : A(1); }

  // The factors of the gradient, which do not depend on logits.
  Factors<A> factors_ahead(A upstream) const {
    RowSums sums;
    for (int64_t i = 0; i < logits.rows; ++i) {
      if (targets[i] != ignore_index) sums.add_weight(token_weights.at(i, targets[i]), row_weight_at(i));
    }
    auto found = factors_of(inputs.options.reduction, sums, data_or_null<A>(inputs.normalizer), false).template as<A>();
    found.upstream = upstream;
    return found;
  }

  PDL_INLINE A z_of(const T* x, int64_t j) const { return transform.apply(widen(x[j]), j); }

  template <typename Statistics>
  PDL_INLINE SavedRow<A> finish_row(int64_t i, const Statistics& statistics, A z_target) const {
    const auto row = row_loss(statistics, z_target, token_weights.at(i, targets[i]), options);
    row.store(saved_rows, logits.rows, i);
    if (predicted != nullptr) predicted[i] = argmax_of(statistics);
    return row;
  }

  PDL_INLINE void ignore_row(int64_t i) const {
    SavedRow<A>::filled(0).store(saved_rows, logits.rows, i);
    if (predicted != nullptr) predicted[i] = -1;
  }

  void finish(A upstream) const { reduce(saved_rows, logits.rows, inputs, upstream, factors, loss); }
};

// The number in memory, or 1.
template <typename T>
Accumulator<T> upstream_of(const OptionalTensor& upstream, const Forward<T>&) {
  return upstream ? *data_or_null<Accumulator<T>>(upstream) : Accumulator<T>(1);
}

}  // namespace pdl::cpu
