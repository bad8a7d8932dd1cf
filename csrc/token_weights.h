// The weight of a vocabulary entry from its count, for host and device: the only copy.
//
//   f = (n + smoothing) / (N + smoothing V)  or, not relative,  f = n + smoothing
//   w = min((f + epsilon)^-alpha, max_weight), divided by its mean, then 1 + blend (w - 1)
//
// arXiv 2505.16900, eq. for w(t). Evaluated in float64, since alpha * log(f) reaches the hundreds for steep weights.
// Weights beyond float32 are its largest number, or 0.
#pragma once

#include "portable.h"

namespace pdl {

enum class Normalize : int64_t { none = 0, corpus = 1, types = 2 };

// The sum of all counts, and the smallest count among those in the mean.
struct CountSums {
  static constexpr int64_t kMost = std::numeric_limits<int64_t>::max();

  int64_t total = 0;
  // kMost minus that count; 0 if there is none.
  int64_t rareness = 0;

  // From 2^63 on the total becomes negative.
  PDL_INLINE CountSums operator+(const CountSums& other) const {
    return {int64_t(uint64_t(total) + uint64_t(other.total)), rareness > other.rareness ? rareness : other.rareness};
  }
};

// The factors from counts to frequencies, and from these to weights within the range of float64.
struct WeightScale {
  double of_count;      // 1 / (N + smoothing V), or 1 where frequencies are counts
  double of_frequency;  // the reciprocal of the frequency whose weight is 1
  double max_weight;    // in that unit; +inf: no limit
};

struct PowerLaw {
  double alpha;
  double epsilon;
  double smoothing;
  bool relative;
  Normalize normalize;
  double max_weight;  // +inf: no limit
  int64_t vocab_size;

  PDL_INLINE CountSums sums_of(int64_t count, bool is_fixed) const {
    const bool counts_for_mean = !is_fixed && (normalize == Normalize::corpus ? count > 0 : count >= 0);
    return {count, counts_for_mean ? CountSums::kMost - count : 0};
  }

  // A weight that is divided by the mean may be in any unit. The unit is the largest weight among the entries in the
  // mean. So the mean is neither infinite nor 0, and no weight is a quotient of such numbers.
  PDL_INLINE WeightScale scale(const CountSums& sums) const {
    const double denominator = double(sums.total) + smoothing * double(vocab_size);
    // Without counts and without smoothing the weights are uniform.
    WeightScale scale{relative && denominator > 0.0 ? 1.0 / denominator : 1.0, 1.0, max_weight};
    if (sums.total < 0) {
      // No weight is less than NaN.
      scale.max_weight = not_a_number<double>();
      return scale;
    }
    // Without counts all entries have count 0, and all are in the mean.
    const bool is_empty = normalize == Normalize::corpus && sums.total == 0;
    const int64_t rareness = is_empty ? CountSums::kMost : sums.rareness;
    if (normalize == Normalize::none || rareness == 0 || alpha == 0.0) return scale;
    double unit = log(frequency(CountSums::kMost - rareness, scale));
    if (max_weight < infinity<double>()) {
      const double at_limit = -log(max_weight) / alpha;
      unit = unit > at_limit ? unit : at_limit;
      scale.max_weight = exp(log(max_weight) + alpha * unit);
    }
    scale.of_frequency = exp(-unit);
    return scale;
  }

  PDL_INLINE double frequency(int64_t count, const WeightScale& scale) const {
    return (to_double(count) + smoothing) * scale.of_count + epsilon;
  }

  // NaN for a negative count, and for all counts if their sum is negative.
  PDL_INLINE double weight(int64_t count, const WeightScale& scale) const {
    const double w = power(frequency(count, scale) * scale.of_frequency, -alpha);
    const double limited = w < scale.max_weight ? w : scale.max_weight;
    return count < 0 ? not_a_number<double>() : limited;
  }

  // The entry's weight in the mean that normalises the weights.
  PDL_INLINE double share(int64_t count, int64_t total) const {
    return normalize == Normalize::corpus && total > 0 ? to_double(count) : 1.0;
  }

  PDL_INLINE double mean(double weight_sum, double share_sum) const {
    return normalize == Normalize::none || share_sum == 0.0 ? 1.0 : weight_sum / share_sum;
  }
};

// Not 1 + blend * (w - 1), which rounds a small w to the spacing of numbers near 1, or to 0. At most the largest
// float32.
PDL_INLINE float blended(double weight, double mean, double blend) {
  const double mixed = (1.0 - blend) + (blend == 0.0 ? 0.0 : blend * (weight / mean));
  constexpr float kLargest = std::numeric_limits<float>::max();
  return mixed > double(kLargest) ? kLargest : float(mixed);
}

// An entry with a fixed weight is not in the mean and is not blended; NaN in the table marks an entry without one.
PDL_INLINE bool is_fixed(const float* fixed, int64_t t) {
  return fixed != nullptr && fixed[t] == fixed[t];
}

}  // namespace pdl
