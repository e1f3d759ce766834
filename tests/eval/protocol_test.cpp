#include "eval/protocol.h"

#include <gtest/gtest.h>

#include "base/error.h"

namespace sagelm {
namespace {

using Windows = std::vector<Window>;

TEST(Protocol, NonoverlapDropsTheIncompleteWindow) {
  const Protocol protocol = make_protocol("nonoverlap", {.ctx = 4, .stride = {}});
  EXPECT_EQ(protocol.windows(11), (Windows{{0, 4, 1}, {4, 8, 5}}));
  EXPECT_EQ(protocol.windows(4), (Windows{{0, 4, 1}}));
  EXPECT_THROW(protocol.windows(3), Error);
}

TEST(Protocol, StridedScoresEveryTokenButTheFirstOnce) {
  const Protocol protocol = make_protocol("strided", {.ctx = 4, .stride = 2});
  EXPECT_EQ(protocol.windows(9), (Windows{{0, 4, 1}, {2, 6, 4}, {4, 8, 6}, {6, 9, 8}}));
  EXPECT_EQ(protocol.windows(8), (Windows{{0, 4, 1}, {2, 6, 4}, {4, 8, 6}}));
  EXPECT_EQ(protocol.windows(2), (Windows{{0, 2, 1}}));
  EXPECT_THROW(protocol.windows(1), Error);
}

TEST(Protocol, StridedByAWholeWindowIsNonoverlapWithTheRest) {
  const Protocol protocol = make_protocol("strided", {.ctx = 4, .stride = 4});
  EXPECT_EQ(protocol.windows(10), (Windows{{0, 4, 1}, {4, 8, 5}, {8, 10, 9}}));
  EXPECT_EQ(protocol.windows(9), (Windows{{0, 4, 1}, {4, 8, 5}}));
}

TEST(Protocol, GptqJoinsRowsAsTheDataSetHasThem) {
  const Protocol protocol = make_protocol("gptq", {});
  EXPECT_EQ(protocol.ctx, 2048);
  EXPECT_EQ(protocol.prepare(" \n = A = \n \n b"), "\n\n = A = \n\n\n\n\n b");
  EXPECT_EQ(protocol.prepare("a\r\n\r\nb\rc"), protocol.prepare("a\n\nb\nc"));
  EXPECT_EQ(protocol.windows(2 * 2048 + 5), (Windows{{0, 2048, 1}, {2048, 4096, 2049}}));
}

TEST(Protocol, SagePaperTakesFortyChunks) {
  const Protocol protocol = make_protocol("sage-paper", {});
  EXPECT_EQ(protocol.windows(50 * 2048).size(), 40u);
  EXPECT_EQ(protocol.windows(50 * 2048).back(), (Window{39 * 2048, 40 * 2048, 39 * 2048 + 1}));
  EXPECT_EQ(protocol.windows(3 * 2048).size(), 3u);
  EXPECT_THROW(make_protocol("sage-paper", {.ctx = 4096, .stride = {}}), UsageError);
}

TEST(Protocol, LlamacppScoresTheSecondHalf) {
  const Protocol protocol = make_protocol("llamacpp", {});
  EXPECT_TRUE(protocol.bos_in_each_window);
  const Windows windows = protocol.windows(1300);
  EXPECT_EQ(windows, (Windows{{0, 512, 257}, {512, 1024, 769}}));
  EXPECT_EQ(windows[0].end - windows[0].first_scored, 255);
  EXPECT_THROW(protocol.windows(1023), Error);
}

TEST(Protocol, RefusesWhatItCannotMean) {
  EXPECT_THROW(make_protocol("wikitext", {}), UsageError);
  EXPECT_THROW(make_protocol("nonoverlap", {.ctx = 1, .stride = {}}), UsageError);
  EXPECT_THROW(make_protocol("nonoverlap", {.ctx = 4, .stride = 2}), UsageError);
  EXPECT_THROW(make_protocol("strided", {.ctx = 4, .stride = 5}), UsageError);
  EXPECT_THROW(make_protocol("strided", {.ctx = 4, .stride = 0}), UsageError);
}

TEST(Protocol, LmEvalWithoutAVersionIsTheNewest) {
  EXPECT_EQ(make_protocol("lm-eval", {.ctx = 64}).name, "lm-eval-0.4.9.2");
}

}  // namespace
}  // namespace sagelm
