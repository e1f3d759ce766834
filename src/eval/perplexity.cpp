#include "eval/perplexity.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <string>
#include <utility>

#include "base/error.h"
#include "eval/statistics.h"

namespace sagelm {
namespace {

size_t limited(size_t count, std::optional<int64_t> limit) {
  return limit ? std::min(count, static_cast<size_t>(std::max<int64_t>(0, *limit))) : count;
}

std::vector<int32_t> front_ids(const Protocol& protocol, const TextEncoder& encoder) {
  std::vector<int32_t> front;
  if (protocol.front != FrontTokens::kTokenizerBos) {
    const std::optional<int32_t> prefix = encoder.bos_id ? encoder.bos_id : encoder.eos_id;
    if (!prefix) {
      fail("the protocol {} needs a tokenizer with a beginning- or end-of-sequence token",
           protocol.name);
    }
    front.push_back(*prefix);
  }
  if (protocol.front != FrontTokens::kPrefix && encoder.adds_bos && encoder.bos_id) {
    front.push_back(*encoder.bos_id);
  }
  return front;
}

std::vector<Document> documents_of(std::string_view text, const Protocol& protocol) {
  if (protocol.documents) return protocol.documents(text);
  return {{.text = protocol.prepare ? protocol.prepare(text) : std::string(text)}};
}

// Sums over documents, from which the figures per word and per byte follow.
class DocumentSums {
 public:
  void add(double log_likelihood, const ScoringPlan::DocumentPlan& document) {
    log_likelihoods_.push_back(log_likelihood);
    words_.push_back(static_cast<double>(document.words));
    bytes_.push_back(static_cast<double>(document.bytes));
    figures_.words += document.words;
    figures_.bytes += document.bytes;
    ++figures_.documents;
  }

  DocumentFigures figures(int64_t documents_of_text) const {
    DocumentFigures result = figures_;
    result.documents_of_text = documents_of_text;
    const auto [word_nll, word_error] = ratio(words_);
    const auto [byte_nll, byte_error] = ratio(bytes_);
    result.word_perplexity = std::exp(word_nll);
    result.word_perplexity_stderr = result.word_perplexity * word_error;
    result.byte_perplexity = std::exp(byte_nll);
    result.byte_perplexity_stderr = result.byte_perplexity * byte_error;
    result.bits_per_byte = byte_nll / std::numbers::ln2;
    result.bits_per_byte_stderr = byte_error / std::numbers::ln2;
    return result;
  }

 private:
  // -sum of log-likelihoods / sum of sizes, and its standard error, linearised: sqrt(n / (n - 1) ×
  // sum of (nll - ratio × size)²) / sum of sizes (Cochran, Sampling Techniques, section 2.11).
  std::pair<double, double> ratio(const std::vector<double>& sizes) const {
    constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
    double nll = 0;
    double size = 0;
    for (size_t i = 0; i < sizes.size(); ++i) {
      nll -= log_likelihoods_[i];
      size += sizes[i];
    }
    const double value = nll / size;
    if (sizes.size() < 2) return {value, kNaN};
    double squares = 0;
    for (size_t i = 0; i < sizes.size(); ++i) {
      const double residual = -log_likelihoods_[i] - value * sizes[i];
      squares += residual * residual;
    }
    const auto n = static_cast<double>(sizes.size());
    return {value, std::sqrt(n / (n - 1) * squares) / size};
  }

