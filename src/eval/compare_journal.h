// A batch of a comparison as one line of a journal, all digits kept.
#pragma once

#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "eval/compare.h"

namespace sagelm {

// What one setting made of a batch.
struct BatchScores {
  std::vector<ComparedToken> tokens;
  double seconds = 0;  // in the scorer
};

// {"first": index of the batch's first input, "settings": [{"seconds": …, "logprob": […], "kl":
// […], "flags": "…"}, …]}, a token's flag being is_top + 2 × same_top as a digit.
std::string batch_record(size_t first, std::span<const BatchScores> settings);
// Nothing if record is not one of the batch that begins with input `first`, of so many settings and
// tokens, or holds a number that is not finite.
std::optional<std::vector<BatchScores>> read_batch_record(const std::string& record, size_t first,
                                                          size_t settings, size_t tokens);

}  // namespace sagelm
