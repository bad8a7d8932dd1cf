// The options of a loss in the form that the ops take: one `float[] options`, in the order of this list and of
// pdl_ext/options.py.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "modulation.h"

namespace pdl {

enum class Reduction : int64_t { none = 0, sum = 1, mean = 2, token_mean = 3 };

// The weight of label smoothing's share: the target's token weight, none, or each class's own.
enum class SmoothingWeight : int64_t { target = 0, none = 1, of_class = 2 };

#define PDL_LOSS_OPTIONS(OPTION)                  \
  OPTION(Reduction, reduction)                    \
  OPTION(int64_t, ignore_index)                   \
  OPTION(double, label_smoothing)                 \
  OPTION(SmoothingWeight, label_smoothing_weight) \
  OPTION(double, z_loss)                          \
  OPTION(double, softcap)                         \
  OPTION(double, logit_scale)                     \
  OPTION(Modulation, modulation)                  \
  OPTION(double, gamma)                           \
  OPTION(double, modulation_scale)                \
  OPTION(bool, modulation_detach)                 \
  OPTION(bool, modulation_normalize)

struct LossOptions {
#define PDL_OPTION_FIELD(type, name) type name{};
  PDL_LOSS_OPTIONS(PDL_OPTION_FIELD)
#undef PDL_OPTION_FIELD

  // The names, in order, each followed by a space.
  static std::string names() {
#define PDL_OPTION_NAME(type, name) #name " "
    return PDL_LOSS_OPTIONS(PDL_OPTION_NAME);
#undef PDL_OPTION_NAME
  }

  // Throws std::invalid_argument for a list of another length. float64 holds every id exactly.
  static LossOptions unpack(const std::vector<double>& numbers) {
#define PDL_OPTION_COUNT(type, name) +1
    constexpr size_t kOptions = 0 PDL_LOSS_OPTIONS(PDL_OPTION_COUNT);
#undef PDL_OPTION_COUNT
    if (numbers.size() != kOptions) {
      throw std::invalid_argument("options: got " + std::to_string(numbers.size()) + " numbers, expected " + names());
    }
    LossOptions options;
    const double* next = numbers.data();
#define PDL_OPTION_UNPACK(type, name) options.name = static_cast<type>(*next++);
    PDL_LOSS_OPTIONS(PDL_OPTION_UNPACK)
#undef PDL_OPTION_UNPACK
    return options;
  }
};

}  // namespace pdl
