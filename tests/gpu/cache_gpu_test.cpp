// The quantized KV cache's kernels (kernels/cache): pages bit for bit against the recipe and
// against the quantizer of whole tensors, decode and prefill against float64. Needs a Hopper
// device; skips without one.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "base/fp8.h"
#include "gpu/gpu_quantized_kv.h"
#include "kernels/attention/recipe.h"
#include "kernels/attention/sage_quantize_sm90.h"
#include "kernels/ops/probe.h"
#include "support/sweep.h"

namespace sagelm::testing {
namespace {

using kernels::Element;

constexpr int kPage = 128;

class CacheGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    if (const std::string reason = no_device_reason(); !reason.empty()) GTEST_SKIP() << reason;
    cudaDeviceProp properties;
    ASSERT_EQ(cudaGetDeviceProperties(&properties, 0), cudaSuccess);
    if (properties.major != 9) GTEST_SKIP() << "the quantized cache is Hopper's";
    ASSERT_EQ(kernels::probe_kernels(), cudaSuccess) << "built for another device";
  }
};

const std::vector<KvShape> kShapes = {{Element::kF16, 4, 4, 128}, {Element::kBF16, 4, 2, 128},
                                      {Element::kF16, 3, 1, 64},  {Element::kF16, 2, 2, 96},
                                      {Element::kF16, 4, 1, 80},  {Element::kBF16, 2, 1, 16},
                                      {Element::kF16, 2, 1, 48}};

std::string name(const KvShape& shape) {
  return std::to_string(shape.heads) + "/" + std::to_string(shape.kv_heads) + " heads of " +
         std::to_string(shape.dim) + (shape.type == Element::kBF16 ? ", bf16" : "");
}

// The logarithm may differ in its last bits.
void expect_same(const GpuQuantizedKv::Page& actual, const GpuQuantizedKv::Page& expected,
                 const std::string& where) {
  EXPECT_EQ(actual.keys, expected.keys) << where;
  EXPECT_EQ(actual.values, expected.values) << where;
  for (const size_t i : {0u, 1u, 2u, 3u, 4u, 6u}) {
    EXPECT_EQ(actual.scales[i], expected.scales[i]) << where << ", scale " << i;
  }
  EXPECT_NEAR(actual.scales[5], expected.scales[5], 1e-5) << where;
}

TEST_F(CacheGpu, PagesAreWhatTheRecipeSaysHoweverTheTokensCome) {
  // Counts of the two sequences, step by step: at once; page by page; pages that close from the
  // tail and from the step's rows; a token at a time across a page's end.
  using Steps = std::vector<std::vector<int>>;
  Steps single = {{120, 250}};
  for (int i = 0; i < 20; ++i) single.push_back({1, i < 10 ? 1 : 0});
  single.push_back({260, 40});
  const std::vector<Steps> ways = {{{400, 300}},
                                   {{128, 256}, {128, 44}, {128, 0}, {16, 0}},
                                   {{100, 300}, {100, 0}, {200, 0}},
                                   {{127, 128}, {1, 127}, {272, 45}},
                                   {{1, 255}, {126, 1}, {2, 1}, {271, 43}},
                                   single};
  for (const KvShape& shape : kShapes) {
    for (const auto& [smooth_k, for_prefill] :
         {std::pair{true, false}, {true, true}, {false, false}}) {
      for (size_t way = 0; way < ways.size(); ++way) {
        if (!smooth_k && way > 1) continue;
        const std::string where = name(shape) + ", way " + std::to_string(way);
        GpuQuantizedKv cache(shape, {400, 300}, smooth_k);
        for (const std::vector<int>& counts : ways[way]) {
          cache.append(counts, for_prefill);
          cache.check_untouched();
        }
        for (int sequence = 0; sequence < 2; ++sequence) {
          const int full = cache.length(sequence) / kPage;
          for (int head = 0; head < shape.kv_heads; ++head) {
            std::vector<float> mean(static_cast<size_t>(shape.dim));
            for (int c = 0; c < shape.dim && smooth_k; ++c) {
              double sum = 0;
              for (int t = 0; t < kPage; ++t) sum += cache.token(sequence, t, 0, head, c);
              mean[static_cast<size_t>(c)] = static_cast<float>(sum / kPage);
            }
            EXPECT_EQ(cache.mean(sequence, head), mean) << where;
            for (int i = 0; i < full; ++i) {
              expect_same(cache.page(sequence, i, head),
                          cache.expected_page(sequence, i, head, mean),
                          where + ", page " + std::to_string(i));
            }
            for (int t = full * kPage; t < cache.length(sequence); ++t) {
              for (int c = 0; c < shape.dim; ++c) {
                for (const int which : {0, 1}) {
                  EXPECT_EQ(cache.tail(sequence, t - full * kPage, which, head, c),
                            cache.token(sequence, t, which, head, c))
                      << where << ", token " << t;
                }
              }
            }
            if (HasFailure()) return;
          }
        }
      }
    }
  }
}

