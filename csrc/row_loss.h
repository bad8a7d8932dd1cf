// The mathematics of one row, for host and device: the only copy.
//
// A row has logits x_j, which a LogitTransform turns into z_j, a target y with a token weight w, and a row weight r.
// Kernels gather statistics over the row in any order and in any number of shares. `row_loss` turns them into the row's
// losses. The row's loss is r m ce, where m is a modulation of nll with derivative c, and
//
//     ce = (1 - s) w nll + s mean_j (u_j (lse - z_j)),    u_j = w, 1, or the weight w_j of class j.
//
// Every loss of the family has the same gradient:
//
//     d loss / d z_j = A p_j - B_j,    p = softmax(z),    A = r (m ((1 - s) w + s mean_j u_j) + c ce),
//     B_j = r m s u_j / V, and at the target r (m (1 - s) w + c ce) more.
//
// `gradient_row` computes these three numbers, and `GradientRow` evaluates the gradient for one element. A new
// weighting or modulation changes a scalar here, never a loop.
#pragma once

#include <type_traits>

#include "loss_options.h"
#include "portable.h"

namespace pdl {

// The options in the accumulator's precision, for the mathematics of a row. vocab_size: of the whole vocabulary.
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

// z = softcap * tanh(scale * x / softcap) + offset[j]. softcap 0 is no softcap, offset nullptr is no offset.
template <typename A>
struct LogitTransform {
  A scale = 1;
  A softcap = 0;
  const float* offset = nullptr;

  static LogitTransform of(const LossOptions& options, const float* offset) {
    return {A(options.logit_scale), A(options.softcap), offset};
  }

  PDL_INLINE A apply(A x, int64_t j) const {
    const A z = without_offset(x);
    return offset != nullptr ? z + A(offset[j]) : z;
  }

  PDL_INLINE A without_offset(A x) const {
    const A z = scale * x;
    return softcap != A(0) ? softcap * hyperbolic_tangent(z / softcap) : z;
  }

  PDL_INLINE A derivative(A x) const {
    if (softcap == A(0)) return scale;
    // 1 - tanh(u)^2 as 4 e / (1 + e)^2 with e = exp(-2 |u|): near the cap the difference would cancel.
    const A u = scale * x / softcap;
    const A e = exp_nonpositive(A(-2) * (u < A(0) ? -u : u));
    return scale * (A(4) * e / ((A(1) + e) * (A(1) + e)));
  }
};

// The u_j above if each class has its own weight, otherwise 1.
template <typename A>
struct ClassWeights {
  const float* of_class = nullptr;

