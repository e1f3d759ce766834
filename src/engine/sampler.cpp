#include "engine/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "base/error.h"

namespace sagelm {
namespace {

float largest_of(std::span<const float> logits) {
  float largest = logits[0];
#pragma omp simd reduction(max : largest)
  for (size_t i = 0; i < logits.size(); ++i) largest = std::max(largest, logits[i]);
  return largest;
}

// The first among equals.
int32_t argmax(std::span<const float> logits) {
  const auto best = std::find(logits.begin(), logits.end(), largest_of(logits));
  return static_cast<int32_t>(best - logits.begin());
}

// exp(x) for x <= 0, within 1e-5 of its value; next to nothing for less than -87. Without calls and
// branches, so that loops over it are vectorized.
inline float quick_exp(float x) {
  constexpr float kRound = 12582912.0F;  // 1.5 * 2^23: adding it rounds to an integer
  const float power = std::max(x, -87.0F) * 1.442695041F;
  const float whole = power + kRound - kRound;
  const float f = power - whole;  // 2^f by its Taylor polynomial, |f| <= 1/2
  const float part =
      1.0F +
      f * (0.693147181F +
           f * (0.240226507F + f * (0.0555041087F + f * (0.00961812911F + f * 0.00133335581F))));
  return part * std::bit_cast<float>((static_cast<int32_t>(whole) + 127) << 23);
}

// Sum of exp((logit - largest) * scale) over logits below `under`.
double sum_under(std::span<const float> logits, float under, float largest, float scale) {
  constexpr size_t kBlock = 4096;
  double total = 0;
  for (size_t begin = 0; begin < logits.size(); begin += kBlock) {
    const size_t end = std::min(begin + kBlock, logits.size());
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t i = begin; i < end; ++i) {
      const float weight = quick_exp((logits[i] - largest) * scale);
      sum += logits[i] < under ? weight : 0.0F;
    }
    total += static_cast<double>(sum);
  }
  return total;
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
  const float largest = largest_of(logits);
  // Tokens below (1 - top_p) / vocab of the largest weight together hold less than 1 - top_p of
  // all, so the nucleus lies among the others: most of the vocabulary is never sorted, and its
  // weights matter as a sum alone.
  const double floor = options_.top_p < 1.0 && options_.top_k == 0
                           ? (1.0 - options_.top_p) / static_cast<double>(logits.size())
                           : 0.0;
  const float under = floor > 0
                          ? largest + static_cast<float>(options_.temperature * std::log(floor))
                          : -std::numeric_limits<float>::infinity();
  double total =
      floor > 0 ? sum_under(logits, under, largest, static_cast<float>(1.0 / options_.temperature))
                : 0.0;
  candidates_.clear();
  for (size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] < under) continue;
    const double weight = std::exp((static_cast<double>(logits[i]) - static_cast<double>(largest)) /
                                   options_.temperature);
    total += weight;
    if (weight > 0) candidates_.push_back({.weight = weight, .id = static_cast<int32_t>(i)});
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
