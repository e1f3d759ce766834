#include "checkpoint/random_weights.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <set>
#include <utility>

#include "base/error.h"
#include "checkpoint/checkpoint.h"

namespace sagelm {
namespace {

float value(const TensorView& tensor, int64_t i) {
  uint16_t raw;
  std::memcpy(&raw, tensor.data + 2 * i, sizeof raw);
  return tensor.dtype == DType::kF16 ? half_to_float(raw) : bfloat16_to_float(raw);
}

TEST(RandomWeights, HaveTheArchitecturesShapes) {
  const Checkpoint made = Checkpoint::random("llama-160m");
  const Checkpoint checkpoint = Checkpoint(Checkpoint::random("llama-160m"));  // moved
  const ModelConfig& config = checkpoint.config();
  EXPECT_EQ(config.name, "llama-160m (random weights)");
  EXPECT_EQ(checkpoint.num_parameters(), 162417408);  // as the published model
  EXPECT_EQ(checkpoint.bytes(), 2 * checkpoint.num_parameters());
  const ModelWeights& weights = checkpoint.weights();
  ASSERT_EQ(weights.layers.size(), 12u);
  EXPECT_EQ(weights.embedding.shape, (std::vector<int64_t>{32000, 768}));
  EXPECT_EQ(weights.layers[3].down_proj.shape, (std::vector<int64_t>{768, 3072}));
  EXPECT_EQ(weights.layers[3].down_proj.name, "model.layers.3.mlp.down_proj.weight");
  EXPECT_NE(weights.lm_head.data, weights.embedding.data);
  check_weights_finite(weights);

  std::set<const std::byte*> starts;
  for (const LayerWeights& layer : weights.layers) {
    for (const TensorView* tensor : {&layer.q_proj, &layer.k_proj, &layer.v_proj, &layer.o_proj,
                                     &layer.gate_proj, &layer.up_proj, &layer.down_proj}) {
      EXPECT_TRUE(starts.insert(tensor->data).second) << tensor->name;
      EXPECT_EQ(tensor->bytes, static_cast<size_t>(2 * tensor->num_elements()));
    }
    EXPECT_EQ(value(layer.input_norm, 767), 1.0f);
  }
  // The same every time.
  EXPECT_EQ(std::memcmp(made.weights().lm_head.data, weights.lm_head.data, weights.lm_head.bytes),
            0);
}

TEST(RandomWeights, AreNormalWithLlamasDeviation) {
  for (const char* name : {"llama-160m", "llama-160m:bf16"}) {
    const Checkpoint checkpoint = Checkpoint::random(name);
    const TensorView& tensor = checkpoint.weights().layers[5].up_proj;
    double sum = 0, squares = 0, fourth = 0;
    const int64_t count = tensor.num_elements();
    for (int64_t i = 0; i < count; ++i) {
      const double x = value(tensor, i) / 0.02;
      sum += x;
      squares += x * x;
      fourth += x * x * x * x;
    }
    const auto n = static_cast<double>(count);
    EXPECT_NEAR(sum / n, 0, 0.005) << name;
    EXPECT_NEAR(squares / n, 1, 0.005) << name;
    EXPECT_NEAR(fourth / n, 2.7, 0.02) << name;  // of four uniform numbers; 3 is normal
  }
}

TEST(RandomWeights, KnownModelsHaveTheirParameters) {
  const ModelConfig config = architecture_config("llama2-7b:bf16");
  EXPECT_EQ(config.dtype, DType::kBF16);
  const int64_t layer = config.hidden_size * (2 * config.q_size() + 2 * config.kv_size() +
                                              3 * config.intermediate_size + 2);
  EXPECT_EQ(config.num_layers * layer + config.hidden_size * (2 * config.vocab_size + 1),
            6738415616);
}

TEST(RandomWeights, RefuseUnknownNames) {
  EXPECT_THROW(architecture_config("gpt"), UsageError);
  EXPECT_THROW(architecture_config("llama2-7b:int8"), UsageError);
  EXPECT_THROW(architecture_config(""), UsageError);
}

}  // namespace
}  // namespace sagelm
