// The quantized operands of the Hopper kernels: tiles stored in global memory exactly as shared
// memory holds them, so that one bulk copy brings a tile to where wgmma reads it.
//
// A key tile is 128 tokens of one KV head, int8 [128 rows][kDim]. Row r of each 16 holds key
// kKeyOfRow[r]: wgmma then leaves in thread 4g + c of a warp the logits of the keys 4c .. 4c+3 of
// every 16, which is the order in which it takes P as an operand, and the thread needs one scale,
// that of key group (key / 4) % 4. A value tile is e4m3, transposed: [kDim channels][128 tokens],
// natural order, one scale. Rows are 16-byte chunks swizzled as the copy engine's 128-byte mode
// (64-byte where rows are 64 bytes) would leave them. A query tile is int8 [128 rows][kDim], one
// scale per row.
#pragma once

#include <cstdint>

namespace sagelm::kernels {

inline constexpr int kTileTokens = 128;
inline constexpr int kKeyGroups = 4;

// Floats per tile: the scales of its key groups; that of its values, and its inverse; 2 unused.
inline constexpr int kTileScales = 8;
inline constexpr int kValueScale = kKeyGroups;
inline constexpr int kValueScaleInverse = kKeyGroups + 1;

// Where the chunk of 16 bytes lies in a row of kRowBytes.
template <int kRowBytes>
__host__ __device__ constexpr int swizzled_chunk(int row, int chunk) {
  static_assert(kRowBytes == 64 || kRowBytes == 128);
  return kRowBytes == 128 ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & 3);
}

// The tile row that holds key `key` (0 to 127).
__host__ __device__ constexpr int row_of_key(int key) {
  return (key & ~15) | ((key >> 1) & 6) | (key & 1) | ((key & 2) << 2);
}

// Quantized operands of a call: of plain tensors all in its workspace, every sequence with room for
// max_*_tiles tiles; or keys and values in the pages of a cache, followed by one tile per sequence
// and KV head of the tokens that fill no page.
struct SageTiles {
  float* key_means;     // [batch][kv_heads][dim]
  int8_t* queries;      // [heads][head_query_tiles][128 * dim]
  float* query_scales;  // [heads][head_query_tiles * 128]: softmax_scale * log2(e) included
  float* query_biases;  // as query_scales: log2(e) * softmax_scale * q.mean; null if not wanted
  int8_t* keys;         // [batch][kv_heads][kv_tiles][128 * dim]; [page][kv_heads][128 * dim]
  uint8_t* values;      // likewise, [dim * 128]
  float* scales;        // likewise, [kTileScales]
  int query_tiles, kv_tiles;
  int head_query_tiles;
  // With pages, else null:
  const int32_t* page_table;  // [batch][page_table_stride]
  int page_table_stride;
  bool unpacked_keys;    // keys and scales are [batch][kv_heads][kv_tiles] all the same
  int8_t* tail_keys;     // [batch][kv_heads][128 * dim]
  uint8_t* tail_values;  // likewise
  float* tail_scales;    // [batch][kv_heads][kTileScales]

#ifdef __CUDACC__
  // Index of a sequence's first row among the quantized queries. With pages the sequences lie one
  // after another, each from a new tile on: rows / 128 + batch tiles hold them.
  __device__ int64_t first_query(const int32_t* cu_q_lens, int b, int head) const {
    const int tile = page_table != nullptr ? cu_q_lens[b] / kTileTokens + b : b * query_tiles;
    return (static_cast<int64_t>(head) * head_query_tiles + tile) * kTileTokens;
  }
#endif
};

}  // namespace sagelm::kernels