  std::vector<double> log_likelihoods_;
  std::vector<double> words_;
  std::vector<double> bytes_;
  DocumentFigures figures_;
};

}  // namespace

ScoringPlan::ScoringPlan(std::string_view text, const Protocol& protocol,
                         const TextEncoder& encoder, std::optional<int64_t> limit) {
  const std::vector<int32_t> front = front_ids(protocol, encoder);
  const std::optional<int32_t> first_id =
      protocol.bos_in_each_window && encoder.adds_bos ? encoder.bos_id : std::nullopt;
  const std::vector<Document> documents = documents_of(text, protocol);
  const size_t documents_planned = limited(documents.size(), limit);
  for (size_t i = 0; i < documents.size(); ++i) {
    std::vector<int32_t> ids = front;
    const std::vector<int32_t> rest = encoder.encode(documents[i].text);
    ids.insert(ids.end(), rest.begin(), rest.end());
    const auto num_ids = static_cast<int64_t>(ids.size());
    std::vector<Window> windows = protocol.windows(num_ids);
    tokens_of_text_ += num_ids;
    windows_of_text_ += static_cast<int64_t>(windows.size());
    if (!protocol.documents) {
      windows.resize(limited(windows.size(), limit));
    } else if (i >= documents_planned) {
      continue;
    }
    add_windows(std::move(ids), windows, first_id);
    if (protocol.documents) {
      documents_.push_back(
          {.words = documents[i].words, .bytes = documents[i].bytes, .end_input = inputs_.size()});
    }
  }
  if (protocol.documents) documents_of_text_ = static_cast<int64_t>(documents.size());
  if (inputs_.empty()) fail("there is no token to score in the text");
}

ScoringPlan::ScoringPlan(std::span<const int32_t> ids, const Protocol& protocol,
                         std::optional<int64_t> limit, std::optional<int32_t> bos_id)
    : windows_of_text_(0), tokens_of_text_(static_cast<int64_t>(ids.size())) {
  std::vector<Window> windows = protocol.windows(tokens_of_text_);
  windows_of_text_ = static_cast<int64_t>(windows.size());
  windows.resize(limited(windows.size(), limit));
  add_windows({ids.begin(), ids.end()}, windows,
              protocol.bos_in_each_window ? bos_id : std::nullopt);
}

void ScoringPlan::add_windows(std::vector<int32_t> ids, std::span<const Window> windows,
                              std::optional<int32_t> first_id) {
  // Inner vectors keep their place when ids_ grows or moves: inputs may point into them.
  ids_.push_back(std::move(ids));
  const std::span<const int32_t> all = ids_.back();
  for (const Window& window : windows) {
    std::span<const int32_t> window_ids = all.subspan(
        static_cast<size_t>(window.begin), static_cast<size_t>(window.end - window.begin));
    if (first_id) {
      std::vector<int32_t> replaced(window_ids.begin(), window_ids.end());
      replaced.front() = *first_id;
      window_ids = ids_.emplace_back(std::move(replaced));
    }
    inputs_.push_back({.ids = window_ids, .first_scored = window.first_scored - window.begin});
  }
}

double PerplexityResult::tokens_per_second() const {
  return seconds > 0 ? static_cast<double>(tokens_run) / seconds : 0;
}

PerplexityResult run_perplexity(const ScoringPlan& plan, int64_t batch_tokens, const Scorer& scorer,
                                const EvalCallback& on_progress, Journal* journal) {
  PerplexityResult result;
  result.windows_of_text = plan.windows_of_text();
  result.windows_planned = static_cast<int64_t>(plan.inputs().size());

  Moments nll;
  DocumentSums sums;
  size_t document = 0;  // the one being scored
  double log_likelihood = 0;
  const auto take = [&](int64_t index, std::span<const Scored> scores) {
    for (const Scored& score : scores) {
      nll.add(-static_cast<double>(score.logprob));
      log_likelihood += static_cast<double>(score.logprob);
    }
    const std::span<const ScoringPlan::DocumentPlan> documents = plan.documents();
    while (document < documents.size() &&
           documents[document].end_input <= static_cast<size_t>(index) + 1) {
      sums.add(log_likelihood, documents[document]);
      log_likelihood = 0;
      ++document;
    }
  };
  const auto after_batch = [&](const BatchRun& run) {
    return !on_progress || on_progress({.done = run.done,
                                        .total = result.windows_planned,
                                        .tokens = run.tokens,
                                        .perplexity = std::exp(nll.mean()),
                                        .resumed = run.resumed});
  };
  const BatchRun run = score_in_batches(
      plan.inputs(), batch_tokens, scorer,
      [](int64_t index) { return fmt::format("window {} of the text", index + 1); }, take,
      after_batch, journal);
  result.windows = run.done;
  result.tokens_run = run.tokens;
  result.seconds = run.seconds;
  result.tokens_scored = nll.count();
  result.nll_mean = nll.mean();
  result.perplexity = std::exp(result.nll_mean);
  result.standard_error = result.perplexity * nll.standard_error();
  if (plan.has_documents()) result.documents = sums.figures(plan.documents_of_text());
  return result;
}

PerplexityResult run_perplexity(std::span<const int32_t> ids, const Protocol& protocol,
                                const PerplexityOptions& options, const Scorer& scorer,
                                const EvalCallback& on_progress) {
  const ScoringPlan plan(ids, protocol, options.limit, options.bos_id);
  return run_perplexity(plan, options.batch_tokens, scorer, on_progress);
}

}  // namespace sagelm
