#include "eval/scorer.h"

#include <chrono>
#include <cmath>
#include <cstddef>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/error.h"

namespace sagelm {
namespace {

struct ScoredBatch {
  std::vector<std::vector<Scored>> scores;
  double seconds = 0;
};

ScoredBatch score_batch(std::span<const Model::ScoreInput> batch, const Scorer& scorer) {
  const auto start = std::chrono::steady_clock::now();
  ScoredBatch result{.scores = scorer(batch)};
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  result.seconds = elapsed.count();
  return result;
}

// A batch as a line of the journal: {"first": index of its first input, "seconds": …, "logprobs":
// [[…], …], "top": ["0110…", …]}. Numbers are printed with all their digits.
std::string to_record(size_t first, const ScoredBatch& batch) {
  nlohmann::ordered_json record = {{"first", first}, {"seconds", batch.seconds}};
  auto& logprobs = record["logprobs"] = nlohmann::ordered_json::array();
  auto& tops = record["top"] = nlohmann::ordered_json::array();
  for (const std::vector<Scored>& scores : batch.scores) {
    auto& row = logprobs.emplace_back(nlohmann::ordered_json::array());
    std::string top;
    for (const Scored& score : scores) {
      row.push_back(static_cast<double>(score.logprob));
      top += score.is_top ? '1' : '0';
    }
    tops.push_back(top);
  }
  return record.dump();
}

// Nothing if record is not one of the batch that begins with input `first`.
std::optional<ScoredBatch> from_record(const std::string& record, size_t first) {
  const auto json = nlohmann::json::parse(record, nullptr, /*allow_exceptions=*/false);
  ScoredBatch batch;
  try {
    if (json.at("first") != first) return {};
    batch.seconds = json.at("seconds").get<double>();
    const auto& tops = json.at("top");
    for (const auto& row : json.at("logprobs")) {
      const auto top = tops.at(batch.scores.size()).get<std::string>();
      if (top.size() != row.size()) return {};
      auto& scores = batch.scores.emplace_back();
      for (const auto& logprob : row) {
        scores.push_back({.logprob = logprob.get<float>(), .is_top = top[scores.size()] == '1'});
      }
    }
  } catch (const nlohmann::json::exception&) {
    return {};
  }
  return batch;
}

// Throws Error for a number of scores other than asked, or one that is not finite.
void check_scores(std::span<const Model::ScoreInput> batch,
                  const std::vector<std::vector<Scored>>& scores, size_t first,
                  const std::function<std::string(int64_t index)>& where) {
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
  }
}

}  // namespace

BatchRun score_in_batches(
    std::span<const Model::ScoreInput> inputs, int64_t batch_tokens, const Scorer& scorer,
    const std::function<std::string(int64_t index)>& where,
    const std::function<void(int64_t index, std::span<const Scored> scores)>& take,
    const std::function<bool(const BatchRun& run)>& after_batch, Journal* journal) {
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
    const std::optional<std::string> record = journal != nullptr ? journal->next() : std::nullopt;
    ScoredBatch scored;
    if (record) {
      std::optional<ScoredBatch> recorded = from_record(*record, first);
      if (!recorded || recorded->scores.size() != batch.size()) {
        fail("the journal {} does not hold this run's batches", journal->path().string());
      }
      scored = std::move(*recorded);
    } else {
      scored = score_batch(batch, scorer);
    }
    check_scores(batch, scored.scores, first, where);
    if (journal != nullptr && !record) journal->append(to_record(first, scored));
    for (size_t i = 0; i < batch.size(); ++i) {
      take(static_cast<int64_t>(first + i), scored.scores[i]);
    }
    first = last;
    run.done = static_cast<int64_t>(last);
    run.tokens += tokens;
    run.seconds += scored.seconds;
    if (record) run.resumed = run.done;
    if (!after_batch(run)) break;
  }
  return run;
}

}  // namespace sagelm
