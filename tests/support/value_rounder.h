// Elements of one channel of V, in order, as e4m3: the recipe's runs, one element at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "base/dtype.h"
#include "base/fp8.h"
#include "kernels/attention/recipe.h"

namespace sagelm::testing {

class ValueRounder {
 public:
  // halves: what an operation yields is rounded to FP16.
  explicit ValueRounder(int64_t head_dim, bool halves = false)
      : run_(recipe::value_run(static_cast<int>(head_dim))),
        gain_(recipe::value_gain(static_cast<int>(head_dim))),
        halves_(halves) {}

  // The code of the next element, which is scaled already.
  uint8_t next(float x) {
    if (count_++ % run_ == 0) next_ = 0;
    const float limit = std::abs(x);
    const float move = std::clamp(next_, -limit, limit);
    const uint8_t code = float_to_e4m3(round(x + move * recipe::kValueMove));
    next_ = round(next_ - round(e4m3_to_float(code) - x) * gain_);
    return code;
  }

 private:
  float round(float x) const { return halves_ ? half_to_float(float_to_half(x)) : x; }

  int run_;
  float gain_;
  bool halves_;
  int64_t count_ = 0;
  float next_ = 0;  // the next move over kValueMove
};

}  // namespace sagelm::testing