TEST_F(CacheGpu, PagesAreTilesOfThePrefillQuantizer) {
  for (const KvShape& shape : kShapes) {
    constexpr int kTokens = 300;
    GpuQuantizedKv cache(shape, {kTokens}, false);
    cache.append({kTokens});
    // The same tokens, [token][2][kv_head][dim].
    std::vector<float> tokens;
    for (int t = 0; t < kTokens; ++t) {
      for (const int which : {0, 1}) {
        for (int head = 0; head < shape.kv_heads; ++head) {
          for (int c = 0; c < shape.dim; ++c) {
            tokens.push_back(static_cast<float>(cache.token(0, t, which, head, c)));
          }
        }
      }
    }
    const GpuArray kv(shape.type, std::move(tokens));
    const int64_t half = int64_t{shape.kv_heads} * shape.dim;
    kernels::Problem p{};
    p.k = p.q = {kv.data(), 0, 2 * half, shape.dim};
    p.v = {static_cast<uint16_t*>(kv.data()) + half, 0, 2 * half, shape.dim};
    p.batch = 1;
    p.num_heads = p.num_kv_heads = shape.kv_heads;
    p.head_dim = shape.dim;
    p.max_q_len = p.max_kv_len = kTokens;
    p.softmax_scale = 1.0f;
    p.bf16 = shape.type == Element::kBF16;
    size_t bytes = 0;
    const auto dim = static_cast<size_t>(shape.padded());
    kernels::place_sage_tiles(p, shape.padded(), nullptr, &bytes);
    DeviceBuffer workspace(bytes);
    workspace.fill(0);  // parts of it stay unwritten, and all of it is read below
    const auto tiles = kernels::place_sage_tiles(p, shape.padded(), workspace.data(), &bytes);
    expect_done(kernels::quantize_to_sage_tiles(p, shape.padded(), tiles, nullptr), "quantize");
    std::vector<std::byte> host(bytes);
    workspace.download(host.data(), bytes);
    const auto at = [&](const void* device, size_t offset) {
      return reinterpret_cast<const uint8_t*>(host.data()) +
             (static_cast<const std::byte*>(device) -
              static_cast<const std::byte*>(workspace.data())) +
             offset;
    };
    for (int head = 0; head < shape.kv_heads; ++head) {
      for (int i = 0; i < kTokens / kPage; ++i) {
        const auto tile = static_cast<size_t>(head * tiles.kv_tiles + i);
        const uint8_t* keys = at(tiles.keys, tile * kPage * dim);
        const uint8_t* values = at(tiles.values, tile * kPage * dim);
        const auto* scales = reinterpret_cast<const float*>(
            at(tiles.scales, tile * kernels::kTileScales * sizeof(float)));
        EXPECT_EQ(cache.raw_keys(0, i, head), std::vector<uint8_t>(keys, keys + kPage * dim));
        EXPECT_EQ(cache.raw_values(0, i, head), std::vector<uint8_t>(values, values + kPage * dim));
        EXPECT_EQ(cache.page(0, i, head).scales,
                  std::vector<float>(scales, scales + kernels::kTileScales - 1));
      }
    }
    if (HasFailure()) FAIL() << name(shape);
  }
}

