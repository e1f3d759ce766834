#include "engine/text_stream.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace sagelm {
namespace {

using Strings = std::vector<std::string>;

TEST(TextStream, WithoutStopsNothingIsHeld) {
  TextStream stream(Strings{});
  EXPECT_EQ(stream.push("abc"), "abc");
  EXPECT_EQ(stream.finish(), "");
  EXPECT_FALSE(stream.stopped());
}

TEST(TextStream, HoldsWhatMayBecomeAStop) {
  TextStream stream(Strings{"END"});
  EXPECT_EQ(stream.push("x E"), "x ");
  EXPECT_EQ(stream.push("N"), "");
  EXPECT_EQ(stream.push("T E"), "ENT ");
  EXPECT_EQ(stream.finish(), "E");
}

TEST(TextStream, EndsBeforeTheFirstStop) {
  TextStream stream(Strings{"cd", "b"});
  EXPECT_EQ(stream.push("ab cd"), "a");
  EXPECT_TRUE(stream.stopped());
  EXPECT_EQ(stream.push("more"), "");
  EXPECT_EQ(stream.finish(), "");
}

TEST(TextStream, StopOverManyPushes) {
  const std::string text = "aabaabaaab!";
  TextStream stream(Strings{"aaab"});
  std::string shown;
  for (const char c : text) shown += stream.push(std::string(1, c));
  EXPECT_TRUE(stream.stopped());
  EXPECT_EQ(shown, "aabaab");
}

}  // namespace
}  // namespace sagelm
