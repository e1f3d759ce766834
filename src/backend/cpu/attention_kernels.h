// What attention.cpp and the per-instruction-set kernels agree on. The kernels are one source
// (attention_kernel.inl) compiled once per instruction set, so this header holds plain data only:
// an inline function here could be emitted with AVX-512 code and picked by the linker for all.
#pragma once

#include <cstdint>
#include <span>

#include "backend/cpu/attention.h"

namespace sagelm::cpu {

// Head sizes are padded with zeros to a multiple of this; no kernel vector is wider.
inline constexpr int64_t kDimAlign = 16;
inline constexpr int64_t kMaxHeadDim = 256;
inline constexpr int64_t kMaxQueryBlock = 128;
inline constexpr int64_t kMaxKeyTile = 128;
// Query rows that go through one key tile together.
inline constexpr int64_t kRowBlock = 6;

enum class PvKind : uint8_t {
  kHalf,         // FP16 P and V, FP32 accumulation
  kHalfAccHalf,  // FP16 P and V, FP16 accumulation in steps of 16 keys, FP32 across tiles
  kInt8,         // INT8 P (scale 1/127) and V (scale per channel), INT32 accumulation
  kE4m3,         // e4m3 P (times 448) and V (scale per channel), FP32 accumulation
};

// A variant in numbers (from kernels/attention/recipe.h).
struct Plan {
  int32_t qk_levels;  // largest integer of Q and K: 127 or 7; 0 = FP16 operands
  bool smooth_k;
  bool smooth_q;
  bool paged;      // a quantized cache: tiles are its pages, and the tail's, in FP16
  bool int4_keys;  // of those pages
  PvKind pv;
  int32_t query_block;  // rows that are scaled (and for smooth_q, averaged) together
  int32_t key_tile;     // keys of one softmax step and one first-level PV accumulator
  int32_t num_q_groups;
  int32_t num_k_groups;
  uint8_t q_group[kMaxQueryBlock];  // scale group of a row of the query block
  uint8_t k_group[kMaxKeyTile];     // scale group of a key of the key tile
  float amax_floor;                 // smallest amax of a scale group: all-zero groups divide by it
};

// One key/value head of one sequence and its prepared operands, tile after tile of key_tile keys
// (the last one padded with zeros as far as attend() reads it) from the key first_prepared on; dim
// is head_dim padded to kDimAlign.
struct KvHead {
  const uint16_t* const* k_pages;
  const uint16_t* const* v_pages;
  int64_t page_size;
  int64_t head;
  int64_t head_dim;
  int64_t dim;
  int64_t kv_len;
  int64_t first_prepared;  // 0; when paged, the first key of the tail, which k_pages[0] then holds
  // When paged: the quantized pages before it, as QuantizedKv has them.
  const uint8_t* operands;
  const float* scales;
  const int32_t* page_ids;
  int64_t num_kv_heads;
  int64_t page_bytes;   // of a head's operands
  int64_t page_scales;  // words
  const float* mean;
  // Outputs of prepare_kv.
  void* k;         // the QK operand, see KernelTable::packs_bytes
  float* k_exact;  // smooth_q only: [tile][dim][key_tile] K minus its mean, not quantized
  float* k_scale;  // [tiles * key_tile]; 1 for FP16 keys
  float* k_mean;   // [dim], zeros without smoothing
  float* v;        // [tiles * key_tile][dim] the values that PV multiplies
  float* v_scale;  // [dim]
};

// Up to query_block rows of one head inside one aligned query block.
struct QueryBlock {
  const KvHead* kv;
  const float* q;  // first row, this head's columns
  int64_t q_row_stride;
  float* out;
  int64_t out_row_stride;
  float* lse;  // this head's entry of the first row, or null
  int64_t rows;
  int64_t first_in_block;  // index of the first row in its aligned block
  int64_t position;        // of the first row in the sequence, >= 0 when causal
  float softmax_scale;
  bool causal;
};

// Scratch of one thread, 64-byte aligned.
struct Workspace {
  float* rows;        // [max(kMaxQueryBlock, kMaxKeyTile)][dim] rows before quantization
  int8_t* bytes;      // the same rows as integers, where the kernels pack bytes
  float* integers;    // [kMaxQueryBlock][dim] the same where they do not; rotated rows
  float* tile_k;      // paged: [dim][kMaxKeyTile] the integers of a page, where they do not or
                      // where the page holds nibbles
  float* tile_v;      // paged: [kMaxKeyTile][dim] the values of a page
  float* tile_scale;  // paged: [kMaxKeyTile] the scales of its keys
  float* tile_shift;  // INT4 keys: [kMaxKeyTile] what is to be added to every integer of a key
  float* out;         // [kMaxQueryBlock][dim] unnormalised output
  float* scores;      // [kRowBlock][kMaxKeyTile]
  float* bias;        // [kMaxKeyTile] smoothed-Q correction
  float* channel;     // [2][dim]
  float* q_scale;     // [kMaxQueryBlock]
  float* q_sum;       // INT4 keys: [kMaxQueryBlock] sums of the rows' integers
  float* row_max;     // [kMaxQueryBlock], in units of log2
  float* row_sum;     // [kMaxQueryBlock]
  int32_t* q_offset;  // [kMaxQueryBlock]
};

struct KernelTable {
  const char* name;
  // Integer K is packed as bytes [tile][dim / 4][key][4], each plus 128; otherwise K is float
  // [tile][dim][key].
  bool packs_bytes;
  void (*prepare_kv)(const Plan& plan, const KvHead& kv, const Workspace& work);
  void (*attend)(const Plan& plan, const QueryBlock& block, const Workspace& work);
  // See quantize_page() in attention.h.
  void (*quantize_page)(KvType type, const uint16_t* k, const uint16_t* v, const float* mean,
                        int64_t head_dim, uint8_t* operands, float* scales);
};

// Null when this build does not contain the instruction set.
const KernelTable* attention_kernels_avx512();
const KernelTable* attention_kernels_avx2();
const KernelTable* attention_kernels_generic();

// attention() with given kernels: tests compare the instruction sets of one machine.
void attention_with(const KernelTable& kernels, std::span<const AttentionArgs> sequences,
                    const AttentionSpec& spec, KvType cache = KvType::kFp16);

// The kernels this build has and this CPU can run, best first.
std::span<const KernelTable* const> available_attention_kernels();

}  // namespace sagelm::cpu
