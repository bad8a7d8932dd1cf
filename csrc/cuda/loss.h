// The loss and its gradient by two calls, which loss_and_gradient uses where it cannot do both at once.
#pragma once

#include "../loss_arguments.h"
#include "launch.cuh"

namespace pdl::cuda {

// The number of shares of each row, for kernels that work element by element. With few rows it keeps the whole card
// busy; with many it is 1.
inline int shares_of_row(const Launcher& launch, const Tensor& logits) {
  // With a share of 16 KiB each thread has all its vectors in flight at once; smaller shares would only be more
  // numerous.
  constexpr int64_t kShareBytes = 16 * 1024;
  const int64_t multiprocessors = launch.attribute(cudaDevAttrMultiProcessorCount);
  if (logits.size(0) == 0 || logits.size(0) >= multiprocessors) return 1;
  const int64_t wanted = (2 * multiprocessors + logits.size(0) - 1) / logits.size(0);
  const int64_t possible = (logits.size(1) * int64_t(logits.element_size()) + kShareBytes - 1) / kShareBytes;
  return int(std::min(wanted, possible));
}

// The number of blocks among which a call of loss_and_gradient divides each row of such logits, to keep it in their
// shared memory. 0 if it does not.
int blocks_with_row_on_chip(const Launcher& launch, const Tensor& logits, Loop loop);

// Whether that call keeps rows in shared memory. The kernels that follow in the same step then prefer shared memory as
// well. Other loops need a few bytes more, which decides nothing but a preference here.
inline bool keeps_rows_on_chip(const Launcher& launch, const Tensor& logits) {
  return blocks_with_row_on_chip(launch, logits, Loop::plain) > 0;
}

// `upstream`: one number, or none for 1; it is stored in the factors.
LossOutputs loss_forward_outputs(const Tensor& logits, const LossInputs& inputs, const OptionalTensor& upstream,
                                 bool stats);

// Logits may be columns of a wider tensor. The rows of their gradient then have the same offset from 16-byte
// boundaries: otherwise it would be read and written element by element. The gaps are zero, since a product may read
// them. The fake kernel in pdl_ext/engine/ops.py must match.
Tensor allocate_gradient(const Tensor& logits);

// Without grad_loss the upstream gradient is that in the factors.
void loss_backward_into(const OptionalTensor& grad_loss, const Tensor& logits, const LossInputs& inputs,
                        const Tensor& saved_rows, const Tensor& factors, const VocabularyShard& shard,
                        const Tensor& grad_logits);

}  // namespace pdl::cuda
