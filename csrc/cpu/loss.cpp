// Weighted cross-entropy on the CPU.
//
// Forward fuses the logit transform, the row's statistics, its weight and the reduction; backward the softmax, the
// gradient and the transform's derivative. A row is cut into tiles, which stay in L1 between their passes. So memory is
// read once forward, and read and written once backward. loss_and_gradient_ does both at once, and memory is read and
// written once. Each exponential, computed once, waits for the row's sum in the gradient itself. Where the gradient has
// another type it waits in a buffer of V numbers a thread, which L2 holds. Threads take rows, or shares of them if
// there are fewer rows than threads.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "../loss_arguments.h"
#include "blocks.h"
#include "check_ids.h"
#include "float16.h"
#include "huge_pages.h"
#include "simd.h"

namespace pdl::cpu {
namespace {

// Each tile drains the pipeline, which plain 16-bit floats feel most.
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

// Cuts rows into shares where there are fewer of them than threads: share s is columns [first(s), last(s)) of row(s).
struct Shares {
  int64_t rows;
  int64_t vocab_size;
  int64_t of_row = 1;
  int64_t size;

  Shares(int64_t rows, int64_t vocab_size) : rows(rows), vocab_size(vocab_size) {
    constexpr int64_t kUnit = 1024, kLeast = 8 * kUnit;
    const int64_t threads = torch::stable::get_num_threads();
    if (rows > 0 && rows < threads) {
      of_row = std::max<int64_t>(1, std::min((threads + rows - 1) / rows, vocab_size / kLeast));
    }
    const int64_t units = (vocab_size + kUnit - 1) / kUnit;
    size = (units + of_row - 1) / of_row * kUnit;
  }

