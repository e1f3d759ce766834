// Inputs that begin alike share the pages of that beginning: Model::score_choices, and
// Model::score_distributions where it is told of one.
#include <algorithm>
#include <cmath>
#include <utility>

#include "base/error.h"
#include "engine/engine_impl.h"
#include "sagelm/sagelm.hpp"

namespace sagelm {

// One sequence to run after the shared pages, and the choices that it scores: all of an input's
// that have one token, or one longer choice.
struct SharedRun {
  size_t input = 0;
  std::vector<size_t> choices = {};
  std::vector<int32_t> tokens = {};  // a choice's last token is predicted, never run
  int64_t first_scored = 0;          // tokens of the context
  int32_t next_token = 0;            // the last token of a choice: asks for the last row's logits
  bool ends_input = false;           // no later run is about this input
};

namespace {

int64_t size_of(const SharedRun& run) { return static_cast<int64_t>(run.tokens.size()); }

// The runs of one input; suffix is what of the prefix is not on shared pages.
void append_runs(std::span<const int32_t> suffix, size_t index, const Model::ChoiceInput& input,
                 std::vector<SharedRun>& runs) {
  std::vector<int32_t> context(suffix.begin(), suffix.end());
  context.insert(context.end(), input.context.begin(), input.context.end());
  const auto length = static_cast<int64_t>(context.size());
  SharedRun last_row{.input = index, .tokens = context, .first_scored = length};
  for (size_t c = 0; c < input.choices.size(); ++c) {
    const std::vector<int32_t>& choice = input.choices[c];
    if (choice.size() == 1) {
      last_row.choices.push_back(c);
      last_row.next_token = choice.back();
      continue;
    }
    SharedRun run{.input = index,
                  .choices = {c},
                  .tokens = context,
                  .first_scored = length,
                  .next_token = choice.back()};
    run.tokens.insert(run.tokens.end(), choice.begin(), choice.end() - 1);
    runs.push_back(std::move(run));
  }
  if (!last_row.choices.empty()) runs.push_back(std::move(last_row));
  runs.back().ends_input = true;
}

// Log of the sum of exp of a row of finite logits.
double log_sum_exp(std::span<const float> row) {
  const double largest = *std::max_element(row.begin(), row.end());
  double sum = 0;
  for (const float logit : row) sum += std::exp(static_cast<double>(logit) - largest);
  return largest + std::log(sum);
}

// Neighbouring runs that are computed together, and the room they need.
struct RunBatch {
  size_t first = 0;
  size_t last = 0;
  KvRoom room = {};
};

std::vector<RunBatch> pack(std::span<const SharedRun> runs, int64_t batch_tokens, KvType type) {
  const int64_t max_pages = pages_of_step(batch_tokens);
  std::vector<RunBatch> batches;
  int64_t tokens = 0;
  int64_t pages = 0;
  for (size_t i = 0; i < runs.size(); ++i) {
    const int64_t more_pages = KvCache::pages_for(size_of(runs[i]));
    if (batches.empty() || tokens + size_of(runs[i]) > batch_tokens ||
        pages + more_pages > max_pages) {
      batches.push_back({.first = i, .last = i});
      tokens = 0;
      pages = 0;
    }
    batches.back().last = i + 1;
    batches.back().room += kv_room(type, size_of(runs[i]));
    pages += more_pages;
    tokens += size_of(runs[i]);
  }
  return batches;
}

// Runs steps, which are those of runs, and returns the log-probability of each of their choices.
// first_scored counts from the first token of a step.
std::vector<std::vector<double>> score_steps(Llama& llama, std::span<const StepInput> steps,
                                             std::span<const int64_t> first_scored,
                                             std::span<const SharedRun> runs,
                                             std::span<const Model::ChoiceInput> inputs) {
  std::vector<std::vector<double>> scores;
  for (const SharedRun& run : runs) scores.emplace_back(run.choices.size());
  const auto read = [&](std::span<const LogitsRow> rows, std::span<const float> logits) {
    const size_t width = logits.size() / rows.size();
    for (size_t k = 0; k < rows.size(); ++k) {
      const size_t step = rows[k].input;
      const SharedRun& run = runs[step];
      const std::span<const float> row = logits.subspan(k * width, width);
      const double total = log_sum_exp(row);
      for (size_t c = 0; c < run.choices.size(); ++c) {
        const std::vector<int32_t>& choice = inputs[run.input].choices[run.choices[c]];
        const int32_t token = choice[static_cast<size_t>(rows[k].token - first_scored[step])];
        scores[step][c] += static_cast<double>(row[static_cast<size_t>(token)]) - total;
      }
    }
  };
  llama.score_logits(steps, first_scored, read);
  return scores;
}

}  // namespace

int64_t Model::score_choices(std::span<const int32_t> prefix, std::span<const ChoiceInput> inputs,
                             const ChoiceCallback& take) {
  Impl& impl = *impl_;
  const int64_t batch_tokens = impl.options.batch_tokens;
  const auto shared = static_cast<int64_t>(prefix.size()) / kPageTokens * kPageTokens;
  impl.check_ids(prefix);
  std::vector<SharedRun> runs;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const ChoiceInput& input = inputs[i];
    if (input.context.empty()) fail("input {} has no context after the prefix", i);
    if (input.choices.empty()) fail("input {} has no choices", i);
    impl.check_ids(input.context);
    for (const std::vector<int32_t>& choice : input.choices) {
      if (choice.empty()) fail("a choice of input {} has no tokens", i);
      impl.check_ids(choice);
      const size_t needed = prefix.size() + input.context.size() + choice.size() - 1;
      if (static_cast<int64_t>(needed) > impl.info.context ||
          static_cast<int64_t>(choice.size()) > batch_tokens) {
        fail("{} tokens, {} of them a choice's, do not fit the context of {} and steps of {}",
             needed, choice.size() - 1, impl.info.context, batch_tokens);
      }
    }
    append_runs(prefix.subspan(static_cast<size_t>(shared)), i, input, runs);
  }

