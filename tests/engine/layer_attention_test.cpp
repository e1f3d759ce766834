// A kernel of its own for every layer, as the public API shows it, on the demo model.
#include <gtest/gtest.h>

#include <span>
#include <string>
#include <vector>

#include "base/error.h"
#include "eval/compare_layers.h"
#include "sagelm/sagelm.hpp"

namespace sagelm {
namespace {

constexpr const char* kMixed = "fp16/sage2/fp16/sage1/fp16/sage2";

Model load(const std::string& attention, const std::string& kv_cache = "auto") {
  LoadOptions options;
  options.model = std::string(SAGELM_SOURCE_DIR) + "/models/demo";
  options.attention = attention;
  options.kv_cache = kv_cache;
  options.threads = 1;
  return Model::load(options);
}

TEST(LayerAttention, EveryLayerRunsItsOwnKernel) {
  Model model = load(kMixed);
  const std::vector<int32_t> ids = model.tokenize(
      "Once upon a time there was a girl who kept a lighthouse, and every evening she lit the "
      "lamp.");
  const std::span<const int32_t> text = ids;
  const auto layers = measure_layers({&text, 1}, model, [] { return true; });
  ASSERT_EQ(layers.size(), 6u);
  for (const size_t exact : {0, 2, 4}) EXPECT_LT(layers[exact].relative_l1, 1e-3) << exact;
  for (const size_t quantized : {1, 3, 5}) {
    EXPECT_GT(layers[quantized].relative_l1, 2e-3) << quantized;
    EXPECT_GT(layers[quantized].cosine, 0.998) << quantized;
  }
}

TEST(LayerAttention, InfoNamesTheKernelsAndTheCacheThatAllCanRead) {
  Model model = load(kMixed);
  ModelInfo info = model.info();
  EXPECT_EQ(info.attention,
            "fp16 in layers 0, 2, 4; sage1 in layer 3; sage2-8b in layers 1, 5 (smoothed K)");
  EXPECT_EQ(info.layer_attention[3], "sage1");
  EXPECT_EQ(info.kv_cache, "fp16");
  EXPECT_EQ(info.adaptive_attention.back(), "fp16");
  EXPECT_THROW(model.set_attention(kMixed, true, "int8"), UsageError);
  EXPECT_THROW(model.set_attention("sage2/fp16", true), UsageError);
  EXPECT_EQ(model.info().attention, info.attention);  // a refusal changes nothing
  model.set_attention("sage2/sage2/sage2/sage2/sage2/sage2", true);
  info = model.info();
  EXPECT_EQ(info.kv_cache, "int8");
  EXPECT_EQ(info.attention.rfind("sage2-8b (", 0), 0u);
  EXPECT_THROW(load(kMixed, "int8"), UsageError);
}

TEST(LayerAttention, OneKernelNamedForEachLayerIsThatKernel) {
  GenerateOptions options;
  options.max_tokens = 12;
  options.sampling = {.temperature = 0, .repeat_penalty = 1};
  const std::string prompt = "The rain fell in torrents, and";
  EXPECT_EQ(load("fp16/fp16/fp16/fp16/fp16/fp16").generate(prompt, options).ids,
            load("fp16").generate(prompt, options).ids);
}

}  // namespace
}  // namespace sagelm
