#include "engine/sampler.h"

#include <algorithm>

#include "base/error.h"

namespace sagelm {

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

TokenDraw Sampler::next(std::span<const int32_t> history, std::optional<int32_t> name) {
  TokenDraw draw{.temperature = options_.temperature,
                 .top_k = options_.top_k,
                 .top_p = options_.top_p,
                 .min_p = options_.min_p};
  if (options_.temperature > 0) draw.uniform = next_uniform();
  if (options_.repeat_penalty != 1.0 && options_.repeat_last_n != 0) {
    penalized_.assign(history.begin(), history.end());
    if (name) penalized_.push_back(*name);
    std::span<const int32_t> last = penalized_;
    if (options_.repeat_last_n > 0) {
      last = last.last(std::min(last.size(), static_cast<size_t>(options_.repeat_last_n)));
    }
    draw.penalty = static_cast<float>(options_.repeat_penalty);
    draw.penalized = last;
  }
  return draw;
}

double Sampler::next_uniform() { return static_cast<double>(generator_() >> 11) * 0x1p-53; }

}  // namespace sagelm
