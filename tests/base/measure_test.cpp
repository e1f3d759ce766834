#include "base/measure.h"

#include <gtest/gtest.h>

namespace sagelm {
namespace {

TEST(Measure, SpreadIsMedianSmallestLargest) {
  const Spread odd = spread_of({5, 1, 9});
  EXPECT_EQ(odd.median, 5);
  EXPECT_EQ(odd.smallest, 1);
  EXPECT_EQ(odd.largest, 9);
  EXPECT_EQ(spread_of({4, 1, 2, 8}).median, 3);
  EXPECT_EQ(spread_of({7}).median, 7);
}

TEST(Measure, SecondsPass) {
  int calls = 0;
  EXPECT_GE(seconds_of([&] { ++calls; }), 0);
  EXPECT_EQ(calls, 1);
}

}  // namespace
}  // namespace sagelm
