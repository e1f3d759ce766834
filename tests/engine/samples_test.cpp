// Several answers to one prompt: Model::generate_samples on the demo model.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "base/error.h"
#include "sagelm/sagelm.hpp"
#include "support/row_products.h"

namespace sagelm {
namespace {

Model load(const std::string& attention, int64_t context = 0) {
  LoadOptions options;
  options.model = std::string(SAGELM_SOURCE_DIR) + "/models/demo";
  options.attention = attention;
  options.threads = 1;
  options.context = context;
  return Model::load(options);
}

GenerateOptions drawing(int64_t tokens, double temperature) {
  GenerateOptions options;
  options.max_tokens = tokens;
  options.sampling = {.temperature = temperature, .seed = 7};
  return options;
}

// A prompt of so many tokens.
std::vector<int32_t> prompt_of(const Model& model, size_t tokens) {
  std::string text = "Once upon a time there was a girl who kept a lighthouse.";
  while (text.size() < 8 * tokens) text += " Every evening she lit the lamp, and a ship came home.";
  std::vector<int32_t> ids = model.tokenize(text);
  ids.resize(tokens);
  return ids;
}

TEST(Samples, AreWhatTheirSeedsGiveAlone) {
  for (const char* attention : {"fp16", "sage2"}) {  // with an FP16 and an 8-bit cache
    Model model = load(attention);
    for (const size_t tokens : {5, 127, 128, 129, 300}) {
      const std::vector<int32_t> prompt = prompt_of(model, tokens);
      GenerateOptions options = drawing(10, 0.8);
      const auto samples = model.generate_samples(prompt, options, 3);
      ASSERT_EQ(samples.size(), 3u);
      for (const Generation& sample : samples) {
        std::vector<int32_t> alone = model.start_session().generate(prompt, options).ids;
        std::vector<int32_t> ids = sample.ids;
        EXPECT_EQ(ids.size(), alone.size());
        if (!rows_ignore_each_other()) {  // the first token is drawn from the prompt's one row
          ids.resize(1);
          alone.resize(1);
        }
        EXPECT_EQ(ids, alone) << attention << ", " << tokens << " tokens, seed "
                              << options.sampling.seed;
        EXPECT_EQ(sample.prefill_tokens, static_cast<int64_t>(tokens));
        ++options.sampling.seed;
      }
      EXPECT_NE(samples[0].ids, samples[1].ids);
    }
  }
}

TEST(Samples, GreedyOnesAreEqualAcrossAPage) {
  for (const char* attention : {"fp16", "sage1", "sage2"}) {
    Model model = load(attention);
    const auto samples = model.generate_samples(prompt_of(model, 120), drawing(20, 0), 4);
    for (const Generation& sample : samples) {
      EXPECT_EQ(sample.ids, samples[0].ids) << attention;
      EXPECT_GT(sample.ids.size(), 8u);  // into the next page
      EXPECT_EQ(sample.text, samples[0].text);
    }
  }
}

TEST(Samples, EndByThemselvesAndReportTheirText) {
  Model model = load("fp16");
  std::vector<std::string> texts(3);
  const auto samples = model.generate_samples(prompt_of(model, 40), drawing(12, 0.8), 3,
                                              [&](int64_t sample, std::string_view text) {
                                                texts[static_cast<size_t>(sample)] += text;
                                                return sample != 1 || texts[1].empty();
                                              });
  EXPECT_EQ(samples[0].stop_reason, StopReason::kMaxTokens);
  EXPECT_EQ(samples[1].stop_reason, StopReason::kCallback);
  EXPECT_LT(samples[1].ids.size(), samples[0].ids.size());
  EXPECT_EQ(samples[2].ids.size(), 12u);
  EXPECT_EQ(texts[0], samples[0].text);
  EXPECT_EQ(texts[2], samples[2].text);
}

TEST(Samples, FillTheContextAndNoMore) {
  for (const char* attention : {"fp16", "sage2"}) {
    Model model = load(attention, 160);
    for (const Generation& sample :
         model.generate_samples(prompt_of(model, 150), drawing(1000, 0.8), 3)) {
      if (sample.stop_reason == StopReason::kEndOfSequence) continue;
      EXPECT_EQ(sample.stop_reason, StopReason::kContextFull) << attention;
      EXPECT_EQ(sample.ids.size(), 10u);
    }
    EXPECT_THROW(model.generate_samples(prompt_of(model, 161), drawing(1, 0), 2), Error);
  }
}

TEST(Samples, RefuseWhatCannotBeMeant) {
  Model model = load("fp16");
  const std::vector<int32_t> prompt = prompt_of(model, 4);
  EXPECT_THROW(model.generate_samples(prompt, drawing(1, 0), 0), UsageError);
  EXPECT_THROW(model.generate_samples(prompt, drawing(1, 0), 1 << 20), UsageError);
  EXPECT_THROW(model.generate_samples({}, drawing(1, 0), 2), Error);
}

}  // namespace
}  // namespace sagelm
