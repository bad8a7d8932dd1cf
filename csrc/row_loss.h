// The mathematics of one row, for host and device: the only copy.
//
// A row has logits x_j, which a LogitTransform turns into z_j, a target y, and a weight w. Kernels gather
// RowStatistics over the row in any order and in any number of shares. `row_loss` turns them into the row's losses.
// The row's loss is w m ce, ce = (1 - s) nll + s mean_j (lse - z_j), where m is a modulation of nll with derivative c.
// Every loss of the family has the same gradient:
//
//     d loss / d z_j = A p_j - B_j,    p = softmax(z),    A = w (m + c ce),
//     B_j = w m s / V, and at the target w (m (1 - s) + c ce) more.
//
// `gradient_row` makes these three numbers, and `GradientRow` evaluates the gradient for one element. A new weighting
// or modulation changes a scalar here, never a loop.
#pragma once

#include <type_traits>

#include "loss_options.h"
#include "portable.h"

namespace pdl {

// The options in the accumulator's precision, as a row's mathematics takes them. vocab_size: of the whole vocabulary.
template <typename A>
struct RowOptions {
  template <typename T>
  using Number = std::conditional_t<std::is_same_v<T, double>, A, T>;

#define PDL_OPTION_FIELD(type, name) Number<type> name{};
  PDL_LOSS_OPTIONS(PDL_OPTION_FIELD)
#undef PDL_OPTION_FIELD
  int64_t vocab_size = 0;

  static RowOptions of(const LossOptions& options, int64_t vocab_size) {
    RowOptions result;
#define PDL_OPTION_COPY(type, name) result.name = static_cast<Number<type>>(options.name);
    PDL_LOSS_OPTIONS(PDL_OPTION_COPY)
#undef PDL_OPTION_COPY
    result.vocab_size = vocab_size;
    return result;
  }
};

// z = softcap * tanh(scale * x / softcap) + offset[j]; softcap 0 and offset nullptr stand for their absence.
template <typename A>
struct LogitTransform {
  A scale = 1;
  A softcap = 0;
  const float* offset = nullptr;

  static LogitTransform of(const LossOptions& options, const float* offset) {
    return {A(options.logit_scale), A(options.softcap), offset};
  }

  PDL_INLINE A apply(A x, int64_t j) const {
    A z = scale * x;
    if (softcap != A(0)) z = softcap * hyperbolic_tangent(z / softcap);
    return offset != nullptr ? z + A(offset[j]) : z;
  }

  PDL_INLINE A derivative(A x) const {
    if (softcap == A(0)) return scale;
    // 1 - tanh(u)^2 as 4 e / (1 + e)^2 with e = exp(-2 |u|): near the cap the difference would cancel.
    const A u = scale * x / softcap;
    const A e = exp_nonpositive(A(-2) * (u < A(0) ? -u : u));
    return scale * (A(4) * e / ((A(1) + e) * (A(1) + e)));
  }
};

// Plain rows need neither the sum of z nor a transform, and the kernels have a leaner loop for them.
inline bool is_plain(const LossOptions& options, const float* offset) {
  return options.label_smoothing == 0.0 && options.logit_scale == 1.0 && options.softcap == 0.0 && offset == nullptr;
}

// Of a share of a row: the largest z and its index, sum of exp(z - max), and sum of (z - centre). The centre is one
// number for the whole row. The identity is what a share without elements has.
template <typename A>
struct RowStatistics {
  A max = -infinity<A>();
  A sum = 0;
  A centred = 0;
  int32_t argmax = -1;
};

// What to subtract before exp: a share that is all -inf must give exp(-inf - 0) = 0, not exp(-inf + inf) = NaN.
template <typename A>
PDL_INLINE A exp_shift(A max) {
  return max == -infinity<A>() ? A(0) : max;
}

template <typename A>
PDL_INLINE RowStatistics<A> merge(const RowStatistics<A>& a, const RowStatistics<A>& b) {
  RowStatistics<A> merged;
  const bool take_b = b.max > a.max || (b.max == a.max && uint32_t(b.argmax) < uint32_t(a.argmax));
  merged.max = take_b ? b.max : a.max;
  merged.argmax = take_b ? b.argmax : a.argmax;
  const A shift = exp_shift(merged.max);
  merged.sum = a.sum * (a.max == merged.max ? A(1) : exp_nonpositive(a.max - shift)) +
               b.sum * (b.max == merged.max ? A(1) : exp_nonpositive(b.max - shift));
  merged.centred = a.centred + b.centred;
  return merged;
}

// The target's own z keeps sum_j (z_j - centre) free of cancellation when all logits share a large offset.
template <typename A>
PDL_INLINE A smoothing_centre(A z_target) {
  return z_target == -infinity<A>() ? A(0) : z_target;
}

// What is kept of a row, for its gradient and for the caller: one column of the op's `saved_rows` [kNumbers, rows].
template <typename A>
struct SavedRow {
  A max;
  A log_sum;  // lse - max
  A nll;
  A ce;  // nll with label smoothing
  A token_weight;
  A modulation;

