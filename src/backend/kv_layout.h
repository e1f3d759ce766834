// What a KV cache holds, in numbers (docs/kv-cache.md).
#pragma once

#include <cstdint>

namespace sagelm {

// Tokens per page of the KV cache: one key tile of the kernels that read quantized pages.
inline constexpr int64_t kPageTokens = 128;
// FP32 scales of a page of INT8 keys, per layer and KV head: one for each key group (key k is in
// group k / 4 % 4), then that of the values.
inline constexpr int64_t kKeyGroups = 4;
inline constexpr int64_t kPageScales = kKeyGroups + 1;

// How a KV cache keeps what it holds.
enum class KvType : uint8_t {
  kFp16,  // pages of FP16 keys and values
  kInt8,  // full pages as INT8 keys and e4m3 values; the page being filled, the tail, as FP16
  kInt4,  // the same with INT4 keys
};

inline constexpr bool is_quantized(KvType type) { return type != KvType::kFp16; }

// Sizes of a cache; what they take is the backend's to say (Backend::kv_bytes). Pages and tails are
// shared by all layers; every sequence that holds tokens has one tail in a quantized cache, and a
// kFp16 cache has none.
struct KvLayout {
  KvType type = KvType::kFp16;
  int64_t num_layers = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t num_pages = 0;  // of kPageTokens tokens each
  int64_t num_tails = 0;

  int64_t heads() const { return num_layers * num_kv_heads; }
};

}  // namespace sagelm
