#include "engine/sampler.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace sagelm {
namespace {

int32_t argmax(std::span<const float> logits) {
  const auto best = std::max_element(logits.begin(), logits.end());  // the first among equals
  return static_cast<int32_t>(best - logits.begin());
}

}  // namespace

void check_sampling_options(const SamplingOptions& options) {
  // Written so that NaN fails too.
  if (!(options.temperature >= 0.0 && options.temperature <= 100.0)) {
    fail_usage("the temperature must be from 0 to 100, not {}", options.temperature);
  }
  if (options.top_k < 0) fail_usage("top-k must be 0 (off) or more, not {}", options.top_k);
  if (!(options.top_p > 0.0 && options.top_p <= 1.0)) {
    fail_usage("top-p must be more than 0 and at most 1, not {}", options.top_p);
  }
  if (!(options.min_p >= 0.0 && options.min_p <= 1.0)) {
    fail_usage("min-p must be from 0 to 1, not {}", options.min_p);
  }
  if (!(options.repeat_penalty > 0.0 && options.repeat_penalty <= 100.0)) {
    fail_usage("the repeat penalty must be more than 0 and at most 100, not {}",
               options.repeat_penalty);
  }
  if (options.repeat_last_n < -1) {
    fail_usage("repeat-last-n must be -1 (all), 0 (off) or more, not {}", options.repeat_last_n);
  }
}

Sampler::Sampler(const SamplingOptions& options) : options_(options), generator_(options.seed) {
  check_sampling_options(options);
}

int32_t Sampler::sample(std::span<float> logits, std::span<const int32_t> history) {
  if (logits.empty()) fail("there are no logits to sample from");
  penalize(logits, history);
  if (options_.temperature == 0.0) return argmax(logits);
  collect(logits);
  double total = 0;
  for (const Candidate& candidate : candidates_) total += candidate.weight;
  double target = next_uniform() * total;
  for (const Candidate& candidate : candidates_) {
    target -= candidate.weight;
    if (target < 0) return candidate.id;
  }
  return candidates_.back().id;  // rounding left a trace of target
}

// Each distinct token of the last repeat_last_n once (CTRL, arXiv:1909.05858, section 4.1).
void Sampler::penalize(std::span<float> logits, std::span<const int32_t> history) {
  if (options_.repeat_penalty == 1.0 || options_.repeat_last_n == 0) return;
  if (options_.repeat_last_n > 0 && history.size() > static_cast<size_t>(options_.repeat_last_n)) {
    history = history.last(static_cast<size_t>(options_.repeat_last_n));
  }
  seen_.assign(history.begin(), history.end());
  std::sort(seen_.begin(), seen_.end());
  seen_.erase(std::unique(seen_.begin(), seen_.end()), seen_.end());
  const auto penalty = static_cast<float>(options_.repeat_penalty);
  for (const int32_t id : seen_) {
    if (id < 0 || static_cast<size_t>(id) >= logits.size()) continue;
    float& logit = logits[static_cast<size_t>(id)];
    logit = logit > 0 ? logit / penalty : logit * penalty;
  }
}

// Leaves in candidates_ the tokens that may be drawn.
void Sampler::collect(std::span<const float> logits) {
  const double largest = logits[static_cast<size_t>(argmax(logits))];
  // Tokens below (1 - top_p) / vocab of the largest weight together hold less than 1 - top_p of
  // all, so the nucleus lies among the others: most of the vocabulary is never sorted.
  const double floor = options_.top_p < 1.0 && options_.top_k == 0
                           ? (1.0 - options_.top_p) / static_cast<double>(logits.size())
                           : 0.0;
  double total = 0;
  candidates_.clear();
  for (size_t i = 0; i < logits.size(); ++i) {
    const double weight = std::exp((logits[i] - largest) / options_.temperature);
    total += weight;
    if (weight > 0 && weight >= floor) {
      candidates_.push_back({.weight = weight, .id = static_cast<int32_t>(i)});
    }
  }
  const auto less_probable = [](const Candidate& a, const Candidate& b) {
    return a.weight != b.weight ? a.weight < b.weight : a.id > b.id;
  };
  const auto top_k = static_cast<size_t>(options_.top_k);
  if (top_k > 0 && top_k < candidates_.size()) {
    const auto end = candidates_.begin() + options_.top_k;
    std::partial_sort(candidates_.begin(), end, candidates_.end(),
                      [&](const Candidate& a, const Candidate& b) { return less_probable(b, a); });
    candidates_.resize(top_k);
    total = 0;
    for (const Candidate& candidate : candidates_) total += candidate.weight;
  }
  if (options_.top_p < 1.0) {
    // The most probable are popped off a heap one by one to the back, until they are enough.
    auto heap_end = candidates_.end();
    std::make_heap(candidates_.begin(), heap_end, less_probable);
    double sum = 0;
    while (sum < options_.top_p * total && heap_end != candidates_.begin()) {
      std::pop_heap(candidates_.begin(), heap_end, less_probable);
      --heap_end;
      sum += heap_end->weight;
    }
    candidates_.erase(candidates_.begin(), heap_end);
    std::reverse(candidates_.begin(), candidates_.end());
  }
  if (options_.min_p > 0) {  // the largest weight is 1
    std::erase_if(candidates_, [this](const Candidate& c) { return c.weight < options_.min_p; });
  }
}

double Sampler::next_uniform() { return static_cast<double>(generator_() >> 11) * 0x1p-53; }

}  // namespace sagelm
