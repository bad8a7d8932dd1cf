// The loss and its gradient by two calls, for the call that does both at once where rows are few.
#pragma once

#include "../loss_arguments.h"
#include "launch.cuh"

namespace pdl::cuda {

// Into how many shares to cut each row, so that few rows keep the whole card busy; 1 where there are rows enough.
inline int shares_of_row(const Launcher& launch, const Tensor& logits) {
  // Of a share of 16 KiB each thread has all its vectors under way at once; of smaller ones there would only be more.
  constexpr int64_t kShareBytes = 16 * 1024;
  const int64_t multiprocessors = launch.attribute(cudaDevAttrMultiProcessorCount);
  if (logits.size(0) == 0 || logits.size(0) >= multiprocessors) return 1;
  const int64_t wanted = (2 * multiprocessors + logits.size(0) - 1) / logits.size(0);
  const int64_t possible = (logits.size(1) * int64_t(logits.element_size()) + kShareBytes - 1) / kShareBytes;
  return int(std::min(wanted, possible));
}

LossOutputs loss_forward_outputs(const Tensor& logits, const LossInputs& inputs, bool stats);

// Without grad_loss that of a scalar reduction is 1.
void loss_backward_into(const OptionalTensor& grad_loss, const Tensor& logits, const LossInputs& inputs,
                        const Tensor& saved_rows, const Tensor& factors, const VocabularyShard& shard,
                        const Tensor& grad_logits);

}  // namespace pdl::cuda
