// The CPU's products against float64, for each way that this machine can compute them.
#include "backend/cpu/linear.h"

#include <gtest/gtest.h>
#include <omp.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "base/error.h"

namespace sagelm::cpu {
namespace {

enum class Values : uint8_t { kNormal, kUniform, kOutliers, kTiny, kSkewed };

std::string name_of(Values values) {
  switch (values) {
    case Values::kNormal:
      return "normal";
    case Values::kUniform:
      return "uniform";
    case Values::kOutliers:
      return "outliers";
    case Values::kTiny:
      return "tiny";
    case Values::kSkewed:
      return "skewed";
  }
  return "";
}

constexpr Values kAllValues[] = {Values::kNormal, Values::kUniform, Values::kOutliers,
                                 Values::kTiny, Values::kSkewed};

std::vector<float> draw(Values values, int64_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> result(static_cast<size_t>(count));
  for (size_t i = 0; i < result.size(); ++i) {
    switch (values) {
      case Values::kNormal:
        result[i] = normal(random);
        break;
      case Values::kUniform:
        result[i] = uniform(random);
        break;
      case Values::kOutliers:
        result[i] = normal(random) * (i % 97 == 5 ? 3000.0f : 1.0f);
        break;
      case Values::kTiny:
        result[i] = normal(random) * 1e-20f;
        break;
      case Values::kSkewed:
        result[i] = std::exp(3 * normal(random));
        break;
    }
  }
  return result;
}

// A weight matrix [out, in] of numbers that BF16 holds, stored so or as F32.
class Weights {
 public:
  Weights(int64_t out, int64_t in, uint32_t seed, DType type = DType::kBF16) : in_(in) {
    for (const float value : draw(Values::kNormal, out * in, seed)) {
      numbers_.push_back(float_to_bfloat16(value));
      wide_.push_back(bfloat16_to_float(numbers_.back()));
    }
    const bool wide = type == DType::kF32;
    view_.dtype = type;
    view_.shape = {out, in};
    view_.data = wide ? reinterpret_cast<const std::byte*>(wide_.data())
                      : reinterpret_cast<const std::byte*>(numbers_.data());
    view_.bytes = numbers_.size() * dtype_size(type);
  }
  Weights(const Weights&) = delete;

  const TensorView& view() const { return view_; }
  double at(int64_t row, int64_t k) const {
    return static_cast<double>(bfloat16_to_float(numbers_[static_cast<size_t>(row * in_ + k)]));
  }

