#include "engine/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "backend/cpu/token_draw.h"
#include "base/error.h"

namespace sagelm {
namespace {

constexpr SamplingOptions kPlain{.temperature = 1.0,
                                 .top_k = 0,
                                 .top_p = 1.0,
                                 .min_p = 0.0,
                                 .repeat_penalty = 1.0,
                                 .repeat_last_n = 64,
                                 .seed = 7};

int32_t sample(Sampler& sampler, const std::vector<float>& logits,
               const std::vector<int32_t>& history = {}) {
  cpu::TokenDrawer drawer;
  return drawer.draw(logits, sampler.next(history));
}

// How often each token is drawn.
std::vector<int> draw(const SamplingOptions& options, const std::vector<float>& logits, int count,
                      const std::vector<int32_t>& history = {}) {
  Sampler sampler(options);
  std::vector<int> counts(logits.size());
  for (int i = 0; i < count; ++i) {
    ++counts[static_cast<size_t>(sample(sampler, logits, history))];
  }
  return counts;
}

TEST(Sampler, GreedyTakesTheLowestOfEquals) {
  SamplingOptions options = kPlain;
  options.temperature = 0;
  EXPECT_EQ(draw(options, {1, 3, 2, 3}, 5), (std::vector<int>{0, 5, 0, 0}));
}

TEST(Sampler, DrawsByProbability) {
  const std::vector<float> logits = {std::log(0.5f), std::log(0.3f), std::log(0.2f)};
  const std::vector<int> counts = draw(kPlain, logits, 20000);
  EXPECT_NEAR(counts[0], 10000, 300);
  EXPECT_NEAR(counts[1], 6000, 300);
  EXPECT_NEAR(counts[2], 4000, 300);
}

TEST(Sampler, TemperatureSharpens) {
  SamplingOptions options = kPlain;
  options.temperature = 0.5;  // squares the probabilities: 25, 9 and 4 of 38
  const std::vector<float> logits = {std::log(0.5f), std::log(0.3f), std::log(0.2f)};
  EXPECT_NEAR(draw(options, logits, 38000)[0], 25000, 400);
}

TEST(Sampler, SameSeedSameDraws) {
  std::vector<float> logits(100);
  for (size_t i = 0; i < logits.size(); ++i) logits[i] = std::sin(static_cast<float>(i));
  EXPECT_EQ(draw(kPlain, logits, 50), draw(kPlain, logits, 50));
  SamplingOptions other = kPlain;
  other.seed = 8;
  EXPECT_NE(draw(kPlain, logits, 50), draw(other, logits, 50));
}

TEST(Sampler, DrawsAreThoseOfTheStandardGenerator) {
  // 10000th output of mt19937_64 by the standard ([rand.predef]); the conversion is ours.
  std::mt19937_64 generator;
  generator.discard(9999);
  EXPECT_EQ(generator(), 9981545732273789042u);
  const std::vector<float> uniform(8, 0.0f);
  SamplingOptions options = kPlain;
  std::mt19937_64 expected(options.seed);
  Sampler sampler(options);
  for (int i = 0; i < 20; ++i) {
    EXPECT_EQ(sample(sampler, uniform), static_cast<int32_t>(expected() >> 61));
  }
}

TEST(Sampler, TopK) {
  SamplingOptions options = kPlain;
  options.top_k = 2;
  const std::vector<int> counts = draw(options, {0, 1, 0.5, 1}, 1000);
  EXPECT_EQ(counts[0] + counts[2], 0);
  EXPECT_GT(counts[1], 400);
  EXPECT_GT(counts[3], 400);
}

TEST(Sampler, TopPIsTheSmallestSetThatHoldsIt) {
  SamplingOptions options = kPlain;
  options.top_p = 0.75;
  const std::vector<float> logits = {std::log(0.2f), std::log(0.5f), std::log(0.3f)};
  const std::vector<int> counts = draw(options, logits, 1000);
  EXPECT_EQ(counts[0], 0);
  EXPECT_GT(counts[1], 500);
  EXPECT_GT(counts[2], 300);
}

TEST(Sampler, TopPIsOfWhatTopKLeaves) {
  SamplingOptions options = kPlain;
  options.top_k = 2;
  options.top_p = 0.55;  // 0.4 of 0.7 is 0.571
  const std::vector<float> logits = {std::log(0.3f), std::log(0.4f), std::log(0.3f)};
  EXPECT_EQ(draw(options, logits, 100), (std::vector<int>{0, 100, 0}));
}

TEST(Sampler, TopPOfManyEqualTokensKeepsItsShare) {
  SamplingOptions options = kPlain;
  options.top_p = 0.5;
  const std::vector<int> counts = draw(options, std::vector<float>(100, 2.0f), 5000);
  int drawn = 0;
  for (const int count : counts) drawn += count > 0 ? 1 : 0;
  EXPECT_EQ(drawn, 50);
}

TEST(Sampler, TopPOfALargeVocabularyIsWhatTheDefinitionSays) {
  std::vector<float> logits(5000);
  for (size_t i = 0; i < logits.size(); ++i) {
    logits[i] = 9.0f * std::sin(static_cast<float>(i * i % 1009));
  }
  SamplingOptions options = kPlain;
  options.temperature = 0.8;
  options.top_p = 0.9;
  std::vector<std::pair<double, int32_t>> tokens;
  double total = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    tokens.emplace_back(std::exp(static_cast<double>(logits[i]) / 0.8), static_cast<int32_t>(i));
    total += tokens.back().first;
  }
  std::sort(tokens.begin(), tokens.end(), [](const auto& a, const auto& b) {
    return a.first != b.first ? a.first > b.first : a.second < b.second;
  });
  double kept = 0;
  size_t count = 0;
  while (kept < 0.9 * total) kept += tokens[count++].first;
  ASSERT_GT(count, 50u);
  Sampler sampler(options);
  std::mt19937_64 generator(options.seed);
  for (int draw = 0; draw < 300; ++draw) {
    double target = static_cast<double>(generator() >> 11) * 0x1p-53 * kept;
    size_t expected = 0;
    while (expected + 1 < count && (target -= tokens[expected].first) >= 0) ++expected;
    ASSERT_EQ(sample(sampler, logits), tokens[expected].second) << draw;
  }
}

TEST(Sampler, MinP) {
  SamplingOptions options = kPlain;
  options.min_p = 0.5;
  const std::vector<float> logits = {std::log(0.5f), std::log(0.3f), std::log(0.2f)};
  const std::vector<int> counts = draw(options, logits, 1000);
  EXPECT_GT(counts[1], 300);
  EXPECT_EQ(counts[2], 0);
}

TEST(Sampler, RepeatPenaltyDividesPositiveAndMultipliesNegative) {
  SamplingOptions options = kPlain;
  options.temperature = 0;
  options.repeat_penalty = 2;
  EXPECT_EQ(draw(options, {3, 2}, 1, {0, 0, 0})[1], 1);  // once, not three times: 1.5 < 2
  EXPECT_EQ(draw(options, {3.9f, 1}, 1, {0, 0, 0})[0], 1);
  EXPECT_EQ(draw(options, {-1, -1.5f}, 1, {0})[1], 1);
  options.repeat_last_n = 1;
  EXPECT_EQ(draw(options, {3, 2}, 1, {0, 1})[0], 1);
  options.repeat_last_n = -1;
  EXPECT_EQ(draw(options, {3, 2}, 1, {0, 0, 0})[1], 1);
  options.repeat_last_n = 0;
  EXPECT_EQ(draw(options, {3, 2}, 1, {0})[0], 1);
}

TEST(Sampler, BannedTokensAreNeverDrawn) {
  const float banned = -std::numeric_limits<float>::infinity();
  SamplingOptions options = kPlain;
  options.repeat_penalty = 1.5;
  EXPECT_EQ(draw(options, {banned, 0, banned}, 100, {0, 1}), (std::vector<int>{0, 100, 0}));
}

TEST(Sampler, RefusesWhatCannotBeMeant) {
  const auto refuses = [](auto change) {
    SamplingOptions options = kPlain;
    change(options);
    EXPECT_THROW(Sampler{options}, UsageError);
  };
  refuses([](SamplingOptions& o) { o.temperature = -0.1; });
  refuses([](SamplingOptions& o) { o.temperature = std::nan(""); });
  refuses([](SamplingOptions& o) { o.top_k = -1; });
  refuses([](SamplingOptions& o) { o.top_p = 0; });
  refuses([](SamplingOptions& o) { o.top_p = 1.1; });
  refuses([](SamplingOptions& o) { o.min_p = 2; });
  refuses([](SamplingOptions& o) { o.repeat_penalty = 0; });
  refuses([](SamplingOptions& o) { o.repeat_last_n = -2; });
}

}  // namespace
}  // namespace sagelm
