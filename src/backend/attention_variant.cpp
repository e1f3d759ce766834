#include "backend/attention_variant.h"

#include <array>

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
    Alias{"sage1", AttentionVariant::kSage1B},
    Alias{"sage2", AttentionVariant::kSage2_8b},
    Alias{"sage", AttentionVariant::kSage2_8b},
};

const VariantRow& row_of(AttentionVariant variant) {
  for (const VariantRow& row : kVariants) {
    if (row.variant == variant) return row;
  }
  fail("attention variant number {} does not exist", static_cast<int>(variant));
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
  known.resize(known.size() - 2);
  fail_usage("unknown attention variant '{}'; known are {}", name, known);
}

std::string describe_attention(const AttentionSpec& spec) {
  const VariantRow& row = row_of(spec.variant);
  const std::string_view smoothing =
      !row.quantized ? "" : (spec.smooth_k ? ", smoothed K" : ", K not smoothed");
  return fmt::format("{} ({}{})", row.name, row.operands, smoothing);
}

}  // namespace sagelm
