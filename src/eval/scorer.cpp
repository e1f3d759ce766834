#include "eval/scorer.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>

#include "base/error.h"

namespace sagelm {
namespace {

int64_t num_scored(const Model::ScoreInput& input) {
  return std::max<int64_t>(0, static_cast<int64_t>(input.ids.size()) - input.first_scored);
}

}  // namespace

BatchRun score_in_batches(
    std::span<const Model::ScoreInput> inputs, int64_t batch_tokens, const Scorer& scorer,
    const std::function<std::string(int64_t index)>& where,
    const std::function<void(int64_t index, std::span<const Scored> scores)>& take,
    const std::function<bool(const BatchRun& run)>& after_batch) {
  BatchRun run;
  for (size_t first = 0; first < inputs.size();) {
    size_t last = first;
    int64_t tokens = 0;
    for (; last < inputs.size(); ++last) {
      const auto next = static_cast<int64_t>(inputs[last].ids.size());
      if (last > first && tokens + next > batch_tokens) break;
      tokens += next;
    }
    const auto batch = inputs.subspan(first, last - first);
    const auto start = std::chrono::steady_clock::now();
    const std::vector<std::vector<Scored>> scores = scorer(batch);
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    for (size_t i = 0; i < batch.size(); ++i) {
      const auto index = static_cast<int64_t>(first + i);
      if (i >= scores.size() || static_cast<int64_t>(scores[i].size()) != num_scored(batch[i])) {
        fail("{}: the model scored another number of tokens than asked", where(index));
      }
      for (size_t j = 0; j < scores[i].size(); ++j) {
        if (!std::isfinite(scores[i][j].logprob)) {
          fail("{}: the log-probability of its token {} is {}", where(index),
               batch[i].first_scored + static_cast<int64_t>(j), scores[i][j].logprob);
        }
      }
      take(index, scores[i]);
    }
    first = last;
    run.done = static_cast<int64_t>(last);
    run.tokens += tokens;
    run.seconds += elapsed.count();
    if (!after_batch(run)) break;
  }
  return run;
}

}  // namespace sagelm
