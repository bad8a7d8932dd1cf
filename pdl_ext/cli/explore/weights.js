// The formulas of pdl_ext.weighting and pdl_ext.statistics in float64, over distinct counts: types that occur equally
// often weigh the same. tests/cli/test_explore_page.py holds them to Python's.

const FLOAT32_MAX = (2 - 2 ** -23) * 2 ** 127;

// Distinct counts, the largest first; how many types have each; the sum over all types.
function readCorpus({gaps, types, total, vocabulary}) {
  let count = 0;
  // From the smallest on, so that none has the rounding of a larger one.
  const counts = Float64Array.from(gaps, gap => (count += gap)).reverse();
  return {counts, types: Float64Array.from(types).reverse(), total, vocabulary};
}

function largestCount(corpus) {
  return corpus.counts[0];
}

function smallestCount(corpus, seen) {
  const {counts} = corpus;
  const last = counts[counts.length - 1];
  return seen && last === 0 ? counts[counts.length - 2] : last;
}

// The places of ranks, 0 the most frequent and ascending, among distinct counts.
function placesOfRanks(corpus, ranks) {
  let place = 0;
  let end = corpus.types[0];
  return ranks.map(rank => {
    for (; end <= rank; end += corpus.types[place]) place += 1;
    return place;
  });
}

// Each gives the weight of a count before it is limited and normalised, and the limit, both over `unit`.
const FAMILY = {
  PowerLaw(corpus, {alpha, epsilon, smoothing, relative, normalize, max_weight}) {
    const denominator = corpus.total + smoothing * corpus.vocabulary;
    const ofCount = relative && denominator > 0 ? 1 / denominator : 1;
    const frequency = count => (count + smoothing) * ofCount + epsilon;
    if (normalize === "none" || alpha === 0) {
      return {raw: count => frequency(count) ** -alpha, limit: max_weight, unit: 1};
    }
    // The largest weight that the mean is taken over is 1, so that the mean is neither infinite nor 0.
    let log = Math.log(frequency(smallestCount(corpus, normalize === "corpus")));
    let limit = max_weight;
    if (max_weight < Infinity) {
      log = Math.max(log, -Math.log(max_weight) / alpha);
      limit = Math.exp(Math.log(max_weight) + alpha * log);
    }
    const scale = Math.exp(-log);
    return {raw: count => (frequency(count) * scale) ** -alpha, limit, unit: scale ** alpha};
  },

  ClassBalanced(corpus, {beta, max_weight}) {
    const logBeta = Math.log(beta);
    return {raw: count => (1 - beta) / -Math.expm1(Math.max(count, 1) * logBeta), limit: max_weight, unit: 1};
  },

  Adaptive(corpus, {form, T, max_weight}) {
    const typesSeen = corpus.vocabulary - (smallestCount(corpus) === 0 ? corpus.types[corpus.types.length - 1] : 0);
    const middle = Math.min(Math.floor(typesSeen / 2), corpus.vocabulary - 1);
    const median = Math.max(corpus.counts[placesOfRanks(corpus, [middle])[0]], 1);
    const logOf = count => -T * (count / median) + (form === "chi2" ? 2 * Math.log(count / median) : 0);
    let largest = -Infinity;
    for (const count of corpus.counts) if (count > 0) largest = Math.max(largest, logOf(count));
    return {
      raw: count => Math.exp(Math.min(logOf(count) - largest, 0)) * (Math.E - 1) + 1,
      limit: max_weight,
      unit: 1,
    };
  },

  Face(corpus, {max_weight}) {
    const most = largestCount(corpus);
    return {raw: count => (most - count) / most, limit: max_weight, unit: 1};
  },

  Uniform(corpus, {max_weight}) {
    return {raw: () => 1, limit: max_weight, unit: 1};
  },
};

// The weight of each distinct count, float32 numbers. options: as Python names them; no max_weight is Infinity.
// lowest, highest: before weights are limited and normalised; limited: how many types the limit holds.
function weigh(corpus, name, options) {
  const {raw, limit, unit} = FAMILY[name](corpus, options);
  let [lowest, highest, limited] = [Infinity, 0, 0];
  const weights = corpus.counts.map((count, place) => {
    const weight = raw(count);
    lowest = Math.min(lowest, weight);
    highest = Math.max(highest, weight);
    if (weight > limit) limited += corpus.types[place];
    return Math.min(weight, limit);
  });
  const mean = meanOf(corpus, options.normalize, weights);
  return {
    weights: weights.map(weight => Math.fround(Math.min(weight / mean, FLOAT32_MAX))),
    lowest: lowest * unit,
    highest: highest * unit,
    limited,
  };
}

function meanOf({counts, types}, normalize, weights) {
  if (normalize === "none") return 1;
  let mass = 0;
  let shares = 0;
  for (let place = 0; place < counts.length; place += 1) {
    const share = normalize === "corpus" ? types[place] * counts[place] : types[place];
    // A type that was never seen may weigh infinity.
    if (share > 0) mass += share * weights[place];
    shares += share;
  }
  return mass > 0 ? mass / shares : 1;
}

// The attributes of pdl_ext.statistics.WeightStatistics, and the weight of what was never seen (NaN if all was).
function statisticsOf({counts, types}, weights, mostFrequent) {
  let sample = 0;
  let total = 0;
  let squares = 0;
  let massOfMost = 0;
  let largest = 0;
  let mostLeft = mostFrequent;
  for (let place = 0; place < counts.length; place += 1) {
    const weight = weights[place];
    const mass = counts[place] * weight;
    const most = Math.min(mostLeft, types[place]);
    massOfMost += most * mass;
    mostLeft -= most;
    sample += types[place] * counts[place];
    total += types[place] * mass;
    squares += types[place] * mass * weight;
    largest = Math.max(largest, weight);
  }
  const last = counts.length - 1;
  return {
    effective_fraction: total ** 2 / (sample * squares),
    mass_of_most_frequent: massOfMost / total,
    weight_of_most_frequent: weights[0],
    weight_of_rarest_seen: weights[counts[last] === 0 ? last - 1 : last],
    weight_of_never_seen: counts[last] === 0 ? weights[last] : NaN,
    largest,
  };
}
