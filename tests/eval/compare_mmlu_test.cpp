// MMLU as a comparison: which inputs it makes of the questions, and its figures by hand.
#include "eval/compare_mmlu.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "base/error.h"

namespace sagelm {
namespace {

MmluItem item(std::vector<int32_t> context, int answer, bool shortened = false) {
  return {.context = std::move(context),
          .choices = {{{10}, {11}, {12}, {13}}},
          .answer = answer,
          .shortened = shortened};
}

// Anatomy (STEM): two questions after five shared tokens, and a shortened one between them;
// marketing (other): two.
std::vector<MmluTask> two_subjects() {
  return {
      {.subject = find_mmlu_subject("anatomy"),
       .items = {item({1, 2, 3, 4, 5, 6}, 0), item({4, 5}, 1, true), item({1, 2, 3, 4, 5, 7}, 2)},
       .shared = 5},
      {.subject = find_mmlu_subject("marketing"),
       .items = {item({1, 8}, 3), item({1, 9}, 0)},
       .shared = 1}};
}

TEST(CompareMmlu, QuestionsBecomeInputs) {
  const std::vector<MmluTask> tasks = two_subjects();
  const MmluComparison plan(tasks, 2);
  ASSERT_EQ(plan.inputs().size(), 5u);
  const std::vector<std::vector<int32_t>> expected = {
      {1, 2, 3, 4, 5, 6, 10}, {1, 2, 3, 4, 5, 7, 12}, {4, 5, 11}, {1, 8, 13}, {1, 9, 10}};
  for (size_t i = 0; i < expected.size(); ++i) {
    const Model::ScoreInput& input = plan.inputs()[i];
    EXPECT_EQ(std::vector<int32_t>(input.ids.begin(), input.ids.end()), expected[i]);
    EXPECT_EQ(input.first_scored, static_cast<int64_t>(expected[i].size()) - 1);
    EXPECT_EQ(plan.choices()[i], (std::vector<int32_t>{10, 11, 12, 13}));
  }
  ASSERT_EQ(plan.groups().size(), 3u);
  EXPECT_EQ(plan.groups()[0].end, 2u);
  EXPECT_EQ(plan.groups()[0].shared, 4);  // whole pages of 2
  EXPECT_EQ(plan.groups()[1].end, 3u);
  EXPECT_EQ(plan.groups()[1].shared, 0);
  EXPECT_EQ(plan.groups()[2].end, 5u);
  EXPECT_EQ(plan.groups()[2].shared, 0);
}

// Right of anatomy's three: first 2, second 3; of marketing's two: 1 and 0.
TEST(CompareMmlu, FiguresByHand) {
  const std::vector<MmluTask> tasks = two_subjects();
  const MmluComparison plan(tasks, 1);
  const std::vector<std::vector<bool>> hits = {{true, false, true, true, false},
                                               {true, true, true, false, false}};
  Comparison comparison;
  comparison.inputs_planned = 5;
  comparison.input_ends = {1, 2, 3, 4, 5};
  for (const std::vector<bool>& row : hits) {
    SettingScores& setting = comparison.settings.emplace_back();
    for (const bool hit : row) setting.tokens.push_back({.logprob = -1, .is_top = hit});
  }
  const std::vector<ComparedMetric> metrics = plan.metrics(comparison);
  ASSERT_EQ(metrics.size(), 5u);
  const std::vector<std::string> names = {"accuracy", "accuracy_macro", "accuracy_STEM",
                                          "accuracy_other", "nll_mean"};
  for (size_t i = 0; i < names.size(); ++i) EXPECT_EQ(metrics[i].name, names[i]);
  const PairedFigure& first = metrics[0].figures[0];
  const PairedFigure& micro = metrics[0].figures[1];
  const PairedFigure& macro = metrics[1].figures[1];
  EXPECT_DOUBLE_EQ(first.value, 0.6);
  EXPECT_EQ(first.difference, 0);
  EXPECT_DOUBLE_EQ(micro.value, 0.6);
  EXPECT_DOUBLE_EQ(micro.difference, 0);
  EXPECT_DOUBLE_EQ(macro.value, 0.5);
  EXPECT_DOUBLE_EQ(macro.difference, 0.5 * (1.0 / 3 - 0.5));
  // Changes of anatomy: 0, 1, 0; of marketing: -1, 0. Squared distances from the subjects' means
  // add up to 2/3 and 1/2.
  EXPECT_DOUBLE_EQ(micro.difference_error, std::sqrt((2.0 / 3 + 0.5) / 3 / 5));
  EXPECT_DOUBLE_EQ(macro.difference_error, std::sqrt(2.0 / 3 / 2 / 3 + 0.5 / 1 / 2) / 2);
  EXPECT_DOUBLE_EQ(metrics[2].figures[1].difference, 1.0 / 3);
  EXPECT_DOUBLE_EQ(metrics[3].figures[1].difference, -0.5);
  EXPECT_DOUBLE_EQ(metrics[4].figures[1].value, 1);
}

TEST(CompareMmlu, LettersOfSeveralTokensAreNamed) {
  std::vector<MmluTask> tasks = two_subjects();
  tasks[1].items[1].choices[2] = {12, 14};
  try {
    const MmluComparison plan(tasks, 1);
    FAIL() << "nothing was refused";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("marketing, question 2: the letter C has 2 tokens"),
              std::string::npos);
  }
}

}  // namespace
}  // namespace sagelm
