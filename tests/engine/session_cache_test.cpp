// The quantized KV caches as the public API shows it, on the demo model.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "base/error.h"
#include "sagelm/sagelm.hpp"

namespace sagelm {
namespace {

Model load(const std::string& attention, const std::string& kv_cache, int64_t batch_tokens = 2048) {
  LoadOptions options;
  options.model = std::string(SAGELM_SOURCE_DIR) + "/models/demo";
  options.attention = attention;
  options.kv_cache = kv_cache;
  options.threads = 1;  // tests run side by side, and OpenMP's threads spin while they wait
  options.batch_tokens = batch_tokens;
  return Model::load(options);
}

std::vector<int32_t> story(const Model& model, size_t tokens) {
  std::string text = "Once upon a time there was a girl who kept a lighthouse.";
  while (text.size() < tokens * 8) {
    text += " On day " + std::to_string(text.size() * 7919 % 1000) + " she saw a ship with " +
            std::to_string(text.size() * 104729 % 97) +
            " sails, and she lit the lamp so that it would not run upon the rocks.";
  }
  std::vector<int32_t> ids = model.tokenize(text);
  ids.resize(tokens);
  return ids;
}

GenerateOptions greedy(int64_t tokens) {
  GenerateOptions options;
  options.max_tokens = tokens;
  options.sampling = {.temperature = 0, .top_p = 1, .repeat_penalty = 1};
  options.ignore_eos = true;
  return options;
}

std::vector<Scored> score(Model model, std::span<const int32_t> ids) {
  const Model::ScoreInput input{.ids = ids, .first_scored = 1};
  return model.score({&input, 1}).front();
}

double mean_difference(const std::vector<Scored>& a, const std::vector<Scored>& b) {
  EXPECT_EQ(a.size(), b.size());
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += std::abs(a[i].logprob - b[i].logprob);
  return sum / static_cast<double>(a.size());
}

// The bound of docs/kv-cache.md, in units of what sage2 and fp16 differ by.
constexpr double kSplitBound = 1.25;

TEST(QuantizedSession, ChunksAgreeWithOnePrefill) {
  const std::vector<int32_t> ids = story(load("fp16", "auto"), 300);
  const std::vector<Scored> whole = score(load("sage2", "int8"), ids);
  const std::vector<Scored> exact = score(load("fp16", "fp16"), ids);
  const double noise = mean_difference(score(load("sage2", "fp16"), ids), exact);
  EXPECT_LE(mean_difference(whole, exact), kSplitBound * noise);
  for (const int64_t chunk : {31, 200}) {
    const double difference = mean_difference(score(load("sage2", "int8", chunk), ids), whole);
    EXPECT_LE(difference, kSplitBound * noise) << "chunks of " << chunk;
  }
}

TEST(QuantizedSession, GoesBackToAnyLength) {
  for (const char* kv_cache : {"int8", "int4"}) {
    Model model = load("sage2", kv_cache);
    const std::vector<int32_t> ids = story(model, 300);
    const std::span<const int32_t> all(ids);
    Session session = model.start_session();
    session.generate(all, greedy(3));
    // In the tail, at pages' ends, inside pages: the rest of a page runs again.
    const std::pair<int64_t, int64_t> steps[] = {{290, 10},  {256, 44},  {255, 172}, {130, 172},
                                                 {128, 172}, {100, 300}, {0, 300}};
    for (const auto& [length, run] : steps) {
      session.truncate(length);
      EXPECT_EQ(static_cast<int64_t>(session.ids().size()), length);
      const Generation again = session.generate(all.subspan(session.ids().size()), greedy(2));
      EXPECT_EQ(again.prefill_tokens, run) << length;
      EXPECT_EQ(session.ids().size(), 302u);
    }
  }
}

TEST(QuantizedSession, ForksDoNotDisturbEachOther) {
  for (const char* kv_cache : {"int4", "int8", "fp16"}) {
    Model model = load("sage2", kv_cache);
    const std::vector<int32_t> ids = story(model, 150);
    const std::span<const int32_t> all(ids);
    Session prompt = model.start_session(2);
    prompt.generate(all.first(120), greedy(1));
    prompt.truncate(120);
    Session first = prompt.fork();
    Session second = prompt.fork();
    const Generation longer = first.generate(all.subspan(120), greedy(20));  // fills a page
    second.generate(all.first(30), greedy(20));
    EXPECT_EQ(prompt.generate(all.subspan(120), greedy(20)).ids, longer.ids);
    EXPECT_EQ(first.ids().size(), 170u);
  }
}

TEST(QuantizedSession, KeepsItsCacheWhenTheKernelChanges) {
  Model model = load("sage2", "auto");
  EXPECT_EQ(model.info().kv_cache, "int8");
  const std::vector<int32_t> ids = story(model, 200);
  Session session = model.start_session();
  session.generate(ids, greedy(2));
  model.set_attention("fp16", true);
  EXPECT_EQ(model.info().kv_cache, "fp16");
  EXPECT_THROW(session.generate({}, greedy(2)), Error);
  EXPECT_EQ(model.start_session().generate(ids, greedy(4)).ids,
            load("fp16", "fp16").start_session().generate(ids, greedy(4)).ids);
  model.set_attention("sage2", true);
  session.truncate(200);
  EXPECT_EQ(session.generate({}, greedy(4)).ids,
            model.start_session().generate(ids, greedy(4)).ids);
}

TEST(QuantizedSession, OnlySage2HasIt) {
  EXPECT_EQ(load("sage1", "auto").info().kv_cache, "fp16");
  EXPECT_THROW(load("sage1", "int8"), UsageError);
  EXPECT_THROW(load("fp16", "int8"), UsageError);
  EXPECT_THROW(load("sage1", "int4"), UsageError);
  EXPECT_THROW(load("fp16", "int4"), UsageError);
  EXPECT_THROW(load("sage2", "int9"), UsageError);
  Model model = load("sage2", "int8");
  EXPECT_THROW(model.set_attention("sage2-4b", true, "int8"), UsageError);
  model.set_attention("sage2-4b", true);
  EXPECT_EQ(model.info().kv_cache, "int4");
}

}  // namespace
}  // namespace sagelm
