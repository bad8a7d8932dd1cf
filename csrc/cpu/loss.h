// The loss and its gradient by two calls, which loss_and_gradient uses where it cannot do both at once.
#pragma once

#include "../loss_arguments.h"

namespace pdl::cpu {

// `upstream`: one number, or none for 1; it is stored in the factors. Raises IndexError for a target out of range.
LossOutputs loss_forward_outputs(const Tensor& logits, const LossInputs& inputs, const OptionalTensor& upstream,
                                 bool stats);

// Without grad_loss the upstream gradient is that in the factors.
void loss_backward_into(const OptionalTensor& grad_loss, const Tensor& logits, const LossInputs& inputs,
                        const Tensor& saved_rows, const Tensor& factors, const VocabularyShard& shard,
                        const Tensor& grad_logits);

Tensor allocate_gradient(const Tensor& logits);

}  // namespace pdl::cpu
