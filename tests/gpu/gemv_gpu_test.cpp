// Products of a few rows (kernels/ops/gemv.h) against float64. Needs a device; skips without one.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <string>
#include <vector>

#include "gpu/gpu_ops.h"
#include "gpu/ops_fixture.h"
#include "gpu/product_case.h"
#include "kernels/ops/gemv.h"

namespace sagelm::testing {
namespace {

using kernels::Element;
using kernels::Gemv;
using kernels::GemvOutput;

class GemvGpu : public HalfOpsGpu {};

INSTANTIATE_TEST_SUITE_P(Types, GemvGpu, ::testing::Values(Element::kF16, Element::kBF16),
                         element_name);
// The tile is 16 outputs (8 gated ones), a turn of the block 1,024 columns; k that is no multiple
// of 8 takes the other kernel.
constexpr ProductSize kGemvSizes[] = {{1, 8},     {7, 24},    {8, 32},    {15, 64},    {16, 1024},
                                      {17, 1032}, {33, 2048}, {40, 2056}, {129, 4096}, {64, 11008},
                                      {5, 1},     {9, 7},     {20, 100},  {33, 1027}};

struct GemvCase : ProductCase<Gemv> {
  GemvCase(Element element, GemvOutput out, ProductSize size, int64_t x_rows)
      : ProductCase(element, out, size, x_rows,
                    normal_values(static_cast<size_t>(x_rows * size.k), 1.0f, 1),
                    normal_values(static_cast<size_t>(
                                      (out == GemvOutput::kSwiglu ? 2 * size.n : size.n) * size.k),
                                  1.0f / std::sqrt(static_cast<float>(size.k)), 2)) {}

