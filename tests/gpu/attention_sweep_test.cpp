// Random shapes through every attention kernel: ragged batches, GQA, one query or many, causal or
// full, any head size, whole tensors and pages. Some rows are compared with float64, all rows with
// the FP16 kernel that was. SAGELM_SWEEP_SEED sets the seed. Needs a device; skips without one.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "gpu/attention_kernels.h"
#include "support/sweep.h"

namespace sagelm::testing {
namespace {

constexpr double kSeconds = 10;
constexpr int kMostCases = 150;
constexpr int kMostKeys = 4097;

// Of what few values may be off the level of many, and one row off the level of all.
constexpr double kFew = 2.5;
constexpr double kOneRow = 8;
// Keys of 4 bits leave single rows, and the log-sum-exp, further off than they leave most.
constexpr double kOneRow4b = 16;

// Without the last, which is about a few rows: behind a sink they are off by far more than others.
constexpr int kSweepInputs = static_cast<int>(GpuInputs::kSinks);

// Sums over the rows of a call beside the same rows of another.
struct Difference {
  double relative_l1 = 0;
  double worst_row = 0;
  std::string where;
};

Difference compare(const GpuAttention& actual, const GpuAttention& expected) {
  const GpuShape& shape = actual.shape();
  double off = 0, all = 0;
  Difference result;
  for (int b = 0; b < static_cast<int>(shape.q_lens.size()); ++b) {
    for (int head = 0; head < shape.num_heads; ++head) {
      for (int row = 0; row < shape.q_lens[static_cast<size_t>(b)]; ++row) {
        const std::vector<double> x = actual.out(b, row, head);
        const std::vector<double> y = expected.out(b, row, head);
        double row_off = 0, row_all = 0;
        for (size_t d = 0; d < x.size(); ++d) {
          row_off += std::abs(x[d] - y[d]);
          row_all += std::abs(y[d]);
        }
        off += row_off;
        all += row_all;
        const double relative = row_all > 0 ? row_off / row_all : row_off;
        if (!(relative <= result.worst_row)) {  // keeps NaN
          result.worst_row = relative;
          result.where = "sequence " + std::to_string(b) + ", head " + std::to_string(head) +
                         ", row " + std::to_string(row);
        }
      }
    }
  }
  result.relative_l1 = all > 0 ? off / all : off;
  return result;
}

int64_t count_values(const GpuShape& shape) {
  int64_t rows = 0;
  for (const int len : shape.q_lens) rows += len;
  return rows * shape.num_heads * shape.head_dim;
}

class AttentionSweepGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    if (const std::string reason = no_device_reason(); !reason.empty()) GTEST_SKIP() << reason;
  }
};

GpuShape random_shape(Sweep& sweep) {
  const SweepCase picked = sweep.next(kMostKeys, 400);
  GpuShape shape{.q_lens = picked.q_lens,
                 .kv_lens = picked.kv_lens,
                 .num_heads = picked.num_heads,
                 .num_kv_heads = picked.num_kv_heads,
                 .head_dim = picked.head_dim,
                 .causal = picked.causal,
                 .bf16 = sweep.one_in(3),
                 .layout = sweep.one_in(2) ? GpuLayout::kRagged : GpuLayout::kPaged,
                 .inputs = static_cast<GpuInputs>(sweep.uniform(0, kSweepInputs - 1)),
                 .seed = static_cast<uint32_t>(sweep.uniform(1, 1 << 30))};
  if (sweep.one_in(3)) {  // sequences alike, as whole tensors
    for (int& len : shape.q_lens) len = shape.q_lens[0];
    for (int& len : shape.kv_lens) len = shape.kv_lens[0];
    shape.layout = sweep.one_in(2) ? GpuLayout::kTokensFirst : GpuLayout::kHeadsFirst;
  }
  return shape;
}

