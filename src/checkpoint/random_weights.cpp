#include "checkpoint/random_weights.h"

#include <algorithm>
#include <array>

#include "base/error.h"

namespace sagelm {
namespace {

struct Architecture {
  std::string_view name;
  int64_t vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim;
  double rope_theta;
  bool tied;
};

constexpr std::array kArchitectures = {
    Architecture{"llama2-7b", 32000, 4096, 11008, 32, 32, 32, 128, 1e4, false},
    Architecture{"llama2-13b", 32000, 5120, 13824, 40, 40, 40, 128, 1e4, false},
    Architecture{"llama3-8b", 128256, 4096, 14336, 32, 32, 8, 128, 5e5, false},
    Architecture{"llama3.2-1b", 128256, 2048, 8192, 16, 32, 8, 64, 5e5, true},
    Architecture{"tinyllama-1.1b", 32000, 2048, 5632, 22, 32, 4, 64, 1e4, false},
    Architecture{"llama-160m", 32000, 768, 3072, 12, 12, 12, 64, 1e4, false},
};

constexpr int64_t kPositions = 131072;
constexpr double kDeviation = 0.02;
// From one window to the next, and how many there are before they start again. Not a multiple of
// a row's length, so that tensors near each other have no rows in common; whole vectors, so that
// every tensor is aligned.
constexpr int64_t kWindowStep = 8 * 131;
constexpr int64_t kWindows = 1024;

// Four 16-bit uniform numbers added up: normal enough for weights, and fast enough for hundreds of
// millions of them. The mixing is splitmix64's (Steele, Lea, Flood, OOPSLA 2014).
float nearly_normal(uint64_t index) {
  uint64_t h = index * 0x9E3779B97F4A7C15u;
  h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9u;
  h = (h ^ (h >> 27)) * 0x94D049BB133111EBu;
  h ^= h >> 31;
  const auto sum =
      static_cast<float>((h & 0xFFFFu) + (h >> 16 & 0xFFFFu) + (h >> 32 & 0xFFFFu) + (h >> 48));
  // The sum has mean 2 (2^16 - 1) and deviation 2^16 / sqrt(3).
  constexpr auto kScale = static_cast<float>(kDeviation * 1.7320508 / 65536.0);
  return (sum - 131070.0f) * kScale;
}

uint16_t narrow(float value, DType type) {
  return type == DType::kF16 ? float_to_half(value) : float_to_bfloat16(value);
}

}  // namespace

std::string known_architectures() {
  std::string names;
  for (const Architecture& known : kArchitectures) {
    if (!names.empty()) names += ", ";
    names += known.name;
  }
  return names;
}

ModelConfig architecture_config(std::string_view name) {
  ModelConfig config;
  config.dtype = DType::kF16;
  std::string_view base = name;
  if (const size_t colon = name.find(':'); colon != std::string_view::npos) {
    const std::string_view type = name.substr(colon + 1);
    base = name.substr(0, colon);
    if (type != "f16" && type != "bf16") {
      fail_usage("random weights are f16 or bf16, not '{}'", type);
    }
    if (type == "bf16") config.dtype = DType::kBF16;
  }
  const auto* known = std::find_if(kArchitectures.begin(), kArchitectures.end(),
                                   [base](const Architecture& a) { return a.name == base; });
  if (known == kArchitectures.end()) {
    fail_usage("there is no architecture '{}' for random weights: use one of {}", base,
               known_architectures());
  }
  config.name = std::string(base) + " (random weights)";
  config.vocab_size = known->vocab_size;
  config.hidden_size = known->hidden_size;
  config.intermediate_size = known->intermediate_size;
  config.num_layers = known->num_layers;
  config.num_heads = known->num_heads;
  config.num_kv_heads = known->num_kv_heads;
  config.head_dim = known->head_dim;
  config.max_position_embeddings = kPositions;
  config.rope_theta = known->rope_theta;
  config.tie_word_embeddings = known->tied;
  return config;
}

RandomTensors::RandomTensors(const ModelConfig& config, uint64_t seed)
    : dtype_(config.dtype),
      ones_(static_cast<size_t>(config.hidden_size), narrow(1.0f, config.dtype)) {
  const int64_t largest =
      config.hidden_size * std::max({config.vocab_size, config.intermediate_size, config.q_size()});
  const int64_t count = largest + kWindows * kWindowStep;
  values_.resize(static_cast<size_t>(count));
  const uint64_t first = seed << 40;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < count; ++i) {
    values_[static_cast<size_t>(i)] =
        narrow(nearly_normal(first + static_cast<uint64_t>(i)), dtype_);
  }
}

TensorView RandomTensors::take(const std::string& name, const std::vector<int64_t>& shape) {
  TensorView view;
  view.name = name;
  view.dtype = dtype_;
  view.shape = shape;
  view.bytes = static_cast<size_t>(view.num_elements()) * dtype_size(dtype_);
  const bool is_norm = shape.size() == 1;
  const int64_t first = is_norm ? 0 : windows_++ % kWindows * kWindowStep;
  const std::vector<uint16_t>& from = is_norm ? ones_ : values_;
  if (static_cast<size_t>(first + view.num_elements()) > from.size()) {
    fail("tensor {} is larger than the random values made for it", name);
  }
  view.data = reinterpret_cast<const std::byte*>(from.data() + first);
  return view;
}

}  // namespace sagelm
