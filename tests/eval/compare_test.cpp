#include "eval/compare.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "base/error.h"
#include "eval/compare_journal.h"

namespace sagelm {
namespace {

constexpr double kTolerance = 1e-6;  // the toys' logits are float

// Every token is drawn from one distribution, whatever came before.
struct Toy {
  std::vector<double> probabilities;
  double added = 0;    // to all logits: changes no distribution
  size_t block = 256;  // rows at once
  std::vector<size_t> batches = {};

  void score(std::span<const Model::ScoreInput> inputs,
             const Model::DistributionCallback& on_block) {
    batches.push_back(inputs.size());
    std::vector<Model::ScoredToken> tokens;
    for (size_t i = 0; i < inputs.size(); ++i) {
      for (auto j = inputs[i].first_scored; j < static_cast<int64_t>(inputs[i].ids.size()); ++j) {
        tokens.push_back({.input = i, .position = j});
      }
    }
    for (size_t begin = 0; begin < tokens.size(); begin += block) {
      const size_t count = std::min(block, tokens.size() - begin);
      std::vector<float> logits;
      for (size_t r = 0; r < count; ++r) {
        for (const double p : probabilities) {
          logits.push_back(static_cast<float>(std::log(p) + added));
        }
      }
      on_block({.tokens = std::span(tokens).subspan(begin, count), .logits = logits});
    }
  }

