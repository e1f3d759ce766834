#include "eval/lambada.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <exception>
#include <string>
#include <utility>

#include "base/error.h"
#include "eval/bootstrap.h"
#include "eval/statistics.h"
#include "text/utf8.h"

namespace sagelm {
namespace {

struct VariantEntry {
  LambadaVariant variant;
  std::string_view name;
  std::string_view description;
};

constexpr std::array kVariants = {
    VariantEntry{LambadaVariant::kWord, "word",
                 "the last word, right if each of its tokens is the most probable one "
                 "(lambada_openai of lm-evaluation-harness)"},
    VariantEntry{LambadaVariant::kLastToken, "last-token",
                 "the last token alone (as in SmoothQuant's demonstration; most likely what "
                 "SageAttention's table shows)"},
};

const VariantEntry& entry_of(LambadaVariant variant) {
  for (const VariantEntry& entry : kVariants) {
    if (entry.variant == variant) return entry;
  }
  return kVariants.front();
}

// What a passage's last word is to be predicted from: all before its last space, without the white
// space at its end.
std::string_view context_of(const std::string& text, const std::string& where) {
  const size_t space = text.rfind(' ');
  if (space == std::string::npos || space + 1 == text.size()) {
    fail("{}: the passage has no last word: {}", where,
         space == std::string::npos ? "there is no space in it" : "it ends with a space");
  }
  const std::string_view before = std::string_view(text).substr(0, space);
  const std::string_view words = strip(before);
  if (words.empty()) fail("{}: the passage has no word before its last one", where);
  const auto end = static_cast<size_t>(words.data() + words.size() - before.data());
  return before.substr(0, end);
}

std::string line_name(std::string_view file, const Passage& passage) {
  return fmt::format("{}:{}", file, passage.line);
}

// Where the target of kWord begins in ids, the ids of the whole text.
int64_t word_target(const std::string& text, size_t num_ids, const std::string& where,
                    const Encoder& encode) {
  const std::vector<int32_t> context = encode(context_of(text, where));
  if (context.empty() || context.size() >= num_ids) {
    fail("{}: the passage's last word has no tokens of its own after those of the words before it",
         where);
  }
  return static_cast<int64_t>(context.size());
}

LambadaExample prepare_example(const Passage& passage, const std::string& where,
                               LambadaVariant variant, const Encoder& encode, int64_t max_tokens) {
  LambadaExample example{.ids = encode(passage.text)};
  const auto length = static_cast<int64_t>(example.ids.size());
  if (length < 2) fail("{}: the passage has no token to predict another from", where);
  example.first_scored = variant == LambadaVariant::kWord
                             ? word_target(passage.text, example.ids.size(), where, encode)
                             : length - 1;
  // The last token is predicted only, and so may be one more than the context holds.
  if (const int64_t cut = length - (max_tokens + 1); cut > 0) {
    if (cut >= example.first_scored) {
      fail("{}: a context of {} tokens is too short for the passage's last word", where,
           max_tokens);
    }
    example.ids.erase(example.ids.begin(), example.ids.begin() + static_cast<std::ptrdiff_t>(cut));
    example.first_scored -= cut;
    example.shortened = true;
  }
  return example;
}

}  // namespace

LambadaVariant parse_lambada_variant(std::string_view name) {
  std::string names;
  for (const VariantEntry& entry : kVariants) {
    if (entry.name == name) return entry.variant;
    if (!names.empty()) names += ", ";
    names += entry.name;
  }
  fail_usage("unknown variant '{}': use one of {}", name, names);
}

std::string_view lambada_variant_name(LambadaVariant variant) { return entry_of(variant).name; }

std::string_view describe_lambada_variant(LambadaVariant variant) {
  return entry_of(variant).description;
}

void check_last_words(std::string_view name, std::span<const Passage> passages) {
  for (const Passage& passage : passages) context_of(passage.text, line_name(name, passage));
}

std::vector<LambadaExample> prepare_lambada(std::string_view name,
                                            std::span<const Passage> passages,
                                            LambadaVariant variant, const Encoder& encode,
                                            int64_t max_tokens) {
  std::vector<LambadaExample> examples(passages.size());
  size_t first_failed = passages.size();
  std::exception_ptr failure;  // of that one: the first in the file, whatever the threads do
#pragma omp parallel for schedule(dynamic, 16)
  for (size_t i = 0; i < passages.size(); ++i) {
    try {
      examples[i] =
          prepare_example(passages[i], line_name(name, passages[i]), variant, encode, max_tokens);
    } catch (...) {
#pragma omp critical(sagelm_prepare_lambada)
      if (i < first_failed) {
        first_failed = i;
        failure = std::current_exception();
      }
    }
  }
  if (failure) std::rethrow_exception(failure);
  return examples;
}

int64_t num_shortened(std::span<const LambadaExample> examples) {
  return std::ranges::count(examples, true, &LambadaExample::shortened);
}

std::vector<Model::ScoreInput> inputs_of(std::span<const LambadaExample> examples) {
  std::vector<Model::ScoreInput> inputs;
  inputs.reserve(examples.size());
  for (const LambadaExample& example : examples) {
    inputs.push_back({.ids = example.ids, .first_scored = example.first_scored});
  }
  return inputs;
}

double LambadaResult::tokens_per_second() const {
  return seconds > 0 ? static_cast<double>(tokens_run) / seconds : 0;
}

LambadaResult run_lambada(std::span<const LambadaExample> examples, int64_t batch_tokens,
                          const Scorer& scorer, const EvalCallback& on_progress, Journal* journal) {
  const std::vector<Model::ScoreInput> inputs = inputs_of(examples);
  LambadaResult result;
  result.examples_planned = static_cast<int64_t>(examples.size());
  Moments hits;
  Moments log_likelihood;
  std::vector<double> log_likelihoods;
  const auto take = [&](int64_t, std::span<const Scored> scores) {
    double sum = 0;
    bool all_top = true;
    for (const Scored& score : scores) {
      sum += static_cast<double>(score.logprob);
      all_top = all_top && score.is_top;
    }
    log_likelihood.add(sum);
    log_likelihoods.push_back(sum);
    hits.add(all_top ? 1 : 0);
    if (all_top) ++result.correct;
  };
  const auto after_batch = [&](const BatchRun& run) {
    return !on_progress || on_progress({.done = run.done,
                                        .total = result.examples_planned,
                                        .tokens = run.tokens,
                                        .perplexity = std::exp(-log_likelihood.mean()),
                                        .resumed = run.resumed});
  };
  const BatchRun run = score_in_batches(
      inputs, batch_tokens, scorer,
      [](int64_t index) { return fmt::format("passage {}", index + 1); }, take, after_batch,
      journal);
  result.examples = run.done;
  result.tokens_run = run.tokens;
  result.seconds = run.seconds;
  result.accuracy = static_cast<double>(result.correct) / static_cast<double>(result.examples);
  result.accuracy_stderr = hits.standard_error();
  result.perplexity = std::exp(-log_likelihood.mean());
  result.perplexity_stderr = bootstrap_perplexity_stderr(log_likelihoods);
  return result;
}

}  // namespace sagelm
