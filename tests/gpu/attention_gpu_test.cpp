// The C interface of the attention kernels against float64. Needs a device; skips without one.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <sstream>
#include <stdexcept>

#include "base/dtype.h"
#include "gpu/attention_kernels.h"

namespace sagelm::testing {
namespace {

class AttentionGpu : public ::testing::TestWithParam<GpuKernel> {
 protected:
  void SetUp() override {
    if (const std::string reason = no_device_reason(); !reason.empty()) GTEST_SKIP() << reason;
  }

  // Skips the test where the library has no such kernel for the shape on this device.
  static bool run(GpuAttention& call) { return testing::run(GetParam(), call); }

  static void expect_close(const GpuShape& shape, int max_rows, double slack = 1.0) {
    GpuAttention call(shape);
    if (!run(call)) return;
    const GpuError error = measure_error(call, max_rows);
    const double bound = GetParam().relative_l1[static_cast<size_t>(shape.inputs)] * slack *
                             (shape.bf16 ? 1.1 : 1.0) +
                         (shape.bf16 ? 4e-3 : 0.0);
    EXPECT_LE(error.relative_l1, bound) << describe(shape);
    EXPECT_FALSE(std::isnan(error.max_abs)) << describe(shape);
    // Of INT4 products some are off by more, those with large keys by most.
    const bool four_bits = GetParam().variant == SAGELM_ATTENTION_SAGE2_4B;
    const double wide = !four_bits ? 1.0 : shape.inputs == GpuInputs::kSinks ? 9.0 : 3.0;
    EXPECT_LE(error.max_lse, wide * (shape.inputs == GpuInputs::kHeavyTailed ? 1.0 : 0.2))
        << describe(shape);
    if (shape.inputs == GpuInputs::kBiasedV) {
      EXPECT_NEAR(error.gain, 1.0, 0.006) << describe(shape);
    }
  }

  static void upload(const sagelm_attention_tensor& to, const std::vector<uint16_t>& from) {
    check_cuda(cudaMemcpy(to.data, from.data(), 2 * from.size(), cudaMemcpyHostToDevice), "inputs");
  }

