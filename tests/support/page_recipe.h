// What the pages of a cache hold, one number at a time.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "base/dtype.h"
#include "kernels/attention/recipe.h"

namespace sagelm::testing {

inline float to_half(float x) { return half_to_float(float_to_half(x)); }

// The factor that numbers up to amax are multiplied by, in FP16 arithmetic.
inline float half_factor(float amax, float levels) {
  return to_half(levels / std::max(amax, levels / recipe::kLargestHalf));
}

// The mean of a channel of a page's keys.
inline float page_mean(std::vector<float> keys, int head_dim, bool halves) {
  const auto count = keys.size();
  const auto rows = static_cast<size_t>(recipe::mean_rows(head_dim));
  for (size_t apart = count / 2; apart >= rows; apart /= 2) {
    for (size_t i = 0; i < apart; ++i) keys[i] += keys[i + apart];
  }
  for (size_t apart = 1; apart < rows; apart *= 2) {
    for (size_t i = 0; i < rows; i += 2 * apart) keys[i] += keys[i + apart];
  }
  const float mean = keys[0] / static_cast<float>(count);
  return halves ? to_half(mean) : mean;
}

}  // namespace sagelm::testing
