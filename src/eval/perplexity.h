// Perplexity of a text under a protocol: first a plan of what to score, then the scoring.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "eval/journal.h"
#include "eval/protocol.h"
#include "eval/scorer.h"

namespace sagelm {

// A tokenizer as protocols use it.
struct TextEncoder {
  // Ids of a text, nothing in front.
  std::function<std::vector<int32_t>(std::string_view text)> encode = {};
  std::optional<int32_t> bos_id = {};
  std::optional<int32_t> eos_id = {};
  bool adds_bos = false;  // as its configuration says; never without a bos_id
};

// What a protocol scores of a text. Move-only: inputs point into it.
class ScoringPlan {
 public:
  struct DocumentPlan {
    int64_t words = 0;
    int64_t bytes = 0;
    size_t end_input = 0;  // its inputs come before this one
  };

  // limit: the first windows, or for a protocol of documents the first documents. Throws Error for
  // a text too short for a window, or a tokenizer that lacks the prefix token.
  ScoringPlan(std::string_view text, const Protocol& protocol, const TextEncoder& encoder,
              std::optional<int64_t> limit = {});
  // Of one document's ids, as the protocol wants them in front and behind.
  ScoringPlan(std::span<const int32_t> ids, const Protocol& protocol, std::optional<int64_t> limit,
              std::optional<int32_t> bos_id);
  ScoringPlan(ScoringPlan&&) = default;
  ScoringPlan& operator=(ScoringPlan&&) = default;
  ScoringPlan(const ScoringPlan&) = delete;
  ScoringPlan& operator=(const ScoringPlan&) = delete;
  ~ScoringPlan() = default;

  std::span<const Model::ScoreInput> inputs() const { return inputs_; }  // one per window
  int64_t windows_of_text() const { return windows_of_text_; }           // without the limit
  int64_t tokens_of_text() const { return tokens_of_text_; }             // likewise, front included
  bool has_documents() const { return documents_of_text_ > 0; }
  std::span<const DocumentPlan> documents() const { return documents_; }
  int64_t documents_of_text() const { return documents_of_text_; }  // without the limit

 private:
  ScoringPlan() = default;
  void add_windows(std::vector<int32_t> ids, std::span<const Window> windows,
                   std::optional<int32_t> first_id);

  std::vector<std::vector<int32_t>> ids_;
  std::vector<Model::ScoreInput> inputs_;
  std::vector<DocumentPlan> documents_;
  int64_t windows_of_text_ = 0;
  int64_t tokens_of_text_ = 0;
  int64_t documents_of_text_ = 0;
};

struct PerplexityOptions {
  int64_t batch_tokens = 2048;         // of windows scored together; no figure depends on it
  std::optional<int64_t> limit = {};   // windows at most, the first ones
  std::optional<int32_t> bos_id = {};  // absent: the tokenizer's configuration wants none
};

// Figures per word and per byte, of whole documents: exp(-log-likelihood / words) and so on, sums
// over all documents first. Standard errors are those of a ratio of sums (linearised), the
// documents being the sample: NaN for fewer than two.
struct DocumentFigures {
  int64_t documents = 0;          // scored to their end
  int64_t documents_of_text = 0;  // without the limit
  int64_t words = 0;
  int64_t bytes = 0;
  double word_perplexity = 0;
  double word_perplexity_stderr = 0;
  double byte_perplexity = 0;
  double byte_perplexity_stderr = 0;
  double bits_per_byte = 0;
  double bits_per_byte_stderr = 0;
};

struct PerplexityResult {
  int64_t windows = 0;          // scored
  int64_t windows_planned = 0;  // more than `windows` only if the run was stopped
  int64_t windows_of_text = 0;  // without the limit
  int64_t tokens_scored = 0;
  int64_t tokens_run = 0;  // through the model
  double nll_mean = 0;     // per token; natural logarithm
  double perplexity = 0;   // exp(nll_mean); infinite where that is no double
  // perplexity × sd(nll) / sqrt(tokens_scored): first order, tokens taken as independent. NaN for
  // fewer than two tokens.
  double standard_error = 0;
  std::optional<DocumentFigures> documents = {};  // of protocols that have documents
  double seconds = 0;                             // in the model

  bool partial() const { return windows < windows_planned; }
  double tokens_per_second() const;  // run through the model; 0 if nothing was measured
};

// Throws Error for a log-probability that is not a number (naming the window). A run that
// on_progress stops has the figures of the windows before. With a journal, what an earlier run
// scored is taken from there and the rest is added to it; the result is the same to the last bit,
// tokens_run and seconds being those of both runs.
PerplexityResult run_perplexity(const ScoringPlan& plan, int64_t batch_tokens, const Scorer& scorer,
                                const EvalCallback& on_progress = {}, Journal* journal = nullptr);

// Of a text that is one document: ids as tokenized from protocol.prepare's text, BOS in front if
// there is one.
PerplexityResult run_perplexity(std::span<const int32_t> ids, const Protocol& protocol,
                                const PerplexityOptions& options, const Scorer& scorer,
                                const EvalCallback& on_progress = {});

}  // namespace sagelm
