#include "eval/compare.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <limits>
#include <optional>
#include <utility>

#include "base/error.h"
#include "eval/compare_journal.h"
#include "eval/logits_rows.h"
#include "eval/statistics.h"

namespace sagelm {
namespace {

using Clock = std::chrono::steady_clock;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The most probable one of choices, which are below logits.size(): the first among equals.
int32_t best_choice(std::span<const float> logits, std::span<const int32_t> choices) {
  return *std::max_element(choices.begin(), choices.end(), [&logits](int32_t a, int32_t b) {
    return logits[static_cast<size_t>(a)] < logits[static_cast<size_t>(b)];
  });
}

// One batch: its scored tokens in order, and the first setting's logits of them, which lie in held.
class Batch {
 public:
  Batch(std::span<const Model::ScoreInput> inputs, int64_t first_input, int64_t shared,
        const CompareOptions& options, const std::function<std::string(int64_t)>& where,
        std::vector<float>& held)
      : inputs_(inputs),
        first_input_(first_input),
        shared_(shared),
        vocab_(static_cast<size_t>(options.vocab_size)),
        where_(where),
        held_(held) {
    if (!options.choices.empty()) {
      choices_ = std::span(options.choices).subspan(static_cast<size_t>(first_input));
    }
    for (size_t i = 0; i < inputs.size(); ++i) {
      const auto length = static_cast<int64_t>(inputs[i].ids.size());
      for (int64_t j = inputs[i].first_scored; j < length; ++j) {
        scored_.push_back({.input = i, .position = j});
      }
    }
  }

  // One setting's part of the batch. To be called for the first setting, the baseline, first.
  BatchScores run(const CompareSetting& setting, bool is_baseline) {
    BatchScores result;
    double own_seconds = 0;
    const Clock::time_point start = Clock::now();
    const auto on_block = [&](const Model::LogitsBlock& block) {
      const Clock::time_point own_start = Clock::now();
      take(setting, block, is_baseline, result.tokens);
      own_seconds += seconds_since(own_start);
    };
    setting.scorer(inputs_, on_block, shared_);
    result.seconds = std::max(0.0, seconds_since(start) - own_seconds);
    if (result.tokens.size() != scored_.size()) {
      fail("setting {}: the model scored {} of {} tokens in {}", setting.name, result.tokens.size(),
           scored_.size(), where_(first_input_));
    }
    return result;
  }

  size_t num_tokens() const { return scored_.size(); }

 private:
  void take(const CompareSetting& setting, const Model::LogitsBlock& block, bool is_baseline,
            std::vector<ComparedToken>& tokens) {
    const size_t rows = block.tokens.size();
    const size_t first = tokens.size();
    check_block(setting, block, first);
    if (is_baseline) {
      held_.resize(std::max(held_.size(), scored_.size() * vocab_));
      summaries_.resize(first + rows);
    }
    tokens.resize(first + rows);
#pragma omp parallel for schedule(static)
    for (size_t r = 0; r < rows; ++r) {
      const size_t index = first + r;
      const std::span<const float> logits = block.logits.subspan(r * vocab_, vocab_);
      RowSummary summary = summarize(logits);
      const std::span<const int32_t> choices = choices_of(index);
      if (!choices.empty()) summary.argmax = best_choice(logits, choices);
      if (is_baseline) {
        summaries_[index] = summary;
        std::ranges::copy(logits, held_.begin() + static_cast<ptrdiff_t>(index * vocab_));
      }
      const RowSummary& baseline = summaries_[index];
      const int32_t target = target_of(index);
      ComparedToken& token = tokens[index];
      token.logprob =
          static_cast<double>(logits[static_cast<size_t>(target)]) - summary.log_sum_exp;
      token.is_top = summary.argmax == target;
      token.same_top = summary.argmax == baseline.argmax;
      if (!is_baseline) {
        token.kl = kl_divergence(std::span(held_).subspan(index * vocab_, vocab_),
                                 baseline.log_sum_exp, logits, summary.log_sum_exp);
      }
    }
    for (size_t index = first; index < tokens.size(); ++index) {
      if (!std::isfinite(tokens[index].logprob) || !std::isfinite(tokens[index].kl)) {
        fail("setting {}: the distribution at {} is not finite", setting.name, place_of(index));
      }
    }
  }

