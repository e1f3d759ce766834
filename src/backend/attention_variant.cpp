#include "backend/attention_variant.h"

#include <algorithm>
#include <array>
#include <cstddef>

#include "base/error.h"

namespace sagelm {
namespace {

struct VariantRow {
  AttentionVariant variant;
  std::string_view name;
  std::string_view operands;
  bool quantized;
};

constexpr std::array kVariants = {
    VariantRow{AttentionVariant::kFp16, "fp16", "FP16 QK and PV, FP32 softmax and accumulation",
               false},
    VariantRow{AttentionVariant::kSage1, "sage1", "INT8 QK per thread, FP16 PV", true},
    VariantRow{AttentionVariant::kSage1T, "sage1-t", "INT8 QK per token, FP16 PV", true},
    VariantRow{AttentionVariant::kSage1B, "sage1-b", "INT8 QK per block, FP16 PV", true},
    VariantRow{AttentionVariant::kSage1VT, "sage1-vt", "INT8 QK per token, INT8 PV", true},
    VariantRow{AttentionVariant::kSage1VB, "sage1-vb", "INT8 QK per block, INT8 PV", true},
    VariantRow{AttentionVariant::kSage2_8b, "sage2-8b", "INT8 QK per thread, FP8 e4m3 PV two-level",
               true},
    VariantRow{AttentionVariant::kSage2_4b, "sage2-4b",
               "INT4 QK per thread, FP8 e4m3 PV two-level, smoothed Q", true},
};

struct Alias {
  std::string_view name;
  AttentionVariant variant;
};

constexpr std::array kAliases = {
    Alias{"sage2", AttentionVariant::kSage2_8b},
    Alias{"sage", AttentionVariant::kSage2_8b},
};

const VariantRow& row_of(AttentionVariant variant) {
  for (const VariantRow& row : kVariants) {
    if (row.variant == variant) return row;
  }
  fail("attention variant number {} does not exist", static_cast<int>(variant));
}

// The layers that have this variant, as "layers 0-3, 5".
std::string layers_of(AttentionVariant variant, std::span<const AttentionSpec> layers) {
  std::string ranges;
  size_t count = 0;
  for (size_t first = 0; first < layers.size(); ++first) {
    if (layers[first].variant != variant) continue;
    size_t last = first;
    while (last + 1 < layers.size() && layers[last + 1].variant == variant) ++last;
    if (!ranges.empty()) ranges += ", ";
    ranges += first == last ? fmt::format("{}", first) : fmt::format("{}-{}", first, last);
    count += last - first + 1;
    first = last;
  }
  return (count == 1 ? "layer " : "layers ") + ranges;
}

}  // namespace

bool reads_quantized_kv(AttentionVariant variant, KvType type) {
  return variant == AttentionVariant::kSage2_8b ||
         (variant == AttentionVariant::kSage2_4b && type == KvType::kInt4);
}

std::string_view attention_variant_name(AttentionVariant variant) { return row_of(variant).name; }

AttentionVariant parse_attention_variant(std::string_view name) {
  for (const VariantRow& row : kVariants) {
    if (row.name == name) return row.variant;
  }
  for (const Alias& alias : kAliases) {
    if (alias.name == name) return alias.variant;
  }
  std::string known;
  for (const VariantRow& row : kVariants) known.append(row.name).append(", ");
  for (const Alias& alias : kAliases) known.append(alias.name).append(", ");
  fail_usage(
      "unknown attention '{}'; known are {}for a model also sage-adaptive, or one for each layer, "
      "separated by /",
      name, known);
}

std::string describe_attention(const AttentionSpec& spec) {
  const VariantRow& row = row_of(spec.variant);
  const std::string_view smoothing =
      !row.quantized ? "" : (spec.smooth_k ? ", smoothed K" : ", K not smoothed");
  return fmt::format("{} ({}{})", row.name, row.operands, smoothing);
}

std::vector<AttentionSpec> parse_layer_attention(std::string_view names, int64_t num_layers,
                                                 bool smooth_k) {
  std::vector<AttentionSpec> layers;
  for (bool more = true; more;) {
    const size_t slash = names.find('/');
    layers.push_back(
        {.variant = parse_attention_variant(names.substr(0, slash)), .smooth_k = smooth_k});
    more = slash != std::string_view::npos;
    if (more) names.remove_prefix(slash + 1);
  }
  const auto count = static_cast<size_t>(num_layers);
  if (layers.size() == 1) layers.resize(count, layers.front());
  if (layers.size() != count) {
    fail_usage("attention is named for {} layers, and the model has {}", layers.size(), num_layers);
  }
  return layers;
}

std::string describe_layer_attention(std::span<const AttentionSpec> layers) {
  const AttentionSpec& first = layers.front();
  if (std::ranges::all_of(layers, [&first](const AttentionSpec& spec) { return spec == first; })) {
    return describe_attention(first);
  }
  std::string text;
  for (const VariantRow& row : kVariants) {
    const bool used = std::ranges::any_of(
        layers, [&row](const AttentionSpec& spec) { return spec.variant == row.variant; });
    if (!used) continue;
    if (!text.empty()) text += "; ";
    text += fmt::format("{} in {}", row.name, layers_of(row.variant, layers));
  }
  return text + (first.smooth_k ? " (smoothed K)" : " (K not smoothed)");
}

}  // namespace sagelm
