// The loss and its gradient by two calls, for the call that does both at once where it cannot.
#pragma once

#include "../loss_arguments.h"
#include "launch.cuh"

namespace pdl::cuda {

// Into how many shares to cut each row of what is computed element by element. Few rows then keep the whole card busy;
// of rows enough each is one.
inline int shares_of_row(const Launcher& launch, const Tensor& logits) {
  // Of a share of 16 KiB each thread has all its vectors under way at once; of smaller ones there would only be more.
  constexpr int64_t kShareBytes = 16 * 1024;
  const int64_t multiprocessors = launch.attribute(cudaDevAttrMultiProcessorCount);
  if (logits.size(0) == 0 || logits.size(0) >= multiprocessors) return 1;
  const int64_t wanted = (2 * multiprocessors + logits.size(0) - 1) / logits.size(0);
  const int64_t possible = (logits.size(1) * int64_t(logits.element_size()) + kShareBytes - 1) / kShareBytes;
  return int(std::min(wanted, possible));
}

// `upstream`, one number or nothing for 1, goes into the factors.
LossOutputs loss_forward_outputs(const Tensor& logits, const LossInputs& inputs, const OptionalTensor& upstream,
                                 bool stats);

// Logits may be columns of a wider tensor: rows of their gradient lie as far from 16-byte boundaries as theirs, or it
// would be read and written element by element. What lies between is zero, since a product may read it. The twin of the
// fake kernel in pdl_ext/engine/ops.py.
Tensor allocate_gradient(const Tensor& logits);

// Without grad_loss it is that of the factors.
void loss_backward_into(const OptionalTensor& grad_loss, const Tensor& logits, const LossInputs& inputs,
                        const Tensor& saved_rows, const Tensor& factors, const VocabularyShard& shard,
                        const Tensor& grad_logits);

}  // namespace pdl::cuda
