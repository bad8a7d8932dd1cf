// What a row's loss is multiplied by that follows from the model's own prediction, for host and device: the only copy.
// pdl_ext/modulation.py says what each is.
#pragma once

#include "portable.h"

namespace pdl {

enum class Modulation : int64_t { none = 0, focal = 1, anti_focal = 2, dft = 3, mile = 4, eaft = 5 };

// Whether it follows from the entropy of the row, which costs its loop an instruction or three an element.
PDL_INLINE bool needs_entropy(Modulation modulation) {
  return modulation == Modulation::mile || modulation == Modulation::eaft;
}

// m and its derivative by nll, which is 0 where m is taken as a constant.
template <typename A>
struct ModulationOfRow {
  A value = 1;
  A slope = 0;
};

// Of an nll >= 0 up to infinity; rounding may have left it below 0. entropy: in nats, at least 0.
template <typename A, typename Options>
PDL_INLINE ModulationOfRow<A> modulation_of(A nll, A entropy, const Options& options) {
  if (options.modulation == Modulation::none) return {};
  if (options.modulation == Modulation::mile) return {A(pow(A(1) + entropy, options.gamma)), A(0)};
  if (options.modulation == Modulation::eaft) {
    // Of one class alone the entropy is 0, and so is the largest one that it might have.
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
  // Focal. 1 - p has few digits left where p is close to 1.
  const A q = A(-expm1(-least));
  const A value = A(pow(q, options.gamma));
  if (options.modulation_detach || options.gamma == A(0)) return {value, A(0)};
  // At nll = 0 the limit is 0 for gamma > 1 and 1 for gamma = 1; the infinite one of gamma < 1 counts as 0.
  const A slope = options.gamma == A(1) ? p : (q == A(0) ? A(0) : options.gamma * p * (value / q));
  return {value, slope};
}

}  // namespace pdl
