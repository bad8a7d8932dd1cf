// The row's mathematics against definitions written out in long double, and its gradient against finite differences.
#include "row_loss.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "targets.h"

namespace pdl {
namespace {

using Wide = long double;

template <typename A>
std::vector<A> random_logits(int64_t n, double spread, double offset, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(offset, spread);
  std::vector<A> z(n);
  for (A& value : z) value = A(normal(generator));
  return z;
}

template <typename A>
RowOptions<A> smoothed(A label_smoothing, int64_t vocab_size) {
  return RowOptions<A>::of({.label_smoothing = label_smoothing}, vocab_size);
}

// The statistics that a kernel gathers from the z's from begin to before end.
template <typename A>
WideStatistics<A> gather(const std::vector<A>& z, int64_t begin, int64_t end, A centre,
                         const ClassWeights<A>& weights = {}) {
  WideStatistics<A> share;
  for (int64_t j = begin; j < end; ++j) {
    if (z[j] > share.max) {
      share.max = z[j];
      share.argmax = int32_t(j);
    }
  }
  for (int64_t j = begin; j < end; ++j) {
    const A below = z[j] - exp_shift(share.max), e = exp_nonpositive(below);
    share.sum += e;
    share.scaled += e * finite_log_ratio(below);
    share.centred += ClassWeights<A>::times(weights.at(j), z[j] - centre);
    share.class_weight += weights.at(j);
  }
  return share;
}

template <typename A>
WideStatistics<A> gather(const std::vector<A>& z, A centre = 0, const ClassWeights<A>& weights = {}) {
  return gather(z, 0, int64_t(z.size()), centre, weights);
}

template <typename A>
void expect_same(const WideStatistics<A>& got, const WideStatistics<A>& expected) {
  const A tolerance = 64 * std::numeric_limits<A>::epsilon();
  EXPECT_EQ(got.max, expected.max);
  EXPECT_EQ(got.argmax, expected.argmax);
  EXPECT_NEAR(got.sum, expected.sum, tolerance * expected.sum);
  EXPECT_NEAR(got.scaled, expected.scaled, tolerance * (1 + std::abs(expected.scaled)));
  EXPECT_EQ(got.class_weight, expected.class_weight);
  if (std::isfinite(expected.centred)) {
    EXPECT_NEAR(got.centred, expected.centred, tolerance * (1 + std::abs(expected.centred)));
  } else {
    EXPECT_EQ(got.centred, expected.centred);
  }
}

// The definitions of design section 2, for one row.
struct Definition {
  Wide label_smoothing = 0, z_loss = 0, scale = 1, softcap = 0;
  SmoothingWeight smoothing_weight = SmoothingWeight::target;
  std::vector<float> class_weight;
  std::vector<float> offset;