TEST_F(AttentionSweepGpu, EveryKernelAgreesWithFloat64) {
  const uint32_t seed = sweep_seed();
  Sweep sweep(seed, {8, 16, 40, 48, 64, 64, 72, 80, 96, 104, 112, 128, 128, 128, 256});
  const TimeLimit limit(kSeconds);
  int cases = 0;
  std::array<double, std::size(kGpuKernels)> highest{}, highest_row{};
  for (; cases < kMostCases && !limit.passed() && !HasFailure(); ++cases) {
    const GpuShape shape = random_shape(sweep);
    const std::string where = "seed " + std::to_string(seed) + ", case " + std::to_string(cases) +
                              ", layout " + std::to_string(static_cast<int>(shape.layout)) +
                              ", inputs " + std::to_string(static_cast<int>(shape.inputs)) +
                              (shape.bf16 ? ", bf16, " : ", ") +
                              SweepCase{shape.q_lens,       shape.kv_lens,  shape.num_heads,
                                        shape.num_kv_heads, shape.head_dim, shape.causal}
                                  .describe();
    GpuAttention reference(shape), call(shape);
    ASSERT_TRUE(run(kGpuKernels[0], reference)) << where;
    const double few = count_values(shape) < 20'000 ? kFew : 1.5;
    for (size_t k = 0; k < std::size(kGpuKernels); ++k) {
      const GpuKernel& kernel = kGpuKernels[k];
      if (!run(kernel, call)) continue;
      const double level =
          kernel.relative_l1[static_cast<size_t>(shape.inputs)] + (shape.bf16 ? 4e-3 : 0.0);
      const GpuError error = measure_error(call, 2);
      EXPECT_LE(error.relative_l1, few * level) << kernel.name << ", " << where;
      const bool four_bits = kernel.variant == SAGELM_ATTENTION_SAGE2_4B;
      const double wide = four_bits ? 4.0 : 1.0;
      EXPECT_LE(error.max_lse, wide * (shape.inputs == GpuInputs::kHeavyTailed ? 1.5 : 0.3))
          << kernel.name << ", " << where;
      const Difference difference = compare(call, reference);
      EXPECT_LE(difference.relative_l1, few * level) << kernel.name << ", " << where;
      if (shape.head_dim >= 40) {  // fewer values say little of a row
        EXPECT_LE(difference.worst_row, (four_bits ? kOneRow4b : kOneRow) * level)
            << kernel.name << ", " << difference.where << ", " << where;
        highest_row[k] = std::max(highest_row[k], difference.worst_row / level);
      }
      highest[k] = std::max(highest[k], error.relative_l1 / level);
    }
  }
  std::printf("seed %u, %d cases; highest errors as parts of their levels:", seed, cases);
  for (size_t k = 0; k < std::size(kGpuKernels); ++k) {
    std::printf(" %s %.2f (of a row %.2f)", kGpuKernels[k].name, highest[k], highest_row[k]);
  }
  std::printf("\n");
}

TEST_F(AttentionSweepGpu, MoreQueriesThanKeysAreRefusedOrDefined) {
  Sweep sweep(sweep_seed() + 1, {48, 64, 128});
  for (int i = 0; i < 12; ++i) {
    const int keys = sweep.length(300);
    const int queries = keys + sweep.length(200);
    GpuShape shape{.q_lens = {queries},
                   .kv_lens = {keys},
                   .num_heads = 2,
                   .num_kv_heads = 1,
                   .head_dim = sweep.one_in(2) ? 64 : 128,
                   .causal = true,
                   .seed = static_cast<uint32_t>(i)};
    const std::string where = std::to_string(queries) + " queries, " + std::to_string(keys) +
                              " keys, seed " + std::to_string(sweep_seed());
    for (const GpuKernel& kernel : kGpuKernels) {
      GpuAttention refused(shape);
      EXPECT_THROW(run(kernel, refused), std::runtime_error) << kernel.name << ", " << where;
      shape.causal = false;
      GpuAttention full(shape);
      shape.causal = true;
      if (!run(kernel, full)) continue;
      EXPECT_LE(measure_error(full, 20).relative_l1, kFew * kernel.relative_l1[0])
          << kernel.name << ", " << where;
      // With lengths of its own: rows before the first key see nothing.
      shape.layout = GpuLayout::kRagged;
      GpuAttention ragged(shape);
      shape.layout = GpuLayout::kTokensFirst;
      run(kernel, ragged);
      const int unseeing = queries - keys - 1;
      for (const double x : ragged.out(0, unseeing, 1)) {
        EXPECT_EQ(x, 0.0) << kernel.name << ", " << where;
      }
      EXPECT_EQ(ragged.lse(0, unseeing, 1), -INFINITY) << kernel.name << ", " << where;
      EXPECT_LE(measure_error(ragged, queries).relative_l1, kFew * kernel.relative_l1[0])
          << kernel.name << ", " << where;
    }
  }
}

}  // namespace
}  // namespace sagelm::testing