  static std::string describe(const GpuShape& s) {
    std::ostringstream text;
    text << "layout " << static_cast<int>(s.layout) << ", dim " << s.head_dim << ", heads "
         << s.num_heads << "/" << s.num_kv_heads << (s.causal ? ", causal" : ", full")
         << (s.bf16 ? ", bf16" : "") << ", inputs " << static_cast<int>(s.inputs) << ", lengths";
    for (size_t b = 0; b < s.q_lens.size(); ++b) text << " " << s.q_lens[b] << "/" << s.kv_lens[b];
    return text.str();
  }
};

TEST_P(AttentionGpu, InputDistributions) {
  for (const int dim : {64, 128}) {
    for (int inputs = 0; inputs < kGpuInputs; ++inputs) {
      for (const bool causal : {true, false}) {
        GpuShape shape{.q_lens = {1500},
                       .kv_lens = {1500},
                       .num_heads = 2,
                       .num_kv_heads = 2,
                       .head_dim = dim,
                       .causal = causal,
                       .inputs = static_cast<GpuInputs>(inputs)};
        expect_close(shape, 40);
        shape.bf16 = true;
        expect_close(shape, 40);
      }
    }
  }
}

TEST_P(AttentionGpu, EveryLengthTo130) {
  for (int n = 1; n <= 130; ++n) {
    expect_close({.q_lens = {n},
                  .kv_lens = {n},
                  .num_heads = 2,
                  .num_kv_heads = 1,
                  .head_dim = n % 2 ? 64 : 128,
                  .causal = n % 3 != 0,
                  .seed = static_cast<uint32_t>(n)},
                 n, 2.0);
  }
}

TEST_P(AttentionGpu, HeadSizes) {
  for (const int dim : {8, 48, 64, 72, 80, 96, 104, 112, 128, 256}) {
    expect_close({.q_lens = {200, 200},
                  .kv_lens = {333, 333},
                  .num_heads = 4,
                  .num_kv_heads = 2,
                  .head_dim = dim},
                 20, 1.5);
  }
}

// Of the rows of one warp some see keys of the second tile of 128 and some do not.
TEST_P(AttentionGpu, ChunksThatBeginInTheFirstTile) {
  for (const int before : {1, 60, 100, 127}) {
    for (const int dim : {64, 128}) {
      expect_close({.q_lens = {200},
                    .kv_lens = {before + 200},
                    .num_heads = 2,
                    .num_kv_heads = 1,
                    .head_dim = dim},
                   20, 1.5);
    }
  }
}

// Sums of so many tiles must not lose the part of one.
TEST_P(AttentionGpu, LongSequences) {
  for (const GpuInputs inputs :
       {GpuInputs::kNormal, GpuInputs::kHeavyTailed, GpuInputs::kBiasedV}) {
    for (const int dim : {64, 128}) {
      expect_close({.q_lens = {130},
                    .kv_lens = {50000},
                    .num_heads = 1,
                    .num_kv_heads = 1,
                    .head_dim = dim,
                    .inputs = inputs},
                   8, 2.0);
    }
  }
  // Rows that see few of so many keys, one of them 33 tiles of 128.
  for (const int dim : {64, 128}) {
    expect_close({.q_lens = {33000}, .kv_lens = {33000}, .head_dim = dim}, 8, 2.0);
  }
}

TEST_P(AttentionGpu, LongNeighboursChangeNothing) {
  for (const int dim : {64, 128}) {
    GpuAttention call({.q_lens = {300, 200},
                       .kv_lens = {9000, 40000},
                       .head_dim = dim,
                       .layout = GpuLayout::kRagged,
                       .inputs = GpuInputs::kBiasedV});
    if (!run(call)) return;
    const std::vector<uint16_t> both = call.raw_out();
    call.args.batch = 1;
    call.args.max_kv_len = 9000;
    call.run();
    const int64_t own = int64_t{300} * dim;
    EXPECT_TRUE(std::equal(both.begin(), both.begin() + own, call.raw_out().begin()));
  }
}

TEST_P(AttentionGpu, LayoutsAgreeWithOracle) {
  for (const GpuLayout layout :
       {GpuLayout::kTokensFirst, GpuLayout::kHeadsFirst, GpuLayout::kRagged, GpuLayout::kPaged}) {
    for (const int group : {1, 4}) {
      GpuShape shape{.q_lens = {130, 130, 130},
                     .kv_lens = {515, 515, 515},
                     .num_heads = 2 * group,
                     .num_kv_heads = 2,
                     .head_dim = 128,
                     .layout = layout};
      expect_close(shape, 30, 1.5);
      if (layout == GpuLayout::kRagged || layout == GpuLayout::kPaged) {
        shape.q_lens = {1, 7, 64, 65, 200, 0, 129, 3};
        shape.kv_lens = {1, 700, 64, 129, 200, 5, 1000, 128};
        expect_close(shape, 30, 2.0);
        shape.head_dim = 64;
        shape.causal = false;
        expect_close(shape, 30, 2.0);
      }
    }
  }
}

TEST_P(AttentionGpu, DecodeRows) {
  for (const int rows : {1, 2, 5, 16}) {
    expect_close({.q_lens = {rows, rows, rows},
                  .kv_lens = {17, 1025, 4097},
                  .num_heads = 8,
                  .num_kv_heads = 2,
                  .head_dim = 128,
                  .layout = GpuLayout::kPaged},
                 rows, 2.0);
  }
}

TEST_P(AttentionGpu, MoreWorkThanProcessors) {
  // Several blocks of rows for each processor, of different lengths, some of them past their end.
  for (const int dim : {64, 128}) {
    for (const bool causal : {true, false}) {
      expect_close({.q_lens = {700, 5, 0, 385, 700},
                    .kv_lens = {700, 1030, 9, 385, 1300},
                    .num_heads = 32,
                    .num_kv_heads = 8,
                    .head_dim = dim,
                    .causal = causal,
                    .layout = GpuLayout::kRagged},
                   4, 1.5);
    }
  }
}

TEST_P(AttentionGpu, SequenceWithoutKeys) {
  GpuShape shape{.q_lens = {3, 3},
                 .kv_lens = {0, 40},
                 .num_heads = 2,
                 .num_kv_heads = 2,
                 .head_dim = 64,
                 .causal = false,
                 .layout = GpuLayout::kRagged};
  GpuAttention call(shape);
  if (!run(call)) GTEST_SKIP() << sagelm_attention_last_error();
  for (int row = 0; row < 3; ++row) {
    for (const double x : call.out(0, row, 1)) EXPECT_EQ(x, 0.0);
    EXPECT_EQ(call.lse(0, row, 1), -INFINITY);
  }
  EXPECT_LE(measure_error(call, 3).relative_l1, std::max(0.1, GetParam().relative_l1[0]));
}

TEST_P(AttentionGpu, NeighboursAndRepeatsChangeNothing) {
  const GpuShape shape{.q_lens = {300, 41, 129},
                       .kv_lens = {300, 400, 1000},
                       .num_heads = 2,
                       .num_kv_heads = 2,
                       .head_dim = 128,
                       .layout = GpuLayout::kRagged};
  GpuAttention call(shape);
  if (!run(call)) GTEST_SKIP() << sagelm_attention_last_error();
  const std::vector<uint16_t> once = call.raw_out();
  for (int i = 0; i < 5; ++i) {
    call.run();
    ASSERT_EQ(once, call.raw_out());
  }
}

TEST_P(AttentionGpu, RowsDoNotDependOnTheirNeighbours) {
  // Other warps' rows, larger, move their references where those that are compared do not.
  constexpr int kRows = 256, kKeys = 3000, kWarpRows = 16;
  if (GetParam().variant != SAGELM_ATTENTION_FP16 &&
      GetParam().kernel != SAGELM_ATTENTION_KERNEL_WGMMA) {
    GTEST_SKIP() << "quantizes rows together";
  }
  for (const int dim : {64, 128}) {
    GpuAttention call({.q_lens = {kRows}, .kv_lens = {kKeys}, .head_dim = dim, .causal = false});
    if (!run(call)) GTEST_SKIP() << sagelm_attention_last_error();
    const std::vector<uint16_t> alone = call.raw_out();
    std::vector<uint16_t> q(size_t{kRows} * static_cast<size_t>(dim));
    check_cuda(cudaMemcpy(q.data(), call.args.q.data, 2 * q.size(), cudaMemcpyDeviceToHost),
               "queries");
    for (const int kept : {0, 1}) {
      const auto is_kept = [&](int row) { return row / kWarpRows % 2 == kept; };
      std::vector<uint16_t> larger = q;
      for (int i = 0; i < kRows * dim; ++i) {
        if (!is_kept(i / dim)) larger[i] = float_to_half(8.0F * half_to_float(q[i]));
      }
      upload(call.args.q, larger);
      call.run();
      const std::vector<uint16_t> beside = call.raw_out();
      for (int row = 0; row < kRows; ++row) {
        const int64_t first = int64_t{row} * dim;
        EXPECT_TRUE(!is_kept(row) || std::equal(alone.begin() + first, alone.begin() + first + dim,
                                                beside.begin() + first))
            << "head size " << dim << ", row " << row;
      }
    }
  }
}

TEST_P(AttentionGpu, LargeCallsRepeat) {
  // Blocks that go from long items to many short ones, so that stages are filled again at once.
  if (GetParam().kernel != SAGELM_ATTENTION_KERNEL_WGMMA) GTEST_SKIP() << "no ring of stages";
  constexpr int kTokens = 16384;
  GpuAttention call({.q_lens = {kTokens},
                     .kv_lens = {kTokens},
                     .num_heads = 32,
                     .num_kv_heads = 32,
                     .head_dim = 64});
  if (!run(call)) GTEST_SKIP() << sagelm_attention_last_error();
  const std::vector<uint16_t> once = call.raw_out();
  for (int i = 0; i < 30; ++i) {
    call.run();
    ASSERT_TRUE(once == call.raw_out()) << "run " << i;
  }
}

TEST_P(AttentionGpu, SumsOfLargestWeights) {
  // Keys of one tile whose weights are all as large as a row's reference allows, or just beyond it,
  // times values that are all the largest: what is summed in halves must not overflow.
  constexpr int kKeys = 512, kRows = 64, kSteps = 31;
  for (int i = 0; i < 2 * kSteps; ++i) {
    const int dim = i < kSteps ? 64 : 128;
    const double bits = 3.0 + 0.1 * (i % kSteps);  // of these keys' logits above the others'
    GpuAttention call({.q_lens = {kRows}, .kv_lens = {kKeys}, .head_dim = dim, .causal = false});
    std::vector<uint16_t> q(kRows * dim), k(kKeys * dim), v(kKeys * dim, float_to_half(1.0F));
    const auto query =
        static_cast<float>(bits * std::log(2.0) * std::sqrt(static_cast<double>(dim)));
    for (int row = 0; row < kRows; ++row) q[row * dim] = float_to_half(query);
    for (int key = 128; key < 256; ++key) k[key * dim] = float_to_half(1.0F);
    upload(call.args.q, q);
    upload(call.args.k, k);
    upload(call.args.v, v);
    if (!run(call)) GTEST_SKIP() << sagelm_attention_last_error();
    for (const int row : {0, 37, kRows - 1}) {
      for (const double x : call.out(0, row, 0)) {
        ASSERT_NEAR(x, 1.0, 0.01) << bits << " bits, head size " << dim;
      }
    }
  }
}

TEST_P(AttentionGpu, NanReachesTheOutput) {
  // Any NaN in a head's keys or values must show in that head's rows that see it.
  const uint16_t nan = 0x7E00;
  for (const int head_dim : {64, 128}) {
    for (const int token : {5, 140, 699}) {
      for (const bool in_keys : {true, false}) {
        GpuAttention call(
            {.q_lens = {64}, .kv_lens = {700}, .head_dim = head_dim, .causal = false});
        auto* values = static_cast<uint16_t*>(in_keys ? call.args.k.data : call.args.v.data);
        check_cuda(cudaMemcpy(values + token * head_dim + 3, &nan, 2, cudaMemcpyHostToDevice),
                   "nan");
        if (!run(call)) GTEST_SKIP() << sagelm_attention_last_error();
        EXPECT_TRUE(std::isnan(call.out(0, 10, 0)[in_keys ? 0 : 3]))
            << "head size " << head_dim << ", token " << token << (in_keys ? " of K" : " of V");
      }
    }
  }
}

TEST_P(AttentionGpu, RefusesWhatItCannotDo) {
  GpuAttention call({.q_lens = {20}, .kv_lens = {10}, .head_dim = 64, .causal = true});
  EXPECT_THROW(run(call), std::runtime_error);
  call.args.causal = 0;
  call.args.head_dim = 60;
  EXPECT_THROW(run(call), std::runtime_error);
  call.args.head_dim = 64;
  call.args.num_kv_heads = 3;
  EXPECT_THROW(run(call), std::runtime_error);
}

INSTANTIATE_TEST_SUITE_P(Kernels, AttentionGpu, ::testing::ValuesIn(kGpuKernels),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace sagelm::testing
