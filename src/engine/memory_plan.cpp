#include "engine/memory_plan.h"

#include <algorithm>
#include <string>

#include "base/error.h"
#include "model/llama.h"

namespace sagelm {
namespace {

// What a GPU's driver takes beside our buffers while a model runs: code of kernels, which is loaded
// when they first run, and graphs.
constexpr int64_t kDriverBytes = int64_t{256} << 20;

MemoryTotal total_of(const MemoryNeeds& needs, int64_t context, bool steps_held,
                     const Backend& backend) {
  MemoryTotal total{.weights = needs.weight_bytes};
  if (!steps_held) {
    total.steps = backend.step_bytes(
        limits_of_steps(*needs.config, needs.attention, needs.batch_tokens, context));
  }
  if (needs.sessions > 0) {
    total.kv = backend.kv_bytes(kv_layout(needs.kv_type, *needs.config, context, needs.sessions));
  }
  return total;
}

}  // namespace

int64_t weight_bytes(const ModelWeights& weights, const Backend& backend) {
  const auto size = [](const TensorView& tensor, DType type) {
    return tensor.num_elements() * static_cast<int64_t>(dtype_size(type));
  };
  const auto product = [&](const TensorView& tensor) {
    return size(tensor, backend.product_type(tensor.dtype));
  };
  const bool tied = weights.lm_head.data == weights.embedding.data && backend.shares_embedding();
  int64_t bytes = size(weights.embedding, backend.embedding_type(weights.embedding.dtype)) +
                  (tied ? 0 : product(weights.lm_head)) + size(weights.final_norm, DType::kF32);
  for (const LayerWeights& layer : weights.layers) {
    for (const TensorView* tensor : {&layer.q_proj, &layer.k_proj, &layer.v_proj, &layer.o_proj,
                                     &layer.gate_proj, &layer.up_proj, &layer.down_proj}) {
      bytes += product(*tensor);
    }
    bytes += size(layer.input_norm, DType::kF32) + size(layer.post_norm, DType::kF32);
  }
  return bytes;
}

KvLayout kv_layout(KvType type, const ModelConfig& config, int64_t context, int64_t sequences) {
  const KvRoom room = kv_room(type, context);
  return {.type = type,
          .num_layers = config.num_layers,
          .num_kv_heads = config.num_kv_heads,
          .head_dim = config.head_dim,
          .num_pages = room.pages * sequences,
          .num_tails = room.tails * sequences};
}

StepLimits limits_of_steps(const ModelConfig& config, std::span<const AttentionSpec> attention,
                           int64_t tokens, int64_t context) {
  StepLimits limits;
  limits.scratch = Llama::scratch_sizes(config, tokens);
  for (size_t i = 0; i < attention.size(); ++i) {
    const AttentionSpec& spec = attention[i];
    if (std::ranges::find(attention.first(i), spec) != attention.first(i).end()) continue;
    limits.attention.push_back({config.num_heads, config.num_kv_heads, config.head_dim, spec});
  }
  limits.tokens = tokens;
  limits.sequences = std::min(tokens, pages_of_step(tokens));
  limits.context = context;
  return limits;
}

std::string misfit(const std::string& model, int64_t context, int64_t sessions,
                   const DeviceMemory& memory,
                   const std::function<MemoryTotal(int64_t context)>& total_of) {
  const auto bytes = [&](int64_t tokens) {
    const MemoryTotal total = total_of(tokens);
    return total.weights + total.steps + total.kv + kDriverBytes;
  };
  const auto fits = [&](int64_t tokens) { return bytes(tokens) <= memory.free; };
  if (fits(context)) return "";
  int64_t fitting = 0, pages = KvCache::pages_for(context);
  while (pages - fitting > 1) {
    const int64_t middle = (fitting + pages) / 2;
    (fits(middle * kPageTokens) ? fitting : pages) = middle;
  }
  const auto gib = [](int64_t size) {
    return fmt::format("{:.2f}", static_cast<double>(size) / (1 << 30));
  };
  std::string parts;
  const auto add = [&](const std::string& name, int64_t size) {
    if (size > 0) parts += fmt::format("{} {}, ", name, gib(size));
  };
  const MemoryTotal total = total_of(context);
  add("weights", total.weights);
  add("activations", total.steps);
  add(fmt::format("a KV cache of {} tokens", context * sessions), total.kv);
  return fmt::format(
      "{} needs {} GiB of memory on the GPU ({}and what the driver takes), and {} of {} GiB are "
      "free: {}",
      model, gib(bytes(context)), parts, gib(memory.free), gib(memory.total),
      fitting == 0 ? std::string("no --ctx would fit")
                   : fmt::format("--ctx {} would fit", fitting * kPageTokens));
}

void check_fits(const MemoryNeeds& needs, bool steps_held, const Backend& backend) {
  const DeviceMemory memory = backend.device_memory();
  if (memory.total == 0) return;
  const std::string problem =
      misfit(needs.config->name, needs.context, needs.sessions, memory,
             [&](int64_t context) { return total_of(needs, context, steps_held, backend); });
  if (!problem.empty()) fail("{}", problem);
}

}  // namespace sagelm