  void check(int64_t count) const {
    const std::vector<double> out = run(0, count).download();
    for (int64_t row = 0; row < count; ++row) {
      for (int64_t o = 0; o < n; ++o) {
        check_one(out, row, o, count, 0);
        if (::testing::Test::HasFailure()) return;
      }
    }
  }
};

constexpr GemvOutput kOutputs[] = {GemvOutput::kHalf, GemvOutput::kFloat, GemvOutput::kAdd,
                                   GemvOutput::kSwiglu};

TEST_P(GemvGpu, Sizes) {
  for (const GemvOutput output : kOutputs) {
    for (const ProductSize& size : kGemvSizes) {
      const GemvCase test(GetParam(), output, size, kernels::kGemvRows);
      for (const int64_t rows : {1, 3, 8}) test.check(rows);
    }
  }
}

TEST_P(GemvGpu, EveryNumberOfRows) {
  for (const GemvOutput output : kOutputs) {
    for (const ProductSize size : {ProductSize{19, 520}, ProductSize{19, 37}}) {
      const GemvCase test(GetParam(), output, size, kernels::kGemvRows);
      for (int64_t rows = 1; rows <= kernels::kGemvRows; ++rows) test.check(rows);
    }
  }
}

TEST_P(GemvGpu, RowDoesNotDependOnItsNeighbours) {
  for (const GemvOutput output : kOutputs) {
    for (const ProductSize size :
         {ProductSize{50, 2056}, ProductSize{50, 1000}, ProductSize{50, 1001}}) {
      const GemvCase test(GetParam(), output, size, kernels::kGemvRows);
      const std::vector<std::byte> together = test.run(0, kernels::kGemvRows).raw();
      const size_t row_bytes = together.size() / static_cast<size_t>(kernels::kGemvRows);
      for (int64_t row = 0; row < kernels::kGemvRows; ++row) {
        // A row of x that starts off a 16-byte boundary is not to be had alone.
        if (2 * row * size.k % 16 != 0) continue;
        const std::vector<std::byte> alone = test.run(row, 1).raw();
        const auto begin = together.begin() + static_cast<int64_t>(row_bytes) * row;
        EXPECT_TRUE(std::equal(alone.begin(), alone.end(), begin))
            << "row " << row << ", k " << size.k << ", output " << static_cast<int>(output);
      }
    }
  }
}

TEST_P(GemvGpu, Normalises) {
  constexpr float kEps = 1e-5f;
  for (const GemvOutput output : {GemvOutput::kHalf, GemvOutput::kFloat, GemvOutput::kSwiglu}) {
    for (const ProductSize size :
         {ProductSize{33, 8}, ProductSize{300, 1000}, ProductSize{140, 4096}}) {
      const int64_t rows = 8192 / size.k < 2 ? 1 : 2;
      const GpuArray x(Element::kF32, normal_values(static_cast<size_t>(rows * size.k), 3.0f, 5));
      const GpuArray norm(Element::kF32, normal_values(static_cast<size_t>(size.k), 1.0f, 6));
      const GemvCase test(GetParam(), output, size, rows);
      const GpuArray out(test.out_type(), static_cast<size_t>(rows * size.n));
      Gemv args = test.args(x.data(), rows, out);
      args.norm = static_cast<const float*>(norm.data());
      args.eps = kEps;
      if (!kernels::gemv_normalises(args)) GTEST_SKIP() << "kernels do not overlap here";
      expect_done(kernels::gemv(args, nullptr), "gemv");
      const std::vector<double> actual = out.download();
      for (int64_t row = 0; row < rows; ++row) {
        std::vector<float> normed;
        double squares = 0;
        for (int64_t i = 0; i < size.k; ++i) {
          const double value = x[static_cast<size_t>(row * size.k + i)];
          squares += value * value;
        }
        const double scale = 1.0 / std::sqrt(squares / static_cast<double>(size.k) + kEps);
        for (int64_t i = 0; i < size.k; ++i) {
          normed.push_back(static_cast<float>(x[static_cast<size_t>(row * size.k + i)] * scale *
                                              norm[static_cast<size_t>(i)]));
        }
        const auto product = [&](int64_t weight_row) {
          Sum sum;
          for (int64_t i = 0; i < size.k; ++i) {
            sum.add(static_cast<double>(normed[static_cast<size_t>(i)]) *
                    test.weight[static_cast<size_t>(weight_row * size.k + i)]);
          }
          return sum;
        };
        for (int64_t o = 0; o < size.n; ++o) {
          // Every normalised element is rounded to the type, which mostly averages out.
          const double rounded = rounding(GetParam());
          const Sum sum = product(o);
          double expected = sum.value, bound = rounded * sum.magnitude;
          if (output == GemvOutput::kSwiglu) {
            const Sum up = product(size.n + o);
            expected = silu(sum.value) * up.value;
            bound = 1.1 * bound * std::abs(up.value) +
                    rounded * up.magnitude * (std::abs(silu(sum.value)) + bound);
          }
          bound += rounding(test.out_type()) * std::abs(expected) + kSmallestHalf;
          expect_near(actual[static_cast<size_t>(row * size.n + o)], expected, bound,
                      "output " + std::to_string(static_cast<int>(output)) + ", k " +
                          std::to_string(size.k) + ", at " + std::to_string(row) + "," +
                          std::to_string(o));
          if (HasFailure()) return;
        }
      }
    }
  }
}

struct ChainSizes {
  int64_t attended, hidden, activated, last;
};

// What a chain does is what its products do one by one, to the bit, each time that it is run.
void expect_chain_does_as_its_products(Element type, std::initializer_list<ChainSizes> sizes,
                                       int runs) {
  for (const ChainSizes& size : sizes) {
    for (const int64_t rows : {1, 2, 5, 8}) {
      const auto values = [](int64_t count, float deviation, uint32_t seed) {
        return normal_values(static_cast<size_t>(count), deviation, seed);
      };
      const auto weights = [&](int64_t n, int64_t k, uint32_t seed) {
        return GpuArray(type, values(n * k, 1.0f / std::sqrt(static_cast<float>(k)), seed));
      };
      const GpuArray attended(type, values(rows * size.attended, 1.0f, 1));
      const std::vector<float> before = values(rows * size.hidden, 1.0f, 2);
      const GpuArray norm(Element::kF32, values(size.hidden, 1.0f, 3));
      const GpuArray o = weights(size.hidden, size.attended, 4),
                     gate_up = weights(2 * size.activated, size.hidden, 5),
                     down = weights(size.hidden, size.activated, 6),
                     last = weights(size.last, size.hidden, 7);
      struct Results {
        GpuArray hidden, activated, last;
      };
      const auto products = [&](const Results& to) {
        std::vector<Gemv> chain(4);
        const auto set = [&](Gemv& args, const GpuArray& x, const GpuArray& weight,
                             const GpuArray& out, int64_t n, int64_t k, GemvOutput output) {
          args.type = type;
          args.x = x.data();
          args.weight = weight.data();
          args.out = out.data();
          args.rows = rows;
          args.n = n;
          args.k = k;
          args.output = output;
          args.eps = 1e-5f;
        };
        set(chain[0], attended, o, to.hidden, size.hidden, size.attended, GemvOutput::kAdd);
        set(chain[1], to.hidden, gate_up, to.activated, size.activated, size.hidden,
            GemvOutput::kSwiglu);
        set(chain[2], to.activated, down, to.hidden, size.hidden, size.activated, GemvOutput::kAdd);
        set(chain[3], to.hidden, last, to.last, size.last, size.hidden, GemvOutput::kHalf);
        chain[1].norm = chain[3].norm = static_cast<const float*>(norm.data());
        return chain;
      };
      const auto make = [&] {
        return Results{GpuArray(Element::kF32, before),
                       GpuArray(type, static_cast<size_t>(rows * size.activated)),
                       GpuArray(type, static_cast<size_t>(rows * size.last))};
      };
      const Results one_by_one = make();
      const std::vector<Gemv> singles = products(one_by_one);
      if (!kernels::gemv_chains(singles)) continue;
      for (const Gemv& args : singles) expect_done(kernels::gemv(args, nullptr), "gemv");
      DeviceBuffer arrivals(sizeof(uint32_t));
      arrivals.fill(0);
      for (int run = 0; run < runs; ++run) {
        const Results chained = make();
        expect_done(kernels::gemv_chain(products(chained), static_cast<uint32_t*>(arrivals.data()),
                                        nullptr),
                    "gemv_chain");
        EXPECT_TRUE(chained.hidden.raw() == one_by_one.hidden.raw() &&
                    chained.activated.raw() == one_by_one.activated.raw() &&
                    chained.last.raw() == one_by_one.last.raw())
            << "hidden " << size.hidden << ", rows " << rows << ", run " << run;
        if (::testing::Test::HasFailure()) return;
      }
    }
  }
}

TEST_P(GemvGpu, Chain) {
  expect_chain_does_as_its_products(GetParam(),
                                    {{8, 16, 24, 8},
                                     {64, 40, 200, 300},
                                     {1000, 136, 2056, 5},
                                     {512, 1024, 2816, 3072},
                                     {1024, 4096, 1000, 640}},
                                    20);
}

// Little enough for a race checker.
TEST_P(GemvGpu, ShortChain) {
  expect_chain_does_as_its_products(GetParam(), {{8, 16, 24, 8}, {64, 40, 200, 300}}, 2);
}

TEST_F(OpsGpu, GemvRefusesWhatItCannotDo) {
  Gemv args;
  args.n = args.k = 8;
  args.rows = 0;
  EXPECT_EQ(kernels::gemv(args, nullptr), cudaSuccess);
  args.rows = kernels::kGemvRows + 1;
  EXPECT_EQ(kernels::gemv(args, nullptr), cudaErrorInvalidValue);
  args.rows = 1;
  args.type = Element::kF32;
  EXPECT_EQ(kernels::gemv(args, nullptr), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace sagelm::testing
