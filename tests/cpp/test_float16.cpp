// The 16-bit floats, singly and in blocks by each instruction set, against a slow oracle. It is a sorted table of all
// their values, and does not use the bits of floats.
#include "cpu/blocks.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

namespace pdl::cpu {
namespace {

template <typename T>
struct Layout;
template <>
struct Layout<BFloat16> {
  static constexpr int kFraction = 7, kBias = 127;
};
template <>
struct Layout<Float16> {
  static constexpr int kFraction = 10, kBias = 15;
};

template <typename T>
constexpr uint16_t kInfinity = uint16_t(0x7fffu >> Layout<T>::kFraction << Layout<T>::kFraction);

// The value of a non-negative pattern below NaN. Infinity's is what the next number would be: the point from which
// half a step down rounds to it.
template <typename T>
double value(uint16_t bits) {
  constexpr int kFraction = Layout<T>::kFraction;
  const int exponent = bits >> kFraction, fraction = bits & ((1 << kFraction) - 1);
  const int lead = exponent == 0 ? 0 : 1 << kFraction;
  return std::ldexp(lead + fraction, std::max(exponent, 1) - Layout<T>::kBias - kFraction);
}

template <typename T>
std::vector<double> values() {
  std::vector<double> all;
  for (uint16_t bits = 0; bits <= kInfinity<T>; ++bits) all.push_back(value<T>(bits));
  return all;
}

// The nearest pattern, of two that are equally near the one with the even last bit.
template <typename T>
uint16_t nearest(float x, const std::vector<double>& all) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double magnitude = std::abs(double(x));
  if (magnitude >= all.back()) return sign | kInfinity<T>;
  const auto above = std::upper_bound(all.begin(), all.end(), magnitude);
  const auto high = uint16_t(above - all.begin()), low = uint16_t(high - 1);
  const double down = magnitude - all[low], up = all[high] - magnitude;
  const bool take_low = down < up || (down == up && low % 2 == 0);
  return sign | (take_low ? low : high);
}

template <typename T>
class Float16Of : public testing::Test {};
using Types = testing::Types<BFloat16, Float16>;
TYPED_TEST_SUITE(Float16Of, Types);

TYPED_TEST(Float16Of, EveryPatternWidensExactlyAndComesBack) {
  using T = TypeParam;
  for (uint32_t i = 0; i < 0x10000; ++i) {
    const auto bits = uint16_t(i), magnitude = uint16_t(bits & 0x7fff);
    const float wide = widen(T{bits});
    if (magnitude > kInfinity<T>) {
      ASSERT_TRUE(std::isnan(wide)) << bits;
      const uint16_t back = narrow<T>(wide).bits;
      ASSERT_GT(back & 0x7fff, kInfinity<T>) << bits;
      ASSERT_EQ(back & 0x8000, bits & 0x8000) << bits;
      continue;
    }
    const double expected = magnitude == kInfinity<T> ? infinity<double>() : value<T>(magnitude);
    ASSERT_EQ(std::abs(double(wide)), expected) << bits;
    ASSERT_EQ(std::signbit(wide), bits >= 0x8000) << bits;
    ASSERT_EQ(narrow<T>(wide).bits, bits);
  }
}

TYPED_TEST(Float16Of, NarrowRoundsToNearestEven) {
  using T = TypeParam;
  const auto all = values<T>();
  const auto check = [&](float x) {
    ASSERT_EQ(narrow<T>(x).bits, nearest<T>(x, all)) << x;
    ASSERT_EQ(narrow<T>(-x).bits, nearest<T>(-x, all)) << x;
  };
  for (size_t i = 0; i + 1 < all.size(); ++i) {
    // bfloat16's smallest steps have midpoints that float holds too: it has 16 bits more.
    const auto middle = float((all[i] + all[i + 1]) / 2);
    check(middle);
    check(std::nextafter(middle, 0.0f));
    check(std::nextafter(middle, infinity<float>()));
  }
  for (uint32_t bits = 0; bits < 0x7f800000u; bits += 1021) check(std::bit_cast<float>(bits));
}

TYPED_TEST(Float16Of, NarrowAtTheEnds) {
  using T = TypeParam;
  EXPECT_EQ(narrow<T>(infinity<float>()).bits, kInfinity<T>);
  EXPECT_EQ(narrow<T>(-infinity<float>()).bits, 0x8000 | kInfinity<T>);
  EXPECT_EQ(narrow<T>(std::numeric_limits<float>::max()).bits, kInfinity<T>);
  EXPECT_EQ(narrow<T>(-0.0f).bits, 0x8000);
  for (const uint32_t nan : {0x7f800001u, 0x7fffffffu, 0x7fc00000u, 0xff800001u, 0xffffffffu}) {
    const float narrowed = widen(narrow<T>(std::bit_cast<float>(nan)));
    EXPECT_TRUE(std::isnan(narrowed)) << nan;
    EXPECT_EQ(std::signbit(narrowed), (nan >> 31) == 1) << nan;
  }
}

TYPED_TEST(Float16Of, OrderIsThatOfTheNumbersWithNanBelow) {
  using T = TypeParam;
  constexpr uint16_t kSign = 0x8000;
  const int16_t lowest = order(T{kSign | kInfinity<T>});
  int16_t last = lowest;
  for (int i = kInfinity<T> - 1; i >= 0; --i) {
    ASSERT_GT(order(T{uint16_t(kSign | i)}), last) << i;
    last = order(T{uint16_t(kSign | i)});
  }
  for (int i = 0; i <= kInfinity<T>; ++i) {
    ASSERT_GT(order(T{uint16_t(i)}), last) << i;
    last = order(T{uint16_t(i)});
  }
  for (uint32_t i = 0; i < 0x10000; ++i) {
    const T x{uint16_t(i)};
    ASSERT_EQ(of_order<T>(order(x)).bits, x.bits);
    if ((i & 0x7fff) > kInfinity<T>) {
      ASSERT_LT(order(x), lowest) << i;
    }
  }
}

template <Capability kCapability>
struct Blocks {
  static constexpr Instructions<kCapability> kInstructions{};

