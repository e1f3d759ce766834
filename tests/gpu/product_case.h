// A matrix product of made inputs for the tests of kernels/ops/gemm.h and gemv.h, and what it
// should give.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "gpu/gpu_ops.h"
#include "gpu/ops_fixture.h"
#include "kernels/ops/gemm.h"
#include "kernels/ops/gemv.h"

namespace sagelm::testing {

inline constexpr double kSumError = 1e-5;  // of the terms' magnitude: float32 sums of tensor cores

struct ProductSize {
  int64_t n, k;
};

inline void launch(const kernels::Gemm& args) { expect_done(kernels::gemm(args, nullptr), "gemm"); }
inline void launch(const kernels::Gemv& args) { expect_done(kernels::gemv(args, nullptr), "gemv"); }

struct Sum {
  double value = 0, magnitude = 0;  // magnitude: of the terms
  void add(double term) {
    value += term;
    magnitude += std::abs(term);
  }
};

// Args: Gemm or Gemv.
template <typename Args>
struct ProductCase {
  using Output = decltype(Args::output);

  kernels::Element type;
  Output output;
  int64_t rows, n, k;
  GpuArray x, weight;
  std::vector<float> before;  // kAdd

  // x_values [rows, k], weight_values [n, k], of kSwiglu [2n, k].
  ProductCase(kernels::Element element, Output out, ProductSize size, int64_t x_rows,
              std::vector<float> x_values, std::vector<float> weight_values)
      : type(element),
        output(out),
        rows(x_rows),
        n(size.n),
        k(size.k),
        x(element, std::move(x_values)),
        weight(element, std::move(weight_values)),
        before(normal_values(static_cast<size_t>(x_rows * size.n), 3.0f, 3)) {}

  kernels::Element out_type() const {
    const bool half = output == Output::kHalf || output == Output::kSwiglu;
    return half ? type : kernels::Element::kF32;
  }

  // Of `count` rows of x_data into `out`.
  Args args(const void* x_data, int64_t count, const GpuArray& out) const {
    Args result;
    result.type = type;
    result.x = x_data;
    result.weight = weight.data();
    result.out = out.data();
    result.rows = count;
    result.n = n;
    result.k = k;
    result.output = output;
    return result;
  }

  // Rows first .. first + count - 1.
  GpuArray run(int64_t first, int64_t count) const {
    const auto from = before.begin() + first * n;
    GpuArray out = output == Output::kAdd ? GpuArray(kernels::Element::kF32,
                                                     std::vector<float>(from, from + count * n))
                                          : GpuArray(out_type(), static_cast<size_t>(count * n));
    launch(args(static_cast<const std::byte*>(x.data()) + 2 * first * k, count, out));
    return out;
  }

  Sum product(int64_t row, int64_t weight_row) const {
    Sum sum;
    for (int64_t i = 0; i < k; ++i) {
      sum.add(x[static_cast<size_t>(row * k + i)] *
              weight[static_cast<size_t>(weight_row * k + i)]);
    }
    return sum;
  }

  // Output o of a row of `out`, what run(0, count) gave, against float64. halves: the relative
  // error with which gate and up are rounded before they meet.
  void check_one(const std::vector<double>& out, int64_t row, int64_t o, int64_t count,
                 double halves) const {
    const Sum sum = product(row, o);
    double expected = sum.value, bound = kSumError * sum.magnitude;
    if (output == Output::kSwiglu) {
      const Sum up = product(row, n + o);
      expected = silu(sum.value) * up.value;
      bound = 1.1 * (bound + halves * std::abs(sum.value)) * std::abs(up.value) +
              kSumError * up.magnitude * std::abs(silu(sum.value)) +
              (1.1 * halves + kSumError) * std::abs(expected);
    }
    const auto at = static_cast<size_t>(row * n + o);
    if (output == Output::kAdd) {
      expected += static_cast<double>(before[at]);
      bound += 0x1p-23 * std::abs(expected);
    }
    bound += 1.1 * rounding(out_type()) * std::abs(expected) + kSmallestHalf;
    expect_near(out[at], expected, bound,
                "output " + std::to_string(static_cast<int>(output)) + ", n " + std::to_string(n) +
                    ", k " + std::to_string(k) + ", rows " + std::to_string(count) + ", at " +
                    std::to_string(row) + "," + std::to_string(o));
  }
};

}  // namespace sagelm::testing