  Wide transform(Wide x, size_t j) const {
    const Wide scaled = scale * x;
    return (softcap == 0 ? scaled : softcap * std::tanh(scaled / softcap)) + (offset.empty() ? 0 : Wide(offset[j]));
  }
  static Wide lse(const std::vector<Wide>& z) {
    const Wide max = *std::max_element(z.begin(), z.end());
    Wide sum = 0;
    for (const Wide value : z) sum += std::exp(value - max);
    return max + std::log(sum);
  }
  Wide ce(const std::vector<Wide>& z, size_t target, Wide w = 1) const {
    const Wide total = lse(z);
    Wide uniform = 0;
    for (size_t j = 0; j < z.size(); ++j) {
      const Wide u = smoothing_weight == SmoothingWeight::target ? w
                     : smoothing_weight == SmoothingWeight::none ? Wide(1)
                                                                 : Wide(class_weight[j]);
      uniform += u * (total - z[j]) / Wide(z.size());
    }
    return label_smoothing == 0 ? w * (total - z[target])
                                : (1 - label_smoothing) * w * (total - z[target]) + label_smoothing * uniform;
  }
  std::vector<Wide> transform(const std::vector<Wide>& x) const {
    std::vector<Wide> z(x.size());
    for (size_t j = 0; j < x.size(); ++j) z[j] = transform(x[j], j);
    return z;
  }
};

template <typename A>
std::vector<Wide> widened(const std::vector<A>& z) {
  return {z.begin(), z.end()};
}

template <typename A>
class RowLossOf : public testing::Test {};
using Accumulators = testing::Types<float, double>;
TYPED_TEST_SUITE(RowLossOf, Accumulators);

TYPED_TEST(RowLossOf, MergingAnySplitInAnyOrderEqualsOneShare) {
  using A = TypeParam;
  std::mt19937 generator(1);
  for (const double spread : {0.1, 3.0, 40.0}) {
    auto z = random_logits<A>(257, spread, 5.0, 2);
    z[3] = z[200] = -infinity<A>();
    const A centre = z[10];
    std::vector<A> finite = z;
    // Sums of -inf are compared once; elsewhere the centred sum has to be a number to mean something.
    finite[3] = finite[200] = -80;
    for (const auto& row : {z, finite}) {
      const auto whole = gather(row, centre);
      for (int trial = 0; trial < 200; ++trial) {
        std::vector<int64_t> cuts{0, int64_t(row.size())};
        for (int cut = 0; cut < trial % 17; ++cut) cuts.push_back(int64_t(generator() % row.size()));
        std::sort(cuts.begin(), cuts.end());
        std::vector<WideStatistics<A>> shares;
        for (size_t k = 0; k + 1 < cuts.size(); ++k) shares.push_back(gather(row, cuts[k], cuts[k + 1], centre));
        while (shares.size() > 1) {
          std::shuffle(shares.begin(), shares.end(), generator);
          const auto last = shares.back();
          shares.pop_back();
          shares.back() = merge(shares.back(), last);
        }
        expect_same(shares[0], whole);
      }
    }
  }
}

TYPED_TEST(RowLossOf, StatisticsAgreeWithTheDefinition) {
  using A = TypeParam;
  const auto z = random_logits<A>(100, 3.0, 0.0, 3);
  WideStatistics<A> row;
  for (int64_t j = 0; j < 100; ++j) row = merge(row, gather(z, j, j + 1, z[7]));
  Wide sum = 0, centred = 0, entropy = 0;
  const auto largest = std::max_element(z.begin(), z.end());
  for (const Wide value : z) {
    sum += std::exp(value - Wide(*largest));
    centred += value - Wide(z[7]);
  }
  for (const Wide value : z) {
    const Wide log_p = value - Wide(*largest) - std::log(sum);
    entropy -= std::exp(log_p) * log_p;
  }
  EXPECT_EQ(row.max, *largest);
  EXPECT_EQ(row.argmax, largest - z.begin());
  EXPECT_NEAR(row.sum, sum, 64 * std::numeric_limits<A>::epsilon() * sum);
  EXPECT_NEAR(row.centred, centred, 64 * std::numeric_limits<A>::epsilon() * std::abs(centred));
  EXPECT_NEAR(entropy_of(row, A(std::log(sum))), entropy, 64 * std::numeric_limits<A>::epsilon() * entropy);
  EXPECT_EQ(entropy_of(static_cast<const RowStatistics<A>&>(row), A(std::log(sum))), A(0));
}

TYPED_TEST(RowLossOf, EntropyOfOneFiniteLogitIsZero) {
  using A = TypeParam;
  std::vector<A> z(9, -infinity<A>());
  z[4] = A(3);
  EXPECT_EQ(entropy_of(gather(z), A(0)), A(0));
  // Rounding may leave the difference below 0.
  WideStatistics<A> row = gather(z);
  row.scaled = A(1e-3);
  EXPECT_EQ(entropy_of(row, A(0)), A(0));
}

TYPED_TEST(RowLossOf, MergingSurvivesSharesOfMinusInfinity) {
  using A = TypeParam;
  const std::vector<A> masked(8, -infinity<A>());
  const auto z = random_logits<A>(8, 2.0, -4.0, 4);
  const auto dead = gather(masked), live = gather(z);
  const auto expect_live = [&](const WideStatistics<A>& got) {
    EXPECT_EQ(got.max, live.max);
    EXPECT_EQ(got.sum, live.sum);
    EXPECT_EQ(got.scaled, live.scaled);
    EXPECT_EQ(got.argmax, live.argmax);
  };
  expect_live(merge(dead, live));
  expect_live(merge(live, dead));
  expect_live(merge(WideStatistics<A>{}, merge(dead, merge(live, dead))));
  const auto both = merge(dead, dead);
  EXPECT_EQ(both.max, -infinity<A>());
  EXPECT_EQ(both.sum, A(0));
  EXPECT_EQ(both.scaled, A(0));
}

TYPED_TEST(RowLossOf, TiesTakeTheLowestIndex) {
  using A = TypeParam;
  WideStatistics<A> low, high;
  low.max = high.max = A(2);
  low.sum = high.sum = A(1);
  low.argmax = 5;
  high.argmax = 9;
  EXPECT_EQ(merge(low, high).argmax, 5);
  EXPECT_EQ(merge(high, low).argmax, 5);
  EXPECT_EQ(merge(low, high).sum, A(2));
  low.max = A(1);
  EXPECT_EQ(merge(low, high).argmax, 9);
  EXPECT_EQ(merge(high, low).argmax, 9);
}

TYPED_TEST(RowLossOf, LossAgreesWithTheDefinition) {
  using A = TypeParam;
  const A tolerance = 64 * std::numeric_limits<A>::epsilon();
  for (const double offset : {0.0, 1e4, -1e4}) {
    for (const double spread : {0.01, 1.0, 20.0}) {
      for (const double label_smoothing : {0.0, 0.1, 0.9}) {
        const auto z = random_logits<A>(997, spread, offset, 5);
        Definition definition;
        definition.label_smoothing = A(label_smoothing);
        for (const int64_t target :
             {int64_t(0), int64_t(500), int64_t(996), std::max_element(z.begin(), z.end()) - z.begin()}) {
          SCOPED_TRACE("offset " + std::to_string(offset) + ", spread " + std::to_string(spread) + ", smoothing " +
                       std::to_string(label_smoothing) + ", target " + std::to_string(target));
          const auto loss =
              row_loss(gather(z, smoothing_centre(z[target])), z[target], A(1), smoothed(A(label_smoothing), 997));
          const auto wide = widened(z);
          const Wide lse = Definition::lse(wide), nll = lse - wide[target], ce = definition.ce(wide, target);
          const Wide log_sum = lse - *std::max_element(wide.begin(), wide.end());
          EXPECT_NEAR(loss.log_sum, log_sum, tolerance * (1 + log_sum));
          EXPECT_NEAR(loss.nll, nll, tolerance * (1 + nll));
          EXPECT_NEAR(loss.ce, ce, tolerance * (1 + ce));
        }
      }
    }
  }
}

TYPED_TEST(RowLossOf, MaskedVocabulary) {
  using A = TypeParam;
  auto z = random_logits<A>(50, 1.0, 0.0, 6);
  std::vector<A> kept(z.begin() + 20, z.end());
  std::fill(z.begin(), z.begin() + 20, -infinity<A>());
  const auto masked = row_loss(gather(z, z[30]), z[30], A(1), smoothed(A(0), 50));
  const auto short_row = row_loss(gather(kept, z[30]), z[30], A(1), smoothed(A(0), 30));
  EXPECT_NEAR(masked.nll, short_row.nll, 8 * std::numeric_limits<A>::epsilon() * (1 + short_row.nll));
  EXPECT_EQ(masked.ce, masked.nll);
  // A masked target is impossible, and smoothing gives mass to the impossible: both cost infinitely much.
  EXPECT_EQ(row_loss(gather(z, smoothing_centre(z[0])), z[0], A(1), smoothed(A(0), 50)).nll, infinity<A>());
  EXPECT_EQ(row_loss(gather(z, z[30]), z[30], A(1), smoothed(A(0.1), 50)).ce, infinity<A>());
}

TYPED_TEST(RowLossOf, NotANumberIsNotHidden) {
  using A = TypeParam;
  auto z = random_logits<A>(50, 1.0, 0.0, 6);
  z[20] = not_a_number<A>();
  EXPECT_TRUE(std::isnan(row_loss(gather(z), z[30], A(1), smoothed(A(0), 50)).nll));
  EXPECT_TRUE(std::isnan(
      row_loss(merge(gather(z, 0, 25, A(0)), gather(z, 25, 50, A(0))), z[30], A(1), smoothed(A(0), 50)).nll));
}

TYPED_TEST(RowLossOf, GradientAgreesWithSoftmax) {
  using A = TypeParam;
  const A eps = std::numeric_limits<A>::epsilon();
  for (const double spread : {0.1, 10.0}) {
    const auto z = random_logits<A>(997, spread, 100.0, 7);
    const int64_t target = std::max_element(z.begin(), z.end()) - z.begin();
    const auto wide = widened(z);
    const Wide lse = Definition::lse(wide);
    const A s = A(0.1);
    const auto options = RowOptions<A>::of({.label_smoothing = s, .z_loss = A(0.002)}, 997);
    const auto saved = row_loss(gather(z, z[target]), z[target], A(0.6), options);
    const auto row = gradient_row(saved, A(0.5), A(1), Factors<A>{1, 1, 0, 1}, options);
    const Wide b = 0.3, a = b + 2 * Wide(options.z_loss) * lse;
    for (int64_t j = 0; j < 997; ++j) {
      const Wide p = std::exp(wide[j] - lse), uniform = Wide(s) / 997;
      const Wide q = uniform + (j == target ? 1 - Wide(s) : 0);
      const Wide expected = a * p - b * q;
      const A got = j == target ? row.at_target(z[j]) : row.off_target(z[j]);
      // exp's relative error grows with its argument.
      const Wide tolerance = 16 * eps * (p * (1 + lse - wide[j]) + q);
      EXPECT_NEAR(got, expected, tolerance) << j;
      EXPECT_GT(std::abs(expected), 4 * tolerance) << "element " << j << " would pass at zero";
    }
  }
}

// Of numbers as far from the largest one as their spacing at its size allows.
TEST(GradientRowOfHalves, IsWithinAnEighthOfHalfAnUlpOfFloat16) {
  for (const float max : {0.0f, -0.0f, 0.5f, 7.25f, -40.5f, 301.0f, -1999.0f, 4090.0f, 30000.0f, -60000.0f, 65504.0f,
                          65536.0f, 131072.0f, -0x1p40f, 0x1.fep127f, -0x1.fep127f}) {
    const GradientRow<float> whole{.max = max, .a_largest = 0.75f, .b_smoothed = 0, .sum = 2, .b_target = 1, .rest = 0};
    const GradientRowOfHalves row(whole);
    const float spacing =
        std::abs(max) < 1 ? 0.125f : std::ldexp(1.0f, std::ilogb(max) - (std::abs(max) > 65504 ? 7 : 10));
    for (int steps = 0; steps < 4000; ++steps) {
      const float z = max - float(steps) * spacing;
      if (z < max - 87) break;
      const Wide exact = 0.75L * std::exp(Wide(z) - Wide(max));
      EXPECT_NEAR(row.off_target(z) / exact, 1, 0x1p-15) << z << " of " << max;
    }
    EXPECT_EQ(row.off_target(-infinity<float>()), 0) << max;
    EXPECT_TRUE(std::isnan(row.off_target(not_a_number<float>()))) << max;
    // On the host subnormal results are kept.
    EXPECT_NEAR(row.off_target(max - 1000 - std::abs(max) / 2), 0, 1e-38) << max;
  }
}

TEST(GradientRowOfHalves, IsNanWhereTheRowHasNoLoss) {
  for (const float max : {infinity<float>(), -infinity<float>()}) {
    const GradientRow<float> whole{
        .max = max, .a_largest = not_a_number<float>(), .b_smoothed = 0, .sum = 1, .b_target = 1, .rest = 0};
    for (const float z : {0.0f, max, -3.0f}) EXPECT_TRUE(std::isnan(GradientRowOfHalves(whole).off_target(z)));
  }
}

struct Options {
  double label_smoothing, z_loss, scale, softcap;
  bool offset;
  SmoothingWeight smoothing_weight = SmoothingWeight::target;
};

class RowGradient : public testing::TestWithParam<Options> {};

// A whole batch of three rows through statistics, loss, factors and gradient, against central differences of the
// batch's loss as the design defines it.
TEST_P(RowGradient, AgreesWithFiniteDifferences) {
  const Options options = GetParam();
  constexpr int64_t kRows = 3, kVocab = 11;
  const int64_t targets[kRows] = {4, 0, 10};
  double token_weight[kRows] = {0.25, 3.0, 1.5};
  const double row_weight[kRows] = {1.0, 0.5, 2.0};
  const double upstream = -1.7, normalizer[] = {6.5, 4.5};
  Definition definition{.label_smoothing = options.label_smoothing,
                        .z_loss = options.z_loss,
                        .scale = options.scale,
                        .softcap = options.softcap,
                        .smoothing_weight = options.smoothing_weight};
  ClassWeights<double> class_weights;
  if (options.smoothing_weight == SmoothingWeight::of_class) {
    definition.class_weight = random_logits<float>(kVocab, 0.3, 2.0, 12);
    class_weights.of_class = definition.class_weight.data();
    for (int64_t i = 0; i < kRows; ++i) token_weight[i] = definition.class_weight[targets[i]];
  }
  if (options.offset) definition.offset = random_logits<float>(kVocab, 1.0, 0.0, 8);
  const LogitTransform<double> transform{options.scale, options.softcap,
                                         options.offset ? definition.offset.data() : nullptr};
  std::vector<std::vector<Wide>> logits;
  for (int64_t i = 0; i < kRows; ++i)
    logits.push_back(widened(random_logits<double>(kVocab, 3.0, 0.0, 9 + unsigned(i))));

  for (const Reduction reduction : {Reduction::sum, Reduction::mean, Reduction::token_mean}) {
    for (const double* divisor : {static_cast<const double*>(nullptr), normalizer}) {
      SCOPED_TRACE("reduction " + std::to_string(int64_t(reduction)) + (divisor == nullptr ? "" : ", normalizer"));
      const auto batch_loss = [&](const std::vector<std::vector<Wide>>& x, const std::vector<Wide>& weights) {
        Wide weighted = 0, weight_sum = 0, squares = 0;
        for (int64_t i = 0; i < kRows; ++i) {
          const auto z = definition.transform(x[i]);
          const Wide w = token_weight[i] * weights[i];
          weighted += weights[i] * definition.ce(z, targets[i], token_weight[i]);
          weight_sum += w;
          squares += definition.z_loss * Definition::lse(z) * Definition::lse(z);
        }
        if (reduction == Reduction::sum) return weighted + squares;
        if (divisor != nullptr) return weighted / divisor[0] + squares / divisor[1];
        return weighted / (reduction == Reduction::mean ? weight_sum : kRows) + squares / kRows;
      };

      std::vector<WideStatistics<double>> statistics;
      std::vector<SavedRow<double>> saved;
      const auto row_options = RowOptions<double>::of({.label_smoothing = options.label_smoothing,
                                                       .label_smoothing_weight = options.smoothing_weight,
                                                       .z_loss = options.z_loss},
                                                      kVocab);
      RowSums sums;
      double terms = 0;
      for (int64_t i = 0; i < kRows; ++i) {
        std::vector<double> z(kVocab);
        for (int64_t j = 0; j < kVocab; ++j) z[j] = transform.apply(double(logits[i][j]), j);
        statistics.push_back(gather(z, smoothing_centre(z[targets[i]]), class_weights));
        saved.push_back(row_loss(statistics[i], z[targets[i]], token_weight[i], row_options));
        sums.add(token_weight[i], row_weight[i], saved[i].ce, saved[i].lse(), 1.0);
        terms += row_term(row_weight[i], saved[i].ce, saved[i].lse(), row_options);
      }
      const auto factors = factors_of(reduction, sums, divisor, false);
      const std::vector<Wide> weights(row_weight, row_weight + kRows);
      if (reduction == Reduction::sum) {
        EXPECT_NEAR(terms, batch_loss(logits, weights), 1e-13 * std::abs(terms));
      }

      const auto difference = [&](Wide& variable) {
        const Wide step = 1e-5L, middle = variable;
        variable = middle + step;
        const Wide above = batch_loss(logits, weights);
        variable = middle - step;
        const Wide below = batch_loss(logits, weights);
        variable = middle;
        return upstream * (above - below) / (2 * step);
      };
      for (int64_t i = 0; i < kRows; ++i) {
        const auto row = gradient_row(saved[i], row_weight[i], upstream, factors, row_options);
        for (int64_t j = 0; j < kVocab; ++j) {
          const double x = double(logits[i][j]), z = transform.apply(x, j);
          const double got =
              (j == targets[i] ? row.at_target(z) : row.off_target(z, class_weights.at(j))) * transform.derivative(x);
          const Wide expected = difference(logits[i][j]);
          EXPECT_NEAR(got, expected, 1e-8L * (0.01L + std::abs(expected))) << "row " << i << ", element " << j;
          EXPECT_NE(got, 0.0);
        }
      }

      std::vector<Wide> varied = weights;
      for (int64_t i = 0; i < kRows; ++i) {
        const Wide step = 1e-5L;
        varied[i] = weights[i] + step;
        const Wide above = batch_loss(logits, varied);
        varied[i] = weights[i] - step;
        const Wide slope = upstream * (above - batch_loss(logits, varied)) / (2 * step);
        varied[i] = weights[i];
        EXPECT_NEAR(upstream * (saved[i].ce - token_weight[i] * factors.correction) * factors.weighted, slope,
                    1e-8L * (0.01L + std::abs(slope)));
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Combinations, RowGradient,
                         testing::Values(Options{0, 0, 1, 0, false}, Options{0.1, 0, 1, 0, false},
                                         Options{0, 0.02, 1, 0, false}, Options{0, 0, 0.6, 0, false},
                                         Options{0, 0, 1, 4, false}, Options{0, 0, 1, 0, true},
                                         Options{0.2, 0.01, 1.3, 5, true},
                                         Options{0.2, 0.01, 1.3, 5, true, SmoothingWeight::none},
                                         Options{0.2, 0.01, 1.3, 5, true, SmoothingWeight::of_class}));

TYPED_TEST(RowLossOf, TransformScalesCapsAndOffsets) {
  using A = TypeParam;
  const float offset[] = {1.5f};
  EXPECT_EQ((LogitTransform<A>{A(2), A(0), offset}.apply(A(3), 0)), A(7.5));
  // -inf stays masked without a cap, and a cap bounds it.
  EXPECT_EQ(LogitTransform<A>{}.apply(-infinity<A>(), 0), -infinity<A>());
  EXPECT_EQ((LogitTransform<A>{A(1), A(30), nullptr}.apply(-infinity<A>(), 0)), A(-30));
}

void expect_factors(const Factors<double>& got, double weighted, double rows, double correction) {
  EXPECT_DOUBLE_EQ(got.weighted, weighted);
  EXPECT_DOUBLE_EQ(got.rows, rows);
  EXPECT_DOUBLE_EQ(got.correction, correction);
}

constexpr const double* kNoNormalizer = nullptr;
// weighted_ce, weight, lse_squares, rows, modulation
constexpr RowSums kSums{12.0, 8.0, 0.0, 5.0, 20.0}, kNothing{};

TEST(FactorsOf, EachReduction) {
  expect_factors(factors_of(Reduction::none, kSums, kNoNormalizer, false), 1, 1, 0);
  expect_factors(factors_of(Reduction::sum, kSums, kNoNormalizer, false), 1, 1, 0);
  expect_factors(factors_of(Reduction::mean, kSums, kNoNormalizer, false), 1.0 / 8, 1.0 / 5, 12.0 / 8);
  expect_factors(factors_of(Reduction::token_mean, kSums, kNoNormalizer, false), 1.0 / 5, 1.0 / 5, 0);
}

TEST(FactorsOf, NormalizerReplacesTheDenominatorOfMeans) {
  const double normalizer[] = {4.0, 10.0};
  expect_factors(factors_of(Reduction::mean, kSums, normalizer, false), 0.25, 0.1, 0);
  expect_factors(factors_of(Reduction::token_mean, kSums, normalizer, false), 0.25, 0.1, 0);
  expect_factors(factors_of(Reduction::sum, kSums, normalizer, false), 1, 1, 0);
}

TEST(FactorsOf, NothingLeftToCountGivesZeroNotNaN) {
  const double zero[2] = {};
  expect_factors(factors_of(Reduction::mean, kNothing, kNoNormalizer, false), 0, 0, 0);
  expect_factors(factors_of(Reduction::token_mean, kNothing, kNoNormalizer, false), 0, 0, 0);
  expect_factors(factors_of(Reduction::mean, kSums, zero, false), 0, 0, 0);
  // Rows that all weigh nothing still count for the z-loss.
  expect_factors(factors_of(Reduction::mean, RowSums{0.0, 0.0, 0.0, 5.0}, kNoNormalizer, false), 0, 1.0 / 5, 0);
}

TEST(FactorsOf, ModulationsAreDividedByTheirMean) {
  for (const Reduction reduction : {Reduction::none, Reduction::sum, Reduction::mean, Reduction::token_mean}) {
    const auto plain = factors_of(reduction, kSums, kNoNormalizer, false);
    const auto normalized = factors_of(reduction, kSums, kNoNormalizer, true);
    expect_factors(normalized, plain.weighted / 4, plain.rows, plain.correction);
    EXPECT_EQ(plain.modulation, 1.0);
    EXPECT_EQ(normalized.modulation, 4.0);
    EXPECT_EQ(factors_of(reduction, kNothing, kNoNormalizer, true).modulation, 1.0);
  }
}

TEST(SavedRow, StoresWhatItLoads) {
  std::vector<float> rows(SavedRow<float>::kNumbers * 3, 0.0f);
  SavedRow<float>{1, 2, 3, 4, 5, 6, 7, 8, 9}.store(rows.data(), 3, 1);
  const auto row = SavedRow<float>::load(rows.data(), 3, 1);
  EXPECT_EQ((std::vector<float>{row.max, row.sum, row.log_sum, row.nll, row.ce, row.token_weight, row.modulation,
                                row.entropy, row.smoothing_weight}),
            (std::vector<float>{1, 2, 3, 4, 5, 6, 7, 8, 9}));
  EXPECT_EQ(std::accumulate(rows.begin(), rows.end(), 0.0f), 45.0f);
}

TEST(Modulation, SlopeIsTheDerivativeUnlessItIsDetached) {
  for (const double gamma : {0.0, 0.5, 1.0, 2.5}) {
    const auto at = [&](double nll, Modulation kind, bool detach) {
      return modulation_of(
          nll, 0.5,
          RowOptions<double>::of(
              {.modulation = kind, .gamma = gamma, .modulation_scale = 0.5, .modulation_detach = detach}, 7));
    };
    for (const double nll : {1e-3, 0.5, 3.0, 20.0}) {
      const double p = std::exp(-nll), step = 1e-6 * nll;
      const auto focal = at(nll, Modulation::focal, false);
      EXPECT_NEAR(focal.value, std::pow(1 - p, gamma), 1e-12);
      const double above = at(nll + step, Modulation::focal, true).value;
      const double below = at(nll - step, Modulation::focal, true).value;
      EXPECT_NEAR(focal.slope, (above - below) / (2 * step), 1e-6 * focal.value / nll);
      EXPECT_EQ(at(nll, Modulation::focal, true).slope, 0.0);
      EXPECT_NEAR(at(nll, Modulation::anti_focal, true).value, std::pow(1 + 0.5 * p, gamma), 1e-12);
      EXPECT_NEAR(at(nll, Modulation::dft, true).value, p, 1e-15);
      EXPECT_NEAR(at(nll, Modulation::mile, true).value, std::pow(1.5, gamma), 1e-15);
      EXPECT_EQ(at(nll, Modulation::mile, true).slope, 0.0);
      EXPECT_NEAR(at(nll, Modulation::eaft, true).value, std::pow(0.5 / std::log(7), gamma), 1e-15);
      EXPECT_EQ(at(nll, Modulation::none, false).value, 1.0);
    }
    // The limits at the ends: p = 1, also a little past it by rounding, and p = 0.
    const double infinite = std::numeric_limits<double>::infinity();
    for (const double nll : {0.0, -1e-16}) {
      EXPECT_EQ(at(nll, Modulation::focal, false).value, gamma == 0 ? 1.0 : 0.0);
      EXPECT_EQ(at(nll, Modulation::focal, false).slope, gamma == 1 ? 1.0 : 0.0);
    }
    EXPECT_EQ(at(infinite, Modulation::focal, false).value, 1.0);
    EXPECT_EQ(at(infinite, Modulation::focal, false).slope, 0.0);
    EXPECT_EQ(at(infinite, Modulation::dft, true).value, 0.0);
  }
}

TEST(LossOptions, AreUnpackedInTheOrderOfTheirNames) {
  const LossOptions options = LossOptions::unpack({3, -100, 0.25, 2, 0.5, 0.75, 1.25, 2, 1.5, 3.5, 1, 1});
  EXPECT_EQ(LossOptions::names(),
            "reduction ignore_index label_smoothing label_smoothing_weight z_loss softcap logit_scale modulation gamma "
            "modulation_scale modulation_detach modulation_normalize ");
  EXPECT_EQ(options.label_smoothing_weight, SmoothingWeight::of_class);
  EXPECT_EQ(options.reduction, Reduction::token_mean);
  EXPECT_EQ(options.ignore_index, -100);
  EXPECT_EQ(options.label_smoothing, 0.25);
  EXPECT_EQ(options.z_loss, 0.5);
  EXPECT_EQ(options.softcap, 0.75);
  EXPECT_EQ(options.logit_scale, 1.25);
  EXPECT_THROW(LossOptions::unpack({3, -100, 0.25, 0.5, 0.75}), std::invalid_argument);
}

TEST(Targets, OfBothTypes) {
  const int32_t narrow[] = {7, -100};
  const int64_t wide[] = {int64_t(1) << 40, -100};
  EXPECT_EQ((Targets{narrow, true}[0]), 7);
  EXPECT_EQ((Targets{narrow, true}[1]), -100);
  EXPECT_EQ((Targets{wide, false}[0]), int64_t(1) << 40);
  EXPECT_EQ((Targets{wide, false}[1]), -100);
}

}  // namespace
}  // namespace pdl
