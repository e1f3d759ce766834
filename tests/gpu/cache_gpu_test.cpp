// The quantized KV cache's kernels (kernels/cache): pages bit for bit against the recipe and
// against the quantizer of whole tensors, decode against float64. Needs a Hopper device; skips
// without one.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "base/fp8.h"
#include "gpu/gpu_quantized_kv.h"
#include "gpu/quantized_kv_fixture.h"
#include "kernels/attention/recipe.h"
#include "kernels/attention/sage_quantize_sm90.h"
#include "support/page_recipe.h"
#include "support/sweep.h"
#include "support/value_rounder.h"

namespace sagelm::testing {
namespace {

using kernels::Element;

constexpr int kPage = 128;

class CacheGpu : public QuantizedKvGpu {};

const std::vector<KvShape> kShapes = {
    {Element::kF16, 4, 4, 128},        {Element::kBF16, 4, 2, 128},
    {Element::kF16, 3, 1, 64},         {Element::kF16, 2, 2, 96},
    {Element::kF16, 4, 1, 80},         {Element::kBF16, 2, 1, 16},
    {Element::kF16, 2, 1, 48},         {Element::kF16, 4, 4, 128, true},
    {Element::kBF16, 4, 2, 128, true}, {Element::kF16, 3, 1, 64, true},
    {Element::kBF16, 4, 1, 80, true},  {Element::kF16, 2, 1, 48, true}};

std::string name(const KvShape& shape) {
  return std::to_string(shape.heads) + "/" + std::to_string(shape.kv_heads) + " heads of " +
         std::to_string(shape.dim) + (shape.type == Element::kBF16 ? ", bf16" : "") +
         (shape.int4_keys ? ", INT4 keys" : "");
}

// The INT4 key of a token, likewise.
void append_int4_key(std::vector<float> key, GpuQuantizedKv::Page& page) {
  key = rotated_key(std::move(key));
  const auto [least, largest] = std::minmax_element(key.begin(), key.end());
  const auto to_bf16 = [](float x) { return bfloat16_to_float(float_to_bfloat16(x)); };
  const float range = std::max(*largest - *least, recipe::kAmaxFloor);
  const float step = to_bf16(range / 15.0f), middle = to_bf16(*least + 8.0f * step);
  const float inverse = 1.0f / step;
  for (const float x : key) {
    const float integer = std::nearbyint((x - middle) * inverse);
    page.keys.push_back(static_cast<int8_t>(std::clamp(integer, -8.0f, 7.0f)));
  }
  page.steps.push_back(step);
  page.middles.push_back(middle);
}

// What the recipe makes of the 16-bit tokens of a page.
GpuQuantizedKv::Page quantized(const GpuQuantizedKv& cache, const KvShape& shape, int sequence,
                               int index, int kv_head, const std::vector<float>& mean) {
  const int dim = shape.dim;
  const auto value = [&](int token, int which, int c) {
    return static_cast<float>(cache.token(sequence, index * kPage + token, which, kv_head, c));
  };
  // FP16 numbers are quantized in FP16 arithmetic.
  const bool halves = shape.type == Element::kF16;
  const auto rounded = [&](float x) { return halves ? to_half(x) : x; };
  const bool round_keys = halves && !shape.int4_keys;
  float key_amax[4], value_amax = recipe::kAmaxFloor;
  std::fill(key_amax, key_amax + 4, recipe::kAmaxFloor);
  for (int token = 0; token < kPage; ++token) {
    for (int c = 0; c < dim; ++c) {
      float& group = key_amax[token / 4 % 4];
      group = std::max(group, std::abs(rounded(value(token, 0, c) - mean[static_cast<size_t>(c)])));
      value_amax = std::max(value_amax, std::abs(value(token, 1, c)));
    }
  }
  GpuQuantizedKv::Page page;
  const auto factor = [&](float amax, float levels) {
    return halves ? half_factor(amax, levels) : levels / amax;
  };
  const float value_factor = factor(value_amax, recipe::kTileValueMax);
  std::vector<ValueRounder> rounders(static_cast<size_t>(dim), ValueRounder(dim, halves));
  for (int token = 0; token < kPage; ++token) {
    const float inverse = factor(key_amax[token / 4 % 4], recipe::kInt8Max);
    std::vector<float> smoothed;
    for (int c = 0; c < shape.padded(); ++c) {
      float key = c < dim ? value(token, 0, c) - mean[static_cast<size_t>(c)] : 0.0f;
      if (round_keys) key = to_half(key);
      smoothed.push_back(key);
      const float integer = std::fma(key, inverse, 12582912.0f);
      if (!shape.int4_keys) {
        page.keys.push_back(static_cast<int8_t>(std::bit_cast<uint32_t>(integer) & 0xFF));
      }
      page.values.push_back(c < dim ? rounders[static_cast<size_t>(c)].next(
                                          rounded(value(token, 1, c) * value_factor))
                                    : 0);
    }
    if (shape.int4_keys) append_int4_key(std::move(smoothed), page);
  }
  const auto scale = [&](float amax, float levels) {
    return halves ? 1.0f / half_factor(amax, levels) : amax * (1.0f / levels);
  };
  for (const float amax : key_amax) page.scales.push_back(scale(amax, recipe::kInt8Max));
  page.scales.push_back(scale(value_amax, recipe::kTileValueMax));
  page.scales.push_back(1.0f / page.scales[4]);
  return page;
}

void expect_same(const GpuQuantizedKv::Page& actual, const GpuQuantizedKv::Page& expected,
                 const std::string& where) {
  EXPECT_EQ(actual.keys, expected.keys) << where;
  EXPECT_EQ(actual.values, expected.values) << where;
  EXPECT_EQ(actual.steps, expected.steps) << where;
  EXPECT_EQ(actual.middles, expected.middles) << where;
  for (size_t i = 0; i < expected.scales.size(); ++i) {
    if (i < 4 && !actual.steps.empty()) continue;
    EXPECT_EQ(actual.scales[i], expected.scales[i]) << where << ", scale " << i;
  }
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
    for (const bool smooth_k : {true, false}) {
      for (size_t way = 0; way < ways.size(); ++way) {
        if (!smooth_k && way > 1) continue;
        const std::string where = name(shape) + ", way " + std::to_string(way);
        GpuQuantizedKv cache(shape, {400, 300}, smooth_k);
        for (const std::vector<int>& counts : ways[way]) {
          cache.append(counts);
          cache.check_untouched();
        }
        for (int sequence = 0; sequence < 2; ++sequence) {
          const int full = cache.length(sequence) / kPage;
          for (int head = 0; head < shape.kv_heads; ++head) {
            std::vector<float> mean(static_cast<size_t>(shape.dim));
            for (int c = 0; c < shape.dim && smooth_k; ++c) {
              std::vector<float> keys;
              for (int t = 0; t < kPage; ++t) {
                keys.push_back(static_cast<float>(cache.token(sequence, t, 0, head, c)));
              }
              mean[static_cast<size_t>(c)] =
                  page_mean(std::move(keys), shape.dim, shape.type == Element::kF16);
            }
            EXPECT_EQ(cache.mean(sequence, head), mean) << where;
            for (int i = 0; i < full; ++i) {
              expect_same(cache.page(sequence, i, head),
                          quantized(cache, shape, sequence, i, head, mean),
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
    if (shape.int4_keys) continue;
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
                  std::vector<float>(scales, scales + kernels::kValueScaleInverse + 1));
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
        EXPECT_NEAR(lse, exact.lse, shape.int4_keys ? 0.3 : 0.05) << where;
      }
    }
  }
  // Of the whole method on such inputs: INT8 queries, INT8 or INT4 keys, e4m3 values.
  EXPECT_LT(error, (shape.int4_keys ? 0.25 : 0.08) * size) << name(shape);
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
  for (const KvShape& shape :
       {KvShape{Element::kF16, 4, 4, 128}, KvShape{Element::kF16, 4, 1, 64},
        KvShape{Element::kBF16, 8, 2, 128}, KvShape{Element::kF16, 8, 2, 128, true}}) {
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
  const TimeLimit limit(3);
  int cases = 0;
  for (; !limit.passed() && !HasFatalFailure(); ++cases) {
    const SweepCase picked = sweep.next(700, 700);
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
  check_decode({Element::kF16, 1, 1, 64, true}, {{18000}, {1}});
}

// A fact at the start of a 16k-token text decides the last token's attention as with an FP16 cache.
TEST_F(CacheGpu, OneKeyFarBackDominates) {
  constexpr int kLength = 16384 + 40, kFact = 20;
  const auto distance = [](const std::vector<double>& a, const std::vector<double>& b) {
    double difference = 0, size = 0;
    for (size_t i = 0; i < b.size(); ++i) {
      difference += std::abs(a[i] - b[i]);
      size += std::abs(b[i]);
    }
    return difference / size;
  };
  for (const int dim : {64, 128}) {
    for (const bool int4_keys : {false, true}) {
      const KvShape shape{Element::kF16, 1, 1, dim, int4_keys};
      GpuQuantizedKv cache(shape, {kLength}, true, kFact);
      cache.append({kLength - 1});
      cache.append({1});
      const std::vector<double> exact = cache.exact(0, 0, 0).out;
      EXPECT_GT(exact[0], 1.0);
      EXPECT_LT(distance(cache.with_fp16_cache(), exact), 0.01) << name(shape);
      EXPECT_LT(distance(cache.decode().out, exact), int4_keys ? 0.1 : 0.05) << name(shape);
    }
  }
}

TEST_F(CacheGpu, DecodeThatAppendsIsTheSame) {
  for (const KvShape& shape :
       {KvShape{Element::kF16, 4, 4, 128}, KvShape{Element::kBF16, 8, 2, 128},
        KvShape{Element::kF16, 3, 1, 64}, KvShape{Element::kF16, 4, 2, 128, true},
        KvShape{Element::kBF16, 3, 1, 64, true}}) {
    const std::vector<int> lengths = {2, 18, 1100, 130, 3000};
    GpuQuantizedKv apart(shape, lengths), at_once(shape, lengths);
    for (GpuQuantizedKv* cache : {&apart, &at_once}) cache->append({0, 15, 1097, 128, 2997});
    for (int step = 0; step < 2; ++step) {
      const std::vector<int> one(lengths.size(), 1);
      apart.append(one);
      const std::vector<std::byte> expected = apart.decode().raw;
      EXPECT_EQ(at_once.append_and_decode(one).raw, expected) << name(shape);
      at_once.check_untouched();
      for (int sequence = 0; sequence < 5; ++sequence) {
        for (int head = 0; head < shape.kv_heads; ++head) {
          for (int place = 0; place < apart.length(sequence) % kPage; ++place) {
            for (int c = 0; c < shape.dim; ++c) {
              for (const int which : {0, 1}) {
                ASSERT_EQ(at_once.tail(sequence, place, which, head, c),
                          apart.tail(sequence, place, which, head, c))
                    << name(shape) << ", sequence " << sequence << ", token " << place;
              }
            }
          }
        }
      }
    }
  }
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

// Of so many that a block takes several parts of a sequence, by few rows and by many.
TEST_F(CacheGpu, SequenceDoesNotDependOnManyNeighbours) {
  std::vector<int> lengths(16, 1000);
  lengths[0] = 910;
  lengths[3] = 77;
  const std::vector<int> ones(lengths.size(), 1);
  for (const auto& [shape, queries] : {std::pair{KvShape{Element::kF16, 8, 8, 64}, 1},
                                       {KvShape{Element::kF16, 8, 8, 64, true}, 1},
                                       {KvShape{Element::kF16, 8, 8, 64}, 9}}) {
    GpuQuantizedKv together(shape, lengths), alone(shape, {lengths[0]});
    std::vector<int> before = lengths;
    for (int& length : before) length -= queries;
    together.append(before);
    together.append(std::vector<int>(lengths.size(), queries));
    alone.append({before[0]});
    alone.append({queries});
    const std::vector<std::byte> all = together.decode().raw, one = alone.decode().raw;
    EXPECT_TRUE(std::equal(one.begin(), one.end(), all.begin())) << name(shape);
    if (queries > 1) continue;
    GpuQuantizedKv at_once(shape, lengths);
    at_once.append(before);
    EXPECT_EQ(at_once.append_and_decode(ones).raw, all) << name(shape);
  }
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
  EXPECT_FALSE(kernels::quantized_kv_decode_takes(args));
  EXPECT_EQ(kernels::decode_from_quantized_kv(args, nullptr, nullptr), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace sagelm::testing
