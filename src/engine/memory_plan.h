// What a model will take of its device's memory, said before it is loaded.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>

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

// Bytes.
struct MemoryTotal {
  int64_t weights = 0, steps = 0, kv = 0;
};
// One sentence that says how much the model with so many sessions of `context` tokens needs, how
// much is free, and which shorter context would fit; empty if all of it does. total_of grows with
// the context.
std::string misfit(const std::string& model, int64_t context, int64_t sessions,
                   const DeviceMemory& memory,
                   const std::function<MemoryTotal(int64_t context)>& total_of);

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
// Throws Error with misfit's sentence. With steps_held the memory of steps is there already.
void check_fits(const MemoryNeeds& needs, bool steps_held, const Backend& backend);

}  // namespace sagelm
