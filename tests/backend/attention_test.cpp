#include "backend/cpu/attention.h"

#include <gtest/gtest.h>
#include <omp.h>

#include <cmath>
#include <limits>
#include <string>

#include "backend/cpu/attention_kernels.h"
#include "base/dtype.h"
#include "base/error.h"
#include "support/attention_inputs.h"
#include "support/float64_attention.h"

namespace sagelm::testing {
namespace {

using Variant = AttentionVariant;

constexpr Variant kVariants[] = {Variant::kFp16,     Variant::kSage1,   Variant::kSage1T,
                                 Variant::kSage1B,   Variant::kSage1VT, Variant::kSage1VB,
                                 Variant::kSage2_8b, Variant::kSage2_4b};

std::string name_of(Variant variant) { return std::string(attention_variant_name(variant)); }

AttentionError error_of(const std::vector<float>& actual, const std::vector<double>& expected) {
  return compare(to_double(actual), expected);
}

AttentionResult run_on(const cpu::KernelTable& kernels, const AttentionProblem& problem,
                       const AttentionSpec& spec) {
  AttentionResult result;
  const PreparedArgs prepared = prepare_args(problem, 0, result);
  cpu::attention_with(kernels, std::span(&prepared.args, 1), spec);
  return result;
}

// ---- Against float64 -------------------------------------------------------------------------

// Relative L1 for the three distributions: for INT8 the levels of the papers' methods simulated on
// such inputs (docs/architecture.md, "Attention variants"). For INT4 the papers give 0.065 on
// smoother inputs of a video model; these are the levels of the exact recipe here.
struct Level {
  Variant variant;
  double relative_l1[3];
};
constexpr Level kLevels[] = {
    {Variant::kFp16, {0.0005, 0.0005, 0.0005}},   {Variant::kSage1, {0.0105, 0.0125, 0.036}},
    {Variant::kSage1T, {0.009, 0.011, 0.034}},    {Variant::kSage1B, {0.0125, 0.016, 0.042}},
    {Variant::kSage1VT, {0.025, 0.030, 0.046}},   {Variant::kSage1VB, {0.025, 0.030, 0.046}},
    {Variant::kSage2_8b, {0.036, 0.0375, 0.048}}, {Variant::kSage2_4b, {0.2, 0.16, 0.34}},
};

TEST(Attention, ErrorAgainstFloat64IsAtThePublishedLevel) {
  for (const int64_t head_dim : {64, 128}) {
    for (const Inputs inputs : kAllInputs) {
      const auto problem = make_problem({768, 768, 1, 1, head_dim, true}, inputs, 11);
      const Float64Result expected = float64_attention(problem);
      for (const Level& level : kLevels) {
        const AttentionResult actual = run_attention(problem, {level.variant, true});
        const AttentionError error = error_of(actual.out, expected.out);
        const std::string where = name_of(level.variant) + " " + inputs_name(inputs) +
                                  " head size " + std::to_string(head_dim) + ": relative L1 " +
                                  std::to_string(error.relative_l1) + " cosine " +
                                  std::to_string(error.cosine);
        const double limit = 1.5 * level.relative_l1[static_cast<int>(inputs)];
        EXPECT_LT(error.relative_l1, limit) << where;
        EXPECT_LT(1 - error.cosine, 1.5 * limit * limit) << where;
      }
    }
  }
}

TEST(Attention, WithoutSmoothingOffsetsHurt) {
  const auto problem = make_problem({512, 512, 1, 1, 128, true}, Inputs::kOffsetK, 12);
  const Float64Result expected = float64_attention(problem);
  for (const Variant variant : kVariants) {
    if (variant == Variant::kFp16) continue;
    const double smooth =
        error_of(run_attention(problem, {variant, true}).out, expected.out).relative_l1;
    const double rough =
        error_of(run_attention(problem, {variant, false}).out, expected.out).relative_l1;
    EXPECT_GT(rough, 1.1 * smooth) << name_of(variant);
  }
}

TEST(Attention, LseMatchesFloat64) {
  for (const Inputs inputs : {Inputs::kNormal, Inputs::kOffsetK}) {
    const auto problem = make_problem({70, 131, 4, 2, 80, true}, inputs, 13);
    const Float64Result expected = float64_attention(problem);
    for (const Variant variant : kVariants) {
      for (const bool smooth_k : {true, false}) {
        const AttentionResult actual = run_attention(problem, {variant, smooth_k});
        const double limit = variant == Variant::kSage2_4b ? 1.5 : 0.15;
        for (size_t i = 0; i < expected.lse.size(); ++i) {
          EXPECT_NEAR(actual.lse[i], expected.lse[i], smooth_k ? limit : 3 * limit)
              << name_of(variant) << " " << smooth_k;
        }
      }
    }
  }
}

// ---- Against the same quantization in exact arithmetic ---------------------------------------

TEST(Attention, KernelsComputeTheirRecipeExactly) {
  const AttentionShape shapes[] = {{200, 200, 2, 1, 64, true},
                                   {77, 300, 2, 2, 80, true},
                                   {130, 190, 1, 1, 48, false},
                                   {9, 65, 4, 2, 256, true},
                                   {1, 129, 2, 1, 100, true}};
  for (const cpu::KernelTable* kernels : cpu::available_attention_kernels()) {
    for (const AttentionShape& shape : shapes) {
      const auto problem = make_problem(shape, Inputs::kOffsetK, 21);
      for (const Variant variant : kVariants) {
        for (const bool smooth_k : {true, false}) {
          const Float64Result expected = quantized_float64_attention(problem, {variant, smooth_k});
          const AttentionResult actual = run_on(*kernels, problem, {variant, smooth_k});
          const std::string where = std::string(kernels->name) + " " + name_of(variant) +
                                    (smooth_k ? " smooth" : " rough") + " head size " +
                                    std::to_string(shape.head_dim);
          // A value within float's rounding of a tie may go to the other integer; a step of INT4 is
          // large.
          const bool int4 = variant == Variant::kSage2_4b;
          EXPECT_LT(error_of(actual.out, expected.out).relative_l1, int4 ? 5e-3 : 2e-3) << where;
          const double lse_limit = int4 ? 0.15 : variant == Variant::kFp16 ? 1e-5 : 0.06;
          for (size_t i = 0; i < expected.lse.size(); ++i) {
            EXPECT_NEAR(actual.lse[i], expected.lse[i], lse_limit) << where;
          }
        }
      }
    }
  }
}

TEST(Attention, EveryHeadSizeOnEveryInstructionSet) {
  for (const cpu::KernelTable* kernels : cpu::available_attention_kernels()) {
    for (int64_t head_dim = 1; head_dim <= 256; head_dim += head_dim < 20 ? 1 : 4) {
      const auto problem = make_problem({5, 37, 2, 1, head_dim, true}, Inputs::kNormal, 22);
      for (const Variant variant : {Variant::kFp16, Variant::kSage2_8b}) {
        const Float64Result expected = quantized_float64_attention(problem, {variant, true});
        const AttentionResult actual = run_on(*kernels, problem, {variant, true});
        EXPECT_LT(error_of(actual.out, expected.out).relative_l1, 2e-3)
            << kernels->name << " " << name_of(variant) << " head size " << head_dim;
      }
    }
  }
}

// ---- Lengths, chunks, batches ----------------------------------------------------------------

TEST(Attention, EveryLengthFrom1To130EqualsTheOracle) {
  const auto whole = make_problem({130, 130, 2, 1, 48, true}, Inputs::kOffsetK, 31);
  for (int64_t length = 1; length <= 130; ++length) {
    const auto problem = prefix_of(whole, length, length);
    for (const Variant variant : {Variant::kFp16, Variant::kSage1, Variant::kSage1B,
                                  Variant::kSage2_8b, Variant::kSage2_4b}) {
      const Float64Result expected = quantized_float64_attention(problem, {variant, true});
      const AttentionResult actual = run_attention(problem, {variant, true});
      EXPECT_LT(error_of(actual.out, expected.out).relative_l1, 2e-3)
          << name_of(variant) << " length " << length;
    }
  }
}

// Runs the sequence in chunks of the given length, each seeing all keys up to its own end.
std::vector<float> in_chunks(const AttentionProblem& whole, const AttentionSpec& spec,
                             int64_t length, int64_t chunk) {
  std::vector<float> out;
  for (int64_t done = 0; done < length; done += chunk) {
    const int64_t count = std::min(chunk, length - done);
    const AttentionResult part = run_attention(prefix_of(whole, done + count, count), spec);
    out.insert(out.end(), part.out.begin(), part.out.end());
  }
  return out;
}

TEST(Attention, ChunksAndSingleTokensStayWithinTheStatedBoundAtEveryLength) {
  for (const Inputs inputs : kAllInputs) {
    const auto whole = make_problem({130, 130, 2, 1, 64, true}, inputs, 32);
    for (const Variant variant : kVariants) {
      const AttentionSpec spec = {variant, true};
      const std::vector<float> tokens = in_chunks(whole, spec, 130, 1);
      for (int64_t length = 1; length <= 130; ++length) {
        const AttentionProblem problem = prefix_of(whole, length, length);
        const std::vector<double> expected = to_double(run_attention(problem, spec).out);
        const std::vector<float> first(tokens.begin(),
                                       tokens.begin() + static_cast<int64_t>(expected.size()));
        EXPECT_LE(error_of(first, expected).relative_l1, cpu::attention_split_bound(spec))
            << name_of(variant) << " " << inputs_name(inputs) << " tokens, length " << length;
        const int64_t chunk = 1 + length % 67;
        EXPECT_LE(error_of(in_chunks(whole, spec, length, chunk), expected).relative_l1,
                  cpu::attention_split_bound(spec))
            << name_of(variant) << " " << inputs_name(inputs) << " length " << length << " chunk "
            << chunk;
      }
    }
  }
}

TEST(Attention, BatchesOfMixedLengthsEqualEachSequenceAloneBitForBit) {
  std::vector<AttentionProblem> problems;
  const int64_t shapes[][2] = {{1, 1},   {1, 500}, {130, 130}, {17, 64},  {64, 65},
                               {3, 127}, {0, 40},  {128, 128}, {100, 300}};
  for (const auto& [q_len, kv_len] : shapes) {
    problems.push_back(make_problem({q_len, kv_len, 4, 2, 64, true}, Inputs::kHeavyTailed,
                                    static_cast<uint32_t>(40 + kv_len)));
  }
  for (const Variant variant : kVariants) {
    const AttentionSpec spec = {variant, true};
    for (const int threads : {1, 2, 3}) {
      std::vector<AttentionResult> results(problems.size());
      std::vector<PreparedArgs> prepared;
      for (size_t i = 0; i < problems.size(); ++i) {
        prepared.push_back(prepare_args(problems[i], 128, results[i]));
      }
      std::vector<cpu::AttentionArgs> batch;
      for (const PreparedArgs& p : prepared) batch.push_back(p.args);
      const int before = omp_get_max_threads();
      omp_set_num_threads(threads);
      cpu::attention(batch, spec);
      omp_set_num_threads(before);
      for (size_t i = 0; i < problems.size(); ++i) {
        const AttentionResult alone = run_attention(problems[i], spec);
        EXPECT_EQ(results[i].out, alone.out) << name_of(variant) << " sequence " << i;
        EXPECT_EQ(results[i].lse, alone.lse) << name_of(variant) << " sequence " << i;
      }
    }
  }
}

TEST(Attention, PageSizeAndRowStridesDoNotMatter) {
  const auto problem = make_problem({20, 150, 4, 2, 72, true}, Inputs::kNormal, 51);
  const int64_t width = 4 * 72;
  for (const Variant variant : kVariants) {
    const AttentionResult expected = run_attention(problem, {variant, true});
    for (const int64_t page_size : {1, 7, 64, 128, 500}) {
      AttentionResult actual;
      const PreparedArgs prepared = prepare_args(problem, page_size, actual);
      cpu::attention(std::span(&prepared.args, 1), {variant, true});
      EXPECT_EQ(actual.out, expected.out) << name_of(variant) << " page size " << page_size;
    }
    AttentionResult actual;
    PreparedArgs prepared = prepare_args(problem, 128, actual);
    const int64_t stride = width + 13;
    std::vector<float> q(static_cast<size_t>(20 * stride), NAN);
    std::vector<float> out(static_cast<size_t>(20 * stride), -7.0f);
    for (int64_t r = 0; r < 20; ++r) {
      std::copy_n(problem.q.begin() + r * width, width, q.begin() + r * stride);
    }
    prepared.args.q = q.data();
    prepared.args.out = out.data();
    prepared.args.q_row_stride = prepared.args.out_row_stride = stride;
    cpu::attention(std::span(&prepared.args, 1), {variant, true});
    for (int64_t r = 0; r < 20; ++r) {
      EXPECT_TRUE(std::equal(out.begin() + r * stride, out.begin() + r * stride + width,
                             expected.out.begin() + r * width));
      EXPECT_EQ(out[static_cast<size_t>(r * stride + width)], -7.0f);
    }
  }
}

TEST(Attention, InstructionSetsAgree) {
  const auto problem = make_problem({150, 210, 2, 1, 96, true}, Inputs::kHeavyTailed, 52);
  for (const Variant variant : kVariants) {
    const AttentionResult best =
        run_on(*cpu::available_attention_kernels().front(), problem, {variant, true});
    for (const cpu::KernelTable* kernels : cpu::available_attention_kernels()) {
      const AttentionResult other = run_on(*kernels, problem, {variant, true});
      EXPECT_LT(error_of(other.out, to_double(best.out)).relative_l1, 1e-3)
          << kernels->name << " " << name_of(variant);
    }
  }
}

// ---- Properties ------------------------------------------------------------------------------

TEST(Attention, AConstantAddedToAllKeysChangesNothing) {
  const auto problem = make_problem({90, 140, 2, 1, 64, true}, Inputs::kNormal, 61);
  AttentionProblem shifted = problem;
  for (size_t i = 0; i < shifted.k.size(); ++i) {
    const float constant = static_cast<float>(static_cast<int>(i % 64 % 5) - 2) * 4.0f;
    shifted.k[i] = float_to_half(half_to_float(shifted.k[i]) + constant);
  }
  for (const Variant variant : kVariants) {
    const AttentionResult expected = run_attention(problem, {variant, true});
    const AttentionResult actual = run_attention(shifted, {variant, true});
    // FP16 keys themselves lose bits when they grow; INT4 flips more roundings.
    EXPECT_LT(error_of(actual.out, to_double(expected.out)).relative_l1,
              variant == Variant::kSage2_4b ? 0.05 : 0.02)
        << name_of(variant);
  }
}

TEST(Attention, NeverWritesToKeysOrValues) {
  auto problem = make_problem({40, 100, 2, 2, 64, true}, Inputs::kOffsetK, 62);
  const auto k = problem.k;
  const auto v = problem.v;
  for (const Variant variant : kVariants) run_attention(problem, {variant, true});
  EXPECT_EQ(problem.k, k);
  EXPECT_EQ(problem.v, v);
}

TEST(Attention, AllZeroInputsGiveTheMeanOfV) {
  auto problem = make_problem({33, 70, 2, 1, 64, false}, Inputs::kNormal, 63);
  std::fill(problem.q.begin(), problem.q.end(), 0.0f);
  std::fill(problem.k.begin(), problem.k.end(), uint16_t{0});
  for (int64_t j = 0; j < 70; ++j) problem.v[static_cast<size_t>(j * 64 + 3)] = 0;
  const Float64Result expected = float64_attention(problem);
  for (const Variant variant : kVariants) {
    const AttentionResult actual = run_attention(problem, {variant, true});
    EXPECT_LT(error_of(actual.out, expected.out).relative_l1, 0.06) << name_of(variant);
    EXPECT_EQ(actual.out[3], 0.0f);
    EXPECT_NEAR(actual.lse[0], std::log(70.0), 1e-5);
  }
}

TEST(Attention, NaNAndInfinityReachTheOutput) {
  const auto clean = make_problem({40, 90, 1, 1, 64, true}, Inputs::kNormal, 64);
  for (const cpu::KernelTable* kernels : cpu::available_attention_kernels()) {
    for (const Variant variant : kVariants) {
      for (const bool infinite : {false, true}) {
        const std::string where = std::string(kernels->name) + " " + name_of(variant);
        const auto last_row_is_finite = [&](const AttentionProblem& problem) {
          const AttentionResult result = run_on(*kernels, problem, {variant, true});
          bool finite = true;
          for (size_t c = 39 * 64; c < 40 * 64; ++c) finite &= std::isfinite(result.out[c]);
          return finite;
        };
        EXPECT_TRUE(last_row_is_finite(clean));
        auto q = clean;
        q.q[39 * 64 + 5] = infinite ? INFINITY : NAN;
        EXPECT_FALSE(last_row_is_finite(q)) << where << " Q";
        auto v = clean;
        v.v[7 * 64 + 5] = infinite ? 0x7C00 : 0x7E00;
        EXPECT_FALSE(last_row_is_finite(v)) << where << " V";
        auto k = clean;
        k.k[7 * 64 + 5] = infinite ? 0x7C00 : 0x7E00;
        if (infinite) k.q[39 * 64 + 5] = 1.0f;  // a logit of -inf would only drop the key
        EXPECT_FALSE(last_row_is_finite(k)) << where << " K";
      }
    }
  }
}

TEST(Attention, RowsWithoutKeysAreZeroWithLseMinusInfinity) {
  const auto causal = make_problem({9, 4, 2, 1, 64, true}, Inputs::kNormal, 65);
  const auto empty = make_problem({3, 0, 2, 1, 64, false}, Inputs::kNormal, 66);
  for (const Variant variant : kVariants) {
    const Float64Result expected = quantized_float64_attention(causal, {variant, true});
    const AttentionResult actual = run_attention(causal, {variant, true});
    for (size_t i = 0; i < 5 * 128; ++i) ASSERT_EQ(actual.out[i], 0.0f);
    EXPECT_EQ(actual.lse[4], -std::numeric_limits<float>::infinity());
    EXPECT_TRUE(std::isfinite(actual.lse[5]));
    EXPECT_LT(error_of(actual.out, expected.out).relative_l1, 2e-3) << name_of(variant);
    const AttentionResult nothing = run_attention(empty, {variant, true});
    for (const float x : nothing.out) ASSERT_EQ(x, 0.0f);
    for (const float x : nothing.lse) ASSERT_EQ(x, -std::numeric_limits<float>::infinity());
  }
}

TEST(Attention, HugeLogitsStayFinite) {
  auto problem = make_problem({20, 80, 1, 1, 64, true}, Inputs::kNormal, 67);
  for (float& x : problem.q) x *= 1000.0f;
  for (const Variant variant : kVariants) {
    for (const float x : run_attention(problem, {variant, true}).out) {
      ASSERT_TRUE(std::isfinite(x)) << name_of(variant);
    }
  }
}

TEST(Attention, ArgumentsThatCannotBeHonouredAreRefused) {
  const auto problem = make_problem({4, 300, 4, 2, 64, true}, Inputs::kNormal, 68);
  const auto refuses = [&](auto spoil) {
    AttentionResult result;
    PreparedArgs prepared = prepare_args(problem, 128, result);
    spoil(prepared.args);
    EXPECT_THROW(cpu::attention(std::span(&prepared.args, 1), {}), Error);
  };
  refuses([](cpu::AttentionArgs& a) { a.head_dim = 0; });
  refuses([](cpu::AttentionArgs& a) { a.head_dim = 257; });
  refuses([](cpu::AttentionArgs& a) { a.num_kv_heads = 3; });
  refuses([](cpu::AttentionArgs& a) { a.num_kv_heads = 0; });
  refuses([](cpu::AttentionArgs& a) { a.kv_len = 3 * 128 + 1; });
  refuses([](cpu::AttentionArgs& a) { a.q_len = -1; });
  refuses([](cpu::AttentionArgs& a) { a.q_row_stride = 255; });
  refuses([](cpu::AttentionArgs& a) { a.kv.page_size = 0; });
  refuses([](cpu::AttentionArgs& a) { a.softmax_scale = NAN; });
  refuses([](cpu::AttentionArgs& a) { a.out = nullptr; });
  refuses([](cpu::AttentionArgs& a) { a.kv.v_pages = a.kv.v_pages.subspan(1); });
}

}  // namespace
}  // namespace sagelm::testing
