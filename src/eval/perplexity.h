// Perplexity of a token sequence under a protocol.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "eval/protocol.h"
#include "eval/scorer.h"

namespace sagelm {

struct PerplexityOptions {
  int64_t batch_tokens = 2048;         // of windows scored together; no figure depends on it
  std::optional<int64_t> limit = {};   // windows at most, the first ones
  std::optional<int32_t> bos_id = {};  // absent: the tokenizer's configuration wants none
};

struct PerplexityResult {
  int64_t windows = 0;          // scored
  int64_t windows_planned = 0;  // more than `windows` only if the run was stopped
  int64_t windows_of_text = 0;  // without the limit
  int64_t tokens_scored = 0;
  int64_t tokens_run = 0;  // through the model
  double nll_mean = 0;     // natural logarithm
  double perplexity = 0;   // exp(nll_mean); infinite where that is no double
  // perplexity × sd(nll) / sqrt(tokens_scored): first order, tokens taken as independent. NaN for
  // fewer than two tokens.
  double standard_error = 0;
  double seconds = 0;  // in the model

  bool partial() const { return windows < windows_planned; }
  double tokens_per_second() const;  // run through the model; 0 if nothing was measured
};

// ids as tokenized from protocol.prepare's text, BOS in front if there is one. Throws Error for a
// text too short, or a log-probability that is not a number (naming the window). A run that
// on_progress stops has the figures of the windows before.
PerplexityResult run_perplexity(std::span<const int32_t> ids, const Protocol& protocol,
                                const PerplexityOptions& options, const Scorer& scorer,
                                const EvalCallback& on_progress = {});

}  // namespace sagelm
