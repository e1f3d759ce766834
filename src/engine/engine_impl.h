// What a Model holds; its sessions share it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "engine/memory_plan.h"
#include "model/kv_cache.h"
#include "model/llama.h"
#include "sagelm/sagelm.hpp"
#include "text/tokenizer.h"

namespace sagelm {

struct SharedRun;  // choices.cpp

struct Model::Impl {
  LoadOptions options;
  ModelInfo info;
  std::unique_ptr<Tokenizer> tokenizer;  // null: made-up weights have none
  std::unique_ptr<Backend> backend;
  std::unique_ptr<Llama> llama;
  KvType kv_type = KvType::kFp16;      // of caches made from now on
  std::optional<KvCache> score_cache;  // grows to what the largest batch of score() needed

  // Runs tokens in chunks of at most batch_tokens, appending them to sequence; the tokens drawn by
  // the logits after the last one. keep_going, if it returns false after a chunk, stops: there is
  // no result then.
  template <typename KeepGoing>
  std::optional<std::vector<int32_t>> prefill(Sequence& sequence, std::span<const int32_t> tokens,
                                              std::span<const TokenDraw> draws,
                                              const KeepGoing& keep_going);

  // Scores tokens[first_scored ...] given those before (first_scored >= 1) on an empty sequence,
  // in chunks likewise.
  std::vector<Scored> score_alone(Sequence& sequence, std::span<const int32_t> tokens,
                                  int64_t first_scored);

  // Token j of a step is token start + j of the inputs[input] being scored.
  struct StepPlace {
    size_t input = 0;
    int64_t start = 0;
  };
  // Runs a step and takes the scores of each steps[i].tokens[j], j >= first_scored[i] >= 1.
  using ScoreStep =
      std::function<void(std::span<const StepInput> steps, std::span<const int64_t> first_scored,
                         std::span<const StepPlace> places)>;
  // Cuts what is to be scored into steps of at most batch_tokens: whole sequences packed together,
  // or one chunk of a longer one. Every token that is scored is so once, in order.
  void for_each_step(std::span<const ScoreInput> inputs, const ScoreStep& run_step);
  void for_each_chunk(Sequence& sequence, std::span<const int32_t> tokens, int64_t first_scored,
                      size_t input, const ScoreStep& run_step);

  // Of the model as it is loaded, and of so many sessions.
  MemoryNeeds memory_needs(const ModelConfig& config, std::span<const AttentionSpec> attention,
                           int64_t sessions) const;
  // Has the backend make room for steps with the model's attention.
  void reserve_steps();
  // score_distributions of inputs whose first `shared` tokens are the same.
  void score_shared(std::span<const ScoreInput> inputs, int64_t shared,
                    const DistributionCallback& on_block);
  // Runs `pages`, whole pages of tokens, once and every run after a fork of them, packed into
  // steps; take gets each step, its first one being that of runs[first], and returns false to stop.
  // Returns the tokens run.
  using RunStep = std::function<bool(size_t first, std::span<const StepInput> steps,
                                     std::span<const int64_t> first_scored)>;
  int64_t run_after(std::span<const int32_t> pages, std::span<const SharedRun> runs,
                    const RunStep& take);

  // A cache of the current type, with at least this room, that no sequence uses.
  KvCache& cache_for_scoring(const KvRoom& room);
  void check_ids(std::span<const int32_t> ids) const;
};

template <typename KeepGoing>
std::optional<std::vector<int32_t>> Model::Impl::prefill(Sequence& sequence,
                                                         std::span<const int32_t> tokens,
                                                         std::span<const TokenDraw> draws,
                                                         const KeepGoing& keep_going) {
  const auto chunk = static_cast<size_t>(options.batch_tokens);
  while (!tokens.empty()) {
    const StepInput input{.sequence = &sequence,
                          .tokens = tokens.first(std::min(chunk, tokens.size()))};
    tokens = tokens.subspan(input.tokens.size());
    if (!tokens.empty()) {
      llama->extend({&input, 1});
      if (!keep_going()) return {};
      continue;
    }
    if (!draws.empty()) {
      std::vector<int32_t> drawn = llama->read_drawn(llama->draw({&input, 1}, draws), draws.size());
      if (std::ranges::min(drawn) < 0) llama->explain_not_finite({&input, 1});
      return drawn;
    }
    llama->step({&input, 1});
  }
  return std::vector<int32_t>();
}

}  // namespace sagelm