  PDL_INLINE A at(int64_t j) const { return of_class != nullptr ? A(of_class[j]) : A(1); }
  // u_j times a difference, which is infinite for a masked class; with a weight of 0 the product is 0.
  PDL_INLINE static A times(A weight, A difference) { return weight == A(0) ? A(0) : weight * difference; }
};

// The loops over a row. `plain` gathers its maximum and sum of exp, `entropy` also the entropy and the argmax.
// `general` also gathers the sum of z and applies the transform.
enum class Loop { plain, entropy, general };

template <Loop kLoop>
constexpr bool kIsPlain = kLoop != Loop::general;

inline bool is_plain(const LossOptions& options, const float* offset) {
  return options.label_smoothing == 0.0 && options.logit_scale == 1.0 && options.softcap == 0.0 && offset == nullptr;
}

// Statistics of a share of a row: the largest z, and the sum of exp(z - max). The default values are those of a share
// without elements.
template <typename A>
struct RowStatistics {
  A max = -infinity<A>();
  A sum = 0;
};

// Also the index of the largest z, and the sum of exp(z - max) (z - max), from which the entropy is computed.
template <typename A>
struct EntropyStatistics : RowStatistics<A> {
  int32_t argmax = -1;
  A scaled = 0;
};

// Also the sums of u_j (z_j - centre) and of u_j. The centre is one number for the whole row.
template <typename A>
struct WideStatistics : EntropyStatistics<A> {
  A centred = 0;
  A class_weight = 0;
};

template <Loop kLoop, typename A>
using StatisticsOf =
    std::conditional_t<kLoop == Loop::plain, RowStatistics<A>,
                       std::conditional_t<kLoop == Loop::entropy, EntropyStatistics<A>, WideStatistics<A>>>;

// The number to subtract before exp: a share of only -inf must give exp(-inf - 0) = 0, not exp(-inf + inf) = NaN.
template <typename A>
PDL_INLINE A exp_shift(A max) {
  return max == -infinity<A>() ? A(0) : max;
}

template <typename A>
PDL_INLINE RowStatistics<A> merge(const RowStatistics<A>& a, const RowStatistics<A>& b) {
  const A max = larger(a.max, b.max), shift = exp_shift(max);
  return {max, a.sum * exp_nonpositive(a.max - shift) + b.sum * exp_nonpositive(b.max - shift)};
}

// z - max, limited to where its exponential is 0: 0 * -inf would be NaN.
template <typename A>
PDL_INLINE A finite_log_ratio(A below) {
  const A least = sizeof(A) == 8 ? A(-1000) : A(-200);
  return below < least ? least : below;
}

// The sum of exp(z - max) (z - max) for another max.
template <typename A>
PDL_INLINE A scaled_relative_to(const EntropyStatistics<A>& row, A shift) {
  const A above = finite_log_ratio(row.max - shift);
  return (row.scaled + above * row.sum) * exp_nonpositive(above);
}

template <typename A>
PDL_INLINE EntropyStatistics<A> merge(const EntropyStatistics<A>& a, const EntropyStatistics<A>& b) {
  EntropyStatistics<A> merged{
      merge<A>(static_cast<const RowStatistics<A>&>(a), static_cast<const RowStatistics<A>&>(b))};
  const bool take_b = b.max > a.max || (b.max == a.max && uint32_t(b.argmax) < uint32_t(a.argmax));
  merged.argmax = take_b ? b.argmax : a.argmax;
  const A shift = exp_shift(merged.max);
  merged.scaled = scaled_relative_to(a, shift) + scaled_relative_to(b, shift);
  return merged;
}

template <typename A>
PDL_INLINE WideStatistics<A> merge(const WideStatistics<A>& a, const WideStatistics<A>& b) {
  return {merge<A>(static_cast<const EntropyStatistics<A>&>(a), static_cast<const EntropyStatistics<A>&>(b)),
          a.centred + b.centred, a.class_weight + b.class_weight};
}

// The entropy of softmax(z) in nats, log(sum) - scaled / sum, at least 0; 0 if it was not gathered.
template <typename A>
PDL_INLINE A entropy_of(const RowStatistics<A>&, A) {
  return A(0);
}
template <typename A>
PDL_INLINE A entropy_of(const EntropyStatistics<A>& row, A log_sum) {
  const A entropy = log_sum - row.scaled / row.sum;
  return entropy < A(0) ? A(0) : entropy;
}

// The sums of u_j and of u_j (z_j - centre), which only the general loop gathers. The index of the largest z, or -1 in
// the plain loop.
template <typename A>
PDL_INLINE A class_weight_of(const RowStatistics<A>&) {
  return A(0);
}
template <typename A>
PDL_INLINE A class_weight_of(const WideStatistics<A>& row) {
  return row.class_weight;
}
template <typename A>
PDL_INLINE A centred_of(const RowStatistics<A>&) {
  return A(0);
}
template <typename A>
PDL_INLINE A centred_of(const WideStatistics<A>& row) {
  return row.centred;
}
template <typename A>
PDL_INLINE int32_t argmax_of(const RowStatistics<A>&) {
  return -1;
}
template <typename A>
PDL_INLINE int32_t argmax_of(const EntropyStatistics<A>& row) {
  return row.argmax;
}

// With the target's own z as centre, sum_j u_j (z_j - centre) does not cancel when all logits share a large offset.
template <typename A>
PDL_INLINE A smoothing_centre(A z_target) {
  return z_target == -infinity<A>() ? A(0) : z_target;
}

// The data kept of a row, for its gradient and for the caller: one column of the op's `saved_rows` [kNumbers, rows].
template <typename A>
struct SavedRow {
  A max;
  A sum;      // of exp(z - max)
  A log_sum;  // lse - max
  A nll;
  A ce;  // nll with its token weight and label smoothing
  A token_weight;
  A modulation;
  A entropy;
  A smoothing_weight;  // the mean of u_j