  static constexpr int kNumbers = 6;

  PDL_INLINE A lse() const { return max + log_sum; }
  // Where the modulation is 0 the loss is, also of a target that has no probability.
  PDL_INLINE A modulated_ce() const { return modulation == A(0) ? A(0) : modulation * ce; }

  PDL_INLINE static SavedRow load(const A* saved_rows, int64_t rows, int64_t i) {
    const A* row = saved_rows + i;
    return {row[0], row[rows], row[2 * rows], row[3 * rows], row[4 * rows], row[5 * rows]};
  }
  PDL_INLINE void store(A* saved_rows, int64_t rows, int64_t i) const {
    A* row = saved_rows + i;
    row[0] = max;
    row[rows] = log_sum;
    row[2 * rows] = nll;
    row[3 * rows] = ce;
    row[4 * rows] = token_weight;
    row[5 * rows] = modulation;
  }
  // Of a row without a target in the vocabulary.
  PDL_INLINE static SavedRow filled(A value) { return {value, value, value, value, value, value}; }
};

// A row of which max, log_sum, nll and token_weight are known, and as its ce the mean of lse - z over the vocabulary.
template <typename A>
PDL_INLINE void complete_row(SavedRow<A>& row, const RowOptions<A>& options) {
  const A uniform = row.ce;
  row.ce = row.nll;
  if (options.label_smoothing != A(0)) {
    row.ce = (A(1) - options.label_smoothing) * row.nll + options.label_smoothing * uniform;
  }
  row.modulation = modulation_of(row.nll, options).value;
}

template <typename A>
PDL_INLINE SavedRow<A> row_loss(const RowStatistics<A>& row, A z_target, A token_weight, const RowOptions<A>& options) {
  SavedRow<A> saved;
  saved.max = row.max;
  saved.log_sum = log(row.sum);
  saved.nll = saved.log_sum - (z_target - row.max);
  saved.ce = saved.log_sum - (smoothing_centre(z_target) - row.max) - row.centred / A(options.vocab_size);
  saved.token_weight = token_weight;
  complete_row(saved, options);
  return saved;
}

// One row's term of the loss before any division.
template <typename A>
PDL_INLINE A row_term(A weight, A ce, A lse, const RowOptions<A>& options) {
  return options.z_loss != A(0) ? weight * ce + options.z_loss * lse * lse : weight * ce;
}

// Factors of the weighted term and of the z-loss term, and `correction`. That is the weighted mean where the
// denominator depends on the row weights (reduction "mean"), else 0. So d loss / d row_weight is token_weight * (m ce -
// correction) * weighted. In memory: the op's `factors` [kNumbers].
template <typename A>
struct Factors {
  A weighted;
  A rows;
  A correction;

  static constexpr int kNumbers = 3;

  PDL_INLINE static Factors load(const A* factors) { return {factors[0], factors[1], factors[2]}; }
  PDL_INLINE void store(A* factors) const {
    factors[0] = weighted;
    factors[1] = rows;
    factors[2] = correction;
  }
  template <typename B>
  PDL_INLINE Factors<B> as() const {
    return {B(weighted), B(rows), B(correction)};
  }
};

// 0 stands for 1/0: with nothing left to count the loss is 0 and so is every gradient.
template <typename A>
PDL_INLINE A reciprocal_or_zero(A denominator) {
  return denominator == A(0) ? A(0) : A(1) / denominator;
}

// Sums over the rows that count, in float64: a million rows of float32 would lose the small ones.
struct RowSums {
  double weighted_ce = 0;
  double weight = 0;
  double lse_squares = 0;
  double rows = 0;

