#include <algorithm>
#include <cmath>
#include <cstddef>
#include <random>
#include <string>
#include <vector>

#include "gpu/gpu_ops.h"
#include "gpu/ops_fixture.h"
#include "gpu/product_case.h"
#include "kernels/ops/gemm.h"
#include "kernels/ops/swiglu.h"

namespace sagelm::testing {
namespace {

using kernels::Element;
using kernels::Gemm;
using kernels::GemmOutput;

class GemmGpu : public HalfOpsGpu {};

INSTANTIATE_TEST_SUITE_P(Types, GemmGpu, ::testing::Values(Element::kF16, Element::kBF16),
                         element_name);

// Heavy tails are the activations' alone: gated products stay below FP16's largest.
enum class Inputs { kNormal, kBiased, kHeavyTailed };

std::vector<float> values_of(Inputs inputs, int64_t rows, int64_t cols, float deviation,
                             uint32_t seed) {
  std::vector<float> values = normal_values(static_cast<size_t>(rows * cols), deviation, seed);
  for (size_t i = 0; i < values.size(); ++i) {
    if (inputs == Inputs::kBiased) values[i] += deviation;
    // Some columns are far larger than the others.
    if (inputs == Inputs::kHeavyTailed && i % static_cast<size_t>(cols) % 37 == 5) values[i] *= 50;
  }
  return values;
}

struct GemmCase : ProductCase<Gemm> {
  GemmCase(Element element, GemmOutput out, int64_t x_rows, int64_t outputs, int64_t inputs,
           Inputs kind = Inputs::kNormal)
      : ProductCase(element, out, {outputs, inputs}, x_rows,
                    values_of(kind, x_rows, inputs, 1.0f, 1),
                    values_of(kind == Inputs::kHeavyTailed ? Inputs::kNormal : kind,
                              out == GemmOutput::kSwiglu ? 2 * outputs : outputs, inputs,
                              1.0f / std::sqrt(static_cast<float>(inputs)), 2)) {}

  // The corners and outputs at random.
  void check() const {
    const std::vector<double> out = run(0, rows).download();
    std::mt19937 random(4);
    const auto samples = static_cast<int64_t>(4'000'000 / k);
    for (int64_t i = 0; i < std::min(samples, rows * n); ++i) {
      const int64_t row = i < 4 ? (i / 2) * (rows - 1) : static_cast<int64_t>(random() % rows);
      const int64_t o = i < 4 ? (i % 2) * (n - 1) : static_cast<int64_t>(random() % n);
      check_one(out, row, o, rows, rounding(type));
      if (::testing::Test::HasFailure()) return;
    }
  }
};

bool no_kernel(Element type) {
  Gemm args;
  args.type = type;
  args.rows = args.n = args.k = 8;
  return !kernels::gemm_takes(args);
}

constexpr GemmOutput kOutputs[] = {GemmOutput::kHalf, GemmOutput::kAdd, GemmOutput::kSwiglu};

TEST_P(GemmGpu, Sizes) {
  if (no_kernel(GetParam())) GTEST_SKIP() << "no such kernel for this device";
  struct Size {
    int64_t rows, n, k;
  };
  // Tiles are 256 rows by 256 or 192 columns (gated: half of them), slices 64.
  constexpr Size kSizes[] = {{1, 8, 8},        {7, 264, 72},    {129, 520, 200},  {200, 8, 11008},
                             {300, 136, 648},  {257, 1016, 64}, {1, 11008, 1032}, {200, 11008, 8},
                             {513, 4096, 128}, {2048, 192, 72}};
  for (const GemmOutput output : kOutputs) {
    for (const Size& size : kSizes) {
      GemmCase(GetParam(), output, size.rows, size.n, size.k).check();
      if (HasFailure()) return;
    }
  }
}

TEST_P(GemmGpu, Distributions) {
  if (no_kernel(GetParam())) GTEST_SKIP() << "no such kernel for this device";
  for (const GemmOutput output : kOutputs) {
    for (const Inputs inputs : {Inputs::kNormal, Inputs::kBiased, Inputs::kHeavyTailed}) {
      GemmCase(GetParam(), output, 300, 776, 1032, inputs).check();
      if (HasFailure()) return;
    }
  }
}

TEST_P(GemmGpu, RowDoesNotDependOnItsNeighbours) {
  if (no_kernel(GetParam())) GTEST_SKIP() << "no such kernel for this device";
  for (const GemmOutput output : kOutputs) {
    const GemmCase test(GetParam(), output, 600, 1400, 520);
    const std::vector<std::byte> together = test.run(0, test.rows).raw();
    const size_t row_bytes = together.size() / static_cast<size_t>(test.rows);
    for (const int64_t first : {0, 1, 255, 300}) {
      const std::vector<std::byte> apart = test.run(first, 300).raw();
      EXPECT_TRUE(std::equal(apart.begin(), apart.end(),
                             together.begin() + static_cast<int64_t>(row_bytes) * first))
          << "from row " << first << ", output " << static_cast<int>(output);
    }
  }
}

// The engine takes either, whichever is faster.
TEST_P(GemmGpu, GatedIsWhatTheGatedActivationMakesOfTheProduct) {
  if (no_kernel(GetParam())) GTEST_SKIP() << "no such kernel for this device";
  for (const int64_t n : {1024, 1416}) {
    const GemmCase gated(GetParam(), GemmOutput::kSwiglu, 300, n, 264);
    const GemmCase both(GetParam(), GemmOutput::kHalf, 300, 2 * n, 264);
    const GpuArray product = both.run(0, 300);
    const GpuArray activated(GetParam(), static_cast<size_t>(300 * n));
    expect_done(kernels::swiglu(product.data(), GetParam(), 300, n, activated.data(), nullptr),
                "swiglu");
    EXPECT_TRUE(gated.run(0, 300).raw() == activated.raw()) << "n " << n;
  }
}

TEST_P(GemmGpu, RefusesWhatItCannotDo) {
  if (no_kernel(GetParam())) GTEST_SKIP() << "no such kernel for this device";
  Gemm args;
  args.type = GetParam();
  args.n = args.k = 8;
  EXPECT_EQ(kernels::gemm(args, nullptr), cudaSuccess);  // no rows
  args.rows = 1;
  args.k = 12;
  EXPECT_EQ(kernels::gemm(args, nullptr), cudaErrorInvalidValue);
  args.k = 8;
  args.n = 9;
  EXPECT_EQ(kernels::gemm(args, nullptr), cudaErrorInvalidValue);
  args.n = 8;
  args.x = reinterpret_cast<const void*>(uintptr_t{8});
  EXPECT_EQ(kernels::gemm(args, nullptr), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace sagelm::testing
