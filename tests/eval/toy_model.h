// A model whose probabilities are known by hand. Ids are 0 and 1: the token equal to the one before
// it has probability 3/4, the other 1/4.
#pragma once

#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "eval/scorer.h"

namespace sagelm::test {

struct ToyModel {
  // What it was asked, in order.
  std::vector<std::vector<int32_t>> sequences;
  std::vector<int64_t> first_scored;
  std::vector<size_t> batches;

  std::vector<std::vector<Scored>> score(std::span<const Model::ScoreInput> inputs) {
    std::vector<std::vector<Scored>> scores;
    batches.push_back(inputs.size());
    for (const Model::ScoreInput& input : inputs) {
      sequences.emplace_back(input.ids.begin(), input.ids.end());
      first_scored.push_back(input.first_scored);
      auto& row = scores.emplace_back();
      for (auto i = static_cast<size_t>(input.first_scored); i < input.ids.size(); ++i) {
        const bool same = input.ids[i] == input.ids[i - 1];
        row.push_back({.logprob = std::log(same ? 0.75F : 0.25F), .is_top = same});
      }
    }
    return scores;
  }

  Scorer scorer() {
    return [this](std::span<const Model::ScoreInput> inputs) { return score(inputs); };
  }
};

}  // namespace sagelm::test