  static constexpr int kNumbers = 9;

  PDL_INLINE A lse() const { return max + log_sum; }
  // With a modulation of 0 the loss is 0, even for a target with probability 0.
  PDL_INLINE A modulated_ce() const { return modulation == A(0) ? A(0) : modulation * ce; }

  PDL_INLINE static SavedRow load(const A* saved_rows, int64_t rows, int64_t i) {
    const A* row = saved_rows + i;
    return {row[0],        row[rows],     row[2 * rows], row[3 * rows], row[4 * rows],
            row[5 * rows], row[6 * rows], row[7 * rows], row[8 * rows]};
  }
  PDL_INLINE void store(A* saved_rows, int64_t rows, int64_t i) const {
    A* row = saved_rows + i;
    row[0] = max;
    row[rows] = sum;
    row[2 * rows] = log_sum;
    row[3 * rows] = nll;
    row[4 * rows] = ce;
    row[5 * rows] = token_weight;
    row[6 * rows] = modulation;
    row[7 * rows] = entropy;
    row[8 * rows] = smoothing_weight;
  }
  // For a row without a target in the vocabulary.
  PDL_INLINE static SavedRow filled(A value) { return {value, value, value, value, value, value, value, value, value}; }
};

// Completes a row whose max, sum, log_sum, nll, token_weight and entropy are known. Its ce is the mean over the
// vocabulary of u_j (lse - z_j), and its smoothing_weight that of u_j. A u_j that is the target's token weight counts
// as 1 in both.
template <typename A>
PDL_INLINE void complete_row(SavedRow<A>& row, const RowOptions<A>& options) {
  const A smoothed = row.ce, s = options.label_smoothing;
  row.ce = row.token_weight * row.nll;
  if (s != A(0) && options.label_smoothing_weight == SmoothingWeight::target) {
    row.ce = row.token_weight * ((A(1) - s) * row.nll + s * smoothed);
    row.smoothing_weight = row.token_weight;
  } else if (s != A(0)) {
    row.ce = (A(1) - s) * row.ce + s * smoothed;
  }
  row.modulation = modulation_of(row.nll, row.entropy, options).value;
}

template <typename Statistics, typename A>
PDL_INLINE SavedRow<A> row_loss(const Statistics& row, A z_target, A token_weight, const RowOptions<A>& options) {
  SavedRow<A> saved;
  saved.max = row.max;
  saved.sum = row.sum;
  saved.log_sum = log(row.sum);
  saved.nll = saved.log_sum - (z_target - row.max);
  saved.entropy = entropy_of(row, saved.log_sum);
  const A vocab_size = A(options.vocab_size);
  saved.smoothing_weight =
      options.label_smoothing_weight == SmoothingWeight::of_class ? class_weight_of(row) / vocab_size : A(1);
  saved.ce =
      saved.smoothing_weight * (saved.log_sum - (smoothing_centre(z_target) - row.max)) - centred_of(row) / vocab_size;
  saved.token_weight = token_weight;
  complete_row(saved, options);
  return saved;
}

// One row's term of the loss. `weight` includes the denominator.
template <typename A>
PDL_INLINE A row_term(A weight, A ce, A lse, const RowOptions<A>& options) {
  return options.z_loss != A(0) ? weight * ce + options.z_loss * lse * lse : weight * ce;
}

// Factors of the weighted term and of the z-loss term, and `correction`. That is the weighted mean if the denominator
// depends on the row weights (reduction "mean"), else 0. So d loss / d row_weight is (m ce - token_weight * correction)
// * weighted. `modulation` is the mean by which m is divided, or 1; `weighted` already includes it. `upstream` is the
// upstream gradient for which a gradient was computed at once. In memory: the op's `factors` [kNumbers].
template <typename A>
struct Factors {
  A weighted;
  A rows;
  A correction;
  A modulation;
  A upstream = 1;

  static constexpr int kNumbers = 5;