  void check_block(const CompareSetting& setting, const Model::LogitsBlock& block, size_t first) {
    const size_t rows = block.tokens.size();
    if (block.logits.size() != rows * vocab_) {
      fail("setting {}: the model's distributions are not over {} tokens", setting.name, vocab_);
    }
    for (size_t r = 0; r < rows; ++r) {
      const size_t index = first + r;
      if (index >= scored_.size() || scored_[index].input != block.tokens[r].input ||
          scored_[index].position != block.tokens[r].position) {
        fail("setting {}: the model scored other tokens than asked in {}", setting.name,
             where_(first_input_));
      }
      const int32_t target = target_of(index);
      if (target < 0 || static_cast<size_t>(target) >= vocab_) {
        fail("{}: id {} is not in the vocabulary of {}", place_of(index), target, vocab_);
      }
      for (const int32_t choice : choices_of(index)) {
        if (choice < 0 || static_cast<size_t>(choice) >= vocab_) {
          fail("{}: id {} is not in the vocabulary of {}", place_of(index), choice, vocab_);
        }
      }
    }
  }

  int32_t target_of(size_t index) const {
    const Model::ScoredToken& token = scored_[index];
    return inputs_[token.input].ids[static_cast<size_t>(token.position)];
  }

  std::span<const int32_t> choices_of(size_t index) const {
    return choices_.empty() ? std::span<const int32_t>() : choices_[scored_[index].input];
  }

  std::string place_of(size_t index) const {
    return fmt::format("token {} of {}", scored_[index].position,
                       where_(first_input_ + static_cast<int64_t>(scored_[index].input)));
  }

