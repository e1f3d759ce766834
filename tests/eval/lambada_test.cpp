#include "eval/lambada.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "base/error.h"
#include "eval/toy_model.h"

namespace sagelm {
namespace {

using test::ToyModel;

constexpr int64_t kContext = 100;
constexpr double kTolerance = 1e-6;

// One token per letter, a space joining the letter after it (as sentencepiece does): id 1 for "b",
// 0 for every other letter; 0 in front as BOS.
std::vector<int32_t> encode(std::string_view text) {
  std::vector<int32_t> ids = {0};
  for (const char letter : text) {
    if (letter != ' ') ids.push_back(letter == 'b' ? 1 : 0);
  }
  return ids;
}

std::vector<LambadaExample> prepare(const std::vector<Passage>& passages, LambadaVariant variant,
                                    int64_t context = kContext) {
  return prepare_lambada("f.jsonl", passages, variant, encode, context);
}

std::string error_of(const std::string& text, LambadaVariant variant, int64_t context = kContext) {
  try {
    prepare({{.line = 7, .text = text}}, variant, context);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(Lambada, TheTargetIsTheLastWordInTheWholesTokens) {
  const auto word = prepare({{.line = 1, .text = "aa ab bba"}}, LambadaVariant::kWord);
  EXPECT_EQ(word[0].ids, (std::vector<int32_t>{0, 0, 0, 0, 1, 1, 1, 0}));
  EXPECT_EQ(word[0].first_scored, 5);
  const auto last = prepare({{.line = 1, .text = "aa ab bba"}}, LambadaVariant::kLastToken);
  EXPECT_EQ(last[0].first_scored, 7);
}

TEST(Lambada, BothVariantsByHand) {
  // Targets after the last letter before them: "b" "bb" after "b": all same; "ab" after "b": both
  // other; "bb" after "a": other, then same.
  const std::vector<Passage> passages = {{.line = 1, .text = "ab b"},
                                         {.line = 2, .text = "ab bb"},
                                         {.line = 3, .text = "b ab"},
                                         {.line = 4, .text = "a bb"}};
  const double same = std::log(0.75);
  const double other = std::log(0.25);

  ToyModel model;
  const auto word = run_lambada(prepare(passages, LambadaVariant::kWord), 2048, model.scorer());
  EXPECT_EQ(word.examples, 4);
  EXPECT_EQ(word.correct, 2);
  EXPECT_DOUBLE_EQ(word.accuracy, 0.5);
  EXPECT_NEAR(word.accuracy_stderr, std::sqrt(0.25 / 3), kTolerance);
  const std::vector<double> sums = {same, 2 * same, 2 * other, other + same};
  double mean = 0;
  for (const double sum : sums) mean += sum / 4;
  EXPECT_NEAR(word.perplexity, std::exp(-mean), 1e-5);
  EXPECT_NEAR(word.perplexity_stderr, 2.2904356866652194, 1e-9);  // the harness's bootstrap

  const auto last =
      run_lambada(prepare(passages, LambadaVariant::kLastToken), 2048, model.scorer());
  EXPECT_EQ(last.correct, 3);
  EXPECT_NEAR(last.perplexity, std::exp(-(3 * same + other) / 4), kTolerance);
}

TEST(Lambada, BatchesDoNotChangeTheResult) {
  std::vector<Passage> passages;
  for (int i = 0; i < 50; ++i) {
    passages.push_back(
        {.line = i + 1,
         .text = std::string(static_cast<size_t>(i % 7 + 1), 'a') + (i % 3 == 0 ? " bb" : " ab")});
  }
  const auto examples = prepare(passages, LambadaVariant::kWord);
  ToyModel alone;
  const auto one = run_lambada(examples, 1, alone.scorer());
  ToyModel together;
  const auto many = run_lambada(examples, 64, together.scorer());
  EXPECT_EQ(alone.batches.size(), 50u);
  EXPECT_LT(together.batches.size(), 10u);
  EXPECT_EQ(one.correct, many.correct);
  EXPECT_EQ(one.perplexity, many.perplexity);
}

TEST(Lambada, AStoppedRunIsPartial) {
  ToyModel model;
  const auto examples =
      prepare({{.line = 1, .text = "a a"}, {.line = 2, .text = "a a"}}, LambadaVariant::kWord);
  const auto result =
      run_lambada(examples, 1, model.scorer(), [](const EvalProgress&) { return false; });
  EXPECT_TRUE(result.partial());
  EXPECT_EQ(result.examples, 1);
}

TEST(Lambada, PassagesThatHaveNoTargetAreNamed) {
  const auto word = LambadaVariant::kWord;
  EXPECT_EQ(error_of("aaa", word),
            "f.jsonl:7: the passage has no last word: there is no space in it");
  EXPECT_EQ(error_of("aa ", word), "f.jsonl:7: the passage has no last word: it ends with a space");
  EXPECT_EQ(error_of("aaa", LambadaVariant::kLastToken), "no error");
}

TEST(Lambada, PassagesBeyondTheContextLoseTheirBeginning) {
  const auto prepared = [](LambadaVariant variant, int64_t context) {
    return prepare({{.line = 7, .text = "aa ab"}, {.line = 8, .text = "a b"}}, variant, context);
  };
  for (const int64_t context : {4, 5}) {  // the last token is a target only
    const auto whole = prepared(LambadaVariant::kWord, context);
    EXPECT_EQ(whole[0].ids, (std::vector<int32_t>{0, 0, 0, 0, 1}));
    EXPECT_EQ(whole[0].first_scored, 3);
    EXPECT_EQ(num_shortened(whole), 0);
  }
  const auto word = prepared(LambadaVariant::kWord, 2);
  EXPECT_EQ(word[0].ids, (std::vector<int32_t>{0, 0, 1}));
  EXPECT_EQ(word[0].first_scored, 1);
  EXPECT_EQ(word[1].ids, encode("a b"));
  EXPECT_EQ(num_shortened(word), 1);
  const auto last = prepared(LambadaVariant::kLastToken, 2);
  EXPECT_EQ(last[0].ids, word[0].ids);
  EXPECT_EQ(last[0].first_scored, 2);
  EXPECT_EQ(error_of("aa ab", LambadaVariant::kWord, 1),
            "f.jsonl:7: a context of 1 tokens is too short for the passage's last word");
}

TEST(Lambada, VariantNames) {
  for (const auto variant : {LambadaVariant::kWord, LambadaVariant::kLastToken}) {
    EXPECT_EQ(parse_lambada_variant(lambada_variant_name(variant)), variant);
  }
  EXPECT_THROW(parse_lambada_variant("words"), UsageError);
}

}  // namespace
}  // namespace sagelm
