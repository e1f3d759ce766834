#include "eval/bootstrap.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace sagelm {
namespace {

// Expected values: the harness's bootstrap in Python, random.Random(block).choices(values).
TEST(Bootstrap, DrawsTheHarnesssSamples) {
  const std::vector<double> few = {-1.5, -0.25, -4.0, -7.75, -2.0, -0.5, -3.25};
  EXPECT_NEAR(bootstrap_perplexity_stderr(few), 34.95096452358042, 1e-9);
  std::vector<double> more;
  for (int i = 0; i < 40; ++i) more.push_back(-(i * i % 97) / 8.0);
  EXPECT_NEAR(bootstrap_perplexity_stderr(more), 232.53896130313123, 1e-9);
}

TEST(Bootstrap, EqualValuesDoNotVaryAndOneIsNoSample) {
  EXPECT_EQ(bootstrap_perplexity_stderr(std::vector<double>(50, -2.0)), 0.0);
  EXPECT_TRUE(std::isnan(bootstrap_perplexity_stderr(std::vector<double>{-2.0})));
  EXPECT_TRUE(std::isnan(bootstrap_perplexity_stderr({})));
}

}  // namespace
}  // namespace sagelm
