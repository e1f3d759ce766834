// What a KV cache holds, in numbers (docs/kv-cache.md).
#pragma once

#include <cstdint>

namespace sagelm {

// Tokens per page of the KV cache: one key tile of the kernels that read quantized pages.
inline constexpr int64_t kPageTokens = 128;
// FP32 scales of a quantized page, per layer and KV head: one for each key group (key k is in group
// k / 4 % 4), then that of the values.
inline constexpr int64_t kKeyGroups = 4;
inline constexpr int64_t kPageScales = kKeyGroups + 1;

// How a KV cache keeps what it holds.
enum class KvType : uint8_t {
  kFp16,  // pages of FP16 keys and values
  kInt8,  // full pages as INT8 keys and e4m3 values; the page being filled, the tail, as FP16
};

// Sizes of a cache. Pages and tails are shared by all layers; every sequence that holds tokens has
// one tail in a kInt8 cache, and a kFp16 cache has none.
struct KvLayout {
  KvType type = KvType::kFp16;
  int64_t num_layers = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t num_pages = 0;  // of kPageTokens tokens each
  int64_t num_tails = 0;

  int64_t heads() const { return num_layers * num_kv_heads; }
  // Elements of a head's row in a quantized page: whole chunks of 16 bytes, zero past head_dim.
  int64_t padded_dim() const { return (head_dim + 15) / 16 * 16; }
  int64_t page_bytes() const {
    return heads() * (type == KvType::kFp16 ? kPageTokens * head_dim * 4
                                            : kPageTokens * padded_dim() * 2 + kPageScales * 4);
  }
  // With the mean key of the sequence's first page, FP32.
  int64_t tail_bytes() const { return heads() * (kPageTokens * head_dim * 4 + head_dim * 4); }
  int64_t bytes() const { return num_pages * page_bytes() + num_tails * tail_bytes(); }
};

}  // namespace sagelm
