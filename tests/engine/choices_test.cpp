// Model::score_choices on the demo model: that a prefix shared through the cache, neighbours and
// steps do not change an answer, and that it is what score() says.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "sagelm/sagelm.hpp"

namespace sagelm {
namespace {

using Logprobs = std::vector<std::vector<double>>;  // of each input, of each choice

Model load(const std::string& attention = "fp16", int64_t batch_tokens = 2048) {
  return Model::load({.model = std::string(SAGELM_SOURCE_DIR) + "/models/demo",
                      .attention = attention,
                      .threads = 1,
                      .batch_tokens = batch_tokens});
}

// A prefix of two whole pages and a part of a third, contexts of different lengths, and choices of
// one to three tokens.
struct Prompts {
  explicit Prompts(Model& model) {
    std::string text;
    for (int i = 0; i < 60; ++i) {
      text += "The captain looked out upon the sea, and rain fell on deck " + std::to_string(i);
    }
    const std::vector<int32_t> ids = model.tokenize(text);
    prefix.assign(ids.begin(), ids.begin() + 300);
    for (const int64_t length : {1, 7, 140, 40, 128, 3}) {
      const auto first = ids.begin() + 300 + length;
      contexts.emplace_back(first, first + length);
    }
    choices = {{500}, {600, 700}, {800}, {900, 901, 902}};
    letters = {{500}, {600}, {800}, {900}};
  }
  std::vector<Model::ChoiceInput> inputs(
      const std::vector<std::vector<int32_t>>& continuations) const {
    std::vector<Model::ChoiceInput> result;
    for (const auto& context : contexts) {
      result.push_back({.context = context, .choices = continuations});
    }
    return result;
  }

  std::vector<int32_t> prefix;
  std::vector<std::vector<int32_t>> contexts;
  std::vector<std::vector<int32_t>> choices, letters;
};

struct Scores {
  Logprobs logprobs;
  int64_t tokens_run = 0;
};

Scores score(Model& model, std::span<const int32_t> prefix,
             std::span<const Model::ChoiceInput> inputs) {
  Scores result;
  result.tokens_run = model.score_choices(
      prefix, inputs, [&result](int64_t input, std::span<const double> logprobs) {
        EXPECT_EQ(input, static_cast<int64_t>(result.logprobs.size()));
        result.logprobs.emplace_back(logprobs.begin(), logprobs.end());
        return true;
      });
  return result;
}

void expect_near(const Logprobs& a, const Logprobs& b, double bound) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    ASSERT_EQ(a[i].size(), b[i].size());
    for (size_t c = 0; c < a[i].size(); ++c) {
      EXPECT_NEAR(a[i][c], b[i][c], bound) << "input " << i << ", choice " << c;
    }
  }
}

TEST(Choices, TheSameAsScoreOfTheWhole) {
  Model model = load();
  const Prompts prompts(model);
  const Scores found = score(model, prompts.prefix, prompts.inputs(prompts.choices));
  Logprobs expected;
  for (const auto& context : prompts.contexts) {
    auto& row = expected.emplace_back();
    for (const auto& choice : prompts.choices) {
      std::vector<int32_t> ids = prompts.prefix;
      ids.insert(ids.end(), context.begin(), context.end());
      const auto first = static_cast<int64_t>(ids.size());
      ids.insert(ids.end(), choice.begin(), choice.end());
      const Model::ScoreInput input{.ids = ids, .first_scored = first};
      double sum = 0;
      const auto scores = model.score({&input, 1});
      for (const Scored& scored : scores.front()) sum += static_cast<double>(scored.logprob);
      row.push_back(sum);
    }
  }
  expect_near(found.logprobs, expected, 0.02);
}

TEST(Choices, ASharedPrefixGivesWhatWholePromptsGive) {
  // fp16: up to rounding. sage2 quantizes keys in groups and around a mean that both depend on
  // where a prompt is cut.
  for (const auto& [attention, bound] : {std::pair("fp16", 0.005), std::pair("sage2", 0.1)}) {
    Model model = load(attention);
    const Prompts prompts(model);
    const Scores shared = score(model, prompts.prefix, prompts.inputs(prompts.letters));
    std::vector<std::vector<int32_t>> whole;
    int64_t tokens = 0;
    for (const auto& context : prompts.contexts) {
      whole.push_back(prompts.prefix);
      whole.back().insert(whole.back().end(), context.begin(), context.end());
      tokens += static_cast<int64_t>(whole.back().size());
    }
    std::vector<Model::ChoiceInput> inputs;
    for (const auto& prompt : whole) {
      inputs.push_back({.context = prompt, .choices = prompts.letters});
    }
    const Scores unshared = score(model, {}, inputs);
    expect_near(shared.logprobs, unshared.logprobs, bound);
    // Two pages of 128 tokens are run once instead of six times.
    EXPECT_EQ(unshared.tokens_run, tokens);
    EXPECT_EQ(shared.tokens_run, tokens - 5 * 256);
  }
}

