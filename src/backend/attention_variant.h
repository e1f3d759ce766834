// The attention variants by name (docs: sections "Attention variants" of docs/architecture.md).
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "backend/kv_layout.h"

namespace sagelm {

enum class AttentionVariant : uint8_t {
  kFp16,      // FP16 operands, FP32 softmax and accumulation: the reference
  kSage1,     // INT8 QK per thread, FP16 PV
  kSage1T,    // INT8 QK per token, FP16 PV
  kSage1B,    // INT8 QK per block, FP16 PV (the SageAttention paper's default)
  kSage1VT,   // INT8 QK per token, INT8 PV
  kSage1VB,   // INT8 QK per block, INT8 PV
  kSage2_8b,  // INT8 QK per thread, FP8 e4m3 PV with two-level accumulation
  kSage2_4b,  // INT4 QK per thread with smoothed Q, FP8 e4m3 PV with two-level accumulation
};

struct AttentionSpec {
  AttentionVariant variant = AttentionVariant::kSage2_8b;
  bool smooth_k = true;
  bool operator==(const AttentionSpec&) const = default;
};

// Whether the variant multiplies what pages of such a cache hold. A kFp16 cache is for all.
bool reads_quantized_kv(AttentionVariant variant, KvType type);

// Canonical name, as --attention takes it ("sage2-8b").
std::string_view attention_variant_name(AttentionVariant variant);

// Accepts canonical names and the aliases sage2 (= sage2-8b) and sage (the best for the device).
// Throws UsageError listing the names.
AttentionVariant parse_attention_variant(std::string_view name);

// One sentence for reports: which kernel runs, its operand types, granularity and smoothing,
// e.g. "sage2-8b (INT8 QK per thread, FP8 e4m3 PV two-level, smoothed K)".
std::string describe_attention(const AttentionSpec& spec);

// A variant's name for all layers, or one for each, separated by '/'. Returns one spec per layer.
// Throws UsageError for an unknown name and for another number of names.
std::vector<AttentionSpec> parse_layer_attention(std::string_view names, int64_t num_layers,
                                                 bool smooth_k);
// As describe_attention where all layers have the same, else which layers have which, e.g.
// "sage2-8b in layers 0-3, 5; fp16 in layer 4 (smoothed K)".
std::string describe_layer_attention(std::span<const AttentionSpec> layers);

}  // namespace sagelm
