// Mean and spread of a stream of numbers.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace sagelm {

// Welford's update (Technometrics 4, 1962): no cancellation however long the stream. Its result
// depends on the order of the numbers only, never on how they were batched.
class Moments {
 public:
  void add(double value) {
    ++count_;
    const double delta = value - mean_;
    mean_ += delta / static_cast<double>(count_);
    squares_ += delta * (value - mean_);
  }

  int64_t count() const { return count_; }
  double mean() const { return count_ > 0 ? mean_ : std::numeric_limits<double>::quiet_NaN(); }
  // Of the mean, the numbers taken as independent: sample standard deviation (divisor n - 1) over
  // sqrt(n). NaN for fewer than two numbers.
  double standard_error() const {
    if (count_ < 2) return std::numeric_limits<double>::quiet_NaN();
    const auto n = static_cast<double>(count_);
    return std::sqrt(squares_ / (n - 1) / n);
  }

 private:
  int64_t count_ = 0;
  double mean_ = 0;
  double squares_ = 0;  // sum of squared distances from the mean
};

}  // namespace sagelm