TEST(Choices, NeighboursAndStepsDoNotChangeScores) {
  for (const char* attention : {"fp16", "sage2"}) {
    Model model = load(attention);
    const Prompts prompts(model);
    const auto inputs = prompts.inputs(prompts.choices);
    const Scores together = score(model, prompts.prefix, inputs);
    for (size_t i = 0; i < inputs.size(); ++i) {
      const Scores alone = score(model, prompts.prefix, {&inputs[i], 1});
      expect_near(alone.logprobs, {together.logprobs[i]}, 0.02);
    }
    if (std::string(attention) != "fp16") continue;
    // Contexts longer than a step.
    Model small = load(attention, 64);
    expect_near(score(small, prompts.prefix, inputs).logprobs, together.logprobs, 0.02);
  }
}

// Whole distributions after a shared beginning: the rows of unshared ones, up to rounding.
TEST(Choices, SharedDistributionsAreThoseOfTheWhole) {
  Model model = load();
  const Prompts prompts(model);
  std::vector<std::vector<int32_t>> ids;
  std::vector<Model::ScoreInput> inputs;
  for (const auto& context : prompts.contexts) {
    ids.push_back(prompts.prefix);
    ids.back().insert(ids.back().end(), context.begin(), context.end());
    ids.back().insert(ids.back().end(), {500, 600});
  }
  for (const auto& whole : ids) {
    inputs.push_back({.ids = whole, .first_scored = static_cast<int64_t>(whole.size()) - 2});
  }
  struct Rows {
    std::vector<std::pair<size_t, int64_t>> places;
    std::vector<float> logits;
  };
  const auto rows_with = [&](int64_t shared) {
    Rows rows;
    model.score_distributions(
        inputs,
        [&rows](const Model::LogitsBlock& block) {
          for (const auto& token : block.tokens) {
            rows.places.emplace_back(token.input, token.position);
          }
          rows.logits.insert(rows.logits.end(), block.logits.begin(), block.logits.end());
        },
        shared);
    return rows;
  };
  const auto shared_tokens = static_cast<int64_t>(prompts.prefix.size());
  const Rows shared = rows_with(shared_tokens);
  const Rows whole = rows_with(0);
  EXPECT_EQ(shared.places, whole.places);
  ASSERT_EQ(shared.logits.size(), whole.logits.size());
  float worst = 0;
  for (size_t i = 0; i < whole.logits.size(); ++i) {
    worst = std::max(worst, std::abs(shared.logits[i] - whole.logits[i]));
  }
  EXPECT_LT(worst, 0.01F);
  ids[1][0] += 1;  // no longer the same beginning
  EXPECT_THROW(rows_with(shared_tokens), Error);
}

TEST(Choices, StopsWhereItIsTold) {
  Model model = load();
  const Prompts prompts(model);
  int64_t told = 0;
  model.score_choices(prompts.prefix, prompts.inputs(prompts.letters),
                      [&told](int64_t, std::span<const double>) { return ++told < 2; });
  EXPECT_EQ(told, 2);
  EXPECT_EQ(model.score_choices({}, {}, [](int64_t, std::span<const double>) { return true; }), 0);
}

TEST(Choices, WhatCannotBeScoredIsNamed) {
  Model model = load();
  const std::vector<int32_t> context = {1, 2};
  const std::vector<int32_t> too_long(3000, 5);
  const std::vector<int32_t> wrong = {1 << 30};
  const std::vector<std::vector<int32_t>> letters = {{500}};
  const std::vector<std::vector<int32_t>> empty = {{}};
  const auto error_of = [&model](std::span<const int32_t> prefix, const Model::ChoiceInput& input) {
    try {
      score(model, prefix, {&input, 1});
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  EXPECT_EQ(error_of({}, {.context = context, .choices = letters}), "no error");
  EXPECT_EQ(error_of(context, {.context = {}, .choices = letters}),
            "input 0 has no context after the prefix");
  EXPECT_EQ(error_of({}, {.context = context, .choices = {}}), "input 0 has no choices");
  EXPECT_EQ(error_of({}, {.context = context, .choices = empty}),
            "a choice of input 0 has no tokens");
  EXPECT_NE(error_of(too_long, {.context = context, .choices = letters}).find("do not fit"),
            std::string::npos);
  EXPECT_NE(error_of({}, {.context = wrong, .choices = letters}), "no error");
}

}  // namespace
}  // namespace sagelm
