// Every protocol's figure, from a text to the perplexity, by a model and a tokenizer that one can
// follow by hand: a token per byte, 1 for "b" and 0 for all others.
#include <gtest/gtest.h>

#include <cmath>
#include <numbers>
#include <string>

#include "base/error.h"
#include "eval/perplexity.h"
#include "eval/toy_model.h"

namespace sagelm {
namespace {

using test::ToyModel;
using Sequences = std::vector<std::vector<int32_t>>;

constexpr double kTolerance = 1e-6;  // log-probabilities are floats

std::vector<int32_t> encode(std::string_view text) {
  std::vector<int32_t> ids;
  for (const char letter : text) ids.push_back(letter == 'b' ? 1 : 0);
  return ids;
}

const TextEncoder kWithBos = {.encode = encode, .bos_id = 0, .eos_id = 1, .adds_bos = true};

// What a model that sees `same` repetitions and `other` changes scores.
double nll_of(int64_t same, int64_t other) {
  return -(static_cast<double>(same) * std::log(0.75) +
           static_cast<double>(other) * std::log(0.25));
}

PerplexityResult score(std::string_view text, std::string_view protocol,
                       const ProtocolOptions& options, ToyModel& model,
                       const TextEncoder& encoder = kWithBos) {
  const ScoringPlan plan(text, make_protocol(protocol, options), encoder);
  return run_perplexity(plan, 2048, model.scorer());
}

void expect_figure(const PerplexityResult& result, int64_t same, int64_t other) {
  EXPECT_EQ(result.tokens_scored, same + other);
  EXPECT_NEAR(result.nll_mean, nll_of(same, other) / static_cast<double>(same + other), kTolerance);
  EXPECT_NEAR(result.perplexity, std::exp(result.nll_mean), kTolerance);
}

TEST(ProtocolFigures, Nonoverlap) {
  ToyModel model;
  // 0 0 1 1 | 1 0 0 1, the last token dropped.
  expect_figure(score("abbbaabb", "nonoverlap", {.ctx = 4}, model), 3, 3);
  EXPECT_EQ(model.sequences, (Sequences{{0, 0, 1, 1}, {1, 0, 0, 1}}));
}

TEST(ProtocolFigures, Strided) {
  ToyModel model;
  // 0 0 1 1 1 0 0 1: every token but the first, once.
  expect_figure(score("abbbaab", "strided", {.ctx = 4, .stride = 2}, model), 4, 3);
  EXPECT_EQ(model.first_scored, (std::vector<int64_t>{1, 2, 2}));
}

TEST(ProtocolFigures, Gptq) {
  ToyModel model;
  // Three rows, the second blank: "ab\n" "\n\n" "" "\n\n" "bb", two windows of its ten ids.
  expect_figure(score("ab\n \nbb", "gptq", {.ctx = 4}, model), 4, 2);
  EXPECT_EQ(model.sequences, (Sequences{{0, 0, 1, 0}, {0, 0, 0, 0}}));
}

TEST(ProtocolFigures, SagePaperLeavesOutWhatFollowsFortyChunks) {
  std::string text(40 * 2048 - 1, 'a');
  for (int i = 0; i < 1024; ++i) text += "ba";
  ToyModel model;
  expect_figure(score(text, "sage-paper", {}, model), 40 * 2047, 0);
  expect_figure(score(text, "gptq", {}, model), 40 * 2047, 2047);
}

TEST(ProtocolFigures, Llamacpp) {
  ToyModel model;
  // 0 1 1 1 1 1 1 1 | 1 0 0 1 1 1 1 0 | 1: of each window of 8 the last 3, after BOS for its first.
  const auto result = score("bbbbbbbbaabbbbab", "llamacpp", {.ctx = 8}, model);
  EXPECT_EQ(model.sequences, (Sequences{{0, 1, 1, 1, 1, 1, 1, 1}, {0, 0, 0, 1, 1, 1, 1, 0}}));
  expect_figure(result, 5, 1);
  // The ± as llama.cpp computes it: sqrt((mean of squares - squared mean) / (n - 1)).
  const double a = -std::log(0.75);
  const double b = -std::log(0.25);
  const double mean = (5 * a + b) / 6;
  const double variance = (5 * a * a + b * b) / 6 - mean * mean;
  EXPECT_NEAR(result.standard_error, std::exp(mean) * std::sqrt(variance / 5), kTolerance);
}

TEST(ProtocolFigures, LlamacppWithoutBos) {
  TextEncoder encoder = kWithBos;
  encoder.adds_bos = false;
  ToyModel model;
  score("bbbbbbbbaabbbbab", "llamacpp", {.ctx = 8}, model, encoder);
  EXPECT_EQ(model.sequences[0], (std::vector<int32_t>(8, 1)));
}

// Two pages, detokenized " = A =\nb" and " = B =\nab": 10 words and 21 bytes as they are in the
// file.
constexpr std::string_view kPages = " = A = \n b\n = B = \n ab";

void expect_wikitext_figures(const PerplexityResult& result, int64_t same, int64_t other) {
  expect_figure(result, same, other);
  ASSERT_TRUE(result.documents);
  EXPECT_EQ(result.documents->documents, 2);
  EXPECT_EQ(result.documents->words, 10);
  EXPECT_EQ(result.documents->bytes, 21);
  const double nll = nll_of(same, other);
  EXPECT_NEAR(result.documents->word_perplexity, std::exp(nll / 10), kTolerance);
  EXPECT_NEAR(result.documents->byte_perplexity, std::exp(nll / 21), kTolerance);
  EXPECT_NEAR(result.documents->bits_per_byte, nll / 21 / std::numbers::ln2, kTolerance);
}

TEST(ProtocolFigures, LmEval043StartsEachPageWithOneBos) {
  ToyModel model;
  expect_wikitext_figures(score(kPages, "lm-eval-0.4.3", {.ctx = 64}, model), 15, 2);
  EXPECT_EQ(model.sequences,
            (Sequences{{0, 0, 0, 0, 0, 0, 0, 0, 1}, {0, 0, 0, 0, 0, 0, 0, 0, 0, 1}}));
  // A window predicts 4 tokens from one; only the last, shorter one is given more.
  ToyModel rolling;
  expect_wikitext_figures(score(kPages, "lm-eval-0.4.3", {.ctx = 4}, rolling), 15, 2);
  EXPECT_EQ(rolling.first_scored, (std::vector<int64_t>{1, 1, 1, 1, 4}));
  for (const std::vector<int32_t>& sequence : rolling.sequences) EXPECT_EQ(sequence.size(), 5u);
}

TEST(ProtocolFigures, LmEval0492ScoresTheTokenizersBosToo) {
  ToyModel model;
  expect_wikitext_figures(score(kPages, "lm-eval-0.4.9.2", {.ctx = 64}, model), 17, 2);
  EXPECT_EQ(model.sequences[0], (std::vector<int32_t>{0, 0, 0, 0, 0, 0, 0, 0, 0, 1}));
  TextEncoder encoder = kWithBos;
  encoder.adds_bos = false;
  expect_wikitext_figures(score(kPages, "lm-eval-0.4.9.2", {.ctx = 64}, model, encoder), 15, 2);
}

TEST(ProtocolFigures, LmEvalPrefixIsEosWhereThereIsNoBos) {
  TextEncoder encoder = {.encode = encode, .bos_id = {}, .eos_id = 1, .adds_bos = false};
  ToyModel model;
  expect_wikitext_figures(score(kPages, "lm-eval-0.4.3", {.ctx = 64}, model, encoder), 13, 4);
  encoder.eos_id = {};
  EXPECT_THROW(score(kPages, "lm-eval-0.4.3", {.ctx = 64}, model, encoder), Error);
}

TEST(ProtocolFigures, LmEvalLimitTakesPages) {
  const ScoringPlan plan(kPages, make_protocol("lm-eval-0.4.3", {.ctx = 64}), kWithBos, 1);
  ToyModel model;
  const auto result = run_perplexity(plan, 2048, model.scorer());
  expect_figure(result, 7, 1);
  EXPECT_EQ(result.documents->documents, 1);
  EXPECT_EQ(result.documents->documents_of_text, 2);
  EXPECT_TRUE(std::isnan(result.documents->word_perplexity_stderr));
}

}  // namespace
}  // namespace sagelm