  PDL_INLINE static Factors load(const A* factors) {
    return {factors[0], factors[1], factors[2], factors[3], factors[4]};
  }
  PDL_INLINE void store(A* factors) const {
    factors[0] = weighted;
    factors[1] = rows;
    factors[2] = correction;
    factors[3] = modulation;
    factors[4] = upstream;
  }
  template <typename B>
  PDL_INLINE Factors<B> as() const {
    return {B(weighted), B(rows), B(correction), B(modulation), B(upstream)};
  }
};

// 0 instead of 1/0: if no row counts, the loss is 0 and so is every gradient.
template <typename A>
PDL_INLINE A reciprocal_or_zero(A denominator) {
  return denominator == A(0) ? A(0) : A(1) / denominator;
}

// Sums over the rows that count, in float64: a sum of a million rows in float32 would lose small terms.
struct RowSums {
  double weighted_ce = 0;
  double weight = 0;
  double lse_squares = 0;
  double rows = 0;
  double modulation = 0;

  PDL_INLINE void add_weight(double token_weight, double row_weight) {
    weight += token_weight * row_weight;
    rows += 1;
  }
  // modulated_ce: includes the token weight.
  PDL_INLINE void add(double token_weight, double row_weight, double modulated_ce, double lse, double m) {
    add_weight(token_weight, row_weight);
    weighted_ce += row_weight * modulated_ce;
    lse_squares += lse * lse;
    modulation += m;
  }

  PDL_INLINE RowSums operator+(const RowSums& other) const {
    return {weighted_ce + other.weighted_ce, weight + other.weight, lse_squares + other.lse_squares, rows + other.rows,
            modulation + other.modulation};
  }
};

// `normalizer`: the denominators of the weighted term and of the z-loss term, or nullptr.
template <typename A>
PDL_INLINE Factors<double> factors_of(Reduction reduction, const RowSums& sums, const A* normalizer, bool normalize) {
  Factors<double> factors{1.0, 1.0, 0.0, 1.0};
  if (normalize && sums.rows > 0) factors.modulation = sums.modulation / sums.rows;
  if (reduction == Reduction::mean || reduction == Reduction::token_mean) {
    if (normalizer != nullptr) {
      factors.weighted = reciprocal_or_zero(double(normalizer[0]));
      factors.rows = reciprocal_or_zero(double(normalizer[1]));
    } else {
      factors.rows = reciprocal_or_zero(sums.rows);
      factors.weighted = reduction == Reduction::mean ? reciprocal_or_zero(sums.weight) : factors.rows;
      if (reduction == Reduction::mean) factors.correction = sums.weighted_ce * factors.weighted;
    }
  }
  factors.weighted /= factors.modulation;
  return factors;
}

PDL_INLINE double reduced_loss(const RowSums& sums, const Factors<double>& factors, double z_loss) {
  const double weighted = sums.weighted_ce * factors.weighted;
  return z_loss != 0.0 ? weighted + z_loss * sums.lse_squares * factors.rows : weighted;
}

// The gradient of one row, element by element, in the accumulator's precision. At the target p_y - q_y is computed
// before anything is rounded to the logits' dtype. Probabilities are expressed as ratios to the largest one, exp(z -
// max): exp((z - max) - log_sum) would round twice, the second time a larger number.
template <typename A>
struct GradientRow {
  A max;
  A a_largest;   // A max_j p_j
  A b_smoothed;  // B_j off the target, of u_j = 1 where each class has its own
  A sum;
  A b_target;  // B_j at it
  A rest;      // A less that

