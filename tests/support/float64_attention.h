// Oracles: attention in float64, exact and with a variant's quantization.
#pragma once

#include <span>
#include <vector>

#include "support/attention_inputs.h"

namespace sagelm::testing {

struct Float64Result {
  std::vector<double> out;  // [q_len][num_heads][head_dim]
  std::vector<double> lse;  // [num_heads][q_len]
};

// Softmax attention of the problem's values, nothing rounded.
Float64Result float64_attention(const AttentionProblem& problem);

// The same integers, e4m3 and FP16 values as the variant's kernels, with exact arithmetic between
// them: tells the error of a kernel from the error of its method. Written from the papers, one
// scalar at a time, and sharing nothing with the kernels but the numbers of the recipe.
Float64Result quantized_float64_attention(const AttentionProblem& problem,
                                          const AttentionSpec& spec);

struct AttentionError {
  double relative_l1 = 0;  // sum |a - b| / sum |b|
  double cosine = 0;
  double max_abs = 0;
};

// NaN in either makes relative_l1 NaN.
AttentionError compare(std::span<const double> actual, std::span<const double> expected);

inline std::vector<double> to_double(const std::vector<float>& values) {
  return {values.begin(), values.end()};
}

}  // namespace sagelm::testing