  int64_t count() const { return rows * of_row; }
  int64_t row(int64_t s) const { return s / of_row; }
  int64_t first(int64_t s) const { return std::min(s % of_row * size, vocab_size); }
  int64_t last(int64_t s) const { return std::min(first(s) + size, vocab_size); }
};

template <typename T>
PDL_INLINE Accumulator<T> largest(const T* x, int64_t n) {
  if constexpr (sizeof(T) == 2) {
    // The integers of numbers that are not negative ascend with them, those of negative ones descend.
    int16_t top = std::numeric_limits<int16_t>::min(), bottom = std::numeric_limits<int16_t>::max();
#pragma omp simd reduction(max : top) reduction(min : bottom)
    for (int64_t j = 0; j < n; ++j) {
      const int16_t bits = int16_t(x[j].bits);
      top = bits > top ? bits : top;
      bottom = bits < bottom ? bits : bottom;
    }
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
    T max = -infinity<T>();
#pragma omp simd reduction(max : max)
    for (int64_t j = 0; j < n; ++j) max = x[j] > max ? x[j] : max;
    return max;
  }
}

// The first place of what is among n numbers; blocks of them are looked through at once.
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

// z of [first, first + n) as numbers to be widened: in `buffer`, unless it is what lies in memory. The largest of them
// where asked for.
template <bool kPlain, typename T, typename A>
PDL_INLINE auto load_tile(const T* x, int64_t first, int64_t n, const LogitTransform<A>& transform, A* buffer,
                          A* max = nullptr) {
  if constexpr (kPlain) {
    if (max != nullptr) *max = largest(x + first, n);
    return x + first;
  } else {
    // A loop that asks each time whether there is an offset is no vector code.
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
// With kKeep also each exp(z - *origin) in `kept`.
template <bool kKeep, bool kEntropy, Capability kCapability, typename T, typename A>
PDL_INLINE A sum_exponentials(Instructions<kCapability> instructions, const T* z, int64_t n, A max, A* kept, A* origin,
                              A* scaled) {
  const A shift = exp_shift(max);
  int64_t j = 0;
  A sum = 0, sum_of_scaled = 0, at_max = 1;
  if (kKeep) *origin = shift;
  if constexpr (sizeof(T) == 2) {
    const ExpOrigin<kCapability> block_origin(shift);
    if (block_origin.in_blocks()) {
      j = n / kBlock * kBlock;
      at_max = block_origin.at_max;
      sum = sum_of_exp_blocks<kKeep, kEntropy>(instructions, z, j, block_origin, kept, kTile<true, T>, &sum_of_scaled) /
            at_max;
      sum_of_scaled /= at_max;
      if (kKeep) *origin = block_origin.value;
    }
  }
#pragma omp simd reduction(+ : sum, sum_of_scaled)
  for (int64_t k = j; k < n; ++k) {
    const A below = widen(z[k]) - shift;
    const A e = exp_nonpositive(below);
    if (kKeep) kept[k] = e * at_max;
    sum += e;
    if (kEntropy) sum_of_scaled += e * finite_log_ratio(below);
  }
  if (kEntropy) *scaled = sum_of_scaled;
  return sum;
}

// Of columns [begin, end). With kKeep also exp(z - its tile's origin) of each element in `kept`, and those origins in
// `tile_origin`; `kept` may be x.
template <Loop kLoop, bool kKeep, Capability kCapability, typename T, typename A>
PDL_INLINE StatisticsOf<kLoop, A> row_statistics(Instructions<kCapability> instructions, const T* x, int64_t begin,
                                                 int64_t end, const LogitTransform<A>& transform,
                                                 const ClassWeights<A>& weights, A centre, bool predict,
                                                 A* kept = nullptr, A* tile_origin = nullptr) {
  constexpr int64_t kWidth = kTile<kIsPlain<kLoop>, T>;
  constexpr bool kEntropy = kLoop != Loop::plain;
  alignas(64) A buffer[kWidth];
  StatisticsOf<kLoop, A> row;
  for (int64_t first = begin; first < end; first += kWidth) {
    const int64_t n = std::min(kWidth, end - first);
    A max;
    const auto* z = load_tile<kIsPlain<kLoop>>(x, first, n, transform, buffer, &max);
    StatisticsOf<kLoop, A> tile;
    tile.max = max;
    if (kLoop != Loop::plain && predict && max > row.max) tile.argmax = int32_t(first + place_of(z, n, max));
    A scaled = 0;
    tile.sum = sum_exponentials<kKeep, kEntropy>(instructions, z, n, max, kKeep ? kept + first : nullptr,
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
    row = merge(row, tile);
  }
  return row;
}

// run(f), where f(j) is the weight of class j: of 1 for all it makes a loop of its own.
template <bool kPlain, typename A, typename Run>
PDL_INLINE void for_classes(const ClassWeights<A>& weights, Run run) {
  if constexpr (!kPlain) {
    if (weights.of_class != nullptr) return run([&](int64_t j) { return A(weights.of_class[j]); });
  }
  run([](int64_t) { return A(1); });
}

// Of columns [begin, end).
template <bool kPlain, Capability kCapability, typename T, typename A>
PDL_INLINE void row_gradient(Instructions<kCapability> instructions, const T* x, T* gradient, int64_t begin,
                             int64_t end, int64_t target, const LogitTransform<A>& transform,
                             const ClassWeights<A>& weights, const GradientRow<A>& row) {
  const bool has_target = target >= begin && target < end;
  // Read before the loop, which may be writing over x.
  const A x_target = has_target ? A(widen(x[target])) : A(0);
  alignas(64) A buffer[kTile<kPlain, T>];
  for (int64_t first = begin; first < end; first += kTile<kPlain, T>) {
    const int64_t n = std::min(kTile<kPlain, T>, end - first);
    const auto* z = load_tile<kPlain>(x, first, n, transform, buffer);
    const auto log_ratio = [&](A z) { return row.log_ratio(z); };
    for_classes<kPlain>(weights, [&](auto class_weight) {
      map_exp<kPlain>(instructions, z, gradient + first, n, log_ratio, [&](A ratio, int64_t j) {
        const A g = row.off_target_of(ratio, class_weight(first + j));
        return kPlain ? g : g * transform.derivative(widen(x[first + j]));
      });
    });
  }
  if (!has_target) return;
  const A z_target = kPlain ? x_target : transform.apply(x_target, target);
  gradient[target] = narrow<T>(row.at_target(z_target) * (kPlain ? A(1) : transform.derivative(x_target)));
}

// The gradient from what row_statistics kept; kept and gradient may be one.
template <bool kPlain, Capability kCapability, typename T, typename A>
PDL_INLINE void row_gradient_of_kept(Instructions<kCapability> instructions, const T* x, const A* kept,
                                     const A* tile_origin, T* gradient, int64_t vocab_size,
                                     const LogitTransform<A>& transform, const ClassWeights<A>& weights,
                                     const GradientRow<A>& row) {
  for (int64_t first = 0; first < vocab_size; first += kTile<kPlain, T>) {
    const int64_t n = std::min(kTile<kPlain, T>, vocab_size - first);
    const GradientRow<A> of_tile = row.relative_to(tile_origin[first / kTile<kPlain, T>]);
    for_classes<kPlain>(weights, [&](auto class_weight) {
      map<kPlain>(instructions, kept + first, gradient + first, n, [&](A e, int64_t j) {
        const A g = of_tile.off_target_of(e, class_weight(first + j));
        return kPlain ? g : g * transform.derivative(widen(x[first + j]));
      });
    });
  }
}

// From the rows to the loss: each row's term or their sum, and the factors that the gradient needs.
template <typename A>
void reduce(const A* saved_rows, int64_t n, const LossInputs& inputs, A* factors, A* loss) {
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
  const auto found =
      factors_of(options.reduction, sums, data_or_null<A>(inputs.normalizer), options.modulation_normalize);
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

// What both ways of a forward pass need of their arguments.
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

  // The factors of the gradient, which need no logits.
  Factors<A> factors_ahead() const {
    RowSums sums;
    for (int64_t i = 0; i < logits.rows; ++i) {
      if (targets[i] != ignore_index) sums.add_weight(token_weights.at(i, targets[i]), row_weight_at(i));
    }
    return factors_of(inputs.options.reduction, sums, data_or_null<A>(inputs.normalizer), false).template as<A>();
  }

  PDL_INLINE A z_of(const T* x, int64_t j) const { return transform.apply(widen(x[j]), j); }

  template <typename Statistics>
  PDL_INLINE SavedRow<A> finish_row(int64_t i, const Statistics& statistics, A z_target) const {
    const auto row = row_loss(statistics, z_target, token_weights.at(i, targets[i]), options);
    row.store(saved_rows, logits.rows, i);
    if (predicted != nullptr) predicted[i] = statistics.argmax;
    return row;
  }

  PDL_INLINE void ignore_row(int64_t i) const {
    SavedRow<A>::filled(0).store(saved_rows, logits.rows, i);
    if (predicted != nullptr) predicted[i] = -1;
  }

  void finish() const { reduce(saved_rows, logits.rows, inputs, factors, loss); }
};

template <Loop kLoop, typename T>
void forward(const Forward<T>& call) {
  using A = Accumulator<T>;
  const Shares shares(call.logits.rows, call.logits.vocab_size);
  std::vector<StatisticsOf<kLoop, A>> of_share(shares.of_row > 1 ? shares.count() : 0);
  simd_parallel_for(shares.count(), shares.size, [&](int64_t begin, int64_t end, auto instructions) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t i = shares.row(s), target = call.targets[i];
      if (target == call.ignore_index) {
        if (shares.of_row == 1) call.ignore_row(i);
        continue;
      }
      const T* x = call.logits.row(i);
      const A z_target = call.z_of(x, target);
      const auto statistics =
          row_statistics<kLoop, false>(instructions, x, shares.first(s), shares.last(s), call.transform,
                                       call.class_weights, smoothing_centre(z_target), call.predicted != nullptr);
      if (shares.of_row == 1) {
        call.finish_row(i, statistics, z_target);
      } else {
        of_share[s] = statistics;
      }
    }
  });
  if (shares.of_row > 1) {
    for (int64_t i = 0; i < shares.rows; ++i) {
      if (call.targets[i] == call.ignore_index) {
        call.ignore_row(i);
        continue;
      }
      StatisticsOf<kLoop, A> row;
      for (int64_t s = i * shares.of_row; s < (i + 1) * shares.of_row; ++s) row = merge(row, of_share[s]);
      call.finish_row(i, row, call.z_of(call.logits.row(i), call.targets[i]));
    }
  }
  call.finish();
}

template <Loop kLoop, typename T>
void forward_with_gradient(const Forward<T>& call, T* gradients, int64_t gradient_stride) {
  using A = Accumulator<T>;
  constexpr bool kPlain = kIsPlain<kLoop>;
  // The transform's derivative needs the logits once more, so they must not be overwritten yet.
  constexpr bool kKeepInGradient = kPlain && std::is_same_v<T, A>;
  const int64_t vocab_size = call.logits.vocab_size;
  const Factors<A> factors = call.factors_ahead();
  simd_parallel_for<kIsBFloat16<T>>(call.logits.rows, vocab_size, [&](int64_t begin, int64_t end, auto instructions) {
    std::vector<A> tile_origin((vocab_size + kTile<kPlain, T> - 1) / kTile<kPlain, T>);
    const std::unique_ptr<A[]> buffer(kKeepInGradient ? nullptr : new A[vocab_size]);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t target = call.targets[i];
      T* gradient = gradients + i * gradient_stride;
      if (target == call.ignore_index) {
        call.ignore_row(i);
        std::fill_n(gradient, vocab_size, narrow<T>(A(0)));
        continue;
      }
      const T* x = call.logits.row(i);
      const A x_target = widen(x[target]);
      const A z_target = call.z_of(x, target);
      A* kept;
      if constexpr (kKeepInGradient) {
        kept = gradient;
      } else {
        kept = buffer.get();
      }
      const auto statistics =
          row_statistics<kLoop, true>(instructions, x, 0, vocab_size, call.transform, call.class_weights,
                                      smoothing_centre(z_target), call.predicted != nullptr, kept, tile_origin.data());
      const auto saved = call.finish_row(i, statistics, z_target);
      const auto row = gradient_row(saved, call.row_weight_at(i), A(1) / statistics.sum, A(1), factors, call.options);
      row_gradient_of_kept<kPlain>(instructions, x, kept, tile_origin.data(), gradient, vocab_size, call.transform,
                                   call.class_weights, row);
      gradient[target] = narrow<T>(row.at_target(z_target) * (kPlain ? A(1) : call.transform.derivative(x_target)));
    }
  });
  call.finish();
}

// Without grad_loss that of a scalar reduction is 1.
template <bool kPlain, typename T>
void backward(const OptionalTensor& grad_loss, const Tensor& logits_tensor, const LossInputs& inputs,
              const Tensor& saved_rows_tensor, const Tensor& factors_tensor, const VocabularyShard& shard,
              const Tensor& grad_logits) {
  using A = Accumulator<T>;
  const Logits<T> logits(logits_tensor);
  const Targets targets = inputs.ids();
  const auto transform = inputs.transform<A>();
  const auto class_weights = inputs.class_weights<A>();
  const auto options = RowOptions<A>::of(inputs.options, shard.vocab_size);
  const bool of_rows = inputs.options.reduction == Reduction::none && logits.rows > 0;
  const A* upstream = data_or_null<A>(grad_loss);
  const int64_t upstream_stride = of_rows ? grad_loss->stride(0) : 0;
  const A* saved_rows = static_cast<const A*>(saved_rows_tensor.const_data_ptr());
  const auto factors = Factors<A>::load(static_cast<const A*>(factors_tensor.const_data_ptr()));
  const A* row_weight = data_or_null<A>(inputs.row_weight);
  T* gradients = static_cast<T*>(grad_logits.mutable_data_ptr());
  const int64_t gradient_stride = grad_logits.stride(0), ignore_index = inputs.options.ignore_index;

  const Shares shares(logits.rows, logits.vocab_size);
  simd_parallel_for<kIsBFloat16<T>>(shares.count(), shares.size, [&](int64_t begin, int64_t end, auto instructions) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t i = shares.row(s), first = shares.first(s), last = shares.last(s);
      T* gradient = gradients + i * gradient_stride;
      const int64_t target = targets[i];
      if (target < 0 || target >= shard.vocab_size || target == ignore_index) {
        std::fill(gradient + first, gradient + last, narrow<T>(target == ignore_index ? A(0) : not_a_number<A>()));
        continue;
      }
      const auto saved = SavedRow<A>::load(saved_rows, logits.rows, i);
      const A weight = row_weight != nullptr ? row_weight[i] : A(1);
      const A grad = upstream != nullptr ? upstream[i * upstream_stride] : A(1);
      const auto row = gradient_row(saved, weight, A(exp(-saved.log_sum)), grad, factors, options);
      row_gradient<kPlain>(instructions, logits.row(i), gradient, first, last, target - shard.first_id, transform,
                           class_weights, row);
    }
  });
}