  std::vector<double> logprobs;  // of the choices of the input under way
  return impl.run_after(
      prefix.first(static_cast<size_t>(shared)), runs,
      [&](size_t first, std::span<const StepInput> steps, std::span<const int64_t> first_scored) {
        const auto batch = std::span<const SharedRun>(runs).subspan(first, steps.size());
        const auto scores = score_steps(*impl.llama, steps, first_scored, batch, inputs);
        for (size_t i = 0; i < batch.size(); ++i) {
          const SharedRun& run = batch[i];
          logprobs.resize(inputs[run.input].choices.size());
          for (size_t c = 0; c < run.choices.size(); ++c) {
            logprobs[run.choices[c]] = scores[i][c];
          }
          if (run.ends_input && !take(static_cast<int64_t>(run.input), logprobs)) {
            return false;
          }
        }
        return true;
      });
}

void Model::Impl::score_shared(std::span<const ScoreInput> inputs, int64_t shared,
                               const DistributionCallback& on_block) {
  const int64_t pages_end = shared / kPageTokens * kPageTokens;
  const std::span<const int32_t> beginning =
      inputs.empty() ? std::span<const int32_t>() : inputs.front().ids;
  std::vector<SharedRun> runs;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const std::span<const int32_t> ids = inputs[i].ids;
    const auto length = static_cast<int64_t>(ids.size());
    if (shared >= inputs[i].first_scored || inputs[i].first_scored >= length ||
        !std::equal(ids.begin(), ids.begin() + shared, beginning.begin())) {
      fail("input {} does not begin with the {} tokens that all share", i, shared);
    }
    if (length - 1 > info.context) {
      fail("a sequence of {} tokens does not fit the context of {}", length, info.context);
    }
    check_ids(ids);
    runs.push_back({.input = i,
                    .tokens = {ids.begin() + pages_end, ids.end() - 1},
                    .first_scored = inputs[i].first_scored - pages_end,
                    .next_token = ids.back()});
  }
  std::vector<ScoredToken> tokens;
  run_after(
      beginning.first(static_cast<size_t>(pages_end)), runs,
      [&](size_t first, std::span<const StepInput> steps, std::span<const int64_t> first_scored) {
        llama->score_logits(
            steps, first_scored,
            [&](std::span<const LogitsRow> rows, std::span<const float> logits) {
              tokens.clear();
              for (const LogitsRow& row : rows) {
                const SharedRun& run = runs[first + row.input];
                const int64_t before = run.first_scored - first_scored[row.input];
                tokens.push_back({.input = run.input, .position = pages_end + before + row.token});
              }
              on_block({.tokens = tokens, .logits = logits});
            });
        return true;
      });
}

int64_t Model::Impl::run_after(std::span<const int32_t> pages, std::span<const SharedRun> runs,
                               const RunStep& take) {
  const int64_t batch_tokens = options.batch_tokens;
  const std::vector<RunBatch> batches = pack(runs, batch_tokens, kv_type);
  KvRoom room;  // of the largest batch
  for (const RunBatch& batch : batches) {
    room.pages = std::max(room.pages, batch.room.pages);
    room.tails = std::max(room.tails, batch.room.tails);
  }
  room += kv_room(kv_type, static_cast<int64_t>(pages.size()));
  KvCache& cache = cache_for_scoring(room);
  Sequence beginning(cache);
  const auto always = [] { return true; };
  if (!runs.empty()) prefill(beginning, pages, {}, always);
  int64_t tokens_run = beginning.length();

  for (const RunBatch& batch : batches) {
    const std::span<const SharedRun> batch_runs =
        runs.subspan(batch.first, batch.last - batch.first);
    std::vector<Sequence> sequences;
    std::vector<StepInput> steps;
    std::vector<int64_t> first_scored;
    sequences.reserve(batch_runs.size());  // steps point into it
    for (const SharedRun& run : batch_runs) {
      sequences.push_back(beginning.fork(beginning.length()));
      // A run longer than a step is alone in its batch; its scored tokens are in its last step.
      const int64_t before = std::max<int64_t>(0, size_of(run) - batch_tokens);
      const auto split = static_cast<size_t>(before);
      prefill(sequences.back(), std::span(run.tokens).first(split), {}, always);
      steps.push_back({.sequence = &sequences.back(),
                       .tokens = std::span(run.tokens).subspan(split),
                       .next_token = run.next_token});
      first_scored.push_back(run.first_scored - before);
      tokens_run += size_of(run);
    }
    if (!take(batch.first, steps, first_scored)) break;
  }
  return tokens_run;
}

}  // namespace sagelm
