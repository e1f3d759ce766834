#include "engine/memory_plan.h"

#include <gtest/gtest.h>

#include <string>

#include "backend/cpu/cpu_backend.h"
#include "model/llama.h"

namespace sagelm {
namespace {

constexpr int64_t kMib = int64_t{1} << 20;

// 10 GiB of weights, half a GiB of activations, 1 MiB of cache per token.
std::string refusal(int64_t context, int64_t free_mib) {
  return misfit(
      "big", context, 1, {.total = 16384 * kMib, .free = free_mib * kMib}, [](int64_t tokens) {
        return MemoryTotal{.weights = 10240 * kMib, .steps = 512 * kMib, .kv = tokens * kMib};
      });
}

TEST(MemoryPlan, SaysWhatWouldFit) {
  // The driver's share is 256 MiB.
  EXPECT_EQ(refusal(4096, 10240 + 512 + 4096 + 256), "");
  EXPECT_EQ(refusal(4096, 10240 + 512 + 4096 + 255),
            "big needs 14.75 GiB of memory on the GPU (weights 10.00, activations 0.50, a KV cache "
            "of 4096 tokens 4.00, and what the driver takes), and 14.75 of 16.00 GiB are free: "
            "--ctx 3968 would fit");
  const std::string half = refusal(4096, 10240 + 512 + 256 + 2048 + 100);
  EXPECT_NE(half.find("--ctx 2048 would fit"), std::string::npos) << half;
  const std::string none = refusal(4096, 10240);
  EXPECT_NE(none.find("no --ctx would fit"), std::string::npos) << none;
}

TEST(MemoryPlan, LimitsNameEveryKindOfAttentionOnce) {
  ModelConfig config;
  config.hidden_size = 64;
  config.intermediate_size = 96;
  config.vocab_size = 1000;
  config.num_heads = config.num_kv_heads = 2;
  config.head_dim = 32;
  const AttentionSpec fp16{.variant = AttentionVariant::kFp16}, sage{};
  const std::vector<AttentionSpec> layers = {sage, fp16, sage, sage};
  const StepLimits limits = limits_of_steps(config, layers, 512, 2048);
  EXPECT_EQ(limits.attention.size(), 2u);
  EXPECT_EQ(limits.tokens, 512);
  EXPECT_EQ(limits.sequences, 16);
  EXPECT_EQ(limits.context, 2048);
  EXPECT_GT(make_cpu_backend(1)->step_bytes(limits), 512 * (64 * 4 + 2 * 96 + 96) * 4);
}

}  // namespace
}  // namespace sagelm