 private:
  int64_t in_;
  std::vector<uint16_t> numbers_;
  std::vector<float> wide_;
  TensorView view_;
};

struct Sum {
  double value = 0;
  double magnitude = 0;  // of the terms, which is what rounding is relative to
};

Sum dot(const double* x, const Weights& weights, int64_t row, int64_t in) {
  Sum sum;
  for (int64_t k = 0; k < in; ++k) {
    const double term = x[k] * weights.at(row, k);
    sum.value += term;
    sum.magnitude += std::abs(term);
  }
  return sum;
}

std::vector<double> normalised(const std::vector<float>& x, int64_t rows, int64_t in,
                               const RowNorm* norm) {
  std::vector<double> result(x.begin(), x.begin() + rows * in);
  if (norm == nullptr) return result;
  for (int64_t row = 0; row < rows; ++row) {
    double* values = result.data() + row * in;
    double squares = 0;
    for (int64_t k = 0; k < in; ++k) squares += values[k] * values[k];
    const double scale = 1 / std::sqrt(squares / static_cast<double>(in) + norm->eps);
    for (int64_t k = 0; k < in; ++k) values[k] *= scale * static_cast<double>(norm->weight[k]);
  }
  return result;
}

// Two BF16 numbers hold 16 bits of an activation; sums are float32.
constexpr double kTolerance = 2e-5;

// Small, so that a sum that starts from it is rounded as finely as one that starts from zero.
constexpr float kUntouched = -12.5f;

struct Shape {
  int64_t rows, in, out;
};

const std::vector<Shape> kShapes = {{1, 32, 32},    {1, 1, 1},      {2, 3, 5},      {15, 31, 17},
                                    {16, 33, 16},   {17, 64, 33},   {31, 288, 48},  {32, 288, 31},
                                    {33, 100, 64},  {64, 512, 100}, {65, 1376, 40}, {130, 77, 95},
                                    {200, 512, 129}};

std::vector<bool> ways() {
  if (has_amx()) return {true, false};
  return {false};
}

TEST(Linear, AgreesWithFloat64) {
  for (const bool amx : ways()) {
    LinearEngine engine(amx);
    uint32_t seed = 0;
    for (const Shape& shape : kShapes) {
      const Values values = kAllValues[++seed % std::size(kAllValues)];
      // Two tensors stacked, the second of one row, unless there is only one.
      const int64_t above = shape.out > 1 ? shape.out - 1 : 1;
      const Weights first(above, shape.in, seed), second(1, shape.in, seed + 100);
      std::vector<TensorView> stacked = {first.view()};
      if (shape.out > 1) stacked.push_back(second.view());
      const LinearWeight weight = engine.pack(stacked);
      EXPECT_EQ(weight.amx.has_value(), amx);
      const std::vector<float> x = draw(values, shape.rows * shape.in, seed + 200);
      const std::vector<float> scale = draw(Values::kUniform, shape.in, seed + 300);
      const RowNorm row_norm{scale.data(), 1e-5};
      for (const RowNorm* norm : {static_cast<const RowNorm*>(nullptr), &row_norm}) {
        const std::vector<double> expected_x = normalised(x, shape.rows, shape.in, norm);
        for (const bool accumulate : {false, true}) {
          SCOPED_TRACE(fmt::format("AMX {}, [{}, {}] x {}, {}, norm {}, accumulate {}", amx,
                                   shape.rows, shape.in, shape.out, name_of(values),
                                   norm != nullptr, accumulate));
          std::vector<float> out(static_cast<size_t>((shape.rows + kRowPadding) * shape.out),
                                 kUntouched);
          engine.run(x.data(), shape.rows, norm, weight, out.data(), accumulate);
          for (int64_t row = 0; row < shape.rows; ++row) {
            for (int64_t n = 0; n < shape.out; ++n) {
              const double* from = expected_x.data() + row * shape.in;
              Sum sum = n < above ? dot(from, first, n, shape.in) : dot(from, second, 0, shape.in);
              if (accumulate) {
                sum.value += static_cast<double>(kUntouched);
                sum.magnitude += std::abs(static_cast<double>(kUntouched));
              }
              ASSERT_NEAR(out[static_cast<size_t>(row * shape.out + n)], sum.value,
                          kTolerance * sum.magnitude)
                  << "row " << row << ", feature " << n;
            }
          }
        }
      }
    }
  }
}

// The types of gate and up, which a checkpoint may mix.
class LinearSwiglu : public testing::TestWithParam<std::pair<DType, DType>> {};

INSTANTIATE_TEST_SUITE_P(
    Types, LinearSwiglu,
    testing::Values(std::pair{DType::kBF16, DType::kBF16}, std::pair{DType::kF32, DType::kF32},
                    std::pair{DType::kBF16, DType::kF32}, std::pair{DType::kF32, DType::kBF16}),
    [](const auto& info) {
      return fmt::format("{}and{}", dtype_name(info.param.first), dtype_name(info.param.second));
    });

TEST_P(LinearSwiglu, AgreesWithFloat64) {
  const auto [gate_type, up_type] = GetParam();
  for (const bool amx : ways()) {
    LinearEngine engine(amx);
    uint32_t seed = 0;
    for (const Shape& shape : kShapes) {
      ++seed;
      SCOPED_TRACE(fmt::format("AMX {}, [{}, {}] x {}", amx, shape.rows, shape.in, shape.out));
      const Weights gate(shape.out, shape.in, seed, gate_type);
      const Weights up(shape.out, shape.in, seed + 100, up_type);
      const auto weight = engine.pack_gate_up(gate.view(), up.view());
      const std::vector<float> x = draw(Values::kNormal, shape.rows * shape.in, seed + 200);
      const std::vector<float> scale(static_cast<size_t>(shape.in), 0.25f);
      const RowNorm norm{scale.data(), 1e-5};
      const std::vector<double> expected_x = normalised(x, shape.rows, shape.in, &norm);
      const auto room = static_cast<size_t>((shape.rows + kRowPadding) * shape.out);
      std::vector<float> gate_up(2 * room), out(room);
      engine.run_swiglu(x.data(), shape.rows, &norm, weight[0], weight[1], gate_up.data(),
                        out.data());
      for (int64_t row = 0; row < shape.rows; ++row) {
        for (int64_t n = 0; n < shape.out; ++n) {
          const double* from = expected_x.data() + row * shape.in;
          const Sum g = dot(from, gate, n, shape.in), u = dot(from, up, n, shape.in);
          const double expected = g.value / (1 + std::exp(-g.value)) * u.value;
          const double bound = (std::abs(g.value) + 1) * u.magnitude +
                               1.1 * g.magnitude * std::abs(u.value) + std::abs(expected);
          ASSERT_NEAR(out[static_cast<size_t>(row * shape.out + n)], expected, kTolerance * bound)
              << "row " << row << ", feature " << n;
        }
      }
    }
  }
}

// On AMX a row's results are the same to the last bit alone or among others, with any number of
// threads.
TEST(Linear, AmxRowsDependOnNothingElse) {
  if (!has_amx()) GTEST_SKIP() << "this CPU has no AMX";
  LinearEngine engine(true);
  const int64_t rows = 150, in = 200, out = 90;
  const Weights weights(out, in, 1);
  const LinearWeight weight = engine.pack({&weights.view(), 1});
  const std::vector<float> x = draw(Values::kSkewed, rows * in, 2);
  std::vector<float> expected(static_cast<size_t>(rows * out));
  const int threads = omp_get_max_threads();
  omp_set_num_threads(1);
  for (int64_t row = 0; row < rows; ++row) {
    engine.run(x.data() + row * in, 1, nullptr, weight, expected.data() + row * out, false);
  }
  for (const int wanted : {1, 2, 3, 4, 6}) {
    omp_set_num_threads(wanted);
    for (const int64_t count : {2, 16, 17, 40, 150}) {
      std::vector<float> found(static_cast<size_t>(count * out), kUntouched);
      engine.run(x.data(), count, nullptr, weight, found.data(), false);
      EXPECT_EQ(std::memcmp(found.data(), expected.data(), found.size() * sizeof(float)), 0)
          << count << " rows, " << wanted << " threads";
    }
  }
  omp_set_num_threads(threads);
}

TEST(Linear, AmxPassesNanAndInfinityOnInTheirRowAlone) {
  if (!has_amx()) GTEST_SKIP() << "this CPU has no AMX";
  LinearEngine engine(true);
  const int64_t rows = 40, in = 70, out = 20;
  const Weights weights(out, in, 1);
  const LinearWeight weight = engine.pack({&weights.view(), 1});
  std::vector<float> x = draw(Values::kNormal, rows * in, 2);
  x[5 * in + 69] = std::nanf("");
  x[33 * in] = HUGE_VALF;
  std::vector<float> found(static_cast<size_t>(rows * out));
  engine.run(x.data(), rows, nullptr, weight, found.data(), false);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t n = 0; n < out; ++n) {
      EXPECT_EQ(std::isfinite(found[static_cast<size_t>(row * out + n)]), row != 5 && row != 33);
    }
  }
}

}  // namespace
}  // namespace sagelm::cpu
