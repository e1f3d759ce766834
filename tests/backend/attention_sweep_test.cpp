// Random shapes against the same quantization in exact arithmetic: ragged batches, GQA, one query
// or many, causal or full, any head size, whole tensors and pages. SAGELM_SWEEP_SEED sets the seed.
#include <gtest/gtest.h>

#include <cstdio>
#include <string>
#include <vector>

#include "backend/cpu/attention.h"
#include "support/attention_inputs.h"
#include "support/float64_attention.h"
#include "support/sweep.h"

namespace sagelm::testing {
namespace {

constexpr double kSeconds = 6;
constexpr int kMostKeys = 4097;
constexpr int64_t kMostWork = 12'000'000;  // of the oracle, in products

TEST(AttentionSweep, RandomShapesComputeTheirRecipeExactly) {
  using enum AttentionVariant;
  const uint32_t seed = sweep_seed();
  std::vector<int> dims = {1, 8, 33, 48, 64, 72, 80, 96, 100, 112, 128, 256};
  Sweep sweep(seed, dims);
  const TimeLimit limit(kSeconds);
  int cases = 0;
  for (; cases < 400 && !limit.passed(); ++cases) {
    const SweepCase shape = sweep.next(kMostKeys, 300);
    std::vector<AttentionProblem> problems;
    std::vector<Float64Result> expected;
    int64_t work = 0;
    for (size_t i = 0; i < shape.q_lens.size(); ++i) {
      work += int64_t{shape.q_lens[i]} * shape.kv_lens[i] * shape.num_heads * shape.head_dim;
    }
    if (work > kMostWork) continue;
    for (size_t i = 0; i < shape.q_lens.size(); ++i) {
      const auto inputs = sweep.one_in(2) ? Inputs::kNormal : Inputs::kOffsetK;
      problems.push_back(make_problem({shape.q_lens[i], shape.kv_lens[i], shape.num_heads,
                                       shape.num_kv_heads, shape.head_dim, shape.causal},
                                      inputs, static_cast<uint32_t>(sweep.uniform(1, 1 << 30))));
    }
    constexpr AttentionVariant kAll[] = {kFp16,    kSage1,   kSage1T,   kSage1B,
                                         kSage1VT, kSage1VB, kSage2_8b, kSage2_4b};
    const AttentionSpec spec{kAll[cases % 8], !sweep.one_in(4)};
    std::vector<AttentionResult> results(problems.size());
    std::vector<PreparedArgs> prepared;
    std::vector<cpu::AttentionArgs> batch;
    for (size_t i = 0; i < problems.size(); ++i) {
      const int page_size = sweep.one_in(2) ? 0 : sweep.uniform(1, 200);
      prepared.push_back(prepare_args(problems[i], page_size, results[i]));
      batch.push_back(prepared.back().args);
    }
    cpu::attention(batch, spec);
    for (size_t i = 0; i < problems.size(); ++i) {
      const Float64Result exact = quantized_float64_attention(problems[i], spec);
      const bool int4 = spec.variant == kSage2_4b;
      // A value within float's rounding of a tie goes to the other step, which few rows show.
      const bool few = int64_t{shape.q_lens[i]} * shape.num_heads < 64;
      const double bound = (int4 ? 2e-2 : 1e-2) * (few ? 3 : 1);
      EXPECT_LT(compare(to_double(results[i].out), exact.out).relative_l1, bound)
          << "seed " << seed << ", case " << cases << ", " << attention_variant_name(spec.variant)
          << (spec.smooth_k ? "" : " not smoothed") << ", sequence " << i << " of "
          << shape.describe();
    }
    if (HasFailure()) break;
  }
  std::printf("seed %u, %d cases\n", seed, cases);
}

}  // namespace
}  // namespace sagelm::testing