  std::span<const Model::ScoreInput> inputs_;
  int64_t first_input_;
  int64_t shared_;
  size_t vocab_;
  std::span<const std::vector<int32_t>> choices_;  // by input, or none
  const std::function<std::string(int64_t)>& where_;
  std::vector<Model::ScoredToken> scored_;
  std::vector<float>& held_;           // the baseline's logits, [scored_.size(), vocab_] of it
  std::vector<RowSummary> summaries_;  // of its rows
};

// Steps after which a group's shared tokens are run anew.
constexpr int64_t kGroupSteps = 8;

// The group that inputs[first] is in.
CompareGroup group_of(size_t first, size_t num_inputs, const CompareOptions& options) {
  for (const CompareGroup& group : options.groups) {
    if (first < group.end) return group;
  }
  return {.end = num_inputs, .shared = 0};
}

// The end of the batch that begins at inputs[first]: one input at least, all of one group.
size_t end_of_batch(std::span<const Model::ScoreInput> inputs, size_t first,
                    const CompareGroup& group, const CompareOptions& options) {
  int64_t tokens = 0;
  int64_t rows = 0;
  const int64_t row_bytes = options.vocab_size * static_cast<int64_t>(sizeof(float));
  const int64_t most_rows = options.baseline_bytes / std::max<int64_t>(row_bytes, 1);
  const int64_t most_tokens = options.batch_tokens * (group.shared > 0 ? kGroupSteps : 1);
  size_t last = first;
  for (; last < std::min(group.end, inputs.size()); ++last) {
    tokens += static_cast<int64_t>(inputs[last].ids.size()) - group.shared;
    rows += num_scored(inputs[last]);
    if (last > first && (tokens > most_tokens || rows > most_rows)) break;
  }
  return last;
}

// Adds what all settings made of a batch of inputs. The first batch warms up: its time counts only
// as long as there is no other.
void append(std::span<const Model::ScoreInput> inputs, int64_t shared,
            std::span<const BatchScores> runs, bool replaces_time, Comparison& result) {
  int64_t tokens_run = shared;
  size_t end = result.settings[0].tokens.size();
  for (const Model::ScoreInput& input : inputs) {
    tokens_run += static_cast<int64_t>(input.ids.size()) - shared;
    end += static_cast<size_t>(num_scored(input));
    result.input_ends.push_back(end);
  }
  result.tokens_run += tokens_run;
  for (size_t s = 0; s < runs.size(); ++s) {
    SettingScores& setting = result.settings[s];
    setting.tokens.insert(setting.tokens.end(), runs[s].tokens.begin(), runs[s].tokens.end());
    setting.seconds = (replaces_time ? 0 : setting.seconds) + runs[s].seconds;
    setting.timed_tokens = (replaces_time ? 0 : setting.timed_tokens) + tokens_run;
  }
}

struct Ratio {
  double value = 0;
  double error = 0;
};

// Sum of samples / sum of weights, and its standard error: sqrt(n / (n - 1) × sum of (sample -
// value × weight)²) / sum of weights (Cochran, Sampling Techniques, section 2.11).
Ratio ratio_of(std::span<const double> samples, std::span<const double> weights) {
  const auto weight_of = [&weights](size_t i) { return weights.empty() ? 1.0 : weights[i]; };
  double sum = 0;
  double weight = 0;
  for (size_t i = 0; i < samples.size(); ++i) {
    sum += samples[i];
    weight += weight_of(i);
  }
  Ratio ratio{.value = sum / weight, .error = kNaN};
  if (samples.size() < 2) return ratio;
  double squares = 0;
  for (size_t i = 0; i < samples.size(); ++i) {
    const double residual = samples[i] - ratio.value * weight_of(i);
    squares += residual * residual;
  }
  const auto n = static_cast<double>(samples.size());
  ratio.error = std::sqrt(n / (n - 1) * squares) / weight;
  return ratio;
}

template <typename PerToken>
std::vector<std::vector<double>> per_token(const Comparison& comparison, const PerToken& value) {
  std::vector<std::vector<double>> samples;
  for (const SettingScores& setting : comparison.settings) {
    auto& row = samples.emplace_back();
    row.reserve(setting.tokens.size());
    for (const ComparedToken& token : setting.tokens) row.push_back(value(token));
  }
  return samples;
}

// fold(so far, token) over each input's tokens, from `initial`.
template <typename Fold>
std::vector<std::vector<double>> per_input(const Comparison& comparison, double initial,
                                           const Fold& fold) {
  std::vector<std::vector<double>> samples;
  for (const SettingScores& setting : comparison.settings) {
    auto& row = samples.emplace_back();
    row.reserve(comparison.input_ends.size());
    size_t token = 0;
    for (const size_t end : comparison.input_ends) {
      double value = initial;
      for (; token < end; ++token) value = fold(value, setting.tokens[token]);
      row.push_back(value);
    }
  }
  return samples;
}

}  // namespace

double SettingScores::tokens_per_second() const {
  return seconds > 0 ? static_cast<double>(timed_tokens) / seconds : 0;
}

Comparison run_comparison(std::span<const Model::ScoreInput> inputs,
                          std::span<const CompareSetting> settings, const CompareOptions& options,
                          const std::function<std::string(int64_t index)>& where,
                          const EvalCallback& on_progress, Journal* journal) {
  Comparison result;
  result.settings.resize(settings.size());
  result.inputs_planned = static_cast<int64_t>(inputs.size());
  Moments baseline_loss;
  std::vector<float> held;    // as large as the largest batch so far
  int64_t parts_done = 0;     // inputs, once per setting
  int64_t parts_resumed = 0;  // of them, from the journal
  int64_t batches = 0;
  for (size_t first = 0; first < inputs.size();) {
    const CompareGroup group = group_of(first, inputs.size(), options);
    const size_t last = end_of_batch(inputs, first, group, options);
    const auto size = static_cast<int64_t>(last - first);
    Batch batch(inputs.subspan(first, last - first), static_cast<int64_t>(first), group.shared,
                options, where, held);
    const std::optional<std::string> record = journal != nullptr ? journal->next() : std::nullopt;
    std::vector<BatchScores> recorded;
    if (record) {
      auto read = read_batch_record(*record, first, settings.size(), batch.num_tokens());
      if (!read) fail("the journal {} does not hold this run's batches", journal->path().string());
      recorded = std::move(*read);
    }
    std::vector<BatchScores> runs;
    bool stopped = false;
    while (runs.size() < settings.size() && !stopped) {
      const size_t setting = runs.size();
      runs.push_back(record ? std::move(recorded[setting])
                            : batch.run(settings[setting], setting == 0));
      if (setting == 0) {
        for (const ComparedToken& token : runs[0].tokens) baseline_loss.add(-token.logprob);
      }
      parts_done += size;
      if (record) parts_resumed = parts_done;
      stopped =
          on_progress &&
          !on_progress({.done = parts_done,
                        .total = result.inputs_planned * static_cast<int64_t>(settings.size()),
                        .tokens = result.tokens_run,
                        .perplexity = std::exp(baseline_loss.mean()),
                        .resumed = parts_resumed});
    }
    result.held_bytes = static_cast<int64_t>(held.size() * sizeof(float));
    if (runs.size() < settings.size()) break;
    if (journal != nullptr && !record) journal->append(batch_record(first, runs));
    append(inputs.subspan(first, last - first), group.shared, runs, batches == 1, result);
    ++batches;
    if (stopped) break;
    first = last;
  }
  return result;
}

bool PairedFigure::excludes_zero() const { return std::abs(difference) > margin(); }

ComparedMetric paired_metric(std::string name, std::span<const std::vector<double>> samples,
                             const MetricForm& form) {
  ComparedMetric metric{.name = std::move(name), .figures = {}};
  std::vector<double> changes;
  for (const std::vector<double>& own : samples) {
    const std::vector<double>& first = samples[0];
    const Ratio ratio = ratio_of(own, form.weights);
    PairedFigure figure{.value = ratio.value, .standard_error = ratio.error};
    // d exp(r) = exp(r) dr: to first order, exp(r) - exp(r0) moves with exp(r) own - exp(r0) first.
    double own_factor = 1;
    double first_factor = 1;
    if (form.exponential) {
      own_factor = figure.value = std::exp(ratio.value);
      first_factor = metric.figures.empty() ? figure.value : metric.figures[0].value;
      figure.standard_error *= figure.value;
    }
    changes.assign(own.size(), 0);
    for (size_t i = 0; i < own.size(); ++i) changes[i] = own[i] - first[i];
    const Ratio difference = ratio_of(changes, form.weights);
    figure.difference = difference.value;
    figure.difference_error = difference.error;
    if (form.exponential) {
      // Not the difference of two close powers, which would lose digits.
      figure.difference = first_factor * std::expm1(difference.value);
      for (size_t i = 0; i < own.size(); ++i) {
        changes[i] = own_factor * own[i] - first_factor * first[i];
      }
      figure.difference_error = ratio_of(changes, form.weights).error;
    }
    metric.figures.push_back(figure);
  }
  return metric;
}

std::vector<std::vector<double>> token_losses(const Comparison& comparison) {
  return per_token(comparison, [](const ComparedToken& token) { return -token.logprob; });
}

std::vector<std::vector<double>> input_losses(const Comparison& comparison) {
  return per_input(comparison, 0,
                   [](double sum, const ComparedToken& token) { return sum - token.logprob; });
}

std::vector<std::vector<double>> input_hits(const Comparison& comparison) {
  return per_input(comparison, 1,
                   [](double hit, const ComparedToken& token) { return token.is_top ? hit : 0; });
}

DistributionDistance distance(const SettingScores& baseline, const SettingScores& setting) {
  const size_t count = setting.tokens.size();
  if (count == 0) return {kNaN, kNaN, kNaN, kNaN, kNaN, kNaN, kNaN, kNaN};
  Moments kl;
  Moments same;
  Moments squares;  // of the change of the correct token's probability
  std::vector<double> sorted;
  sorted.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const ComparedToken& token = setting.tokens[i];
    const double change = std::exp(token.logprob) - std::exp(baseline.tokens[i].logprob);
    kl.add(token.kl);
    same.add(token.same_top ? 1 : 0);
    squares.add(change * change);
    sorted.push_back(token.kl);
  }
  // The rank is at least 1, and 99 * count / 100 rounded up.
  const size_t rank = (99 * count + 99) / 100;
  const auto p99 = sorted.begin() + static_cast<ptrdiff_t>(rank - 1);
  std::nth_element(sorted.begin(), p99, sorted.end());
  const double share = same.mean();
  const double rms = std::sqrt(squares.mean());
  return {.kl_mean = kl.mean(),
          .kl_error = kl.standard_error(),
          .kl_p99 = *p99,
          .kl_max = *std::max_element(p99, sorted.end()),
          .same_top = share,
          .same_top_error = std::sqrt(share * (1 - share) / static_cast<double>(count)),
          .rms_change = rms,
          .rms_change_error = rms > 0 ? squares.standard_error() / (2 * rms) : 0};
}

}  // namespace sagelm
