#include "eval/compare_layers.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "base/dtype.h"
#include "base/error.h"
#include "support/attention_inputs.h"
#include "support/float64_attention.h"

namespace sagelm {
namespace {

// A record as the model gives it, of a problem whose queries are as many as its keys.
struct Probed {
  AttentionDims dims;
  std::vector<float> qkv;
  std::vector<float> out;
  Model::AttentionRecord record;

  Probed(const testing::AttentionProblem& problem, int64_t layer) {
    const testing::AttentionShape& shape = problem.shape;
    dims = {shape.num_heads, shape.num_kv_heads, shape.head_dim};
    const int64_t d = shape.head_dim;
    for (int64_t t = 0; t < shape.q_len; ++t) {
      const auto q = problem.q.begin() + t * shape.num_heads * d;
      qkv.insert(qkv.end(), q, q + shape.num_heads * d);
      for (const std::vector<uint16_t>* from : {&problem.k, &problem.v}) {
        for (int64_t head = 0; head < shape.num_kv_heads; ++head) {
          for (int64_t i = 0; i < d; ++i) {
            qkv.push_back(
                half_to_float((*from)[static_cast<size_t>((head * shape.kv_len + t) * d + i)]));
          }
        }
      }
    }
    out.assign(problem.q.size(), 0);
    record = {.layer = layer, .tokens = shape.q_len, .qkv = qkv, .out = out};
  }
};

testing::AttentionProblem problem_of(int64_t tokens, int64_t heads, int64_t kv_heads) {
  return testing::make_problem({.q_len = tokens,
                                .kv_len = tokens,
                                .num_heads = heads,
                                .num_kv_heads = kv_heads,
                                .head_dim = 48},
                               testing::Inputs::kHeavyTailed, 3);
}

TEST(CompareLayers, ExactAttentionIsThatOfTheOtherOracle) {
  for (const int64_t tokens : {1, 7, 70}) {
    const testing::AttentionProblem problem = problem_of(tokens, 6, 2);
    const Probed probed(problem, 0);
    const std::vector<double> exact = exact_attention(probed.record, probed.dims);
    const std::vector<double> oracle = testing::float64_attention(problem).out;
    ASSERT_EQ(exact.size(), oracle.size());
    for (size_t i = 0; i < exact.size(); ++i) {
      EXPECT_NEAR(exact[i], oracle[i], 1e-6 * (1 + std::abs(oracle[i])));  // the scale is float
    }
  }
}

TEST(CompareLayers, ErrorsKnownByHand) {
  const std::vector<float> out = {3, 0, 1, 0};
  const Model::AttentionRecord record{.layer = 1, .tokens = 1, .qkv = {}, .out = out};
  LayerErrors errors;
  errors.add(record, std::vector<double>{2, 0, 0, 0});
  errors.add(record, std::vector<double>{3, 0, 1, 0});  // a second text, without error
  const auto layers = errors.layers();
  ASSERT_EQ(layers.size(), 2u);
  EXPECT_NEAR(layers[1].cosine, 16 / std::sqrt(20.0 * 14.0), 1e-12);
  EXPECT_NEAR(layers[1].relative_l1, 2.0 / 6, 1e-12);
  EXPECT_NEAR(layers[1].rmse, std::sqrt(2.0 / 8), 1e-12);
}

TEST(CompareLayers, MeasuresEveryLayerUntilStopped) {
  const testing::AttentionProblem problem = problem_of(20, 2, 1);
  const std::vector<int32_t> ids(20, 0);
  const std::vector<std::span<const int32_t>> texts(3, ids);
  int probed_texts = 0;
  const AttentionProber prober = [&](std::span<const int32_t>, const auto& on_layer) {
    ++probed_texts;
    for (const int64_t layer : {0, 1}) {
      Probed probed(problem, layer);
      const std::vector<double> exact = exact_attention(probed.record, probed.dims);
      for (size_t i = 0; i < exact.size(); ++i) {
        probed.out[i] = static_cast<float>(exact[i] * (layer == 0 ? 1 : 1.5));
      }
      on_layer(probed.record);
    }
  };
  const AttentionDims dims{.num_heads = 2, .num_kv_heads = 1, .head_dim = 48};
  const auto layers = measure_layers(texts, dims, prober, [&] { return probed_texts < 2; });
  EXPECT_EQ(probed_texts, 2);
  ASSERT_EQ(layers.size(), 2u);
  EXPECT_LT(layers[0].relative_l1, 1e-6);
  EXPECT_NEAR(layers[1].relative_l1, 0.5, 1e-6);
  EXPECT_NEAR(layers[1].cosine, 1, 1e-12);
}

TEST(CompareLayers, OtherSizesAreAnError) {
  const Probed probed(problem_of(4, 2, 1), 0);
  EXPECT_THROW(exact_attention(probed.record, {2, 2, 48}), Error);
  EXPECT_THROW(exact_attention(probed.record, {2, 0, 48}), Error);
}

}  // namespace
}  // namespace sagelm
