// Running ahead of the tokens changes nothing: decode() on the demo model.
#include "engine/decoding.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "base/error.h"
#include "engine/open_checkpoint.h"
#include "support/row_products.h"
#include "text/tokenizer.h"

namespace sagelm {
namespace {

struct Outcome {
  std::vector<std::vector<int32_t>> ids;
  std::vector<std::string> texts;
  std::vector<StopReason> reasons;
  std::vector<int64_t> steps, lengths;
  int64_t free_pages = 0;

  bool operator==(const Outcome&) const = default;
};

class Decoding : public ::testing::Test {
 protected:
  // poisoned: a token whose embedding is NaN.
  void load(AttentionVariant variant, int32_t poisoned = -1) {
    LoadOptions options;
    options.model = std::string(SAGELM_SOURCE_DIR) + "/models/demo";
    const Checkpoint checkpoint = open_checkpoint(options);
    tokenizer_ = std::make_unique<Tokenizer>(Tokenizer::open(checkpoint.directory()));
    backend_ = make_cpu_backend(1);
    ModelWeights weights = checkpoint.weights();
    std::vector<std::byte> embedding(weights.embedding.data,
                                     weights.embedding.data + weights.embedding.bytes);
    if (poisoned >= 0) {
      const size_t row = embedding.size() / static_cast<size_t>(weights.embedding.shape[0]);
      std::fill_n(embedding.begin() + static_cast<int64_t>(row) * poisoned, row, std::byte{0xFF});
      weights.embedding.data = embedding.data();
    }
    llama_ = std::make_unique<Llama>(checkpoint.config(), weights, *backend_,
                                     AttentionSpec{variant, true});
  }

