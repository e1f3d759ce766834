// How tokens are drawn, one after the other: what the options mean to a backend, and its random
// numbers.
#pragma once

#include <cstdint>
#include <optional>
#include <random>
#include <span>
#include <vector>

#include "backend/token_draw.h"
#include "sagelm/sagelm.hpp"

namespace sagelm {

// Throws UsageError naming the option that is out of its range.
void check_sampling_options(const SamplingOptions& options);

class Sampler {
 public:
  explicit Sampler(const SamplingOptions& options);

  // How the token after history (oldest first) and, if it is given, the token of that name behind
  // it is drawn. Valid until the next call.
  TokenDraw next(std::span<const int32_t> history, std::optional<int32_t> name = {});

 private:
  double next_uniform();  // [0, 1)

  SamplingOptions options_;
  // The standard fixes its output, so draws are the same on every platform; its distributions are
  // not, so next_uniform converts.
  std::mt19937_64 generator_;
  std::vector<int32_t> penalized_;
};

}  // namespace sagelm