  CompareSetting setting(std::string name) {
    return {.name = std::move(name),
            .scorer = [this](std::span<const Model::ScoreInput> inputs,
                             const Model::DistributionCallback& on_block,
                             int64_t) { score(inputs, on_block); }};
  }
};

std::string where(int64_t index) { return "window " + std::to_string(index + 1); }

CompareOptions options_of(int64_t batch_tokens = 2048) {
  return {.vocab_size = 3, .batch_tokens = batch_tokens};
}

// KL((1/2, 1/4, 1/4) || (1/4, 1/4, 1/2)) = 1/2 ln 2 - 1/4 ln 2.
TEST(Compare, TwoDistributionsKnownByHand) {
  Toy first{.probabilities = {0.5, 0.25, 0.25}};
  Toy second{.probabilities = {0.25, 0.25, 0.5}, .added = 7};
  const std::vector<int32_t> ids = {2, 0, 1, 2, 0};
  const Model::ScoreInput input{.ids = ids, .first_scored = 1};
  const std::vector<CompareSetting> settings = {first.setting("a"), second.setting("b")};
  const Comparison result = run_comparison({&input, 1}, settings, options_of(), where);
  ASSERT_EQ(result.inputs(), 1);
  EXPECT_FALSE(result.partial());
  ASSERT_EQ(result.settings[1].tokens.size(), 4u);
  EXPECT_EQ(result.held_bytes, 4 * 3 * 4);
  EXPECT_EQ(result.tokens_run, 5);
  const auto& a = result.settings[0].tokens;
  const auto& b = result.settings[1].tokens;
  EXPECT_NEAR(a[0].logprob, std::log(0.5), kTolerance);
  EXPECT_NEAR(b[0].logprob, std::log(0.25), kTolerance);
  EXPECT_TRUE(a[0].is_top);
  EXPECT_FALSE(b[0].is_top);
  EXPECT_TRUE(b[2].is_top);
  EXPECT_TRUE(a[0].same_top);
  EXPECT_FALSE(b[0].same_top);
  EXPECT_EQ(a[1].kl, 0);
  for (const ComparedToken& token : b) EXPECT_NEAR(token.kl, 0.25 * std::log(2.0), kTolerance);

  // Losses: a has ln 2, ln 4, ln 4, ln 2; b has ln 4, ln 4, ln 2, ln 4. In units of ln 2 the
  // differences are 1, 0, -1, 1: mean 1/4, sample variance 11/12.
  const ComparedMetric nll = paired_metric("nll", token_losses(result));
  EXPECT_EQ(nll.name, "nll");
  const double unit = std::log(2.0);
  EXPECT_NEAR(nll.figures[0].value, 1.5 * unit, kTolerance);
  EXPECT_NEAR(nll.figures[1].value, 1.75 * unit, kTolerance);
  EXPECT_NEAR(nll.figures[0].standard_error, unit * std::sqrt(1.0 / 3 / 4), kTolerance);
  EXPECT_EQ(nll.figures[0].difference, 0);
  EXPECT_EQ(nll.figures[0].difference_error, 0);
  EXPECT_FALSE(nll.figures[0].excludes_zero());
  EXPECT_NEAR(nll.figures[1].difference, 0.25 * unit, kTolerance);
  EXPECT_NEAR(nll.figures[1].relative_difference(nll.figures[0]), 0.25 / 1.5, kTolerance);
  EXPECT_NEAR(nll.figures[1].difference_error, unit * std::sqrt(11.0 / 12 / 4), kTolerance);
  EXPECT_FALSE(nll.figures[1].excludes_zero());

  const ComparedMetric perplexity =
      paired_metric("perplexity", token_losses(result), {.exponential = true});
  EXPECT_NEAR(perplexity.figures[0].value, std::pow(2, 1.5), 1e-5);
  EXPECT_NEAR(perplexity.figures[1].value, std::pow(2, 1.75), 1e-5);
  EXPECT_NEAR(perplexity.figures[1].difference, std::pow(2, 1.75) - std::pow(2, 1.5), 1e-5);
  EXPECT_NEAR(perplexity.figures[1].standard_error,
              std::pow(2, 1.75) * nll.figures[1].standard_error, 1e-5);
  // Weights of 2 halve what is averaged: the square root.
  const std::vector<double> weights(4, 2);
  const ComparedMetric root =
      paired_metric("x", token_losses(result), {.weights = weights, .exponential = true});
  EXPECT_NEAR(root.figures[1].value, std::pow(2, 0.875), 1e-5);
  EXPECT_NEAR(root.figures[1].standard_error,
              std::pow(2, 0.875) * nll.figures[1].standard_error / 2, 1e-5);

  const DistributionDistance same = distance(result.settings[0], result.settings[0]);
  EXPECT_EQ(same.kl_mean, 0);
  EXPECT_EQ(same.same_top, 1);
  EXPECT_EQ(same.same_top_error, 0);
  EXPECT_EQ(same.rms_change, 0);
  EXPECT_EQ(same.rms_change_error, 0);
  const DistributionDistance other = distance(result.settings[0], result.settings[1]);
  EXPECT_NEAR(other.kl_mean, 0.25 * unit, kTolerance);
  EXPECT_NEAR(other.kl_max, 0.25 * unit, kTolerance);
  EXPECT_EQ(other.same_top, 0);
  // The probability changes by -1/4, 0, 1/4, -1/4: squares 1/16 three times, 0 once.
  EXPECT_NEAR(other.rms_change, std::sqrt(3.0 / 64), kTolerance);
  EXPECT_NEAR(other.rms_change_error, 1.0 / 64 / (2 * std::sqrt(3.0 / 64)), kTolerance);
}

// Documents of 1 and 3 words with losses 2 and 2, then 3 and 3: ratios 1 and 1.5. Residuals of the
// difference (1, 1) - 0.5 × (1, 3) = ±0.5.
TEST(Compare, FiguresPerWordAreRatiosOfSums) {
  const std::vector<std::vector<double>> losses = {{2, 2}, {3, 3}};
  const std::vector<double> words = {1, 3};
  const auto nll = paired_metric("nll", losses, {.weights = words}).figures;
  EXPECT_NEAR(nll[0].value, 1, 1e-12);
  EXPECT_NEAR(nll[0].standard_error, std::sqrt(2 * 2.0) / 4, 1e-12);  // residuals ±1
  EXPECT_NEAR(nll[1].difference, 0.5, 1e-12);
  EXPECT_NEAR(nll[1].difference_error, std::sqrt(2 * 0.5) / 4, 1e-12);
  const auto exponential =
      paired_metric("ppl", losses, {.weights = words, .exponential = true}).figures;
  EXPECT_NEAR(exponential[1].value, std::exp(1.5), 1e-12);
  EXPECT_NEAR(exponential[1].difference, std::exp(1.5) - std::exp(1), 1e-12);
  // The samples e^1.5 × (3, 3) - e × (2, 2) = (x, x) have residuals ±x / 2.
  const double x = 3 * std::exp(1.5) - 2 * std::exp(1);
  EXPECT_NEAR(exponential[1].difference_error, std::sqrt(2 * 2 * x * x / 4) / 4, 1e-12);
}

TEST(Compare, PercentileAndAgreement) {
  SettingScores baseline;
  SettingScores setting;
  for (int i = 1; i <= 200; ++i) {
    baseline.tokens.push_back({.logprob = -1, .same_top = true});
    setting.tokens.push_back(
        {.logprob = -1, .kl = static_cast<double>(201 - i), .same_top = i > 50});
  }
  const DistributionDistance far = distance(baseline, setting);
  EXPECT_EQ(far.kl_p99, 198);
  EXPECT_EQ(far.kl_max, 200);
  EXPECT_NEAR(far.kl_mean, 100.5, 1e-9);
  EXPECT_EQ(far.same_top, 0.75);
  EXPECT_NEAR(far.same_top_error, std::sqrt(0.75 * 0.25 / 200), 1e-12);
  setting.tokens.resize(1);
  baseline.tokens.resize(1);
  EXPECT_EQ(distance(baseline, setting).kl_p99, 200);
  EXPECT_TRUE(std::isnan(distance({}, {}).kl_mean));
}

// Groups bound batches and say what their inputs share; with choices, the most probable token is
// looked for among those.
TEST(Compare, GroupsAndChoices) {
  const std::vector<int32_t> ids = {2, 1, 0};
  const std::vector<Model::ScoreInput> inputs(7, {.ids = ids, .first_scored = 2});
  Toy toy{.probabilities = {0.3, 0.2, 0.5}};
  Toy other{.probabilities = {0.2, 0.3, 0.5}};
  std::vector<int64_t> shared;
  CompareSetting first = toy.setting("a");
  first.scorer = [&](std::span<const Model::ScoreInput> batch,
                     const Model::DistributionCallback& on_block, int64_t tokens) {
    shared.push_back(tokens);
    toy.score(batch, on_block);
  };
  CompareOptions options = options_of(3);
  options.groups = {{.end = 5, .shared = 1}, {.end = 7, .shared = 0}};
  options.choices.assign(7, {1, 0});
  const std::vector<CompareSetting> settings = {first, other.setting("b")};
  const Comparison result = run_comparison(inputs, settings, options, where);
  // The group that shares is one batch (2 tokens of each input are its own, 24 may be); the other
  // one has batches of 3 tokens.
  EXPECT_EQ(toy.batches, (std::vector<size_t>{5, 1, 1}));
  EXPECT_EQ(shared, (std::vector<int64_t>{1, 0, 0}));
  EXPECT_EQ(result.tokens_run, 1 + 5 * 2 + 2 * 3);
  for (size_t i = 0; i < inputs.size(); ++i) {
    EXPECT_TRUE(result.settings[0].tokens[i].is_top);  // 0 of {1, 0}, though 2 is the most probable
    EXPECT_FALSE(result.settings[1].tokens[i].is_top);
    EXPECT_FALSE(result.settings[1].tokens[i].same_top);
  }
  options.choices[6] = {0, 3};
  EXPECT_THROW(run_comparison(inputs, settings, options, where), Error);
}

// A tiny change must not drown in rounding: KL = sum p ln(p / q) is about d^2 / 2.
TEST(Compare, SmallDivergencesAreExact) {
  const float shift = 0x1p-12F;
  const std::vector<float> p = {0, 0};
  const std::vector<float> q = {shift, -shift};
  int calls = 0;
  const auto scorer = [&](std::span<const Model::ScoreInput>,
                          const Model::DistributionCallback& on_block, int64_t) {
    const Model::ScoredToken token{.input = 0, .position = 1};
    on_block({.tokens = {&token, 1}, .logits = calls++ == 0 ? p : q});
  };
  const std::vector<int32_t> ids = {0, 1};
  const Model::ScoreInput input{.ids = ids};
  const std::vector<CompareSetting> settings = {{"a", scorer}, {"b", scorer}};
  const Comparison result = run_comparison({&input, 1}, settings, {.vocab_size = 2}, where);
  const double expected = std::log(std::cosh(static_cast<double>(shift)));
  EXPECT_NEAR(result.settings[1].tokens[0].kl / expected, 1, 1e-7);
}

// Every token has distributions of its own, drawn at random and far from normalised.
TEST(Compare, RandomDistributionsAgainstDirectSums) {
  constexpr size_t kVocab = 97;
  constexpr size_t kTokens = 64;
  std::mt19937 random(11);
  std::normal_distribution<float> normal(5, 3);
  std::vector<float> p(kTokens * kVocab);
  std::vector<float> q(kTokens * kVocab);
  for (size_t i = 0; i < p.size(); ++i) {
    p[i] = normal(random);
    q[i] = p[i] + 0.1F * normal(random);
  }
  std::vector<int32_t> ids(kTokens + 1);
  for (int32_t& id : ids) id = static_cast<int32_t>(random() % kVocab);
  std::vector<Model::ScoredToken> rows;
  for (size_t t = 0; t < kTokens; ++t) rows.push_back({0, static_cast<int64_t>(t) + 1});
  const auto hand_over = [&rows](const std::vector<float>& logits) {
    return [&rows, &logits](std::span<const Model::ScoreInput>,
                            const Model::DistributionCallback& on_block,
                            int64_t) { on_block({.tokens = rows, .logits = logits}); };
  };
  const Model::ScoreInput input{.ids = ids};
  const std::vector<CompareSetting> settings = {{"p", hand_over(p)}, {"q", hand_over(q)}};
  const Comparison result = run_comparison({&input, 1}, settings, {.vocab_size = kVocab}, where);
  const auto softmax = [](const float* logits) {
    std::vector<double> probabilities;
    double sum = 0;
    for (size_t v = 0; v < kVocab; ++v) {
      probabilities.push_back(std::exp(static_cast<double>(logits[v])));
      sum += probabilities.back();
    }
    for (double& probability : probabilities) probability /= sum;
    return probabilities;
  };
  double kl_sum = 0;
  double squares = 0;
  int same = 0;
  for (size_t t = 0; t < kTokens; ++t) {
    const std::vector<double> first = softmax(&p[t * kVocab]);
    const std::vector<double> second = softmax(&q[t * kVocab]);
    double kl = 0;
    for (size_t v = 0; v < kVocab; ++v) kl += first[v] * std::log(first[v] / second[v]);
    EXPECT_NEAR(result.settings[1].tokens[t].kl, kl, 1e-12);
    const auto target = static_cast<size_t>(ids[t + 1]);
    EXPECT_NEAR(result.settings[1].tokens[t].logprob, std::log(second[target]), 1e-12);
    kl_sum += kl;
    squares += (second[target] - first[target]) * (second[target] - first[target]);
    same += std::max_element(first.begin(), first.end()) - first.begin() ==
                    std::max_element(second.begin(), second.end()) - second.begin()
                ? 1
                : 0;
  }
  const DistributionDistance far = distance(result.settings[0], result.settings[1]);
  EXPECT_NEAR(far.kl_mean, kl_sum / kTokens, 1e-12);
  EXPECT_NEAR(far.same_top, same / static_cast<double>(kTokens), 1e-12);
  EXPECT_NEAR(far.rms_change, std::sqrt(squares / kTokens), 1e-12);
}

TEST(Compare, NoFigureDependsOnTheBatchOrTheBlocks) {
  std::mt19937 random(3);
  std::vector<std::vector<int32_t>> texts(9);
  std::vector<Model::ScoreInput> inputs;
  for (auto& text : texts) {
    text.resize(2 + random() % 7);
    for (int32_t& id : text) id = static_cast<int32_t>(random() % 3);
    inputs.push_back(
        {.ids = text,
         .first_scored = 1 + static_cast<int64_t>(random() % 2)});  // some have nothing scored
  }
  const auto run = [&](size_t block, CompareOptions options, size_t batches) {
    Toy first{.probabilities = {0.6, 0.3, 0.1}, .block = block};
    Toy second{.probabilities = {0.59, 0.3, 0.11}, .block = block};
    const std::vector<CompareSetting> settings = {first.setting("a"), second.setting("b")};
    const Comparison result = run_comparison(inputs, settings, options, where);
    EXPECT_EQ(first.batches.size(), batches);
    EXPECT_EQ(first.batches, second.batches);
    EXPECT_EQ(result.input_ends.size(), inputs.size());
    // However long the text, logits are held of one batch only.
    const auto all = static_cast<int64_t>(result.settings[0].tokens.size()) * 3 * 4;
    EXPECT_EQ(result.held_bytes == all, batches == 1) << result.held_bytes;
    if (batches > 1) {
      EXPECT_LE(result.held_bytes, 7 * 3 * 4);  // the longest input's
    }
    EXPECT_EQ(result.input_ends.back(), result.settings[1].tokens.size());
    return paired_metric("perplexity", input_losses(result), {.exponential = true}).figures[1];
  };
  const PairedFigure together = run(256, options_of(1000), 1);
  const PairedFigure apart = run(1, options_of(1), inputs.size());
  CompareOptions little = options_of(1000);
  little.baseline_bytes = 1;
  const PairedFigure held_little = run(2, little, inputs.size());
  for (const PairedFigure& other : {apart, held_little}) {
    EXPECT_EQ(together.value, other.value);  // bit for bit
    EXPECT_EQ(together.difference, other.difference);
    EXPECT_EQ(together.difference_error, other.difference_error);
  }
}

TEST(Compare, InputsAreHitsOnlyIfAllTheirTokensAre) {
  Toy first{.probabilities = {0.5, 0.25, 0.25}};
  Toy second{.probabilities = {0.25, 0.5, 0.25}};
  const std::vector<std::vector<int32_t>> texts = {{0, 0, 0}, {0, 0, 1}, {0, 1, 1}};
  std::vector<Model::ScoreInput> inputs;
  for (const auto& text : texts) inputs.push_back({.ids = text, .first_scored = 1});
  const std::vector<CompareSetting> settings = {first.setting("a"), second.setting("b")};
  const Comparison result = run_comparison(inputs, settings, options_of(), where);
  const auto hits = input_hits(result);
  EXPECT_EQ(hits[0], (std::vector<double>{1, 0, 0}));
  EXPECT_EQ(hits[1], (std::vector<double>{0, 0, 1}));
  const auto losses = input_losses(result);
  EXPECT_NEAR(losses[0][1], std::log(2.0) + std::log(4.0), kTolerance);
  const ComparedMetric accuracy = paired_metric("accuracy", hits);
  EXPECT_NEAR(accuracy.figures[1].value, 1.0 / 3, kTolerance);
  EXPECT_NEAR(accuracy.figures[1].difference, 0, kTolerance);
  EXPECT_NEAR(accuracy.figures[1].difference_error, std::sqrt(1.0 / 3), kTolerance);
}

TEST(Compare, AConstantDifferenceExcludesZero) {
  Toy first{.probabilities = {0.5, 0.25, 0.25}};
  Toy second{.probabilities = {0.4, 0.3, 0.3}};
  const std::vector<int32_t> ids(50, 0);
  const Model::ScoreInput input{.ids = ids};
  const std::vector<CompareSetting> settings = {first.setting("a"), second.setting("b")};
  const Comparison result = run_comparison({&input, 1}, settings, options_of(), where);
  EXPECT_TRUE(paired_metric("perplexity", token_losses(result), {.exponential = true})
                  .figures[1]
                  .excludes_zero());
}

TEST(Compare, AStoppedRunKeepsWholeBatchesOnly) {
  Toy first{.probabilities = {0.5, 0.25, 0.25}};
  Toy second{.probabilities = {0.4, 0.3, 0.3}};
  const std::vector<int32_t> ids(4, 1);
  const std::vector<Model::ScoreInput> inputs(10, {.ids = ids, .first_scored = 1});
  const std::vector<CompareSetting> settings = {first.setting("a"), second.setting("b")};
  for (const int64_t stop_at : {2, 6, 8, 10}) {
    std::vector<int64_t> seen;
    const Comparison result =
        run_comparison(inputs, settings, options_of(8), where, [&](const EvalProgress& progress) {
          seen.push_back(progress.done);
          EXPECT_EQ(progress.total, 20);
          return progress.done < stop_at;
        });
    EXPECT_EQ(seen.back(), stop_at);
    EXPECT_EQ(result.inputs(), stop_at / 4 * 2);
    EXPECT_TRUE(result.partial());
    EXPECT_EQ(result.settings[0].tokens.size(), result.settings[1].tokens.size());
    EXPECT_EQ(result.settings[1].tokens.size(), static_cast<size_t>(result.inputs()) * 3);
  }
}

class CompareJournal : public testing::Test {
 protected:
  void SetUp() override {
    path_ = std::filesystem::temp_directory_path() / fmt::format("sagelm-compare-{}", getpid());
    std::filesystem::remove(path_);
  }
  void TearDown() override { std::filesystem::remove(path_); }

