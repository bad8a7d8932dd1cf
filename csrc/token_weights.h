// The weight of a vocabulary entry from its count, for host and device: the only copy.
//
//   f = (n + smoothing) / (N + smoothing V)  or, not relative,  f = n + smoothing
//   w = min((f + epsilon)^-alpha, max_weight), divided by its mean, then 1 + blend (w - 1)
//
// arXiv 2505.16900, eq. for w(t). Evaluated in float64, since alpha * log(f) reaches the hundreds for steep weights.
#pragma once

#include "portable.h"

namespace pdl {

enum class Normalize : int64_t { none = 0, corpus = 1, types = 2 };

struct PowerLaw {
  double alpha;
  double epsilon;
  double smoothing;
  bool relative;
  Normalize normalize;
  double max_weight;  // +inf: no limit
  int64_t vocab_size;

  // 1 / (N + smoothing V), or 1 where frequencies are counts. Nothing counted and nothing smoothed is uniform.
  PDL_INLINE double frequency_scale(int64_t total) const {
    const double denominator = double(total) + smoothing * double(vocab_size);
    return relative && denominator > 0.0 ? 1.0 / denominator : 1.0;
  }

  PDL_INLINE double weight(int64_t count, double frequency_scale) const {
    const double w = power((to_double(count) + smoothing) * frequency_scale + epsilon, -alpha);
    return w < max_weight ? w : max_weight;
  }

  // What the entry counts for in the mean that normalises the weights.
  PDL_INLINE double share(int64_t count, int64_t total) const {
    return normalize == Normalize::corpus && total > 0 ? to_double(count) : 1.0;
  }

  PDL_INLINE double mean(double weight_sum, double share_sum) const {
    return normalize == Normalize::none || share_sum == 0.0 ? 1.0 : weight_sum / share_sum;
  }
};

// Not 1 + blend * (w - 1): that rounds a small w to the grain of 1, and to 0 below it.
PDL_INLINE float blended(double weight, double mean, double blend) {
  return float((1.0 - blend) + blend * (weight / mean));
}

// An entry that the user fixed takes no part in the mean and is not blended; NaN in the table marks a free one.
PDL_INLINE bool is_fixed(const float* fixed, int64_t t) {
  return fixed != nullptr && fixed[t] == fixed[t];
}

}  // namespace pdl
