// Quantized pages of the KV cache and attention over them.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <string>

#include "backend/cpu/attention_kernels.h"
#include "backend/cpu/kv_storage.h"
#include "base/dtype.h"
#include "base/error.h"
#include "base/fp8.h"
#include "kernels/attention/recipe.h"
#include "support/attention_inputs.h"
#include "support/float64_attention.h"
#include "support/page_recipe.h"
#include "support/value_rounder.h"

namespace sagelm::testing {
namespace {

constexpr AttentionSpec kSpec{AttentionVariant::kSage2_8b, true};

const AttentionSpec kSpec4b{AttentionVariant::kSage2_4b, true};

int64_t padded(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

// One page of one head, as the formulas have it: one element at a time.
struct Page {
  std::vector<int> k;                 // [kPageTokens][head_dim]
  std::vector<uint8_t> v;             // [kPageTokens][head_dim]
  std::vector<float> scales;          // [kPageScales]
  std::vector<float> steps, middles;  // of INT4 keys, [kPageTokens]; k is then [kPageTokens][dim]
};

// The product with the Hadamard matrix, in the order of the kernels, so that it rounds as theirs.
std::vector<float> rotated(std::vector<float> x, float factor) {
  for (size_t half = 1; half < x.size(); half *= 2) {
    for (size_t i = 0; i < x.size(); ++i) {
      if ((i & half) != 0) continue;
      const float a = x[i], b = x[i + half];
      x[i] = a + b;
      x[i + half] = a - b;
    }
  }
  for (float& value : x) value *= factor;
  return x;
}

Page reference_page(const uint16_t* k, const uint16_t* v, const float* mean, int64_t head_dim) {
  Page page;
  std::vector<float> amax(kPageScales), factors;
  const auto each = [&](const auto& visit) {
    for (int64_t key = 0; key < kPageTokens; ++key) {
      for (int64_t c = 0; c < head_dim; ++c) {
        const int64_t i = key * head_dim + c;
        visit(static_cast<size_t>(key / 4 % 4), to_half(half_to_float(k[i]) - mean[c]),
              half_to_float(v[i]));
      }
    }
  };
  each([&amax](size_t group, float key, float value) {
    amax[group] = std::max(amax[group], std::abs(key));
    amax[4] = std::max(amax[4], std::abs(value));
  });
  for (size_t g = 0; g < amax.size(); ++g) {
    factors.push_back(half_factor(amax[g], g == 4 ? recipe::kTileValueMax : recipe::kInt8Max));
    page.scales.push_back(1.0F / factors.back());
  }
  std::vector<ValueRounder> rounders(static_cast<size_t>(head_dim), ValueRounder(head_dim, true));
  each([&](size_t group, float key, float value) {
    page.k.push_back(static_cast<int>(std::nearbyint(key * factors[group])));  // exact products
    const size_t channel = page.v.size() % rounders.size();
    page.v.push_back(rounders[channel].next(to_half(value * factors[4])));
  });
  return page;
}

// The same page with INT4 keys.
Page reference_int4_page(const uint16_t* k, const uint16_t* v, const float* mean,
                         int64_t head_dim) {
  Page page = reference_page(k, v, mean, head_dim);
  page.k.clear();
  const auto dim = static_cast<size_t>(cpu::page_shape(KvType::kInt4, head_dim).dim);
  for (int64_t key = 0; key < kPageTokens; ++key) {
    std::vector<float> row(dim);
    for (int64_t c = 0; c < head_dim; ++c) {
      row[static_cast<size_t>(c)] = half_to_float(k[key * head_dim + c]) - mean[c];
    }
    row = rotated(std::move(row), dim == 256 ? 1.0F / 16 : 1.0F / 8);
    const auto [least, largest] = std::minmax_element(row.begin(), row.end());
    const auto to_bf16 = [](float x) { return bfloat16_to_float(float_to_bfloat16(x)); };
    page.steps.push_back(to_bf16(std::max(*largest - *least, 1e-7F) / 15));
    page.middles.push_back(to_bf16(*least + 8 * page.steps.back()));
    for (const float x : row) {
      const float integer = std::nearbyint((x - page.middles.back()) * (1 / page.steps.back()));
      page.k.push_back(static_cast<int>(std::clamp(integer, -8.0F, 7.0F)));
    }
  }
  return page;
}

TEST(KvPage, Int4KeysAreTheSameOnEveryInstructionSet) {
  for (const int64_t head_dim : {1, 48, 64, 100, 128, 256}) {
    for (const Inputs inputs : kAllInputs) {
      const auto problem = make_problem({1, kPageTokens, 1, 1, head_dim, true}, inputs, 5);
      std::vector<float> mean(static_cast<size_t>(head_dim));
      for (size_t c = 0; c < mean.size(); ++c)
        mean[c] = to_half(0.37F * static_cast<float>(c % 7) - 1.0F);
      const Page expected =
          reference_int4_page(problem.k.data(), problem.v.data(), mean.data(), head_dim);
      const cpu::PageShape shape = cpu::page_shape(KvType::kInt4, head_dim);
      for (const cpu::KernelTable* kernels : cpu::available_attention_kernels()) {
        std::vector<uint8_t> operands(static_cast<size_t>(shape.operand_bytes()), 0xEE);
        std::vector<float> scales(static_cast<size_t>(shape.scales), -1.0F);
        kernels->quantize_page(KvType::kInt4, problem.k.data(), problem.v.data(), mean.data(),
                               head_dim, operands.data(), scales.data());
        EXPECT_EQ(scales[4], expected.scales[4]);
        for (int64_t key = 0; key < kPageTokens; ++key) {
          const auto at = static_cast<size_t>(key);
          const auto word = std::bit_cast<uint32_t>(scales[kPageScales + at]);
          ASSERT_EQ(bfloat16_to_float(static_cast<uint16_t>(word)), expected.steps[at]);
          ASSERT_EQ(bfloat16_to_float(static_cast<uint16_t>(word >> 16)), expected.middles[at]);
          for (int64_t c = 0; c < shape.dim; ++c) {
            const int64_t half = kPageTokens / 2;
            const uint8_t byte =
                operands[static_cast<size_t>((c / 4 * half + key % half) * 4 + c % 4)];
            const int nibble = key < half ? byte & 15 : byte >> 4;
            ASSERT_EQ(nibble - 8, expected.k[static_cast<size_t>(key * shape.dim + c)])
                << kernels->name << ", head size " << head_dim;
            const uint8_t v = operands[static_cast<size_t>(shape.key_bytes + key * shape.dim + c)];
            const auto i = static_cast<size_t>(key * head_dim + c);
            ASSERT_EQ(v & 0x7F, c < head_dim ? expected.v[i] & 0x7F : 0);
          }
        }
      }
    }
  }
}

TEST(KvPage, HoldsTheSameNumbersOnEveryInstructionSet) {
  for (const int64_t head_dim : {1, 12, 64, 100, 128, 256}) {
    for (const Inputs inputs : kAllInputs) {
      auto problem = make_problem({1, kPageTokens, 1, 1, head_dim, true}, inputs, 5);
      if (inputs == Inputs::kNormal) {
        std::fill(problem.v.begin(), problem.v.end(), uint16_t{0});
      }
      std::vector<float> mean(static_cast<size_t>(head_dim));
      for (size_t c = 0; c < mean.size(); ++c)
        mean[c] = to_half(0.37F * static_cast<float>(c % 7) - 1.0F);
      const Page expected =
          reference_page(problem.k.data(), problem.v.data(), mean.data(), head_dim);
      const int64_t dim = padded(head_dim);
      for (const cpu::KernelTable* kernels : cpu::available_attention_kernels()) {
        std::vector<uint8_t> operands(static_cast<size_t>(2 * kPageTokens * dim), 0xEE);
        std::vector<float> scales(kPageScales);
        kernels->quantize_page(KvType::kInt8, problem.k.data(), problem.v.data(), mean.data(),
                               head_dim, operands.data(), scales.data());
        for (size_t g = 0; g < scales.size(); ++g) {
          EXPECT_EQ(scales[g], expected.scales[g]);
        }
        for (int64_t key = 0; key < kPageTokens; ++key) {
          for (int64_t c = 0; c < dim; ++c) {
            const uint8_t k =
                operands[static_cast<size_t>((c / 4 * kPageTokens + key) * 4 + c % 4)];
            const uint8_t v = operands[static_cast<size_t>((kPageTokens + key) * dim + c)];
            const auto i = static_cast<size_t>(key * head_dim + c);
            ASSERT_EQ(k - 128, c < head_dim ? expected.k[i] : std::lrint(0.0F)) << kernels->name;
            ASSERT_EQ(v & 0x7F, c < head_dim ? expected.v[i] & 0x7F : 0) << kernels->name;
            ASSERT_EQ(e4m3_to_float(v), c < head_dim ? e4m3_to_float(expected.v[i]) : 0);
          }
        }
      }
    }
  }
}

// ---- Attention -------------------------------------------------------------------------------

// A problem whose keys and values are in a cache, appended in chunks of the given length.
class Cached {
 public:
  Cached(const AttentionProblem& problem, int64_t chunk, KvType type = KvType::kInt8)
      : problem_(problem),
        type_(type),
        kv_({.type = type,
             .num_layers = 2,
             .num_kv_heads = problem.shape.num_kv_heads,
             .head_dim = problem.shape.head_dim,
             .num_pages = problem.shape.kv_len / kPageTokens + 1,
             .num_tails = 2}) {
    const AttentionShape& s = problem.shape;
    for (int64_t p = s.kv_len / kPageTokens; p >= 0; --p) pages_.push_back(static_cast<int32_t>(p));
    for (int64_t begin = 0; begin < s.kv_len; begin += chunk) {
      const int64_t end = std::min(s.kv_len, begin + chunk);
      for (int64_t head = 0; head < s.num_kv_heads; ++head) {
        const std::vector<float> k = floats(problem.k, head, begin, end);
        const std::vector<float> v = floats(problem.v, head, begin, end);
        kv_.append(1, place(end, end - begin), head, k.data(), v.data(), s.head_dim, true);
      }
    }
  }

  // The last q_len of the first kv_len tokens attend; kv_len must be what was appended last.
  AttentionResult attend(const cpu::KernelTable& kernels) const {
    AttentionResult result;
    PreparedArgs prepared = prepare_args(problem_, 0, result);
    std::vector<const uint16_t*> none;
    kv_.locate(1, place(problem_.shape.kv_len, problem_.shape.q_len), none, none, prepared.args);
    cpu::attention_with(kernels, std::span(&prepared.args, 1), kSpec, type_);
    return result;
  }
  AttentionResult attend() const { return attend(*cpu::available_attention_kernels().front()); }

 private:
  SequenceChunk place(int64_t kv_len, int64_t q_len) const {
    return {.first_row = 0,
            .q_len = q_len,
            .kv_len = kv_len,
            .pages = std::span(pages_).first(static_cast<size_t>(kv_len / kPageTokens)),
            .tail = 1};
  }
  std::vector<float> floats(const std::vector<uint16_t>& from, int64_t head, int64_t begin,
                            int64_t end) const {
    std::vector<float> values;
    const AttentionShape& s = problem_.shape;
    for (int64_t i = begin * s.head_dim; i < end * s.head_dim; ++i) {
      values.push_back(half_to_float(from[static_cast<size_t>(head * s.kv_len * s.head_dim + i)]));
    }
    return values;
  }

  AttentionProblem problem_;
  KvType type_;
  cpu::CpuKv kv_;
  std::vector<int32_t> pages_;
};

// What attention over the cache means, in exact arithmetic but for the roundings it names.
Float64Result exact_attention(const AttentionProblem& problem, KvType type = KvType::kInt8) {
  const AttentionShape& s = problem.shape;
  const int64_t full = s.kv_len / kPageTokens * kPageTokens;
  Float64Result result;
  result.out.resize(static_cast<size_t>(s.q_len * s.num_heads * s.head_dim));
  result.lse.resize(static_cast<size_t>(s.q_len * s.num_heads));
  for (int64_t head = 0; head < s.num_heads; ++head) {
    const int64_t kv_head = head / (s.num_heads / s.num_kv_heads);
    const uint16_t* k = problem.k.data() + kv_head * s.kv_len * s.head_dim;
    const uint16_t* v = problem.v.data() + kv_head * s.kv_len * s.head_dim;
    std::vector<float> mean(static_cast<size_t>(s.head_dim));
    for (int64_t c = 0; full > 0 && c < s.head_dim; ++c) {
      std::vector<float> keys;
      for (int64_t j = 0; j < kPageTokens; ++j)
        keys.push_back(half_to_float(k[j * s.head_dim + c]));
      mean[static_cast<size_t>(c)] = page_mean(std::move(keys), static_cast<int>(s.head_dim), true);
    }
    std::vector<Page> pages;
    for (int64_t p = 0; p < full; p += kPageTokens) {
      const auto make = type == KvType::kInt4 ? reference_int4_page : reference_page;
      pages.push_back(make(k + p * s.head_dim, v + p * s.head_dim, mean.data(), s.head_dim));
    }
    for (int64_t row = 0; row < s.q_len; ++row) {
      const float* q = problem.q.data() + (row * s.num_heads + head) * s.head_dim;
      double bias = 0;
      for (int64_t c = 0; c < s.head_dim; ++c) {
        bias += static_cast<double>(q[c]) * static_cast<double>(mean[static_cast<size_t>(c)]);
      }
      std::vector<float> rotated_q(q, q + s.head_dim);
      if (type == KvType::kInt4) {
        rotated_q.resize(static_cast<size_t>(cpu::page_shape(type, s.head_dim).dim));
        rotated_q = rotated(std::move(rotated_q), rotated_q.size() == 64 ? 1.0F / 8 : 1.0F / 16);
      }
      double q_amax = 1e-7;
      for (const float x : rotated_q) q_amax = std::max<double>(q_amax, std::abs(x));
      const int64_t visible = s.causal ? s.kv_len - s.q_len + row + 1 : s.kv_len;
      double max = -std::numeric_limits<double>::infinity(), sum = 0;
      std::vector<double> out(static_cast<size_t>(s.head_dim));
      for (int64_t first = 0; first < visible; first += kPageTokens) {
        const bool quantized = first < full;
        const Page* page = quantized ? &pages[static_cast<size_t>(first / kPageTokens)] : nullptr;
        const int64_t last = std::min(visible, first + kPageTokens);
        std::vector<double> logits;
        for (int64_t j = first; j < last; ++j) {
          double logit = 0;
          for (size_t c = 0; quantized && type == KvType::kInt4 && c < rotated_q.size(); ++c) {
            const auto key = static_cast<size_t>(j - first);
            logit += std::nearbyint(static_cast<double>(rotated_q[c]) * 127 / q_amax) * q_amax /
                     127 *
                     (static_cast<double>(page->steps[key]) * page->k[key * rotated_q.size() + c] +
                      static_cast<double>(page->middles[key]));
          }
          for (int64_t c = 0; c < s.head_dim; ++c) {
            if (quantized && type == KvType::kInt4) break;
            const auto i = static_cast<size_t>((j - first) * s.head_dim + c);
            if (quantized) {
              logit += std::nearbyint(static_cast<double>(q[c]) * 127 / q_amax) * page->k[i];
            } else {
              logit += static_cast<double>(q[c]) *
                       (static_cast<double>(half_to_float(k[j * s.head_dim + c])) -
                        static_cast<double>(mean[static_cast<size_t>(c)]));
            }
          }
          if (quantized && type == KvType::kInt8) {
            logit *=
                q_amax / 127 * static_cast<double>(page->scales[static_cast<size_t>(j / 4 % 4)]);
          }
          logits.push_back(logit * static_cast<double>(problem.softmax_scale));
        }
        const double new_max = std::max(max, *std::max_element(logits.begin(), logits.end()));
        const double alpha = std::exp(max - new_max);
        max = new_max;
        sum *= alpha;
        for (double& x : out) x *= alpha;
        for (int64_t j = first; j < last; ++j) {
          const double p = std::exp(logits[static_cast<size_t>(j - first)] - max);
          sum += p;
          const auto scaled = static_cast<float>(448 * p);
          const double rounded = quantized ? e4m3_to_float(float_to_e4m3(scaled))
                                           : half_to_float(float_to_half(scaled));
          for (int64_t c = 0; c < s.head_dim; ++c) {
            const auto i = static_cast<size_t>((j - first) * s.head_dim + c);
            const double value = quantized
                                     ? static_cast<double>(e4m3_to_float(page->v[i])) *
                                           static_cast<double>(page->scales[4])
                                     : static_cast<double>(half_to_float(v[j * s.head_dim + c]));
            out[static_cast<size_t>(c)] += rounded / 448 * value;
          }
        }
      }
      for (int64_t c = 0; c < s.head_dim; ++c) {
        result.out[static_cast<size_t>((row * s.num_heads + head) * s.head_dim + c)] =
            out[static_cast<size_t>(c)] / sum;
      }
      result.lse[static_cast<size_t>(head * s.q_len + row)] =
          max + std::log(sum) + bias * static_cast<double>(problem.softmax_scale);
    }
  }
  return result;
}

AttentionError error_of(const std::vector<float>& actual, const std::vector<double>& expected) {
  return compare(to_double(actual), expected);
}

TEST(QuantizedCache, AttentionComputesItsRecipeExactly) {
  const AttentionShape shapes[] = {{300, 300, 2, 1, 64, true}, {1, 128, 2, 2, 80, true},
                                   {77, 300, 2, 2, 48, true},  {130, 390, 1, 1, 128, false},
                                   {9, 257, 4, 2, 256, true},  {1, 127, 2, 1, 100, true},
                                   {1, 1, 1, 1, 12, true},     {6, 640, 2, 1, 128, true}};
  for (const cpu::KernelTable* kernels : cpu::available_attention_kernels()) {
    for (const AttentionShape& shape : shapes) {
      for (const KvType type : {KvType::kInt8, KvType::kInt4}) {
        const auto problem = make_problem(shape, Inputs::kOffsetK, 21);
        const AttentionResult actual = Cached(problem, 1000, type).attend(*kernels);
        const Float64Result expected = exact_attention(problem, type);
        const std::string where = std::string(kernels->name) + " " + std::to_string(shape.q_len) +
                                  " of " + std::to_string(shape.kv_len) + " head size " +
                                  std::to_string(shape.head_dim) +
                                  (type == KvType::kInt4 ? ", INT4 keys" : "");
        EXPECT_LT(error_of(actual.out, expected.out).relative_l1, 2e-3) << where;
        for (size_t i = 0; i < expected.lse.size(); ++i) {
          EXPECT_NEAR(actual.lse[i], expected.lse[i], 2e-3) << where;
        }
      }
    }
  }
}

// The error of the method: no more than sage2-8b's own with an FP16 cache (attention_test.cpp).
TEST(QuantizedCache, ErrorAgainstFloat64IsThatOfSage2) {
  const double levels[] = {0.036, 0.0375, 0.062};
  for (const int64_t head_dim : {64, 128}) {
    for (const Inputs inputs : kAllInputs) {
      const auto problem = make_problem({768, 768, 1, 1, head_dim, true}, inputs, 11);
      const AttentionError error =
          error_of(Cached(problem, 768).attend().out, float64_attention(problem).out);
      const AttentionError fp16_cache =
          error_of(run_attention(problem, kSpec).out, float64_attention(problem).out);
      const std::string where = std::string(inputs_name(inputs)) + " " + std::to_string(head_dim) +
                                ": relative L1 " + std::to_string(error.relative_l1) +
                                ", with FP16 " + std::to_string(fp16_cache.relative_l1);
      RecordProperty(inputs_name(inputs) + std::to_string(head_dim), where);
      EXPECT_LT(error.relative_l1, 1.5 * levels[static_cast<int>(inputs)]) << where;
    }
  }
}

// INT4 keys are to be better than those of sage2-4b, whose queries have 4 bits too.
TEST(QuantizedCache, ErrorOfInt4KeysIsBelowThatOfSage2_4b) {
  for (const int64_t head_dim : {64, 128}) {
    for (const Inputs inputs : kAllInputs) {
      const auto problem = make_problem({768, 768, 1, 1, head_dim, true}, inputs, 11);
      const std::vector<double> exact = float64_attention(problem).out;
      const double error =
          error_of(Cached(problem, 768, KvType::kInt4).attend().out, exact).relative_l1;
      const double other = error_of(run_attention(problem, kSpec4b).out, exact).relative_l1;
      EXPECT_LT(error, other) << inputs_name(inputs) << " " << head_dim;
    }
  }
}

// A fact at the start of a 16k-token text decides the last token's attention: one key among all the
// others, whose value comes out as with an FP16 cache.
TEST(QuantizedCache, OneKeyFarBackDominates) {
  constexpr int64_t kLength = 16384 + 40, kFact = 20, kDim = 64;
  auto problem = make_problem({1, kLength, 1, 1, kDim, true}, Inputs::kNormal, 9);
  double square = 0;
  for (int64_t c = 0; c < kDim; ++c) square += static_cast<double>(problem.q[c] * problem.q[c]);
  const double wanted = 13.0;  // a logit that outweighs 16k others by about e^3
  for (int64_t c = 0; c < kDim; ++c) {
    problem.k[kFact * kDim + c] = float_to_half(static_cast<float>(
        static_cast<double>(problem.q[c]) * wanted / (square * problem.softmax_scale)));
    problem.v[kFact * kDim + c] = float_to_half(c % 2 == 0 ? 2.0F : -2.0F);
  }
  const Float64Result exact = float64_attention(problem);
  EXPECT_GT(exact.out[0], 1.0);
  EXPECT_LT(
      error_of(run_attention(problem, {AttentionVariant::kFp16, true}).out, exact.out).relative_l1,
      0.01);
  EXPECT_LT(error_of(Cached(problem, 2048).attend().out, exact.out).relative_l1, 0.03);
  EXPECT_LT(error_of(Cached(problem, 2048, KvType::kInt4).attend().out, exact.out).relative_l1,
            0.1);
}

// As attention sinks have, of which V's rounding with feedback must not make more than there is
// (recipe.h): one key has nine tenths of every row's weight, and values near zero.
TEST(QuantizedCache, ValuesNearZeroOfAHeavyKeyStayNearZero) {
  constexpr int64_t kLength = 768, kSink = 303, kHeads = 32;
  for (const int64_t dim : {64, 128}) {
    auto problem = make_problem({1, kLength, kHeads, kHeads, dim, true}, Inputs::kNormal, 9);
    for (int64_t head = 0; head < kHeads; ++head) {
      const float* q = problem.q.data() + head * dim;
      float square = 0;
      for (int64_t c = 0; c < dim; ++c) square += q[c] * q[c];
      uint16_t* k = problem.k.data() + (head * kLength + kSink) * dim;
      uint16_t* v = problem.v.data() + (head * kLength + kSink) * dim;
      for (int64_t c = 0; c < dim; ++c) {
        k[c] = float_to_half(q[c] * 9.3F / (square * problem.softmax_scale));  // ln(9 * 768 * 1.6)
        v[c] = float_to_half(half_to_float(v[c]) * 0.01F);
      }
    }
    const std::vector<double> exact = float64_attention(problem).out;
    EXPECT_LT(error_of(run_attention(problem, kSpec).out, exact).relative_l1, 0.07) << dim;
    EXPECT_LT(error_of(Cached(problem, kLength).attend().out, exact).relative_l1, 0.11) << dim;
  }
}

// Pages do not depend on how the tokens came: a row that sees full pages only is the same bit for
// bit.
TEST(QuantizedCache, PagesAreTheSameForChunksOfAnySize) {
  const auto problem = make_problem({3, 384, 2, 1, 64, true}, Inputs::kHeavyTailed, 33);
  for (const KvType type : {KvType::kInt8, KvType::kInt4}) {
    const AttentionResult whole = Cached(problem, 384, type).attend();
    for (const int64_t chunk : {1, 7, 100, 128, 200, 383}) {
      EXPECT_EQ(Cached(problem, chunk, type).attend().out, whole.out) << chunk;
    }
  }
}

class QuantizedCaches : public ::testing::TestWithParam<KvType> {};
INSTANTIATE_TEST_SUITE_P(Types, QuantizedCaches, ::testing::Values(KvType::kInt8, KvType::kInt4),
                         [](const auto& info) {
                           return info.param == KvType::kInt8 ? "int8" : "int4";
                         });

TEST_P(QuantizedCaches, ChunksAndSingleTokensStayWithinTheStatedBound) {
  for (const Inputs inputs : kAllInputs) {
    const auto whole = make_problem({300, 300, 2, 1, 64, true}, inputs, 32);
    const std::vector<double> expected = to_double(Cached(whole, 300, GetParam()).attend().out);
    for (const int64_t chunk : {1, 37, 128, 170}) {
      std::vector<float> out;
      for (int64_t done = 0; done < 300; done += chunk) {
        const int64_t count = std::min<int64_t>(chunk, 300 - done);
        const auto part =
            Cached(prefix_of(whole, done + count, count), chunk, GetParam()).attend().out;
        out.insert(out.end(), part.begin(), part.end());
      }
      EXPECT_LE(error_of(out, expected).relative_l1, cpu::attention_split_bound(kSpec, GetParam()))
          << inputs_name(inputs) << " " << chunk;
    }
  }
}

TEST(QuantizedCache, OtherVariantsAreRefused) {
  const auto problem = make_problem({1, 200, 1, 1, 64, true}, Inputs::kNormal, 1);
  AttentionResult result;
  PreparedArgs prepared = prepare_args(problem, 0, result);
  EXPECT_THROW(
      cpu::attention(std::span(&prepared.args, 1), {AttentionVariant::kFp16, true}, KvType::kInt8),
      Error);
  EXPECT_THROW(cpu::attention(std::span(&prepared.args, 1), kSpec4b, KvType::kInt8), Error);
  EXPECT_THROW(cpu::attention(std::span(&prepared.args, 1), {AttentionVariant::kSage1B, true},
                              KvType::kInt4),
               Error);
  EXPECT_THROW(cpu::attention(std::span(&prepared.args, 1), kSpec, KvType::kInt8), Error);
}

TEST(QuantizedCache, NanInAPageReachesTheOutput) {
  for (const bool in_key : {true, false}) {
    auto problem = make_problem({1, 200, 1, 1, 64, true}, Inputs::kNormal, 2);
    (in_key ? problem.k : problem.v)[70 * 64 + 3] = 0x7E00;
    for (const cpu::KernelTable* kernels : cpu::available_attention_kernels()) {
      for (const KvType type : {KvType::kInt8, KvType::kInt4}) {
        const AttentionResult result = Cached(problem, 200, type).attend(*kernels);
        EXPECT_TRUE(std::isnan(result.out[3])) << kernels->name << " " << in_key;
      }
    }
  }
}

}  // namespace
}  // namespace sagelm::testing
