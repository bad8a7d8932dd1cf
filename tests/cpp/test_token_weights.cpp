// Token weights against the formulas of the design, written out in long double.
#include "token_weights.h"

#include <gtest/gtest.h>

#include <vector>

namespace pdl {
namespace {

using Wide = long double;

const std::vector<int64_t> kCounts{1000, 0, 1, 37, 250, 0, 9};
const PowerLaw kDefault{1.0, 1e-7, 1.0, true, Normalize::corpus, infinity<double>(), int64_t(kCounts.size())};

int64_t sum(const std::vector<int64_t>& counts) {
  int64_t total = 0;
  for (const int64_t count : counts) total += count;
  return total;
}

// The steps in the order in which a kernel takes them.
std::vector<float> weights(const PowerLaw& law, const std::vector<int64_t>& counts, double blend = 1.0,
                           const float* fixed = nullptr) {
  CountSums sums;
  for (size_t t = 0; t < counts.size(); ++t) sums = sums + law.sums_of(counts[t], is_fixed(fixed, int64_t(t)));
  const int64_t total = sums.total;
  const WeightScale scale = law.scale(sums);
  double weight_sum = 0, share_sum = 0;
  for (size_t t = 0; t < counts.size(); ++t) {
    if (is_fixed(fixed, int64_t(t))) continue;
    const double share = law.share(counts[t], total);
    weight_sum += share == 0.0 ? 0.0 : share * law.weight(counts[t], scale);
    share_sum += share;
  }
  const double mean = law.mean(weight_sum, share_sum);
  std::vector<float> result(counts.size());
  for (size_t t = 0; t < counts.size(); ++t) {
    result[t] = is_fixed(fixed, int64_t(t)) ? fixed[t] : blended(law.weight(counts[t], scale), mean, blend);
  }
  return result;
}

// Design section 2.1, from the counts to the weights in one go.
std::vector<Wide> definition(const PowerLaw& law, const std::vector<int64_t>& counts, Wide blend = 1.0L,
                             const float* fixed = nullptr) {
  const Wide total = sum(counts), size = counts.size();
  std::vector<Wide> w(counts.size());
  Wide numerator = 0, denominator = 0;
  for (size_t t = 0; t < counts.size(); ++t) {
    Wide f = counts[t] + Wide(law.smoothing);
    if (law.relative) f /= total + law.smoothing * size;
    w[t] = std::min(std::pow(f + law.epsilon, -Wide(law.alpha)), Wide(law.max_weight));
    const Wide q = law.normalize == Normalize::corpus && total > 0 ? Wide(counts[t]) : 1.0L;
    if (fixed == nullptr || std::isnan(fixed[t])) {
      numerator += q * w[t];
      denominator += q;
    }
  }
  for (size_t t = 0; t < counts.size(); ++t) {
    if (law.normalize != Normalize::none) w[t] /= numerator / denominator;
    w[t] = blend * w[t] + (1 - blend);
    if (fixed != nullptr && !std::isnan(fixed[t])) w[t] = fixed[t];
  }
  return w;
}

void expect_near(const std::vector<float>& got, const std::vector<Wide>& expected) {
  ASSERT_EQ(got.size(), expected.size());
  // Relative, down to where float32 itself runs out.
  constexpr Wide kLeast = std::numeric_limits<float>::denorm_min();
  for (size_t t = 0; t < got.size(); ++t) {
    EXPECT_NEAR(got[t], expected[t], 1e-7L * std::abs(expected[t]) + kLeast) << "token " << t;
  }
}

TEST(TokenWeights, AgreeWithTheDefinition) {
  for (const double alpha : {0.25, 1.0, 1.5, 20.0}) {
    for (const double smoothing : {0.0, 1.0, 10.0}) {
      for (const bool relative : {false, true}) {
        for (const Normalize normalize : {Normalize::none, Normalize::corpus, Normalize::types}) {
          for (const double max_weight : {1.5, infinity<double>()}) {
            SCOPED_TRACE("alpha " + std::to_string(alpha) + ", smoothing " + std::to_string(smoothing) + ", relative " +
                         std::to_string(relative) + ", normalize " + std::to_string(int64_t(normalize)) +
                         ", max_weight " + std::to_string(max_weight));
            // The smallest epsilon whose power still fits a float32 weight.
            const double epsilon = alpha > 2.0 ? 0.02 : 1e-7;
            const PowerLaw law{alpha, epsilon, smoothing, relative, normalize, max_weight, int64_t(kCounts.size())};
            expect_near(weights(law, kCounts), definition(law, kCounts));
            expect_near(weights(law, kCounts, 0.3), definition(law, kCounts, 0.3L));
          }
        }
      }
    }
  }
}

TEST(TokenWeights, OfAKnownTable) {
  const PowerLaw law{1.0, 0.0, 1.0, true, Normalize::corpus, infinity<double>(), 3};
  // f = 1/2, 1/3, 1/6 and w = 2, 3, 6; a corpus token weighs (2 * 2 + 1 * 3) / 3 on average.
  const auto w = weights(law, {2, 1, 0});
  EXPECT_FLOAT_EQ(w[0], 6.0f / 7);
  EXPECT_FLOAT_EQ(w[1], 9.0f / 7);
  EXPECT_FLOAT_EQ(w[2], 18.0f / 7);
}

TEST(TokenWeights, ThePapersFormulaToTheLetter) {
  const PowerLaw law{1.0, 1e-7, 0.0, false, Normalize::none, infinity<double>(), int64_t(kCounts.size())};
  const auto w = weights(law, kCounts);
  EXPECT_FLOAT_EQ(w[0], 1e-3f);
  EXPECT_FLOAT_EQ(w[1], 1e7f);
  EXPECT_FLOAT_EQ(w[3], 1.0f / 37);
}

TEST(TokenWeights, NothingCountedIsUniform) {
  const std::vector<int64_t> zeros(5, 0);
  for (const double smoothing : {0.0, 1.0}) {
    for (const bool relative : {false, true}) {
      for (const Normalize normalize : {Normalize::corpus, Normalize::types}) {
        const PowerLaw law{1.0, 1e-7, smoothing, relative, normalize, infinity<double>(), 5};
        for (const float w : weights(law, zeros)) EXPECT_EQ(w, 1.0f);
      }
    }
  }
}

TEST(TokenWeights, AlphaZeroIsCrossEntropy) {
  PowerLaw law = kDefault;
  law.alpha = 0.0;
  for (const float w : weights(law, kCounts)) EXPECT_EQ(w, 1.0f);
}

TEST(TokenWeights, BlendZeroIsCrossEntropyAndOneTheWeights) {
  for (const float w : weights(kDefault, kCounts, 0.0)) EXPECT_EQ(w, 1.0f);
  expect_near(weights(kDefault, kCounts, 1.0), definition(kDefault, kCounts));
}

TEST(TokenWeights, MeansThatNormalisationPromises) {
  const auto corpus = weights(kDefault, kCounts);
  PowerLaw law = kDefault;
  law.normalize = Normalize::types;
  const auto types = weights(law, kCounts);
  Wide corpus_mean = 0, types_mean = 0;
  for (size_t t = 0; t < kCounts.size(); ++t) {
    corpus_mean += Wide(kCounts[t]) * corpus[t] / sum(kCounts);
    types_mean += Wide(types[t]) / kCounts.size();
  }
  EXPECT_NEAR(corpus_mean, 1.0L, 1e-6L);
  EXPECT_NEAR(types_mean, 1.0L, 1e-6L);
  EXPECT_NE(corpus[0], types[0]);
}

TEST(TokenWeights, MaxWeightIsAppliedBeforeNormalisation) {
  PowerLaw law = kDefault;
  law.normalize = Normalize::none;
  law.max_weight = 10.0;
  const auto w = weights(law, kCounts);
  EXPECT_EQ(w[1], 10.0f);
  EXPECT_EQ(w[2], 10.0f);
  EXPECT_LT(w[0], 2.0f);
  law.normalize = Normalize::types;
  expect_near(weights(law, kCounts), definition(law, kCounts));
}

TEST(TokenWeights, FixedEntriesAreKeptAndLeaveTheMean) {
  const float free = not_a_number<float>();
  const std::vector<float> fixed{free, 0.0f, free, 2.5f, free, free, free};
  EXPECT_FALSE(is_fixed(nullptr, 3));
  EXPECT_FALSE(is_fixed(fixed.data(), 0));
  EXPECT_TRUE(is_fixed(fixed.data(), 1));
  for (const double blend : {1.0, 0.4}) {
    const auto w = weights(kDefault, kCounts, blend, fixed.data());
    EXPECT_EQ(w[1], 0.0f);
    EXPECT_EQ(w[3], 2.5f);
    expect_near(w, definition(kDefault, kCounts, blend, fixed.data()));
  }
  EXPECT_NE(weights(kDefault, kCounts, 1.0, fixed.data())[0], weights(kDefault, kCounts)[0]);
}

TEST(TokenWeights, AllEntriesFixed) {
  const std::vector<float> fixed(kCounts.size(), 0.5f);
  for (const float w : weights(kDefault, kCounts, 1.0, fixed.data())) EXPECT_EQ(w, 0.5f);
}

TEST(TokenWeights, AllCountedEntriesFixed) {
  // Nothing of the corpus is left to take a mean over, so that the free entry keeps its own weight, 1 / (1 / 7).
  const float fixed[] = {0.5f, not_a_number<float>()};
  const PowerLaw law{1.0, 0.0, 1.0, true, Normalize::corpus, infinity<double>(), 2};
  EXPECT_FLOAT_EQ(weights(law, {5, 0}, 1.0, fixed)[1], 7.0f);
}

TEST(TokenWeights, CountsBeyondFloat32AreTold) {
  const std::vector<int64_t> counts{int64_t(1) << 40, 3 * (int64_t(1) << 40), 0};
  PowerLaw law = kDefault;
  law.vocab_size = 3;
  const auto w = weights(law, counts);
  // epsilon is felt at these frequencies, a count of one is not.
  EXPECT_NEAR(w[0] / w[1], 3.0, 1e-5);
  expect_near(w, definition(law, counts));
}

// Where (f + epsilon)^-alpha is 0 or infinite in float64 for some or all entries.
TEST(TokenWeights, AreFiniteAtExtremes) {
  const std::vector<int64_t> counts{1000000000000000, 999999999999999, 500000000000000, 3, 1, 0};
  for (const double alpha : {5.0, 30.0, 250.0}) {
    for (const double smoothing : {1e-3, 1.0}) {
      for (const bool relative : {false, true}) {
        for (const Normalize normalize : {Normalize::none, Normalize::corpus, Normalize::types}) {
          for (const double max_weight : {1e-30, 2.0, 1e200, infinity<double>()}) {
            SCOPED_TRACE("alpha " + std::to_string(alpha) + ", smoothing " + std::to_string(smoothing) + ", relative " +
                         std::to_string(relative) + ", normalize " + std::to_string(int64_t(normalize)) +
                         ", max_weight " + std::to_string(max_weight));
            const PowerLaw law{alpha, 0.0, smoothing, relative, normalize, max_weight, int64_t(counts.size())};
            std::vector<Wide> expected(counts.size());
            const Wide total = sum(counts);
            Wide mean = 0, shares = 0;
            std::vector<Wide> logs(counts.size());
            for (size_t t = 0; t < counts.size(); ++t) {
              const Wide f = (counts[t] + Wide(smoothing)) / (relative ? total + Wide(smoothing) * counts.size() : 1);
              logs[t] = std::min(-Wide(alpha) * std::log(f), std::log(Wide(max_weight)));
            }
            for (size_t t = 0; t < counts.size(); ++t) {
              const Wide q = normalize == Normalize::corpus ? Wide(counts[t]) : 1.0L;
              // long double's exponents reach to 1e4932, which alpha 250 of a count of 1e15 is within.
              mean += q * std::exp(logs[t]);
              shares += q;
            }
            mean /= shares;
            constexpr Wide kLargest = std::numeric_limits<float>::max();
            for (size_t t = 0; t < counts.size(); ++t) {
              const Wide w = std::exp(logs[t]) / (normalize == Normalize::none ? 1.0L : mean);
              expected[t] = std::min(w, kLargest);
            }
            expect_near(weights(law, counts), expected);
          }
        }
      }
    }
  }
}

TEST(TokenWeights, AreNoNumbersForNegativeCounts) {
  EXPECT_TRUE(std::isnan(weights(kDefault, {1000, 0, 1, -1, 250, 0, 9})[3]));
  constexpr int64_t kHuge = int64_t(1) << 62;
  for (const float w : weights(kDefault, {kHuge, kHuge, kHuge, 0, 0, 0, 0})) EXPECT_TRUE(std::isnan(w));
}

}  // namespace
}  // namespace pdl
