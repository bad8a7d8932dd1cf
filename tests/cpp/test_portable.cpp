// exp, tanh and power against long double: as the baseline compiles them, and with the fused multiply-adds of AVX2.
// Also the exp of blocks, for which AVX2 and AVX-512 have tables.
#include "portable.h"

#include "cpu/blocks.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

namespace pdl {
namespace {

using Wide = long double;

float (*const kBaselineExp)(float) = [](float x) { return exp_nonpositive(x); };
float (*const kBaselineTanh)(float) = [](float x) { return hyperbolic_tangent(x); };

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target("avx2,fma"))) float fused_exp(float x) {
  return exp_nonpositive(x);
}
__attribute__((target("avx2,fma"))) float fused_tanh(float x) {
  return hyperbolic_tangent(x);
}
bool has_fused() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool has_avx512() {
  return has_fused() && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#else
float (*const fused_exp)(float) = kBaselineExp;
float (*const fused_tanh)(float) = kBaselineTanh;
bool has_fused() {
  return false;
}
bool has_avx512() {
  return false;
}
#endif

// By way of what the loss keeps, of a number 0: relative to -x, since few x are 16-bit numbers.
template <cpu::Capability kCapability, typename T>
float exp_in_block(float x) {
  const cpu::ExpOrigin<kCapability, T> origin(-x);
  const std::vector<T> z(cpu::kBlock, cpu::narrow<T>(0.0f));
  float kept[cpu::kBlock], scaled;
  const float sum =
      sum_of_exp_blocks<true, true>(cpu::Instructions<kCapability>(), z.data(), cpu::kBlock, origin, kept, 0, &scaled);
  if (sum == sum) {
    EXPECT_FLOAT_EQ(sum, cpu::kBlock * kept[0]);
    const float expected = sum * finite_log_ratio(x);
    EXPECT_NEAR(scaled, expected, 2e-6f * std::abs(expected));
  }
  return kept[cpu::kBlock - 1];
}

#ifdef PDL_SIMD_TARGETS
float avx512_exp(float x) {
  return cpu::detail::exp_of_one_avx512(x, 0);
}
#else
float (*const avx512_exp)(float) = kBaselineExp;
#endif

// Of a chunk whose largest number is `max`, exp(x - max) by way of what the loss keeps.
float kept_exp(float x, float max) {
  constexpr auto kCapability = cpu::Capability::avx512;
  const cpu::ExpOrigin<kCapability, cpu::BFloat16> origin(max);
  std::vector<cpu::BFloat16> z(cpu::kBlock, cpu::narrow<cpu::BFloat16>(x));
  float kept[cpu::kBlock], scaled;
  const float sum = sum_of_exp_blocks<true, true>(cpu::Instructions<kCapability>(), z.data(), cpu::kBlock, origin, kept,
                                                  cpu::kBlock, &scaled);
  if (sum == sum) {
    EXPECT_FLOAT_EQ(sum, cpu::kBlock * kept[0]);
    const float expected = sum * finite_log_ratio(widen(z[0]) - max);
    EXPECT_NEAR(scaled, expected, 2e-6f * std::abs(expected));
  }
  return kept[cpu::kBlock - 1] / origin.at_max;
}

struct Variant {
  const char* name;
  float (*exp)(float);
  float (*tanh)(float);
  // In ulp, beyond 2.
  Wide exp_error_per_x = 0;

  Wide exp_bound(float x) const { return 2 + exp_error_per_x * std::abs(Wide(x)); }
};

std::vector<Variant> variants() {
  std::vector<Variant> all{{"baseline", kBaselineExp, kBaselineTanh}};
  all.push_back({"baseline, block", exp_in_block<cpu::Capability::baseline, float>, kBaselineTanh});
  if (has_fused()) all.push_back({"fused", fused_exp, fused_tanh});
  if (has_fused()) {
    constexpr auto kAvx2 = cpu::Capability::avx2;
    all.push_back({"AVX2, block", exp_in_block<kAvx2, float>, kBaselineTanh});
    all.push_back({"AVX2, block of bfloat16", exp_in_block<kAvx2, cpu::BFloat16>, kBaselineTanh, 0.25L});
    all.push_back({"AVX2, block of float16", exp_in_block<kAvx2, cpu::Float16>, kBaselineTanh, 0.25L});
  }
  if (has_avx512()) {
    all.push_back({"AVX-512", avx512_exp, kBaselineTanh, 0.25L});
    all.push_back({"AVX-512, block", exp_in_block<cpu::Capability::avx512, float>, kBaselineTanh});
  }
  return all;
}

// Distance from the exact value, in units of the last place of the float that is nearest to it.
Wide ulps(float got, Wide exact) {
  const Wide unit = std::ldexp(1.0L, std::max(std::ilogb(exact), -126) - 23);
  return std::abs(Wide(got) - exact) / unit;
}

// Every 499th float from `first` to `last`, which have the same sign.
template <typename F>
void for_floats(float first, float last, F&& f) {
  const uint32_t begin = std::bit_cast<uint32_t>(first), end = std::bit_cast<uint32_t>(last);
  for (uint32_t bits = begin; bits <= end; bits += 499) f(std::bit_cast<float>(bits));
}

TEST(Exp, IsWithinItsBound) {
  for (const auto& variant : variants()) {
    Wide worst = 0;
    float where = 0;
    const auto check = [&](float x) {
      const Wide error = ulps(variant.exp(x), std::exp(Wide(x))) / variant.exp_bound(x);
      if (!(error <= worst)) {
        worst = error;
        where = x;
      }
    };
    for_floats(-0.0f, -87.0f, check);
    // The floats are dense near 0; most of the interval by length lies in its last few binades.
    for (int i = 0; i <= 870000; ++i) check(float(i) * -1e-4f);
    EXPECT_LE(worst, 1.0L) << variant.name << " at " << where;
  }
}

// bfloat16 numbers, which are exact, around origins that are.
TEST(Exp, RelativeToAnOriginNearTheLargest) {
  if (!has_avx512()) GTEST_SKIP() << "no AVX-512";
  for (const float max : {0.0f, -0.0f, 0.0078125f, 1.0f, -1.0f, 20.5f, -97.0f, 332.0f, -1020.0f, 1020.0f}) {
    EXPECT_EQ(kept_exp(max, max), 1.0f) << max;
    EXPECT_EQ(kept_exp(-infinity<float>(), max), 0.0f) << max;
    EXPECT_TRUE(std::isnan(kept_exp(not_a_number<float>(), max))) << max;
    for (float below = 1 / 64.0f; below < 80; below *= 1.37f) {
      const float x = cpu::widen(cpu::narrow<cpu::BFloat16>(max - below));
      const Wide exact = std::exp(Wide(x) - max);
      // Relative to the largest, as exp's own argument is.
      EXPECT_LE(ulps(kept_exp(x, max), exact), 4 + 0.25L * (max - x)) << x << " of " << max;
    }
    const cpu::ExpOrigin<cpu::Capability::avx512, cpu::BFloat16> origin(max);
    EXPECT_LE(origin.value, max);
    EXPECT_NEAR(std::exp(double(max) - origin.value), origin.at_max, 1e-6 + 1e-7 * std::abs(max));
  }
  using Origin = cpu::ExpOrigin<cpu::Capability::avx512, cpu::BFloat16>;
  EXPECT_FALSE(Origin(1024).in_blocks());
  EXPECT_FALSE(Origin(infinity<float>()).in_blocks());
}

TEST(Exp, AtTheEnds) {
  for (const auto& variant : variants()) {
    EXPECT_EQ(variant.exp(0.0f), 1.0f);
    EXPECT_EQ(variant.exp(-0.0f), 1.0f);
    EXPECT_EQ(variant.exp(-infinity<float>()), 0.0f);
    EXPECT_EQ(variant.exp(std::numeric_limits<float>::lowest()), 0.0f);
    EXPECT_TRUE(std::isnan(variant.exp(not_a_number<float>())));
    EXPECT_TRUE(std::isnan(variant.exp(-not_a_number<float>())));
  }
}

TEST(Exp, IsZeroOrRightWhereTheResultFadesOut) {
  constexpr float kLeast = std::numeric_limits<float>::min();
  for (const auto& variant : variants()) {
    for (float x = -87.3f; x > -87.4f; x = std::nextafter(x, -100.0f)) {
      const float got = variant.exp(x);
      EXPECT_TRUE(got == 0.0f ? x < -87.336f : ulps(got, std::exp(Wide(x))) <= variant.exp_bound(x))
          << variant.name << " at " << x;
      EXPECT_TRUE(got == 0.0f || got >= kLeast / 2) << variant.name << " at " << x;
    }
    for_floats(-87.4f, -1e4f, [&](float x) { ASSERT_EQ(variant.exp(x), 0.0f) << variant.name << " at " << x; });
  }
}

TEST(Exp, OfFloat64IsTheLibrarys) {
  EXPECT_EQ(exp_nonpositive(-1.25), std::exp(-1.25));
  EXPECT_EQ(exp_nonpositive(-infinity<double>()), 0.0);
}

TEST(Tanh, IsWithinThreeUlp) {
  for (const auto& variant : variants()) {
    Wide worst = 0;
    float where = 0;
    for_floats(1e-30f, 20.0f, [&](float x) {
      const Wide error = ulps(variant.tanh(x), std::tanh(Wide(x)));
      if (!(error <= worst)) {
        worst = error;
        where = x;
      }
      ASSERT_EQ(variant.tanh(-x), -variant.tanh(x)) << variant.name << " at " << x;
    });
    EXPECT_LE(worst, 3.0L) << variant.name << " at " << where;
  }
}

TEST(Tanh, AtTheEnds) {
  for (const auto& variant : variants()) {
    EXPECT_EQ(variant.tanh(0.0f), 0.0f);
    EXPECT_EQ(variant.tanh(infinity<float>()), 1.0f);
    EXPECT_EQ(variant.tanh(-infinity<float>()), -1.0f);
    EXPECT_EQ(variant.tanh(1e30f), 1.0f);
    EXPECT_TRUE(std::isnan(variant.tanh(not_a_number<float>())));
  }
  EXPECT_EQ(hyperbolic_tangent(0.75), std::tanh(0.75));
}

TEST(ToDouble, OfAnyCount) {
  for (int shift = 0; shift < 63; ++shift) {
    for (const int64_t x : {int64_t(1) << shift, (int64_t(1) << shift) - 1, (int64_t(1) << shift) + 12345}) {
      if (x >= 0) EXPECT_EQ(to_double(x), double(x));
    }
  }
  EXPECT_EQ(to_double(0x7fffffffffffffff), 0x1p63);
}

template <typename Power>
void expect_accurate(Power power) {
  for (const double y : {-40.0, -1.5, -1.0, -0.5, -1e-3, 0.25, 3.0}) {
    for (double x = 0x1p-30; x < 0x1p60; x *= 1.0007) {
      const Wide truth = std::pow(Wide(x), Wide(y));
      if (truth < 1e-300L || truth > 1e300L) continue;
      const Wide limit = 1e-14L * (1 + std::fabs(Wide(y) * std::log2(Wide(x))));
      ASSERT_LE(std::fabs(power(x, y) / truth - 1), limit) << x << " ^ " << y;
    }
  }
  EXPECT_EQ(power(1e-7, 0.0), 1.0);
  EXPECT_EQ(power(0.0, 0.0), 1.0);
  EXPECT_EQ(power(1.0, -5.0), 1.0);
  EXPECT_EQ(power(1e-7, -200.0), infinity<double>());
  EXPECT_EQ(power(1e7, -200.0), 0.0);
  EXPECT_EQ(power(1e7, -1e308), 0.0);
  EXPECT_GT(power(1e7, -44.3), 0.0);  // subnormal
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target("avx2,fma"))) double fused_power(double x, double y) {
  return power(x, y);
}
#endif

TEST(Power, IsAccurate) {
  expect_accurate([](double x, double y) { return power(x, y); });
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  if (has_fused()) expect_accurate(fused_power);
#endif
}

}  // namespace
}  // namespace pdl
