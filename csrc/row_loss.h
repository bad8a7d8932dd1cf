// The mathematics of one row, for host and device: the only copy.
//
// A row has logits x_j, which a LogitTransform turns into z_j, a target y, and a weight w. Kernels gather
// RowStatistics over the row in any order and in any number of parts; `row_loss` turns them into the row's losses;
// `row_scalars` gives the two numbers A and B with which every loss of the family has the gradient
//     d loss / d z_j = A p_j - B q_j,    p = softmax(z),    q_j = (1 - s) [j = y] + s / V,
// and `GradientRow` evaluates it for one element. A new weighting changes a scalar here, never a loop.
#pragma once

#include "portable.h"

namespace pdl {

enum class Reduction : int64_t { none = 0, sum = 1, mean = 2, token_mean = 3 };

// z = softcap * tanh(scale * x / softcap) + offset[j]; softcap 0 and offset nullptr stand for their absence.
template <typename A>
struct LogitTransform {
  A scale = 1;
  A softcap = 0;
  const float* offset = nullptr;

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

// Of a part of a row: the largest z and its index, sum of exp(z - max), and sum of (z - centre), where the centre is
// one number for the whole row. The identity is what a part without elements has.
template <typename A>
struct RowStatistics {
  A max = -infinity<A>();
  A sum = 0;
  A centred = 0;
  int32_t argmax = -1;
};

// What to subtract before exp: a part that is all -inf must give exp(-inf - 0) = 0, not exp(-inf + inf) = NaN.
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

template <typename A>
struct RowLoss {
  A log_sum;  // lse - max
  A nll;
  A ce;  // nll with label smoothing
};

template <typename A>
PDL_INLINE RowLoss<A> row_loss(const RowStatistics<A>& row, A z_target, int64_t vocab_size, A label_smoothing) {
  RowLoss<A> loss;
  loss.log_sum = log(row.sum);
  loss.nll = loss.log_sum - (z_target - row.max);
  loss.ce = loss.nll;
  if (label_smoothing != A(0)) {
    const A uniform = loss.log_sum - (smoothing_centre(z_target) - row.max) - row.centred / A(vocab_size);
    loss.ce = (A(1) - label_smoothing) * loss.nll + label_smoothing * uniform;
  }
  return loss;
}

// One row's term of the loss before any division.
template <typename A>
PDL_INLINE A row_term(A weight, A ce, A z_loss, A lse) {
  return z_loss != A(0) ? weight * ce + z_loss * lse * lse : weight * ce;
}

// Factors of the weighted term and of the z-loss term, and `correction`: the weighted mean where the denominator
// depends on the row weights (reduction "mean"), else 0, so that d loss / d row_weight is
// token_weight * (ce - correction) * weighted.
template <typename A>
struct Totals {
  A weighted;
  A rows;
  A correction;
};

// 0 stands for 1/0: with nothing left to count the loss is 0 and so is every gradient.
template <typename A>
PDL_INLINE A reciprocal_or_zero(A denominator) {
  return denominator == A(0) ? A(0) : A(1) / denominator;
}

// `normalizer`: the denominators of the weighted term and of the z-loss term, where they are given.
template <typename A>
PDL_INLINE Totals<A> totals(Reduction reduction, A weighted_ce, A weight, A rows, const A* normalizer) {
  Totals<A> result{A(1), A(1), A(0)};
  if (reduction == Reduction::none || reduction == Reduction::sum) return result;
  if (normalizer != nullptr) {
    result.weighted = reciprocal_or_zero(normalizer[0]);
    result.rows = reciprocal_or_zero(normalizer[1]);
    return result;
  }
  result.rows = reciprocal_or_zero(rows);
  result.weighted = result.rows;
  if (reduction == Reduction::mean) {
    result.weighted = reciprocal_or_zero(weight);
    result.correction = weighted_ce * result.weighted;
  }
  return result;
}

// Sums over the rows that count, in float64: a million rows of float32 would lose the small ones.
struct RowSums {
  double weighted_ce = 0;
  double weight = 0;
  double lse_squares = 0;
  double rows = 0;

  PDL_INLINE void add(double row_weight, double ce, double lse) {
    weighted_ce += row_weight * ce;
    weight += row_weight;
    lse_squares += lse * lse;
    rows += 1;
  }

  PDL_INLINE RowSums operator+(const RowSums& other) const {
    return {weighted_ce + other.weighted_ce, weight + other.weight, lse_squares + other.lse_squares, rows + other.rows};
  }
};

template <typename A>
PDL_INLINE Totals<double> totals(Reduction reduction, const RowSums& sums, const A* normalizer) {
  double divisors[2] = {};
  if (normalizer != nullptr) {
    divisors[0] = normalizer[0];
    divisors[1] = normalizer[1];
  }
  return totals(reduction, sums.weighted_ce, sums.weight, sums.rows, normalizer != nullptr ? divisors : nullptr);
}

PDL_INLINE double reduced_loss(const RowSums& sums, const Totals<double>& factors, double z_loss) {
  const double weighted = sums.weighted_ce * factors.weighted;
  return z_loss != 0.0 ? weighted + z_loss * sums.lse_squares * factors.rows : weighted;
}

template <typename A>
struct RowScalars {
  A a;
  A b;
};

template <typename A>
PDL_INLINE RowScalars<A> row_scalars(A upstream, A weight, A z_loss, A lse, const Totals<A>& totals) {
  const A b = upstream * weight * totals.weighted;
  return {z_loss != A(0) ? b + A(2) * upstream * z_loss * lse * totals.rows : b, b};
}

// The gradient of one row, element by element, in the accumulator's precision: at the target p_y - q_y is taken
// before anything is rounded to the logits' dtype. Of probabilities it takes shares of the largest one, exp(z - max):
// exp((z - max) - log_sum) would round twice, the second time a larger number.
template <typename A>
struct GradientRow {
  A max;
  A a_share;    // A max_j p_j
  A b_uniform;  // B s / V
  A b_target;   // B (1 - s + s / V)

  // largest: the probability of the largest logit, 1 / sum or exp(-log_sum). Where all are -inf it has none.
  PDL_INLINE GradientRow(A max, A largest, RowScalars<A> scalars, A label_smoothing, int64_t vocab_size)
      : max(max), a_share(max == -infinity<A>() ? not_a_number<A>() : scalars.a * largest) {
    const A uniform = label_smoothing / A(vocab_size);
    b_uniform = scalars.b * uniform;
    b_target = scalars.b * (A(1) - label_smoothing + uniform);
  }

  PDL_INLINE A log_share(A z) const { return z - max; }
  // Of a row with a NaN, which is in a_share, any number will do.
  PDL_INLINE A share(A z) const { return exp_compensated(log_share(z)); }
  PDL_INLINE A off_target_of(A share) const { return a_share * share - b_uniform; }
  // The same row for shares of exp(origin - max).
  PDL_INLINE GradientRow relative_to(A origin) const {
    GradientRow row = *this;
    row.a_share *= exp_nonpositive(origin - max);
    return row;
  }
  PDL_INLINE A off_target(A z) const { return off_target_of(share(z)); }
  PDL_INLINE A at_target(A z) const { return a_share * share(z) - b_target; }
};

}  // namespace pdl