  static bool supported() {
#ifdef PDL_SIMD_TARGETS
    if (kCapability >= Capability::avx2 && !(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"))) {
      return false;
    }
    if (kCapability >= Capability::avx512 && !__builtin_cpu_supports("avx512bw")) return false;
    return kCapability < Capability::avx512_bf16 || __builtin_cpu_supports("avx512bf16");
#else
    return kCapability == Capability::baseline;
#endif
  }

  template <typename T>
  static void widen_every_pattern() {
    for (uint32_t first = 0; first < 0x10000; first += kBlock) {
      T x[kBlock];
      float y[kBlock];
      for (int k = 0; k < kBlock; ++k) x[k].bits = uint16_t(first + k);
      widen_block(kInstructions, x, y);
      for (int k = 0; k < kBlock; ++k) {
        const float expected = widen(x[k]);
        ASSERT_EQ(std::isnan(y[k]), std::isnan(expected)) << first + k;
        if (!std::isnan(expected)) {
          ASSERT_EQ(std::bit_cast<uint32_t>(y[k]), std::bit_cast<uint32_t>(expected));
        }
      }
    }
  }

  template <typename T>
  static void narrow_like_one_by_one() {
    constexpr bool kFlushes = kCapability == Capability::avx512_bf16 && std::is_same_v<T, BFloat16>;
    float x[kBlock];
    T y[kBlock];
    int filled = 0;
    const auto check = [&](float value) {
      x[filled++] = value;
      if (filled < kBlock) return;
      filled = 0;
      narrow_block<false>(kInstructions, x, y);
      for (int k = 0; k < kBlock; ++k) {
        if (std::isnan(x[k])) {
          ASSERT_TRUE(std::isnan(widen(y[k]))) << k;
        } else if (kFlushes && std::abs(x[k]) < std::numeric_limits<float>::min()) {
          ASSERT_EQ(y[k].bits, std::signbit(x[k]) ? 0x8000 : 0) << x[k];
        } else {
          ASSERT_EQ(y[k].bits, narrow<T>(x[k]).bits) << x[k];
        }
      }
    };
    // All that is representable, all midpoints and their neighbours, of both signs; and what lies between.
    const auto all = values<T>();
    for (const float sign : {1.0f, -1.0f}) {
      for (size_t i = 0; i + 1 < all.size(); ++i) {
        const auto middle = float((all[i] + all[i + 1]) / 2);
        for (const float value :
             {float(all[i]), middle, std::nextafter(middle, 0.0f), std::nextafter(middle, infinity<float>())}) {
          check(sign * value);
        }
      }
    }
    for (uint64_t bits = 0; bits < 0x100000000u; bits += 1021) check(std::bit_cast<float>(uint32_t(bits)));
    for (int k = 0; k < kBlock; ++k) check(k % 2 ? infinity<float>() : -infinity<float>());
  }

  // Whole blocks and nothing behind them, or nothing at all.
  template <typename T>
  static void scale_like_one_by_one(bool streamed) {
    constexpr int64_t kCount = 5 * kBlock + 7, kWhole = 5 * kBlock;
    alignas(64) float x[kCount];
    alignas(64) T y[kCount];
    const T untouched{0x1234};
    for (int64_t i = 0; i < kCount; ++i) {
      x[i] = std::ldexp(float(i % 13) - 6.3f, int(i % 11) - 5);
      y[i] = untouched;
    }
    x[3] = infinity<float>();
    x[40] = not_a_number<float>();
    const int64_t scaled = scale_blocks(kInstructions, x, 1.7f, 0.3f, y, kCount, streamed);
    finish_streaming();
    ASSERT_TRUE(scaled == 0 || scaled == kWhole) << scaled;
    for (int64_t i = 0; i < kCount; ++i) {
      if (i < scaled && std::isnan(x[i])) {
        ASSERT_TRUE(std::isnan(widen(y[i]))) << i;
      } else {
        ASSERT_EQ(y[i].bits, (i < scaled ? narrow<T>(std::fmaf(x[i], 1.7f, -0.3f)) : untouched).bits) << i;
      }
    }
  }
};

template <typename B>
class BlocksOf : public testing::Test {};
using Capabilities = testing::Types<Blocks<Capability::baseline>, Blocks<Capability::avx2>, Blocks<Capability::avx512>,
                                    Blocks<Capability::avx512_bf16>>;
TYPED_TEST_SUITE(BlocksOf, Capabilities);

TYPED_TEST(BlocksOf, WidenEveryPattern) {
  if (!TypeParam::supported()) GTEST_SKIP();
  TypeParam::template widen_every_pattern<BFloat16>();
  TypeParam::template widen_every_pattern<Float16>();
}

TYPED_TEST(BlocksOf, NarrowLikeOneByOne) {
  if (!TypeParam::supported()) GTEST_SKIP();
  TypeParam::template narrow_like_one_by_one<BFloat16>();
  TypeParam::template narrow_like_one_by_one<Float16>();
}

TYPED_TEST(BlocksOf, ScaleLikeOneByOne) {
  if (!TypeParam::supported()) GTEST_SKIP();
  for (const bool streamed : {false, true}) {
    TypeParam::template scale_like_one_by_one<BFloat16>(streamed);
    TypeParam::template scale_like_one_by_one<Float16>(streamed);
  }
}

TEST(WideTypes, PassThrough) {
  EXPECT_EQ(widen(1.1f), 1.1f);
  EXPECT_EQ(widen(1.1), 1.1);
  EXPECT_EQ(narrow<float>(1.1f), 1.1f);
  EXPECT_EQ(narrow<double>(1.1), 1.1);
}

}  // namespace
}  // namespace pdl::cpu
