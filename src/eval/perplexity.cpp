#include "eval/perplexity.h"

#include <cmath>
#include <cstddef>
#include <vector>

#include "base/error.h"
#include "eval/statistics.h"

namespace sagelm {

double PerplexityResult::tokens_per_second() const {
  return seconds > 0 ? static_cast<double>(tokens_run) / seconds : 0;
}

PerplexityResult run_perplexity(std::span<const int32_t> ids, const Protocol& protocol,
                                const PerplexityOptions& options, const Scorer& scorer,
                                const EvalCallback& on_progress) {
  std::vector<Window> windows = protocol.windows(static_cast<int64_t>(ids.size()));
  PerplexityResult result;
  result.windows_of_text = static_cast<int64_t>(windows.size());
  if (options.limit && *options.limit < result.windows_of_text) {
    windows.resize(static_cast<size_t>(*options.limit));
  }
  result.windows_planned = static_cast<int64_t>(windows.size());

  const bool replace_first = protocol.bos_in_each_window && options.bos_id.has_value();
  std::vector<std::vector<int32_t>> replaced;  // the windows themselves if they differ from ids
  if (replace_first) replaced.reserve(windows.size());
  std::vector<Model::ScoreInput> inputs;
  inputs.reserve(windows.size());
  for (const Window& window : windows) {
    std::span<const int32_t> window_ids = ids.subspan(
        static_cast<size_t>(window.begin), static_cast<size_t>(window.end - window.begin));
    if (replace_first) {
      replaced.emplace_back(window_ids.begin(), window_ids.end()).front() = *options.bos_id;
      window_ids = replaced.back();
    }
    inputs.push_back({.ids = window_ids, .first_scored = window.first_scored - window.begin});
  }

  Moments nll;
  const auto take = [&nll](int64_t, std::span<const Scored> scores) {
    for (const Scored& score : scores) nll.add(-static_cast<double>(score.logprob));
  };
  const auto after_batch = [&](const BatchRun& run) {
    return !on_progress || on_progress({.done = run.done,
                                        .total = result.windows_planned,
                                        .tokens = run.tokens,
                                        .perplexity = std::exp(nll.mean())});
  };
  const BatchRun run = score_in_batches(
      inputs, options.batch_tokens, scorer,
      [](int64_t index) { return fmt::format("window {} of the text", index + 1); }, take,
      after_batch);
  result.windows = run.done;
  result.tokens_run = run.tokens;
  result.seconds = run.seconds;
  result.tokens_scored = nll.count();
  result.nll_mean = nll.mean();
  result.perplexity = std::exp(result.nll_mean);
  result.standard_error = result.perplexity * nll.standard_error();
  return result;
}

}  // namespace sagelm
