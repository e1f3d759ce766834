// The public API on the demo model: what its reference.json says, and that chunks, sessions and
// batches do not change an answer.
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/error.h"
#include "sagelm/sagelm.hpp"

namespace sagelm {
namespace {

const std::string kDemo = std::string(SAGELM_SOURCE_DIR) + "/models/demo";

nlohmann::json reference() {
  std::ifstream file(kDemo + "/reference.json");
  return nlohmann::json::parse(file);
}

Model load(int64_t batch_tokens = 2048, const std::string& attention = "fp16") {
  LoadOptions options;
  options.model = kDemo;
  options.attention = attention;
  options.threads = 1;  // tests run side by side, and OpenMP's threads spin while they wait
  options.batch_tokens = batch_tokens;
  return Model::load(options);
}

GenerateOptions greedy(int64_t tokens) {
  GenerateOptions options;
  options.max_tokens = tokens;
  options.sampling = {.temperature = 0, .top_p = 1, .repeat_penalty = 1};
  return options;
}

std::vector<int32_t> story(Model& model, size_t tokens) {
  std::string text;
  while (text.size() < tokens * 8) {
    text += "The old captain looked out upon the sea, and the rain fell in torrents. ";
    text += std::to_string(text.size());
  }
  std::vector<int32_t> ids = model.tokenize(text);
  ids.resize(tokens);
  return ids;
}

TEST(Engine, GreedyTextAndLogprobsAreTheReference) {
  const nlohmann::json expected = reference();
  Model model = load();
  GenerateOptions options = greedy(64);
  options.prompt_logprobs = true;
  std::string streamed;
  const Generation generation =
      model.generate(expected["prompt"].get<std::string>(), options, [&](std::string_view text) {
        streamed += text;
        return true;
      });
  EXPECT_EQ(generation.prompt_ids, expected["prompt_ids"].get<std::vector<int32_t>>());
  const auto ids = expected["greedy_64_ids"].get<std::vector<int32_t>>();
  ASSERT_EQ(generation.ids.size(), ids.size());
  for (size_t i = 0; i < 32; ++i) EXPECT_EQ(generation.ids[i], ids[i]) << "token " << i;
  EXPECT_EQ(streamed, generation.text);
  const auto logprobs = expected["prompt_token_logprobs"].get<std::vector<double>>();
  ASSERT_EQ(generation.prompt_logprobs.size(), logprobs.size());
  for (size_t i = 0; i < logprobs.size(); ++i) {
    EXPECT_NEAR(generation.prompt_logprobs[i], logprobs[i], 0.02) << "token " << i + 1;
  }
  EXPECT_EQ(generation.stop_reason, StopReason::kMaxTokens);
  EXPECT_EQ(generation.decode_steps, 63);
}

TEST(Engine, ChunksOfThePromptDoNotChangeScores) {
  Model whole = load();
  Model chunked = load(64);
  const std::vector<int32_t> ids = story(whole, 300);
  for (const int64_t first : {int64_t{1}, int64_t{63}, int64_t{64}, int64_t{65}, int64_t{299}}) {
    const Model::ScoreInput input{.ids = ids, .first_scored = first};
    const std::vector<Scored> a = whole.score({&input, 1}).front();
    const std::vector<Scored> b = chunked.score({&input, 1}).front();
    ASSERT_EQ(a.size(), ids.size() - static_cast<size_t>(first));
    ASSERT_EQ(b.size(), a.size());
    for (size_t i = 0; i < a.size(); ++i) EXPECT_NEAR(a[i].logprob, b[i].logprob, 0.02) << i;
  }
}

TEST(Engine, NeighboursDoNotChangeScores) {
  for (const char* attention : {"fp16", "sage2"}) {
    Model model = load(256, attention);
    const std::vector<int32_t> ids = story(model, 200);
    std::vector<Model::ScoreInput> inputs;
    for (const size_t length : {2u, 129u, 0u, 1u, 40u, 200u, 64u, 128u, 17u, 100u}) {
      inputs.push_back({.ids = std::span(ids).first(length), .first_scored = 1});
    }
    const std::vector<std::vector<Scored>> together = model.score(inputs);
    ASSERT_EQ(together.size(), inputs.size());
    for (size_t i = 0; i < inputs.size(); ++i) {
      const std::vector<Scored> alone = model.score({&inputs[i], 1}).front();
      ASSERT_EQ(together[i].size(), inputs[i].ids.empty() ? 0 : inputs[i].ids.size() - 1);
      ASSERT_EQ(alone.size(), together[i].size());
      for (size_t j = 0; j < alone.size(); ++j) {
        EXPECT_NEAR(alone[j].logprob, together[i][j].logprob, 0.02) << attention << " " << i;
      }
    }
  }
}

TEST(Engine, ASessionGoesOnAsOnePromptWould) {
  Model model = load();
  const std::vector<int32_t> ids = story(model, 90);
  Session session = model.start_session();
  const Generation first = session.generate(std::span(ids).first(40), greedy(5));
  EXPECT_EQ(session.ids().size(), 40 + first.ids.size());
  session.truncate(40);
  const Generation second = session.generate(std::span(ids).subspan(40), greedy(8));
  EXPECT_EQ(second.ids, model.start_session().generate(ids, greedy(8)).ids);
  // Without new ids it goes on from where it is.
  session.truncate(90);
  EXPECT_EQ(session.generate({}, greedy(8)).ids, second.ids);
}

TEST(Engine, AFullContextSaysSo) {
  LoadOptions options;
  options.model = kDemo;
  options.attention = "fp16";
  options.context = 32;
  Model model = Model::load(options);
  const std::vector<int32_t> ids = story(model, 40);
  Session session = model.start_session();
  EXPECT_THROW(session.generate(ids, greedy(1)), Error);
  EXPECT_TRUE(session.ids().empty());
  GenerateOptions endless = greedy(100);
  endless.ignore_eos = true;
  const Generation generation = session.generate(std::span(ids).first(30), endless);
  EXPECT_EQ(generation.stop_reason, StopReason::kContextFull);
  EXPECT_EQ(generation.ids.size(), 2u);
  EXPECT_EQ(session.ids().size(), 32u);
}

TEST(Engine, StopsWhereItIsTold) {
  Model model = load();
  const std::string prompt = reference()["prompt"];
  GenerateOptions options = greedy(64);
  options.stop = {"deserted"};
  const Generation stopped = model.generate(prompt, options);
  EXPECT_EQ(stopped.stop_reason, StopReason::kStopString);
  EXPECT_EQ(stopped.text, "was a dark, dark, and ");
  int calls = 0;
  const Generation broken_off =
      model.generate(prompt, greedy(64), [&](std::string_view) { return ++calls < 3; });
  EXPECT_EQ(broken_off.stop_reason, StopReason::kCallback);
  EXPECT_EQ(broken_off.ids.size(), 3u);
}

TEST(Engine, RefusesWhatCannotBe) {
  LoadOptions options;
  options.model = kDemo;
  options.context = 4096;
  EXPECT_THROW(Model::load(options), UsageError);
  EXPECT_THROW(Model::inspect(options), UsageError);
  options.context = 0;
  options.device = "tpu";
  EXPECT_THROW(Model::load(options), UsageError);
  options.device = "auto";
  options.attention = "sage9";
  EXPECT_THROW(Model::load(options), UsageError);
  Model model = load();
  EXPECT_THROW(model.start_session().generate({}, greedy(1)), Error);
  const std::vector<int32_t> outside = {1, 8192};
  EXPECT_THROW(model.start_session().generate(outside, greedy(1)), Error);
}

TEST(Engine, InspectAgreesWithLoad) {
  LoadOptions options;
  options.model = kDemo;
  const ModelInfo inspected = Model::inspect(options);
  const ModelInfo loaded = load().info();
  EXPECT_EQ(inspected.num_parameters, loaded.num_parameters);
  EXPECT_EQ(inspected.num_parameters, 13767552);
  EXPECT_EQ(inspected.context, 2048);
  EXPECT_EQ(inspected.kv_cache, "int8");
  // Per layer and head: two 8-bit rows of 64, and 5 scales for every 128 tokens.
  EXPECT_EQ(inspected.kv_bytes_per_token, (6 * 6 * (128 * 128 + 20) + 127) / 128);
  options.attention = "fp16";
  EXPECT_EQ(Model::inspect(options).kv_cache, "fp16");
  EXPECT_EQ(Model::inspect(options).kv_bytes_per_token, 2 * 2 * 6 * 384);
  EXPECT_GT(loaded.weight_bytes, 0);
  // oneDNN may pad what it packs.
  EXPECT_NEAR(static_cast<double>(inspected.weight_bytes), static_cast<double>(loaded.weight_bytes),
              0.05 * static_cast<double>(loaded.weight_bytes));
}

}  // namespace
}  // namespace sagelm
