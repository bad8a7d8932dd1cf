// Token weights on the CPU: the table of w(t) from the counts. The work is V powers, in vector code and on all threads.
// The mean that normalises them is summed over parts of fixed size, so that it does not depend on the number of
// threads.
#include <torch/csrc/stable/library.h>

#include <memory>
#include <vector>

#include "../token_weights.h"
#include "../weights_arguments.h"
#include "simd.h"

namespace pdl::cpu {
namespace {

constexpr int64_t kPart = 4096;
// The cost of an entry, in logits.
constexpr int64_t kCost = 16;

Tensor token_weights(Tensor counts_tensor, OptionalTensor blend, OptionalTensor fixed_tensor, double alpha,
                     double epsilon, double smoothing, bool relative, int64_t normalize, double max_weight) {
  check_weights_arguments(counts_tensor, blend, fixed_tensor);
  const int64_t vocab_size = counts_tensor.size(0);
  const PowerLaw law{alpha, epsilon, smoothing, relative, Normalize(normalize), max_weight, vocab_size};
  const int64_t* counts = static_cast<const int64_t*>(counts_tensor.const_data_ptr());
  const float* fixed = fixed_tensor ? static_cast<const float*>(fixed_tensor->const_data_ptr()) : nullptr;
  const double mix = blend ? *static_cast<const float*>(blend->const_data_ptr()) : 1.0;
  const Tensor result = allocate(counts_tensor, counts_tensor.sizes(), ScalarType::Float);
  float* weights = static_cast<float*>(result.mutable_data_ptr());

  const int64_t parts = (vocab_size + kPart - 1) / kPart;
  std::vector<CountSums> of_parts(parts);
  simd_parallel_for(parts, kPart, [&](int64_t begin, int64_t end, auto) {
    // Copies that no store can change: otherwise the loops would not become vector code.
    const PowerLaw own_law = law;
    const int64_t* own_counts = counts;
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * kPart, last = std::min(first + kPart, vocab_size);
      // Separate numbers, and a loop without the optional table, for the same reason.
      uint64_t total = 0;
      int64_t rareness = 0;
      if (fixed == nullptr) {
#pragma omp simd reduction(+ : total) reduction(max : rareness)
        for (int64_t t = first; t < last; ++t) {
          const CountSums one = own_law.sums_of(own_counts[t], false);
          total += uint64_t(one.total);
          rareness = one.rareness > rareness ? one.rareness : rareness;
        }
        of_parts[part] = {int64_t(total), rareness};
      } else {
        for (int64_t t = first; t < last; ++t) {
          of_parts[part] = of_parts[part] + own_law.sums_of(own_counts[t], is_fixed(fixed, t));
        }
      }
    }
  });
  CountSums sums;
  for (const CountSums& one : of_parts) sums = sums + one;
  const int64_t total = sums.total;
  const WeightScale scale = law.scale(sums);
  const std::unique_ptr<double[]> raw(new double[vocab_size]);
  std::vector<double> weight_sums(parts), share_sums(parts);
  simd_parallel_for(parts, kPart * kCost, [&](int64_t begin, int64_t end, auto) {
    const PowerLaw own_law = law;
    const WeightScale own_scale = scale;
    const int64_t* own_counts = counts;
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * kPart, n = std::min(kPart, vocab_size - first);
      double w[kPart];
#pragma omp simd
      for (int64_t t = 0; t < n; ++t) w[t] = own_law.weight(own_counts[first + t], own_scale);
      double weight_sum = 0, share_sum = 0;
      for (int64_t t = 0; t < n; ++t) {
        const double share = is_fixed(fixed, first + t) ? 0.0 : own_law.share(own_counts[first + t], total);
        raw[first + t] = w[t];
        // 0 * inf would be NaN.
        weight_sum += share == 0.0 ? 0.0 : share * w[t];
        share_sum += share;
      }
      weight_sums[part] = weight_sum;
      share_sums[part] = share_sum;
    }
  });
  double weight_sum = 0, share_sum = 0;
  for (int64_t part = 0; part < parts; ++part) {
    weight_sum += weight_sums[part];
    share_sum += share_sums[part];
  }
  const double mean = law.mean(weight_sum, share_sum);
  simd_parallel_for(vocab_size, 2, [&](int64_t begin, int64_t end, auto) {
#pragma omp simd
    for (int64_t t = begin; t < end; ++t) weights[t] = is_fixed(fixed, t) ? fixed[t] : blended(raw[t], mean, mix);
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pdl_ext, CPU, m) {
  m.impl("token_weights", TORCH_BOX(&token_weights));
}

}  // namespace pdl::cpu
