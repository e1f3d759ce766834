// Logits to the next token: repeat penalty, temperature, top-k, top-p, min-p, in this order, then a
// draw. Takes plain logits and knows nothing of the model.
#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <vector>

#include "sagelm/sagelm.hpp"

namespace sagelm {

// Throws UsageError naming the option that is out of its range.
void check_sampling_options(const SamplingOptions& options);

class Sampler {
 public:
  explicit Sampler(const SamplingOptions& options);

  // The next token. logits [vocab_size] are finite, or minus infinity for tokens that are banned,
  // and are scaled in place; history is what the repeat penalty looks back on, oldest first. At
  // temperature 0 the most probable token, the lowest id among equals.
  int32_t sample(std::span<float> logits, std::span<const int32_t> history);

 private:
  struct Candidate {
    double weight;  // exp(logit - largest logit)
    int32_t id;
  };

  void penalize(std::span<float> logits, std::span<const int32_t> history);
  void collect(std::span<const float> logits);
  double next_uniform();  // [0, 1)

  SamplingOptions options_;
  // The standard fixes its output, so draws are the same on every platform; its distributions are
  // not, so next_uniform converts.
  std::mt19937_64 generator_;
  std::vector<Candidate> candidates_;
  std::vector<int32_t> seen_;
};

}  // namespace sagelm