  PDL_INLINE void add(double w, double ce, double lse) {
    weighted_ce += w * ce;
    weight += w;
    lse_squares += lse * lse;
    rows += 1;
  }

  PDL_INLINE RowSums operator+(const RowSums& other) const {
    return {weighted_ce + other.weighted_ce, weight + other.weight, lse_squares + other.lse_squares, rows + other.rows};
  }
};

// `normalizer`: the denominators of the weighted term and of the z-loss term, where they are given.
template <typename A>
PDL_INLINE Factors<double> factors_of(Reduction reduction, const RowSums& sums, const A* normalizer) {
  Factors<double> factors{1.0, 1.0, 0.0};
  if (reduction == Reduction::none || reduction == Reduction::sum) return factors;
  if (normalizer != nullptr) {
    factors.weighted = reciprocal_or_zero(double(normalizer[0]));
    factors.rows = reciprocal_or_zero(double(normalizer[1]));
    return factors;
  }
  factors.rows = reciprocal_or_zero(sums.rows);
  factors.weighted = factors.rows;
  if (reduction == Reduction::mean) {
    factors.weighted = reciprocal_or_zero(sums.weight);
    factors.correction = sums.weighted_ce * factors.weighted;
  }
  return factors;
}

PDL_INLINE double reduced_loss(const RowSums& sums, const Factors<double>& factors, double z_loss) {
  const double weighted = sums.weighted_ce * factors.weighted;
  return z_loss != 0.0 ? weighted + z_loss * sums.lse_squares * factors.rows : weighted;
}

// The gradient of one row, element by element, in the accumulator's precision: at the target p_y - q_y is taken
// before anything is rounded to the logits' dtype. Of probabilities it takes ratios to the largest one, exp(z - max):
// exp((z - max) - log_sum) would round twice, the second time a larger number.
template <typename A>
struct GradientRow {
  A max;
  A a_largest;  // A max_j p_j
  A b_uniform;  // B_j off the target
  A b_target;   // and at it

  PDL_INLINE A log_ratio(A z) const { return z - max; }
  // Of a row with a NaN, which is in a_largest, any number will do.
  PDL_INLINE A ratio(A z) const { return exp_compensated(log_ratio(z)); }
  PDL_INLINE A off_target_of(A ratio) const { return a_largest * ratio - b_uniform; }
  // The same row for ratios to exp(origin - max).
  PDL_INLINE GradientRow relative_to(A origin) const {
    GradientRow row = *this;
    row.a_largest *= exp_nonpositive(origin - max);
    return row;
  }
  PDL_INLINE A off_target(A z) const { return off_target_of(ratio(z)); }
  PDL_INLINE A at_target(A z) const { return a_largest * ratio(z) - b_target; }
};

// NaN as narrow_number keeps it, whatever the user's weights had.
template <typename A>
PDL_INLINE A canonical(A x) {
  return x == x ? x : not_a_number<A>();
}

// largest: the probability of the largest logit, 1 / sum or exp(-log_sum). Where all are -inf it has none.
template <typename A>
PDL_INLINE GradientRow<A> gradient_row(const SavedRow<A>& row, A row_weight, A largest, A upstream,
                                       const Factors<A>& factors, const RowOptions<A>& options) {
  const A weighted = upstream * (row.token_weight * row_weight) * factors.weighted;
  A of_ce = weighted, of_modulation = 0;
  if (options.modulation != Modulation::none) {
    of_ce = weighted * row.modulation;
    const A slope = modulation_of(row.nll, options).slope;
    // Where nll is infinite the product is none: its limit is 0.
    of_modulation = slope == A(0) ? A(0) : weighted * (slope * row.ce);
  }
  A of_lse = of_ce + of_modulation;
  if (options.z_loss != A(0)) of_lse += A(2) * upstream * options.z_loss * row.lse() * factors.rows;
  const A a = canonical(of_lse), b = canonical(of_ce), uniform = options.label_smoothing / A(options.vocab_size);
  return {row.max, row.max == -infinity<A>() ? not_a_number<A>() : a * largest, b * uniform,
          b * (A(1) - options.label_smoothing + uniform) + canonical(of_modulation)};
}

}  // namespace pdl
