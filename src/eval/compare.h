// A/B of settings of one model (attention kernels, devices, caches): all of them score the same
// tokens, and what counts is the difference token by token. Its standard error is far below that
// of two perplexities measured one by one, since both settings find the same tokens hard.
//
// Everything here is computed in float64 from the settings' logits. A result depends on the batch
// size only as far as the scorers' own rounding does, and on the number of threads not at all.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "eval/journal.h"
#include "eval/scorer.h"
#include "sagelm/sagelm.hpp"

namespace sagelm {

// As Model::score_distributions.
using DistributionScorer =
    std::function<void(std::span<const Model::ScoreInput> inputs,
                       const Model::DistributionCallback& on_block, int64_t shared)>;

struct CompareSetting {
  std::string name;  // for messages
  DistributionScorer scorer;
};

// Inputs, up to the one before `end`, that begin with the same `shared` tokens: scored together.
struct CompareGroup {
  size_t end = 0;
  int64_t shared = 0;
};

struct CompareOptions {
  int64_t vocab_size = 0;       // of every distribution
  int64_t batch_tokens = 2048;  // of inputs scored together, by every setting in turn
  // The first setting's logits are held for one batch; a batch stays below this where one input
  // alone does.
  int64_t baseline_bytes = int64_t{512} << 20;
  // All inputs, in groups that no batch reaches across; none: nothing is shared. The shared tokens
  // are run anew after some batch_tokens, so that a large group can be stopped within.
  std::vector<CompareGroup> groups = {};
  // By input: the ids that is_top and same_top look for the most probable one among; none: all.
  std::vector<std::vector<int32_t>> choices = {};
};

// What a setting makes of one scored token, beside the first setting.
struct ComparedToken {
  double logprob = 0;     // of the correct token, natural logarithm
  double kl = 0;          // KL(first setting || this one) of the next-token distribution, in nats
  bool is_top = false;    // the correct token is the most probable one (of the choices)
  bool same_top = false;  // the first setting's most probable token is this one's too
};

struct SettingScores {
  std::vector<ComparedToken> tokens;  // in the inputs' order
  // In the scorer; without the first batch, which warms up, if there were more.
  double seconds = 0;
  int64_t timed_tokens = 0;          // run through the model in those seconds
  double tokens_per_second() const;  // 0 if nothing was measured
};

struct Comparison {
  std::vector<SettingScores> settings;  // in the order given; the first is the baseline
  std::vector<size_t> input_ends;       // input i has the tokens [input_ends[i - 1], input_ends[i])
  int64_t inputs_planned = 0;           // more than inputs() only if the run was stopped
  int64_t tokens_run = 0;               // through the model, by each setting; what is shared, once
  int64_t held_bytes = 0;               // of the first setting's logits, the most at once

  int64_t inputs() const { return static_cast<int64_t>(input_ends.size()); }
  bool partial() const { return inputs() < inputs_planned; }
};

// Runs every setting over all inputs, batch by batch. on_progress is told after each setting's part
// of a batch, counting an input once per setting; a batch that it stops short of its last setting
// does not count. where names input `index` in messages. Throws Error for a scorer that returns
// other tokens than asked, distributions of another size, or values that are not finite.
//
// With a journal, every batch is one record: those that are there stand in for the scorers, the
// others are appended, so that a resumed run's figures are an undisturbed one's. Throws Error for a
// record that does not fit its batch.
Comparison run_comparison(std::span<const Model::ScoreInput> inputs,
                          std::span<const CompareSetting> settings, const CompareOptions& options,
                          const std::function<std::string(int64_t index)>& where,
                          const EvalCallback& on_progress = {}, Journal* journal = nullptr);

// A figure of one setting. Standard errors take the samples (tokens or passages) as independent and
// are NaN for fewer than two.
struct PairedFigure {
  double value = 0;
  double standard_error = 0;
  double difference = 0;  // to the first setting on the same samples
  double difference_error = 0;

  // The difference in units of the first setting's value; not finite where that is 0.
  double relative_difference(const PairedFigure& first) const { return difference / first.value; }
  // Half the width of the difference's 95 % interval.
  double margin() const { return 1.959963984540054 * difference_error; }
  // The 95 % interval of the difference does not hold zero.
  bool excludes_zero() const;
};

struct ComparedMetric {
  std::string name;                   // "perplexity"; also the key in JSON
  std::vector<PairedFigure> figures;  // one per setting
};

// Sum of the samples / sum of the weights (1 each if there are none), samples[s][i] being sample i
// under setting s. Errors are those of a ratio of sums, linearised; with weights of 1 that is the
// standard error of a mean. exponential: the figure is exp of that.
struct MetricForm {
  std::span<const double> weights = {};
  bool exponential = false;
};
ComparedMetric paired_metric(std::string name, std::span<const std::vector<double>> samples,
                             const MetricForm& form = {});

// Negative log-probability of each scored token, [setting][token].
std::vector<std::vector<double>> token_losses(const Comparison& comparison);
// Summed over each input's scored tokens, [setting][input].
std::vector<std::vector<double>> input_losses(const Comparison& comparison);
// 1 where all scored tokens of an input are the most probable ones, else 0, [setting][input].
std::vector<std::vector<double>> input_hits(const Comparison& comparison);

// How far a setting's distributions are from the first setting's. NaN where nothing was scored.
struct DistributionDistance {
  double kl_mean = 0;
  double kl_error = 0;  // standard error of the mean
  double kl_p99 = 0;    // the smallest value that 99 % of the tokens do not exceed
  double kl_max = 0;
  double same_top = 0;        // share of tokens
  double same_top_error = 0;  // binomial
  // Root of the mean squared change of the correct token's probability, error to first order.
  double rms_change = 0;
  double rms_change_error = 0;
};

DistributionDistance distance(const SettingScores& baseline, const SettingScores& setting);

}  // namespace sagelm
