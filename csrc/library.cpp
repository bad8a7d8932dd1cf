// The schemas of the ops, and the Python module `pdl_ext._C`. Importing the module registers the ops; its functions
// report how it was built. The kernels register themselves, each device beside its own code.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include "build_info.h"
#include "cpu/simd.h"
#include "loss_options.h"

STABLE_TORCH_LIBRARY(pdl_ext, m) {
  m.def(
      "loss_forward(Tensor logits, Tensor targets, Tensor? token_weight, Tensor? row_weight, Tensor? logit_offset, "
      "Tensor? normalizer, float[] options, bool stats) -> (Tensor loss, Tensor saved_rows, Tensor factors, "
      "Tensor predicted)");
  m.def(
      "loss_and_gradient_(Tensor logits, Tensor(a!) gradient, Tensor targets, Tensor? token_weight, Tensor? "
      "row_weight, Tensor? logit_offset, Tensor? normalizer, float[] options, bool stats) -> (Tensor loss, "
      "Tensor saved_rows, Tensor factors, Tensor predicted)");
  m.def(
      "loss_and_gradient(Tensor logits, Tensor targets, Tensor? token_weight, Tensor? row_weight, Tensor? "
      "logit_offset, Tensor? normalizer, Tensor? upstream, float[] options, bool stats) -> (Tensor loss, Tensor "
      "saved_rows, Tensor factors, Tensor predicted, Tensor gradient)");
  m.def(
      "correct_gradient_(Tensor(a!) gradient, Tensor(b!)? expected, Tensor grad_loss, Tensor logits, Tensor targets, "
      "Tensor saved_rows, Tensor factors, Tensor? token_weight, Tensor? row_weight, Tensor? logit_offset, float[] "
      "options) -> ()");
  m.def("scale_(Tensor(a!) gradient, Tensor factor) -> ()");
  m.def(
      "loss_backward(Tensor grad_loss, Tensor logits, Tensor targets, Tensor saved_rows, Tensor factors, Tensor? "
      "token_weight, Tensor? row_weight, Tensor? logit_offset, float[] options, int first_id, int vocab_size) -> "
      "Tensor");
  m.def(
      "loss_backward_(Tensor grad_loss, Tensor(a!) logits, Tensor targets, Tensor saved_rows, Tensor factors, Tensor? "
      "token_weight, Tensor? row_weight, Tensor? logit_offset, float[] options, int first_id, int vocab_size) -> ()");
  m.def("complete_rows_(Tensor(a!) saved_rows, float[] options, int vocab_size) -> ()");
  m.def(
      "reduce_rows(Tensor saved_rows, Tensor targets, Tensor? row_weight, Tensor? normalizer, float[] options) -> "
      "(Tensor loss, Tensor factors)");
  m.def(
      "token_weights(Tensor counts, Tensor? blend, Tensor? fixed, float alpha, float epsilon, float smoothing, "
      "bool relative, int normalize, float max_weight) -> Tensor");
  m.def(
      "count_tokens_(Tensor(a!) counts, Tensor(b!) ignored, Tensor(c!) out_of_range, Tensor(d!) seen, Tensor "
      "tokens, int ignore_index, bool strict, bool alone=False) -> ()");
}

#ifndef PDL_EXT_WITH_CUDA
const char* pdl::cuda_architectures() {
  return "";
}
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled ops of pdl_ext, registered as torch.ops.pdl_ext.*, and how they were built.";
  m.def("cpu_capability", &pdl::cpu::capability_name);
  m.def("loss_option_names", &pdl::LossOptions::names);
  m.def("built_with_torch", [] { return TORCH_VERSION; });
  m.def("cuda_architectures", &pdl::cuda_architectures);
  m.def("cuda_status", [] { return PDL_EXT_CUDA_STATUS; });
}
