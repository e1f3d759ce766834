// What a model will take of its device's memory, said before it is loaded.
#pragma once

#include <cstdint>
#include <span>

#include "backend/backend.h"
#include "base/model_spec.h"
#include "model/kv_cache.h"

namespace sagelm {

// The model's weights as this backend holds them.
int64_t weight_bytes(const ModelWeights& weights, const Backend& backend);

// The cache of so many sequences of `context` tokens each.
KvLayout kv_layout(KvType type, const ModelConfig& config, int64_t context, int64_t sequences = 1);

// Steps of up to `tokens` tokens, whose sequences have up to `context`.
StepLimits limits_of_steps(const ModelConfig& config, std::span<const AttentionSpec> attention,
                           int64_t tokens, int64_t context);

// Pages that the sequences of a step may touch where it has several: short ones leave most of a
// page unused each.
inline int64_t pages_of_step(int64_t tokens) { return 4 * KvCache::pages_for(tokens); }

// What must fit the device at once.
struct MemoryNeeds {
  const ModelConfig* config = nullptr;
  std::span<const AttentionSpec> attention;
  KvType kv_type = KvType::kFp16;
  int64_t weight_bytes = 0;  // 0: they are there
  int64_t batch_tokens = 0;
  int64_t context = 0;
  int64_t sessions = 0;  // each of `context` tokens
};
// Throws Error that says how much is needed, how much is free, and which context would fit. With
// steps_held the memory of steps is there already.
void check_fits(const MemoryNeeds& needs, bool steps_held, const Backend& backend);

}  // namespace sagelm
