// Token weights on the CPU: the table of w(t) from the counts. Work is V powers, done on all threads; the mean that
// normalises them is summed in the vocabulary's order, so that it does not depend on the number of threads.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "../token_weights.h"
#include "../weights_arguments.h"

namespace pdl::cpu {
namespace {

Tensor token_weights(Tensor counts_tensor, OptionalTensor blend, OptionalTensor fixed_tensor, double alpha,
                     double epsilon, double smoothing, bool relative, int64_t normalize, double max_weight) {
  check_weights_arguments(counts_tensor, blend, fixed_tensor);
  const int64_t vocab_size = counts_tensor.size(0);
  const PowerLaw law{alpha, epsilon, smoothing, relative, Normalize(normalize), max_weight, vocab_size};
  const int64_t* counts = static_cast<const int64_t*>(counts_tensor.const_data_ptr());
  const float* fixed = fixed_tensor ? static_cast<const float*>(fixed_tensor->const_data_ptr()) : nullptr;
  const double mix = blend ? *static_cast<const float*>(blend->const_data_ptr()) : 1.0;
  const Tensor result = torch::stable::new_empty(counts_tensor, counts_tensor.sizes(), ScalarType::Float);
  float* weights = static_cast<float*>(result.mutable_data_ptr());

  int64_t total = 0;
  for (int64_t t = 0; t < vocab_size; ++t) total += counts[t];
  const double scale = law.frequency_scale(total);
  std::vector<double> raw(vocab_size);
  torch::stable::parallel_for(0, vocab_size, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) raw[t] = law.weight(counts[t], scale);
  });
  double weight_sum = 0, share_sum = 0;
  for (int64_t t = 0; t < vocab_size; ++t) {
    const double share = is_fixed(fixed, t) ? 0.0 : law.share(counts[t], total);
    weight_sum += share == 0.0 ? 0.0 : share * raw[t];
    share_sum += share;
  }
  const double mean = law.mean(weight_sum, share_sum);
  for (int64_t t = 0; t < vocab_size; ++t) weights[t] = is_fixed(fixed, t) ? fixed[t] : blended(raw[t], mean, mix);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pdl_ext, CPU, m) {
  m.impl("token_weights", TORCH_BOX(&token_weights));
}

}  // namespace pdl::cpu
