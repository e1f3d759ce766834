#include "eval/perplexity.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "base/error.h"
#include "eval/toy_model.h"

namespace sagelm {
namespace {

using test::ToyModel;

constexpr double kTolerance = 1e-6;  // log-probabilities are floats

Protocol protocol_of(std::string_view name, int64_t ctx, std::optional<int64_t> stride = {}) {
  return make_protocol(name, {.ctx = ctx, .stride = stride});
}

TEST(Perplexity, NonoverlapByHand) {
  ToyModel model;
  // Windows 0 0 0 1 | 1 1 0 0: same, same, other | same, other, same; the step across the cut and
  // the last token are not scored.
  const std::vector<int32_t> ids = {0, 0, 0, 1, 1, 1, 0, 0, 1};
  const auto result = run_perplexity(ids, protocol_of("nonoverlap", 4), {}, model.scorer());
  EXPECT_EQ(result.windows, 2);
  EXPECT_EQ(result.tokens_scored, 6);
  EXPECT_EQ(result.tokens_run, 8);
  EXPECT_FALSE(result.partial());
  const double a = -std::log(0.75);
  const double b = -std::log(0.25);
  const double mean = (4 * a + 2 * b) / 6;
  const double variance =
      (4 * (a - mean) * (a - mean) + 2 * (b - mean) * (b - mean)) / 5;  // of the sample
  EXPECT_NEAR(result.nll_mean, mean, kTolerance);
  EXPECT_NEAR(result.perplexity, std::exp(mean), kTolerance);
  EXPECT_NEAR(result.standard_error, std::exp(mean) * std::sqrt(variance / 6), kTolerance);
}

TEST(Perplexity, StridedByHand) {
  ToyModel model;
  const std::vector<int32_t> ids = {0, 0, 0, 1, 1, 1, 0, 0, 1};  // 5 same, 3 other
  const auto result = run_perplexity(ids, protocol_of("strided", 4, 2), {}, model.scorer());
  EXPECT_EQ(result.tokens_scored, 8);
  EXPECT_NEAR(result.nll_mean, -(5 * std::log(0.75) + 3 * std::log(0.25)) / 8, kTolerance);
  EXPECT_EQ(model.sequences[1], (std::vector<int32_t>{0, 1, 1, 1}));
  EXPECT_EQ(model.first_scored, (std::vector<int64_t>{1, 2, 2, 2}));
}

TEST(Perplexity, LlamacppStartsEachWindowWithBos) {
  ToyModel model;
  const std::vector<int32_t> ids = {1, 0, 0, 1, 0, 0, 1, 1};
  const auto result = run_perplexity(ids, protocol_of("llamacpp", 4),
                                     {.batch_tokens = 4, .limit = {}, .bos_id = 1}, model.scorer());
  EXPECT_EQ(model.sequences, (std::vector<std::vector<int32_t>>{{1, 0, 0, 1}, {1, 0, 1, 1}}));
  EXPECT_EQ(result.tokens_scored, 2);  // 0 → 1 and 1 → 1
  EXPECT_NEAR(result.nll_mean, -(std::log(0.25) + std::log(0.75)) / 2, kTolerance);
}

TEST(Perplexity, BatchesDoNotChangeTheResult) {
  std::mt19937 random(7);
  std::vector<int32_t> ids(1000);
  for (int32_t& id : ids) id = static_cast<int32_t>(random() % 2);
  const Protocol protocol = protocol_of("strided", 16, 5);
  ToyModel alone;
  const auto one = run_perplexity(ids, protocol, {.batch_tokens = 1}, alone.scorer());
  ToyModel together;
  const auto many = run_perplexity(ids, protocol, {.batch_tokens = 333}, together.scorer());
  EXPECT_EQ(alone.batches.size(), alone.sequences.size());
  EXPECT_EQ(together.batches.front(), 20u);  // 20 × 16 tokens
  EXPECT_EQ(one.tokens_scored, many.tokens_scored);
  EXPECT_EQ(one.nll_mean, many.nll_mean);  // bit for bit
  EXPECT_EQ(one.standard_error, many.standard_error);
}

TEST(Perplexity, LimitTakesTheFirstWindows) {
  ToyModel model;
  const std::vector<int32_t> ids = {0, 0, 0, 1, 1, 1, 0, 0, 1};
  const auto result =
      run_perplexity(ids, protocol_of("nonoverlap", 4), {.limit = 1}, model.scorer());
  EXPECT_EQ(result.windows, 1);
  EXPECT_EQ(result.windows_of_text, 2);
  EXPECT_FALSE(result.partial());
  EXPECT_EQ(model.sequences.size(), 1u);
}

TEST(Perplexity, AStoppedRunIsPartial) {
  ToyModel model;
  const std::vector<int32_t> ids(100, 0);
  std::vector<int64_t> seen;
  const auto result = run_perplexity(ids, protocol_of("nonoverlap", 10), {.batch_tokens = 20},
                                     model.scorer(), [&seen](const EvalProgress& progress) {
                                       seen.push_back(progress.done);
                                       EXPECT_EQ(progress.total, 10);
                                       return progress.done < 4;
                                     });
  EXPECT_EQ(seen, (std::vector<int64_t>{2, 4}));
  EXPECT_TRUE(result.partial());
  EXPECT_EQ(result.windows, 4);
  EXPECT_EQ(result.tokens_scored, 36);
  EXPECT_NEAR(result.perplexity, 4.0 / 3, kTolerance);
}

TEST(Perplexity, WhatIsNotANumberIsAnError) {
  const std::vector<int32_t> ids(8, 0);
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    ToyModel model;
    const Scorer scorer = [&](std::span<const Model::ScoreInput> inputs) {
      auto scores = model.score(inputs);
      scores.back()[1].logprob = bad;
      return scores;
    };
    try {
      run_perplexity(ids, protocol_of("nonoverlap", 4), {.batch_tokens = 8}, scorer);
      FAIL();
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find("window 2 of the text"), std::string::npos)
          << error.what();
    }
  }
}

TEST(Perplexity, OneTokenHasNoStandardError) {
  ToyModel model;
  const std::vector<int32_t> ids = {0, 0};
  const auto result = run_perplexity(ids, protocol_of("nonoverlap", 2), {}, model.scorer());
  EXPECT_NEAR(result.perplexity, 4.0 / 3, kTolerance);
  EXPECT_TRUE(std::isnan(result.standard_error));
}

}  // namespace
}  // namespace sagelm