  PDL_INLINE A log_ratio(A z) const { return z - max; }
  // In a row with a NaN, which is in a_largest, the ratio may be any number.
  PDL_INLINE A ratio(A z) const { return exp_compensated(log_ratio(z)); }
  PDL_INLINE A off_target_of(A ratio) const { return a_largest * ratio - b_smoothed; }
  PDL_INLINE A off_target_of(A ratio, A class_weight) const { return a_largest * ratio - b_smoothed * class_weight; }
  // The same row for ratios to exp(origin - max). origin may be above max only if all numbers relative to it are -inf.
  PDL_INLINE GradientRow relative_to(A origin) const {
    GradientRow row = *this;
    row.a_largest *= exp_nonpositive(origin > max ? A(0) : origin - max);
    return row;
  }
  PDL_INLINE A off_target(A z) const { return off_target_of(ratio(z)); }
  PDL_INLINE A off_target(A z, A class_weight) const { return off_target_of(ratio(z), class_weight); }
  // A p_y - B_y. Near p_y = 1 it is computed as B_y (p_y - 1) + (A - B_y) p_y, since there e - sum is exact.
  PDL_INLINE A at_target(A z) const {
    const A e = ratio(z);
    return e > A(0.5) * sum ? b_target * ((e - sum) / sum) + rest * (e / sum) : a_largest * e - b_target;
  }
};

// The gradient off the target for a plain row of 16-bit floats: exp(z - max) is 2^(scale z - shift - residual). The
// residual is the rounding error of max * scale. It is the same for the whole row, and is included in `a`. So an
// element takes two multiply-adds and an exponential. The rounding error of the first is below 2^-18 of the result; an
// eighth of half an ulp of float16 is 2^-15.
struct GradientRowOfHalves {
  float scale;
  float shift;
  float a;
  float b;

  PDL_INLINE explicit GradientRowOfHalves(const GradientRow<float>& row) {
    // Beyond this two bfloat16 numbers differ by more than the range of exponentials. A scale of 1 is exact.
    constexpr float kNear = 65536.0f;
    scale = fabsf(row.max) <= kNear ? kLog2E : 1.0f;
    shift = row.max * scale;
    const float residual = fmaf(row.max, scale, -shift);
    a = row.a_largest * exp2_approximate(-residual);
    b = row.b_smoothed;
  }

  PDL_INLINE float off_target(float z) const { return fmaf(a, exp2_approximate(fmaf(z, scale, -shift)), -b); }
};

// A NaN in the form that narrow_number keeps, whatever NaN the user's weights had.
template <typename A>
PDL_INLINE A canonical(A x) {
  return x == x ? x : not_a_number<A>();
}

// The largest logit's probability is 1 / sum. If all logits are -inf it is undefined.
template <typename A>
PDL_INLINE GradientRow<A> gradient_row(const SavedRow<A>& row, A row_weight, A upstream, const Factors<A>& factors,
                                       const RowOptions<A>& options) {
  const A weighted = upstream * row_weight * factors.weighted;
  A m = 1, of_modulation = 0;
  if (options.modulation != Modulation::none) {
    const A slope = modulation_of(row.nll, row.entropy, options).slope;
    // With an infinite nll the product is NaN, and its limit is 0.
    of_modulation = slope == A(0) ? A(0) : weighted * (slope * row.ce);
    m = row.modulation;
  }
  const A s = options.label_smoothing, uniform = s / A(options.vocab_size), w = row.token_weight;
  // The common part of A and B is computed once: otherwise the rounding errors of two numbers would remain.
  A of_lse, of_class, of_target, rest;
  if (options.label_smoothing_weight == SmoothingWeight::target) {
    of_lse = upstream * (w * row_weight) * factors.weighted * m;
    of_class = of_lse * uniform;
    of_target = of_lse * (A(1) - s + uniform);
    rest = of_lse * (s - uniform);
  } else {
    const A of_nll = weighted * m * ((A(1) - s) * w);
    const A smoothed = weighted * m * (s * row.smoothing_weight);
    of_lse = of_nll + smoothed;
    of_class = weighted * m * uniform;
    const A smoothed_target = options.label_smoothing_weight == SmoothingWeight::none ? of_class : of_class * w;
    of_target = of_nll + smoothed_target;
    rest = smoothed - smoothed_target;
  }
  of_lse += of_modulation;
  if (options.z_loss != A(0)) {
    const A penalty = A(2) * upstream * options.z_loss * row.lse() * factors.rows;
    of_lse += penalty;
    rest += penalty;
  }
  return {row.max,
          row.max == -infinity<A>() ? not_a_number<A>() : canonical(of_lse) / row.sum,
          canonical(of_class),
          row.sum,
          canonical(of_target + of_modulation),
          canonical(rest)};
}

}  // namespace pdl
