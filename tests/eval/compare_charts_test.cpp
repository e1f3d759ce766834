#include "eval/compare_charts.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

namespace sagelm {
namespace {

size_t count_of(const std::string& text, const std::string& part) {
  size_t count = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++count;
  return count;
}

Comparison comparison_of(size_t tokens) {
  Comparison comparison;
  comparison.settings.resize(3);
  for (size_t i = 0; i < tokens; ++i) {
    const double logprob = -1 - static_cast<double>(i % 7);
    comparison.settings[0].tokens.push_back({.logprob = logprob, .same_top = true});
    comparison.settings[1].tokens.push_back({.logprob = logprob, .kl = 0, .same_top = true});
    comparison.settings[2].tokens.push_back({.logprob = logprob, .kl = 2e-4, .same_top = true});
  }
  for (SettingScores& setting : comparison.settings) {
    setting.seconds = 2;
    setting.timed_tokens = 100;
  }
  comparison.input_ends = {tokens};
  comparison.inputs_planned = 1;
  return comparison;
}

const std::vector<std::string> kNames = {"first", "second", "third"};

TEST(CompareCharts, OneOfEachKind) {
  const std::vector<std::vector<AttentionError>> layers(
      3, {{.cosine = 0.999, .relative_l1 = 0.01, .rmse = 0.02},
          {.cosine = 0.9, .relative_l1 = 0.1, .rmse = 0.2}});
  const auto figures = compare_figures(comparison_of(10), kNames, layers);
  ASSERT_EQ(figures.size(), 6u);  // two scatters, histogram, speed, two of the layers
  EXPECT_EQ(figures[0].title, "second against first");
  EXPECT_EQ(count_of(figures[0].svg, "h0"), 10u);
  EXPECT_NE(figures[0].svg.find("dots s1"), std::string::npos);
  EXPECT_NE(figures[1].svg.find("dots s2"), std::string::npos);
  // The baseline has no divergence from itself: the legend begins with the second setting.
  EXPECT_EQ(figures[2].legend, (std::vector<std::string>{"second", "third"}));
  EXPECT_EQ(figures[2].legend_style, 1u);
  EXPECT_EQ(count_of(figures[2].svg, "class=\"line"), 2u);
  EXPECT_NE(figures[2].svg.find(">100</text>"), std::string::npos);  // all in one bin each
  EXPECT_EQ(count_of(figures[3].svg, "50 tokens/s"), 3u);
  for (const size_t i : {4, 5}) {
    EXPECT_EQ(figures[i].legend, kNames);
    EXPECT_EQ(count_of(figures[i].svg, "class=\"line"), 3u);
    EXPECT_EQ(figures[i].svg.find(">0.5</text>"), std::string::npos);  // there is no such layer
  }
}

TEST(CompareCharts, WhatWasNotMeasuredIsNotDrawn) {
  EXPECT_TRUE(compare_figures(comparison_of(0), kNames, {}).empty());
  EXPECT_EQ(compare_figures(comparison_of(1), kNames, {}).size(), 4u);
}

// A page of a long text must stay a page.
TEST(CompareCharts, DotsAreLimited) {
  const auto figures = compare_figures(comparison_of(50000), kNames, {});
  EXPECT_EQ(count_of(figures[0].svg, "h0"), 4000u);
  EXPECT_LT(figures[0].svg.size(), 100000u);
}

}  // namespace
}  // namespace sagelm
