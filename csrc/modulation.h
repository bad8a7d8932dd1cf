// Factors of a row's loss that depend on the model's own prediction, for host and device: the only copy.
// pdl_ext/modulation.py explains each.
#pragma once

#include "portable.h"

namespace pdl {

enum class Modulation : int64_t { none = 0, focal = 1, anti_focal = 2, dft = 3, mile = 4, eaft = 5 };

// Whether it depends on the row's entropy, which costs the row's loop one to three instructions an element.
PDL_INLINE bool needs_entropy(Modulation modulation) {
  return modulation == Modulation::mile || modulation == Modulation::eaft;
}

// m and its derivative by nll, which is 0 if m is treated as a constant.
template <typename A>
struct ModulationOfRow {
  A value = 1;
  A slope = 0;
};

// nll: from 0 to infinity, and slightly below 0 after rounding. entropy: in nats, at least 0.
template <typename A, typename Options>
PDL_INLINE ModulationOfRow<A> modulation_of(A nll, A entropy, const Options& options) {
  if (options.modulation == Modulation::none) return {};
  if (options.modulation == Modulation::mile) return {A(pow(A(1) + entropy, options.gamma)), A(0)};
  if (options.modulation == Modulation::eaft) {
    // With a single class the entropy is 0, and so is its upper bound.
    const A share = entropy == A(0) ? A(0) : entropy / A(log(A(options.vocab_size)));
    return {A(pow(share, options.gamma)), A(0)};
  }
  const A least = nll < A(0) ? A(0) : nll;
  const A p = A(exp(-least));
  if (options.modulation > Modulation::eaft) return {not_a_number<A>(), A(0)};
  if (options.modulation == Modulation::dft) return {p, A(0)};
  if (options.modulation == Modulation::anti_focal) {
    return {A(pow(A(1) + options.modulation_scale * p, options.gamma)), A(0)};
  }
  // Focal. expm1, since 1 - p loses digits where p is close to 1.
  const A q = A(-expm1(-least));
  const A value = A(pow(q, options.gamma));
  if (options.modulation_detach || options.gamma == A(0)) return {value, A(0)};
  // At nll = 0 the limit is 0 for gamma > 1 and 1 for gamma = 1. For gamma < 1 it is infinite, and is taken as 0.
  const A slope = options.gamma == A(1) ? p : (q == A(0) ? A(0) : options.gamma * p * (value / q));
  return {value, slope};
}

}  // namespace pdl