// Lengths after the last step, and how many tokens that step has of each sequence.
struct DecodeBatch {
  std::vector<int> lengths, counts;
};

void check_decode(const KvShape& shape, const DecodeBatch& batch) {
  GpuQuantizedKv cache(shape, batch.lengths);
  std::vector<int> before = batch.lengths;
  for (size_t i = 0; i < before.size(); ++i) before[i] -= batch.counts[i];
  if (*std::max_element(before.begin(), before.end()) > 0) cache.append(before);
  cache.append(batch.counts);
  const GpuQuantizedKv::Output output = cache.decode();
  const int most = *std::max_element(batch.counts.begin(), batch.counts.end());
  const bool bf16 = shape.type == Element::kBF16;
  double error = 0, size = 0;
  size_t row = 0;
  for (size_t sequence = 0; sequence < batch.counts.size(); ++sequence) {
    for (int query = 0; query < batch.counts[sequence]; ++query, ++row) {
      for (int head = 0; head < shape.heads; ++head) {
        const auto b = static_cast<int>(sequence);
        const GpuQuantizedKv::Row expected = cache.oracle(b, query, head);
        const GpuQuantizedKv::Row exact = cache.exact(b, query, head);
        const std::string where = name(shape) + ", length " +
                                  std::to_string(batch.lengths[sequence]) + ", query " +
                                  std::to_string(query) + ", head " + std::to_string(head);
        for (int c = 0; c < shape.dim; ++c) {
          const auto at = static_cast<size_t>(c);
          const double actual =
              output.out[(row * static_cast<size_t>(shape.heads) + static_cast<size_t>(head)) *
                             static_cast<size_t>(shape.dim) +
                         at];
          // P is rounded to FP16 (to BF16 in a BF16 tail), the result once more.
          const double bound = (bf16 ? 0x1p-8 : 0x1p-10) * expected.magnitudes[at] +
                               rounding(shape.type) * std::abs(expected.out[at]) + 1e-6;
          ASSERT_TRUE(std::abs(actual - expected.out[at]) <= bound)
              << where << ", channel " << c << ": " << actual << ", not " << expected.out[at]
              << " +- " << bound;
          error += std::abs(actual - exact.out[at]);
          size += std::abs(exact.out[at]);
        }
        const double lse = static_cast<double>(
            output.lse[static_cast<size_t>((b * shape.heads + head) * most + query)]);
        EXPECT_NEAR(lse, expected.lse, 1e-3) << where;
        EXPECT_NEAR(lse, exact.lse, 0.05) << where;
      }
    }
  }
  // Of the whole method on such inputs: INT8 queries and keys, e4m3 values.
  EXPECT_LT(error, 0.08 * size) << name(shape);
}

