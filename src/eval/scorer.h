// What an evaluation needs of a model, so that tests can put known probabilities in its place.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "eval/journal.h"
#include "sagelm/sagelm.hpp"

namespace sagelm {

// As Model::score.
using Scorer = std::function<std::vector<std::vector<Scored>>(std::span<const Model::ScoreInput>)>;

// Tokens of the input that are scored.
inline int64_t num_scored(const Model::ScoreInput& input) {
  return std::max<int64_t>(0, static_cast<int64_t>(input.ids.size()) - input.first_scored);
}

// Where an evaluation stands, told after each batch; false ends it with what it has.
struct EvalProgress {
  int64_t done = 0;  // windows or passages
  int64_t total = 0;
  int64_t tokens = 0;  // run through the model
  double perplexity = 0;
  int64_t resumed = 0;  // of those done, taken from a journal
};
using EvalCallback = std::function<bool(const EvalProgress& progress)>;

struct BatchRun {
  int64_t done = 0;     // inputs scored
  int64_t tokens = 0;   // of them
  double seconds = 0;   // in the scorer
  int64_t resumed = 0;  // of those done, taken from the journal; tokens and seconds hold them too
};

// Scores inputs in the given order, a batch being neighbours of at most batch_tokens tokens
// together (one input at least). take(index, scores) gets each input's scores in order; after_batch
// returns false to stop. Throws Error if a log-probability is not finite or the scorer returns
// another number of them than asked; where names input `index`, e.g. "window 3".
//
// With a journal, every batch is one record: those that are there stand in for the scorer, the
// others are appended. A batch is recorded whole or not at all, so that a resumed run computes the
// same batches as an undisturbed one. Throws Error for a record that does not fit its batch.
BatchRun score_in_batches(
    std::span<const Model::ScoreInput> inputs, int64_t batch_tokens, const Scorer& scorer,
    const std::function<std::string(int64_t index)>& where,
    const std::function<void(int64_t index, std::span<const Scored> scores)>& take,
    const std::function<bool(const BatchRun& run)>& after_batch, Journal* journal = nullptr);

}  // namespace sagelm
