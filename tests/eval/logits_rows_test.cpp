// Against sums in long double, term by term.
#include "eval/logits_rows.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace sagelm {
namespace {

long double direct_log_sum_exp(const std::vector<float>& row) {
  long double largest = row[0];
  for (const float x : row) largest = std::max<long double>(largest, x);
  long double sum = 0;
  for (const float x : row) sum += std::exp(x - largest);
  return largest + std::log(sum);
}

long double direct_kl(const std::vector<float>& p, const std::vector<float>& q) {
  const long double p_total = direct_log_sum_exp(p);
  const long double q_total = direct_log_sum_exp(q);
  long double sum = 0;
  for (size_t i = 0; i < p.size(); ++i) {
    sum += std::exp(p[i] - p_total) * ((p[i] - p_total) - (q[i] - q_total));
  }
  return sum;
}

double kl(const std::vector<float>& p, const std::vector<float>& q) {
  return kl_divergence(p, summarize(p).log_sum_exp, q, summarize(q).log_sum_exp);
}

std::vector<float> random_row(size_t size, float spread, float added, std::mt19937& random) {
  std::normal_distribution<float> normal(added, spread);
  std::vector<float> row(size);
  for (float& x : row) x = normal(random);
  return row;
}

TEST(LogitsRows, AgreeWithDirectSums) {
  std::mt19937 random(7);
  for (const size_t size : {1, 2, 7, 8, 15, 16, 17, 33, 1000, 1024, 1025, 32000}) {
    for (const float spread : {0.01F, 1.0F, 4.0F, 30.0F, 1000.0F}) {
      for (const float added : {0.0F, -50.0F, 3000.0F}) {
        const std::vector<float> p = random_row(size, spread, added, random);
        const long double total = direct_log_sum_exp(p);
        EXPECT_NEAR(summarize(p).log_sum_exp, static_cast<double>(total),
                    1e-14 * (1 + std::abs(static_cast<double>(total))))
            << size << " " << spread << " " << added;
        for (const float change : {0.001F, 0.1F, 3.0F}) {
          std::vector<float> q = random_row(size, change * spread, 1, random);
          for (size_t i = 0; i < size; ++i) q[i] += p[i];
          const auto expected = static_cast<double>(direct_kl(p, q));
          // The logits' own size decides what is left of a small difference.
          const double rounding = 1e-15 * (10 + std::abs(static_cast<double>(total)));
          EXPECT_NEAR(kl(p, q), expected, 1e-10 * expected + rounding)
              << size << " " << spread << " " << added << " " << change;
        }
      }
    }
  }
}

TEST(LogitsRows, OneTermIsItsExponential) {
  // Two logits: the smaller one's share, from 1/2 to nothing.
  for (float x = 0; x < 800; x = x * 1.01F + 0.003F) {
    const std::vector<float> row = {0, -x};
    EXPECT_NEAR(summarize(row).log_sum_exp, std::log1p(std::exp(-static_cast<double>(x))), 3e-16);
    EXPECT_GE(kl(row, {0, -x - 1}), 0);
  }
}

TEST(LogitsRows, TheFirstOfTheLargestIsFound) {
  std::mt19937 random(3);
  for (const size_t size : {1, 3, 16, 100, 1024, 5000}) {
    std::vector<float> row = random_row(size, 1, -100, random);
    for (const size_t at : {size - 1, size / 2, size / 3, size_t{0}}) {
      row[at] = 1;  // beside those further on
      EXPECT_EQ(summarize(row).argmax, static_cast<int32_t>(at)) << size;
    }
  }
}

TEST(LogitsRows, EqualRowsDoNotDiverge) {
  std::mt19937 random(5);
  const std::vector<float> row = random_row(32000, 3, 0, random);
  EXPECT_EQ(kl(row, row), 0);
}

TEST(LogitsRows, WhatIsNotFiniteShows) {
  std::mt19937 random(5);
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    for (const size_t at : {0, 7, 40}) {
      std::vector<float> row = random_row(41, 3, 0, random);
      const std::vector<float> good = row;
      row[at] = bad;
      EXPECT_FALSE(std::isfinite(summarize(row).log_sum_exp)) << bad << " " << at;
      EXPECT_FALSE(std::isfinite(kl(good, row))) << bad << " " << at;
    }
  }
}

}  // namespace
}  // namespace sagelm
