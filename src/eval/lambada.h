// LAMBADA: predicting the last word of a passage from all before it.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string_view>
#include <vector>

#include "eval/dataset.h"
#include "eval/scorer.h"

namespace sagelm {

enum class LambadaVariant : uint8_t {
  // lambada_openai of EleutherAI's lm-evaluation-harness: all tokens of the last word must be the
  // most probable ones, each given the true ones before it.
  kWord,
  // The last token alone, as in SmoothQuant's demonstration: much easier where words have several
  // tokens, and not to be compared with kWord.
  kLastToken,
};

// Throws UsageError listing the names.
LambadaVariant parse_lambada_variant(std::string_view name);
std::string_view lambada_variant_name(LambadaVariant variant);
std::string_view describe_lambada_variant(LambadaVariant variant);  // one sentence, for reports

struct LambadaExample {
  std::vector<int32_t> ids = {};  // of the whole passage, or of its end
  int64_t first_scored = 0;       // the target is ids[first_scored …]
  bool shortened = false;         // the passage was too long
};

// Ids of a text, BOS in front if the tokenizer's configuration wants it. Called by several threads
// at once.
using Encoder = std::function<std::vector<int32_t>(std::string_view text)>;

// Throws Error with file and line for a passage that has no last word after a space, or no word
// before it. Needs no tokenizer, so that a whole file is checked first. name is the file's.
void check_last_words(std::string_view name, std::span<const Passage> passages);

// kWord: the target is what the ids of the whole passage have beyond the length of the ids of the
// text before its last space (white space before that space is the target's too); the target is
// never tokenized alone. A passage loses its beginning, BOS and all, where it exceeds max_tokens
// and the token predicted after them, as in lm-eval. name is the file's. Throws Error with file and
// line for a passage that check_last_words refuses (kWord), or whose target has no tokens of its
// own or is longer than max_tokens.
std::vector<LambadaExample> prepare_lambada(std::string_view name,
                                            std::span<const Passage> passages,
                                            LambadaVariant variant, const Encoder& encode,
                                            int64_t max_tokens);

int64_t num_shortened(std::span<const LambadaExample> examples);

// As a model scores them; views of the examples.
std::vector<Model::ScoreInput> inputs_of(std::span<const LambadaExample> examples);

struct LambadaResult {
  int64_t examples = 0;
  int64_t examples_planned = 0;  // more than `examples` only if the run was stopped
  int64_t correct = 0;
  int64_t tokens_run = 0;
  double accuracy = 0;
  double accuracy_stderr = 0;  // sample sd / sqrt(n)
  double perplexity = 0;       // exp(-mean log-probability of a target): per word, not per token
  // By bootstrap, the very samples that lm-eval draws. Standard errors are NaN for fewer than two
  // examples.
  double perplexity_stderr = 0;
  double seconds = 0;  // in the model

  bool partial() const { return examples < examples_planned; }
  double tokens_per_second() const;  // run through the model; 0 if nothing was measured
};

// batch_tokens: of passages scored together; no figure depends on it. Throws Error for a
// log-probability that is not a number. A run that on_progress stops has the figures so far.
// journal as in run_perplexity.
LambadaResult run_lambada(std::span<const LambadaExample> examples, int64_t batch_tokens,
                          const Scorer& scorer, const EvalCallback& on_progress = {},
                          Journal* journal = nullptr);

}  // namespace sagelm
