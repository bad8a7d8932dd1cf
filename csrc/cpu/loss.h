// The loss and its gradient by two calls, for the call that does both at once where it cannot.
#pragma once

#include "../loss_arguments.h"

namespace pdl::cpu {

// `upstream`, one number or nothing for 1, goes into the factors. Raises IndexError for a target out of range.
LossOutputs loss_forward_outputs(const Tensor& logits, const LossInputs& inputs, const OptionalTensor& upstream,
                                 bool stats);

// Without grad_loss it is that of the factors.
void loss_backward_into(const OptionalTensor& grad_loss, const Tensor& logits, const LossInputs& inputs,
                        const Tensor& saved_rows, const Tensor& factors, const VocabularyShard& shard,
                        const Tensor& grad_logits);

Tensor allocate_gradient(const Tensor& logits);

}  // namespace pdl::cpu