TEST_F(CacheGpu, DecodeOneToken) {
  for (const KvShape& shape : kShapes) {
    for (const int length : {1, 2, 17, 127, 128, 129, 144, 256, 300, 512, 513, 640, 650, 1100}) {
      check_decode(shape, {{length}, {1}});
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(CacheGpu, DecodeRaggedBatch) {
  for (const KvShape& shape : kShapes) {
    check_decode(shape, {{700, 1, 128, 90, 1291, 512}, {1, 1, 1, 0, 1, 1}});
    if (HasFatalFailure()) return;
  }
}

TEST_F(CacheGpu, DecodeSeveralQueries) {
  // Rows that see different parts of a page, of a tail, and of both.
  for (const KvShape& shape : {KvShape{Element::kF16, 4, 4, 128}, KvShape{Element::kF16, 4, 1, 64},
                               KvShape{Element::kBF16, 8, 2, 128}}) {
    for (const DecodeBatch& batch :
         {DecodeBatch{{4}, {4}}, {{130, 257, 384}, {4, 3, 2}}, {{520, 700, 128}, {1, 4, 4}}}) {
      check_decode(shape, batch);
      if (HasFatalFailure()) return;
    }
  }
  check_decode({Element::kF16, 1, 1, 128}, {{140, 16, 650}, {16, 16, 15}});
}

TEST_F(CacheGpu, DecodeGroupOfSixteen) {
  check_decode({Element::kF16, 16, 1, 128}, {{900, 40}, {1, 1}});
  check_decode({Element::kF16, 32, 2, 64}, {{900, 40}, {1, 1}});
}

TEST_F(CacheGpu, DecodeRandomShapes) {
  Sweep sweep(sweep_seed(), {16, 48, 64, 80, 96, 112, 128, 128});
  const TimeLimit limit(4);
  int cases = 0;
  for (; !limit.passed() && !HasFatalFailure(); ++cases) {
    const SweepCase picked = sweep.next(1500, 1500);
    const KvShape shape{sweep.one_in(2) ? Element::kF16 : Element::kBF16, picked.num_heads,
                        picked.num_kv_heads, picked.head_dim};
    DecodeBatch batch{.lengths = picked.kv_lens, .counts = {}};
    for (const int length : batch.lengths) {
      const int most = sweep.one_in(2) ? 1 : 16 / (shape.heads / shape.kv_heads);
      batch.counts.push_back(std::min(length, sweep.uniform(1, most)));
    }
    SCOPED_TRACE("seed " + std::to_string(sweep_seed()) + ", case " + std::to_string(cases) + ", " +
                 picked.describe());
    check_decode(shape, batch);
  }
  std::printf("seed %u, %d cases\n", sweep_seed(), cases);
}

TEST_F(CacheGpu, DecodeLongSequence) {
  // More parts than a warp has lanes.
  check_decode({Element::kF16, 1, 1, 64}, {{18000}, {1}});
}

TEST_F(CacheGpu, SequenceDoesNotDependOnItsNeighbours) {
  const KvShape shape = {Element::kF16, 4, 2, 128};
  GpuQuantizedKv together(shape, {900, 77, 2000}), alone(shape, {900});
  together.append({899, 76, 1999});
  together.append({1, 1, 1});
  alone.append({899});
  alone.append({1});
  const std::vector<std::byte> both = together.decode().raw, one = alone.decode().raw;
  EXPECT_TRUE(std::equal(one.begin(), one.end(), both.begin()));
  EXPECT_EQ(together.decode().raw, both);
}

// The steps of a batch; the attention of the last one.
void check_prefill(const KvShape& shape, const std::vector<std::vector<int>>& steps,
                   bool smooth_k = true) {
  std::vector<int> lengths(steps.front().size());
  for (const std::vector<int>& counts : steps) {
    for (size_t i = 0; i < counts.size(); ++i) lengths[i] += counts[i];
  }
  GpuQuantizedKv cache(shape, lengths, smooth_k);
  for (const std::vector<int>& counts : steps) cache.append(counts, true);
  const GpuQuantizedKv::Output output = cache.prefill();
  const std::vector<int>& counts = steps.back();
  double error = 0, method_error = 0, size = 0;
  size_t row = 0;
  for (size_t sequence = 0; sequence < counts.size(); ++sequence) {
    for (int query = 0; query < counts[sequence]; ++query, ++row) {
      // The oracle is slow: the first rows, the last ones and some between, of one head each.
      const int last = counts[sequence] - 1;
      if (query > 3 && last - query > 3 && query % 61 != 0) continue;
      for (int head = 0; head < shape.heads; ++head) {
        if (last > 3 && query % shape.heads != head) continue;
        const auto b = static_cast<int>(sequence);
        const GpuQuantizedKv::Row expected = cache.oracle(b, query, head);
        const GpuQuantizedKv::Row exact = cache.exact(b, query, head);
        double row_error = 0, row_size = 0;
        for (int c = 0; c < shape.dim; ++c) {
          const auto at = static_cast<size_t>(c);
          const double actual =
              output.out[(row * static_cast<size_t>(shape.heads) + static_cast<size_t>(head)) *
                             static_cast<size_t>(shape.dim) +
                         at];
          row_error += std::abs(actual - expected.out[at]);
          row_size += std::abs(expected.out[at]);
          method_error += std::abs(actual - exact.out[at]);
        }
        // P has 3 bits after the point: one that stands alone is off by up to 1/16.
        ASSERT_LT(row_error, 0.07 * row_size)
            << name(shape) << ", sequence " << sequence << " of " << lengths[sequence] << ", query "
            << query << ", head " << head;
        error += row_error;
        size += row_size;
      }
    }
  }
  EXPECT_LT(error, 0.035 * size) << name(shape);
  EXPECT_LT(method_error, 0.08 * size) << name(shape);
}

TEST_F(CacheGpu, PrefillOfNewSequences) {
  for (const KvShape& shape : kShapes) {
    for (const int length : {1, 17, 63, 127, 128, 129, 191, 256, 300, 700}) {
      check_prefill(shape, {{length}});
      if (HasFatalFailure()) return;
    }
    check_prefill(shape, {{5, 700, 64, 128, 1, 300, 129}});
    if (HasFatalFailure()) return;
  }
}

TEST_F(CacheGpu, PrefillContinuesFromPages) {
  for (const KvShape& shape : kShapes) {
    // Onto nothing but a tail, onto pages, onto both; ending in a tail, at a page's end, past
    // several; ragged, beside sequences that begin, that stand still and that decode.
    for (const std::vector<std::vector<int>>& steps :
         {std::vector<std::vector<int>>{{50}, {20}},
          {{100}, {28}},
          {{100}, {200}},
          {{128}, {17}},
          {{256}, {300}},
          {{130, 7}, {60, 200}, {66, 1}},
          {{700, 3, 128, 0, 515}, {129, 130, 1, 90, 0}},
          {{1100, 1000}, {200, 333}}}) {
      check_prefill(shape, steps);
      if (HasFatalFailure()) return;
    }
    check_prefill(shape, {{200, 10}, {70, 40}}, false);
    if (HasFatalFailure()) return;
  }
}

TEST_F(CacheGpu, PrefillDoesNotDependOnNeighbours) {
  const KvShape shape = {Element::kF16, 4, 2, 128};
  GpuQuantizedKv together(shape, {900, 300, 2000}), alone(shape, {900});
  together.append({500, 20, 1500}, true);
  together.append({400, 280, 500}, true);
  alone.append({500}, true);
  alone.append({400}, true);
  const std::vector<std::byte> both = together.prefill().raw, one = alone.prefill().raw;
  EXPECT_TRUE(std::equal(one.begin(), one.end(), both.begin()));
  EXPECT_EQ(together.prefill().raw, both);
}

TEST_F(CacheGpu, RefusesWhatItCannotDo) {
  EXPECT_EQ(kernels::quantized_kv_refusal(32, 8, 128), nullptr);
  EXPECT_NE(kernels::quantized_kv_refusal(32, 8, 256), nullptr);
  EXPECT_NE(kernels::quantized_kv_refusal(32, 8, 100), nullptr);
  EXPECT_NE(kernels::quantized_kv_refusal(32, 5, 128), nullptr);
  const KvShape shape = {Element::kF16, 4, 1, 64};
  GpuQuantizedKv cache(shape, {10});
  cache.append({5});
  const kernels::DecodeFromQuantizedKv args = cache.decode_args();
  EXPECT_FALSE(kernels::quantized_kv_decode_takes(4, 1, 5));
  EXPECT_EQ(kernels::decode_from_quantized_kv(args, nullptr, nullptr), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace sagelm::testing