  // Of ten inputs in five batches, stopped after `most` parts; returns the scorers' batches.
  static Comparison run(const std::filesystem::path& path, int64_t most, size_t& scored) {
    Toy first{.probabilities = {0.5, 0.25, 0.25}};
    Toy second{.probabilities = {0.1, 0.2, 0.7}};
    const std::vector<int32_t> ids = {0, 1, 2, 0};
    const std::vector<Model::ScoreInput> inputs(10, {.ids = ids, .first_scored = 1});
    const std::vector<CompareSetting> settings = {first.setting("a"), second.setting("b")};
    Journal journal = Journal::open(path, {{"run", "1"}});
    const Comparison result = run_comparison(
        inputs, settings, options_of(8), where,
        [most](const EvalProgress& progress) { return progress.done < most; }, &journal);
    scored = first.batches.size() + second.batches.size();
    return result;
  }

  std::filesystem::path path_;
};

TEST_F(CompareJournal, AResumedRunHasTheFiguresOfAnUndisturbedOne) {
  size_t scored = 0;
  const Comparison whole = run(path_, 100, scored);
  EXPECT_EQ(scored, 10u);
  std::filesystem::remove(path_);
  // In the middle of a batch, which counts for nothing, and at the end of one.
  EXPECT_EQ(run(path_, 6, scored).inputs(), 2);
  EXPECT_EQ(run(path_, 12, scored).inputs(), 6);
  EXPECT_EQ(scored, 4u);
  const Comparison resumed = run(path_, 100, scored);
  EXPECT_EQ(scored, 4u);
  EXPECT_FALSE(resumed.partial());
  EXPECT_EQ(resumed.tokens_run, whole.tokens_run);
  EXPECT_EQ(resumed.input_ends, whole.input_ends);
  for (const size_t s : {0, 1}) {
    ASSERT_EQ(resumed.settings[s].tokens.size(), whole.settings[s].tokens.size());
    for (size_t i = 0; i < whole.settings[s].tokens.size(); ++i) {
      const ComparedToken& one = resumed.settings[s].tokens[i];
      const ComparedToken& other = whole.settings[s].tokens[i];
      EXPECT_EQ(one.logprob, other.logprob);  // bit for bit
      EXPECT_EQ(one.kl, other.kl);
      EXPECT_EQ(one.is_top, other.is_top);
      EXPECT_EQ(one.same_top, other.same_top);
    }
  }
  run(path_, 100, scored);
  EXPECT_EQ(scored, 0u);
}

TEST_F(CompareJournal, RecordsThatDoNotFitAreRefused) {
  const std::vector<BatchScores> scores(
      2, {.tokens = {{.logprob = -1.25, .kl = 1e-300, .is_top = true, .same_top = true}},
          .seconds = 0.1});
  const std::string record = batch_record(4, scores);
  const auto read = read_batch_record(record, 4, 2, 1);
  ASSERT_TRUE(read);
  EXPECT_EQ((*read)[1].tokens[0].kl, 1e-300);
  EXPECT_EQ((*read)[1].seconds, 0.1);
  EXPECT_FALSE(read_batch_record(record, 3, 2, 1));
  EXPECT_FALSE(read_batch_record(record, 4, 3, 1));
  EXPECT_FALSE(read_batch_record(record, 4, 2, 2));
  for (const char* bad : {"", "{}", "[]", "{\"first\": 4, \"settings\": [1, 2]}",
                          "{\"first\": 4, \"settings\": {}}", "nonsense"}) {
    EXPECT_FALSE(read_batch_record(bad, 4, 2, 1)) << bad;
  }
  Journal::open(path_, {{"run", "1"}}).append("{\"first\": 0}");
  size_t scored = 0;
  EXPECT_THROW(run(path_, 100, scored), Error);
}

TEST(Compare, WhatTheModelDoesWrongIsAnError) {
  const std::vector<int32_t> ids = {0, 1, 2};
  const std::vector<Model::ScoreInput> inputs(2, {.ids = ids, .first_scored = 1});
  const auto message = [&](const DistributionScorer& wrong, int64_t vocab_size = 3) {
    Toy first{.probabilities = {0.5, 0.25, 0.25}};
    const std::vector<CompareSetting> settings = {first.setting("a"), {"wrong", wrong}};
    CompareOptions options = options_of();
    options.vocab_size = vocab_size;
    try {
      run_comparison(inputs, settings, options, where);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  const std::vector<Model::ScoredToken> tokens = {{0, 1}, {0, 2}, {1, 1}, {1, 2}};
  const auto hand_over = [](std::vector<Model::ScoredToken> rows, std::vector<float> logits) {
    return [rows = std::move(rows), logits = std::move(logits)](
               std::span<const Model::ScoreInput>, const Model::DistributionCallback& on_block,
               int64_t) { on_block({.tokens = rows, .logits = logits}); };
  };
  const std::vector<float> good(12, 0.5F);
  EXPECT_EQ(message(hand_over(tokens, good)), "no error");
  EXPECT_NE(message(hand_over({{0, 1}}, {0, 0, 0})).find("1 of 4 tokens"), std::string::npos);
  EXPECT_NE(message(hand_over({{0, 2}}, {0, 0, 0})).find("other tokens"), std::string::npos);
  EXPECT_NE(message(hand_over({{0, 1}}, {0, 0})).find("not over 3 tokens"), std::string::npos);
  std::vector<float> bad = good;
  bad[10] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_NE(message(hand_over(tokens, bad)).find("token 2 of window 2"), std::string::npos)
      << message(hand_over(tokens, bad));
  const std::vector<int32_t> foreign = {0, 3};
  const Model::ScoreInput input{.ids = foreign};
  Toy toy{.probabilities = {0.5, 0.25, 0.25}};
  const std::vector<CompareSetting> settings = {toy.setting("a")};
  EXPECT_THROW(run_comparison({&input, 1}, settings, options_of(), where), Error);
}

}  // namespace
}  // namespace sagelm
