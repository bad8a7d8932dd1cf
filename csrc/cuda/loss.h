// The loss and its gradient by two calls, for the call that does both at once where rows are few.
#pragma once

#include "../loss_arguments.h"
#include "launch.cuh"

namespace pdl::cuda {

// Into how many parts to cut each row, so that few rows keep the whole card busy; 1 where there are rows enough.
inline int parts_of_row(const Launcher& launch, const Tensor& logits) {
  // Of a part of 16 KiB each thread has all its vectors under way at once; of smaller ones there would only be more.
  constexpr int64_t kPartBytes = 16 * 1024;
  const int64_t multiprocessors = launch.attribute(cudaDevAttrMultiProcessorCount);
  if (logits.size(0) == 0 || logits.size(0) >= multiprocessors) return 1;
  const int64_t wanted = (2 * multiprocessors + logits.size(0) - 1) / logits.size(0);
  const int64_t possible = (logits.size(1) * int64_t(logits.element_size()) + kPartBytes - 1) / kPartBytes;
  return int(std::min(wanted, possible));
}

LossOutputs loss_forward_outputs(const Tensor& logits, const Tensor& targets, const OptionalTensor& token_weight,
                                 const OptionalTensor& row_weight, const OptionalTensor& logit_offset,
                                 const OptionalTensor& normalizer, const LossOptions& options, bool predict);

// Without grad_loss that of a scalar reduction is 1.
void loss_backward_into(const OptionalTensor& grad_loss, const Tensor& logits, const Tensor& targets,
                        const Tensor& rows, const Tensor& totals, const OptionalTensor& row_weight,
                        const OptionalTensor& logit_offset, const LossOptions& options, const VocabularySlice& slice,
                        const Tensor& grad_logits);

}  // namespace pdl::cuda