void backward_into(const OptionalTensor& grad_loss, const Tensor& logits, const LossInputs& inputs,
                   const Tensor& saved_rows, const Tensor& factors, const VocabularyShard& shard,
                   const Tensor& grad_logits) {
  check_backward_arguments(logits, inputs, saved_rows, factors, grad_loss, shard);
  dispatch_logits<BFloat16, Float16>(logits, [&]<typename T>(T) {
    const auto run = inputs.is_plain() ? backward<true, T> : backward<false, T>;
    run(grad_loss, logits, inputs, saved_rows, factors, shard, grad_logits);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> loss_forward(Tensor logits, Tensor targets, OptionalTensor token_weight,
                                                        OptionalTensor row_weight, OptionalTensor logit_offset,
                                                        OptionalTensor normalizer, std::vector<double> options,
                                                        bool stats) {
  const LossInputs inputs{.targets = targets,
                          .token_weight = token_weight,
                          .row_weight = row_weight,
                          .logit_offset = logit_offset,
                          .normalizer = normalizer,
                          .options = LossOptions::unpack(options)};
  check_loss_arguments(logits, inputs);
  const LossOutputs outputs = allocate_loss_outputs(logits, inputs.options.reduction, stats);
  dispatch_logits<BFloat16, Float16>(logits, [&]<typename T>(T) {
    const Forward<T> call(logits, inputs, stats, outputs);
    check_ids("targets", call.targets, call.logits.rows, call.logits.vocab_size, call.ignore_index);
    dispatch_loop(inputs.loop(stats), [&]<Loop kLoop>() { forward<kLoop>(call); });
  });
  return {outputs.loss, outputs.saved_rows, outputs.factors, outputs.predicted};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> loss_and_gradient_(Tensor logits, Tensor gradient, Tensor targets,
                                                              OptionalTensor token_weight, OptionalTensor row_weight,
                                                              OptionalTensor logit_offset, OptionalTensor normalizer,
                                                              std::vector<double> options, bool stats) {
  const LossInputs inputs{.targets = targets,
                          .token_weight = token_weight,
                          .row_weight = row_weight,
                          .logit_offset = logit_offset,
                          .normalizer = normalizer,
                          .options = LossOptions::unpack(options)};
  check_loss_arguments(logits, inputs);
  check_gradient(logits, gradient, inputs.options.reduction);
  const LossOutputs outputs = allocate_loss_outputs(logits, inputs.options.reduction, stats);
  dispatch_logits<BFloat16, Float16>(logits, [&]<typename T>(T) {
    const Forward<T> call(logits, inputs, stats, outputs);
    check_ids("targets", call.targets, call.logits.rows, call.logits.vocab_size, call.ignore_index);
    // What a modulation is divided by is known once all rows are.
    if (Shares(call.logits.rows, call.logits.vocab_size).of_row > 1 || inputs.options.modulation_normalize) {
      dispatch_loop(inputs.loop(stats), [&]<Loop kLoop>() { forward<kLoop>(call); });
      backward_into(std::nullopt, logits, inputs, outputs.saved_rows, outputs.factors, {0, call.logits.vocab_size},
                    gradient);
      return;
    }
    T* gradients = static_cast<T*>(gradient.mutable_data_ptr());
    dispatch_loop(inputs.loop(stats),
                  [&]<Loop kLoop>() { forward_with_gradient<kLoop>(call, gradients, gradient.stride(0)); });
  });
  return {outputs.loss, outputs.saved_rows, outputs.factors, outputs.predicted};
}

void scale_(Tensor gradient, Tensor factor) {
  check_scale_arguments(gradient, factor);
  dispatch_logits<BFloat16, Float16>(gradient, [&]<typename T>(T) {
    using A = Accumulator<T>;
    const A by = *static_cast<const A*>(factor.const_data_ptr());
    if (by == A(1)) return;
    T* gradients = static_cast<T*>(gradient.mutable_data_ptr());
    const int64_t stride = gradient.stride(0);
    const Shares shares(gradient.size(0), gradient.size(1));
    simd_parallel_for<kIsBFloat16<T>>(shares.count(), shares.size, [&](int64_t begin, int64_t end, auto instructions) {
      for (int64_t s = begin; s < end; ++s) {
        T* row = gradients + shares.row(s) * stride;
        T* first = row + shares.first(s);
        map<false>(instructions, first, first, shares.last(s) - shares.first(s), [&](A g, int64_t) { return g * by; });
      }
    });
  });
}

Tensor loss_backward(Tensor grad_loss, Tensor logits, Tensor targets, Tensor saved_rows, Tensor factors,
                     OptionalTensor token_weight, OptionalTensor row_weight, OptionalTensor logit_offset,
                     std::vector<double> options, int64_t first_id, int64_t vocab_size) {
  const LossInputs inputs{.targets = targets,
                          .token_weight = token_weight,
                          .row_weight = row_weight,
                          .logit_offset = logit_offset,
                          .options = LossOptions::unpack(options)};
  const Tensor grad_logits = allocate(logits, logits.sizes(), logits.scalar_type());
  prefer_huge_pages(grad_logits.mutable_data_ptr(), grad_logits.numel() * int64_t(grad_logits.element_size()));
  backward_into(grad_loss, logits, inputs, saved_rows, factors, {first_id, vocab_size}, grad_logits);
  return grad_logits;
}

void loss_backward_(Tensor grad_loss, Tensor logits, Tensor targets, Tensor saved_rows, Tensor factors,
                    OptionalTensor token_weight, OptionalTensor row_weight, OptionalTensor logit_offset,
                    std::vector<double> options, int64_t first_id, int64_t vocab_size) {
  const LossInputs inputs{.targets = targets,
                          .token_weight = token_weight,
                          .row_weight = row_weight,
                          .logit_offset = logit_offset,
                          .options = LossOptions::unpack(options)};
  check_rows_apart(logits, "logits");
  backward_into(grad_loss, logits, inputs, saved_rows, factors, {first_id, vocab_size}, logits);
}

void complete_rows_(Tensor saved_rows, std::vector<double> numbers, int64_t vocab_size) {
  const LossOptions options = LossOptions::unpack(numbers);
  check_complete_arguments(saved_rows);
  const auto run = [&]<typename A>(A) {
    A* rows = static_cast<A*>(saved_rows.mutable_data_ptr());
    const int64_t n = saved_rows.size(1);
    for (int64_t i = 0; i < n; ++i) {
      auto row = SavedRow<A>::load(rows, n, i);
      complete_row(row, RowOptions<A>::of(options, vocab_size));
      row.store(rows, n, i);
    }
  };
  saved_rows.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
}

std::tuple<Tensor, Tensor> reduce_rows(Tensor saved_rows, Tensor targets, OptionalTensor row_weight,
                                       OptionalTensor normalizer, std::vector<double> options) {
  const LossInputs inputs{
      .targets = targets, .row_weight = row_weight, .normalizer = normalizer, .options = LossOptions::unpack(options)};
  check_reduce_arguments(saved_rows, inputs);
  const ScalarType dtype = saved_rows.scalar_type();
  const Tensor loss = allocate_loss(saved_rows, targets.numel(), inputs.options.reduction, dtype);
  const Tensor factors = allocate(saved_rows, {Factors<float>::kNumbers}, dtype);
  const auto run = [&]<typename A>(A) {
    reduce(static_cast<const A*>(saved_rows.const_data_ptr()), targets.numel(), inputs,
           static_cast<A*>(factors.mutable_data_ptr()), static_cast<A*>(loss.mutable_data_ptr()));
  };
  dtype == ScalarType::Double ? run(double{}) : run(float{});
  return {loss, factors};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pdl_ext, CPU, m) {
  m.impl("loss_forward", TORCH_BOX(&loss_forward));
  m.impl("loss_and_gradient_", TORCH_BOX(&loss_and_gradient_));
  m.impl("scale_", TORCH_BOX(&scale_));
  m.impl("loss_backward", TORCH_BOX(&loss_backward));
  m.impl("loss_backward_", TORCH_BOX(&loss_backward_));
  m.impl("complete_rows_", TORCH_BOX(&complete_rows_));
  m.impl("reduce_rows", TORCH_BOX(&reduce_rows));
}

}  // namespace pdl::cpu