  // Answers to a prompt of so many tokens, each with options of its own.
  Outcome run(bool runs_ahead, KvType type, size_t prompt_tokens, int64_t context, int64_t pages,
              std::span<const GenerateOptions> options, int64_t callback_after = 1000) {
    KvCache cache = llama_->make_cache(type, {.pages = pages, .tails = 8});
    std::vector<int32_t> prompt(prompt_tokens);
    for (size_t i = 0; i < prompt.size(); ++i) prompt[i] = static_cast<int32_t>(100 + i * i % 997);
    Sequence first(cache);
    const StepInput input{.sequence = &first, .tokens = prompt};

    const size_t count = options.size();
    std::vector<std::vector<int32_t>> ids(count, prompt);
    std::vector<Generation> results(count);
    std::vector<Sequence> sequences;
    std::vector<Answer> answers;
    std::vector<DecodedAnswer> decoded;
    std::vector<TokenDraw> draws;
    sequences.reserve(count);
    answers.reserve(count);
    // The model would end most answers at once.
    const Answer::Of of{.tokenizer = tokenizer_.get(), .eos_ids = {}, .context = context};
    for (size_t i = 0; i < count; ++i) {
      const TextCallback on_text = [&results, i, callback_after](std::string_view) {
        return i != 1 || static_cast<int64_t>(results[i].ids.size()) < callback_after;
      };
      answers.emplace_back(of, options[i], on_text, ids[i], results[i]);
      EXPECT_TRUE(answers[i].wants_token());
      draws.push_back(answers[i].next_draw(0));
    }
    const std::vector<int32_t> tokens =
        llama_->read_drawn(llama_->draw({&input, 1}, draws), draws.size());
    for (size_t i = 0; i < count; ++i) {
      sequences.push_back(first.fork(first.length()));
      decoded.push_back({&answers[i], &sequences[i], &results[i].decode_steps});
    }
    first.truncate(0);
    decode(*llama_, runs_ahead, decoded, tokens);

    Outcome outcome;
    for (size_t i = 0; i < count; ++i) {
      answers[i].finish();
      outcome.ids.push_back(ids[i]);
      outcome.texts.push_back(results[i].text);
      outcome.reasons.push_back(results[i].stop_reason);
      outcome.steps.push_back(results[i].decode_steps);
      outcome.lengths.push_back(sequences[i].length());
    }
    outcome.free_pages = cache.free_room().pages;
    return outcome;
  }

  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Llama> llama_;
};

GenerateOptions drawing(uint64_t seed, int64_t tokens) {
  GenerateOptions options;
  options.max_tokens = tokens;
  options.sampling.seed = seed;
  return options;
}

TEST_F(Decoding, RunningAheadChangesNothing) {
  load(AttentionVariant::kSage2_8b);
  std::vector<GenerateOptions> options;
  for (const int64_t tokens : {14, 14, 1, 2, 14}) {
    options.push_back(drawing(options.size(), tokens));
  }
  options[0].sampling.repeat_last_n = 1;  // only the token that is not known yet
  options[4].sampling.temperature = 1.5;
  // Answers that end leave fewer rows beside the others. Where those then have other last bits,
  // every answer has a call of its own.
  std::vector<std::vector<GenerateOptions>> calls;
  if (rows_ignore_each_other()) {
    calls = {options};
  } else {
    for (const GenerateOptions& alone : options) calls.push_back({alone});
  }
  for (const KvType type : {KvType::kFp16, KvType::kInt8}) {
    for (const size_t prompt : {3, 120, 126, 127, 250}) {
      for (const std::vector<GenerateOptions>& call : calls) {
        const Outcome expected = run(false, type, prompt, 4096, 40, call, 9);
        if (call.size() > 1) {
          EXPECT_EQ(expected.reasons[1], StopReason::kCallback);
        }
        EXPECT_TRUE(run(true, type, prompt, 4096, 40, call, 9) == expected) << prompt;
        if (call.back().max_tokens < 14) continue;
        // Ended by a token that was drawn, in the middle of the others.
        std::vector<GenerateOptions> ended = call;
        ASSERT_EQ(expected.ids.back().size(), prompt + 14);
        ended.back().end_ids = {expected.ids.back()[prompt + 7]};
        if (call.size() > 1) {
          ended[0].stop = {tokenizer_->decode(std::span(expected.ids[0]).subspan(prompt + 10, 1))};
        }
        const Outcome shorter = run(false, type, prompt, 4096, 40, ended);
        EXPECT_EQ(shorter.reasons.back(), StopReason::kEndOfSequence);
        EXPECT_TRUE(run(true, type, prompt, 4096, 40, ended) == shorter) << prompt;
      }
    }
  }
}

TEST_F(Decoding, RunningAheadNeedsNoMoreRoom) {
  load(AttentionVariant::kFp16);
  const GenerateOptions options[] = {drawing(1, 100)};
  // The context ends where the cache does, or the cache is full first.
  const Outcome expected = run(false, KvType::kFp16, 100, 128, 1, options);
  EXPECT_EQ(expected.reasons[0], StopReason::kContextFull);
  EXPECT_TRUE(run(true, KvType::kFp16, 100, 128, 1, options) == expected);
  for (const bool runs_ahead : {false, true}) {
    EXPECT_THROW(run(runs_ahead, KvType::kFp16, 100, 4096, 1, options), Error);
  }
}

TEST_F(Decoding, NanNamesTheLayer) {
  load(AttentionVariant::kFp16);
  const GenerateOptions options[] = {drawing(1, 14), drawing(2, 14)};
  const Outcome good = run(false, KvType::kFp16, 20, 4096, 10, options);
  load(AttentionVariant::kFp16, good.ids[1][26]);
  for (const bool runs_ahead : {false, true}) {
    try {
      run(runs_ahead, KvType::kFp16, 20, 4096, 10, options);
      FAIL() << "no error";
    } catch (const Error& error) {
      EXPECT_EQ(std::string(error.what()).find("NaN or Inf appears in the attention of layer 0"),
                0u)
          << error.what();
    }
  }
}

}  // namespace
}  // namespace sagelm
