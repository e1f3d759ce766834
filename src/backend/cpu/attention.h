// Attention on the CPU for one sequence: the FP16 reference and bit-faithful models of the
// quantized variants (kernels/attention/recipe.h holds their numbers).
#pragma once

#include <cstdint>
#include <span>

#include "backend/attention_variant.h"
#include "backend/kv_layout.h"

namespace sagelm::cpu {

// Keys and values of one sequence in pages of page_size tokens: page p holds FP16 values
// [num_kv_heads][page_size][head_dim] starting at k_pages[p] and v_pages[p]. A contiguous
// [num_kv_heads][kv_len][head_dim] tensor is one page with page_size = kv_len.
struct PagedKv {
  std::span<const uint16_t* const> k_pages;
  std::span<const uint16_t* const> v_pages;
  int64_t page_size = 0;
};

// What a quantized page holds of one layer and KV head.
struct PageShape {
  int64_t dim = 0;  // channels of a row, those past head_dim zeros
  int64_t key_bytes = 0;
  int64_t value_bytes = 0;
  int64_t scales = 0;  // 32-bit words

  int64_t operand_bytes() const { return key_bytes + value_bytes; }
};
PageShape page_shape(KvType type, int64_t head_dim);

// One sequence in a quantized cache, of one layer. A head of a page is K, then V as e4m3
// [kPageTokens][dim].
//   kInt8  dim: head_dim rounded up to 16. K as unsigned bytes, each plus 128,
//          [dim / 4][kPageTokens][4]; scales: kPageScales.
//   kInt4  dim: head_dim rounded up to 64, 128 or 256. K, rotated, as nibbles, each plus 8,
//          [dim / 4][kPageTokens / 2][4]: byte (i, key, j) holds channel 4 i + j of key in its low
//          nibble, of key + kPageTokens / 2 in its high one; scales: the values' where it is with
//          kInt8, those before it 0, then a word per key: BF16 step (low half) and middle.
struct QuantizedKv {
  const uint8_t* operands = nullptr;  // [page][num_kv_heads][PageShape::operand_bytes()]
  const float* scales = nullptr;      // [page][num_kv_heads][PageShape::scales]
  std::span<const int32_t> pages;     // the first kv_len / kPageTokens are the sequence's
  // The keys past those pages, FP16 [num_kv_heads][kPageTokens][head_dim].
  const uint16_t* tail_k = nullptr;
  const uint16_t* tail_v = nullptr;
  // [num_kv_heads][head_dim], what was subtracted from the keys of quantized pages; null: the
  // sequence has none.
  const float* mean = nullptr;
};

struct AttentionArgs {
  const float* q = nullptr;  // [q_len, num_heads, head_dim], rows q_row_stride elements apart
  int64_t q_row_stride = 0;
  float* out = nullptr;  // [q_len, num_heads, head_dim], rows out_row_stride elements apart
  int64_t out_row_stride = 0;
  float* lse = nullptr;  // optional [num_heads, q_len]: natural-log sum of exp of scaled logits
  PagedKv kv;            // for a call with KvType::kFp16, else:
  QuantizedKv quantized;
  int64_t q_len = 0;
  int64_t kv_len = 0;  // when causal the last query row sees the last key; see below
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;  // divides num_heads
  int64_t head_dim = 0;      // 1..256
  float softmax_scale = 0;   // normally 1/sqrt(head_dim)
  bool causal = true;
};

// Runs the sequences of a ragged batch, in parallel over heads and query blocks (OpenMP). A
// sequence's result never depends, not by a bit, on the others, on the number of threads or on the
// page size. K and V are only read. Not to be called from inside a parallel region.
//
// Rows that see no key (kv_len 0, or causal rows before the first key) give 0 and lse -inf.
// Throws Error for arguments that cannot be honoured. NaN and Inf in Q, K or V reach the output: a
// scale group that holds one makes NaN of everything computed with it (with smoothed K, of all rows
// of the head; for quantized V, of its channel), which may include rows that do not see the value.
//
// cache says which cache all sequences are in; kInt8 is for sage2-8b only, kInt4 for sage2-*.
//
// Numbers, all variants: Q is rounded to FP16 first; softmax, its sum (of unrounded P) and O are
// FP32; each tile of 64 keys is summed in a fresh accumulator that is then added to O.
//   fp16      QK and PV of FP16 values in FP32, P rounded to FP16.
//   sage1*    K minus its mean over all kv_len keys; integers rounded half to even; scales per
//             query and per keys {8i+2c, 8i+2c+1} of every 64, which one thread has in mma
//             fragments, per token (-t) or per 128 queries and 64 keys (-b); P and V in FP16, the
//             tile's accumulator rounded to FP16 every 16 keys. With INT8 PV (-vt, -vb) P has the
//             scale 1/127 and V one per channel.
//   sage2-*   the same with sage1's scales; e4m3 P (times 448) and V (one scale per channel,
//             rounded with feedback: recipe.h). sage2-4b also subtracts the mean of every 64
//             queries and adds its exact product with the smoothed keys.
// When causal, query groups and blocks are counted from the start of the sequence.
// With a quantized cache: Q is INT8 and has a scale per row; the keys and values of quantized pages
// are used as they are stored, a page being one tile with e4m3 P; those of the tail are FP16 (K
// minus the same mean), with unquantized Q and FP16 P. A row's result does not depend on the rows
// beside it. INT4 keys are rotated (recipe.h), and so is Q before it is quantized.
void attention(std::span<const AttentionArgs> sequences, const AttentionSpec& spec,
               KvType cache = KvType::kFp16);

// Quantizes a full page of one head, FP16 k and v [kPageTokens][head_dim], into operands and scales
// as QuantizedKv has them. mean [head_dim] is subtracted from K. Bit for bit the same on every
// instruction set: INT8 K to the nearest integer of (k - mean) * (127 / amax), ties to even; V to
// e4m3 of v * (3 / amax), with feedback (recipe.h); both in FP16 arithmetic (docs/kv-cache.md).
// INT4 K, of the 16 steps from the least to the largest element of a rotated key, to the nearest.
void quantize_page(KvType type, const uint16_t* k, const uint16_t* v, const float* mean,
                   int64_t head_dim, uint8_t* operands, float* scales);

// Splitting a sequence into chunks or single tokens gives the same result as one pass within this
// relative L1 distance of the outputs (sum |a - b| / sum |b|). 0: bit for bit. Query scale groups
// sit at absolute positions, so what remains is: the K mean and the per-channel V scales follow the
// keys seen so far, a scale group cut by a chunk's end has fewer members, and for sage2-4b so does
// the mean of a query block. With a quantized cache: rows whose page is not yet full see its keys
// in FP16, later the quantized ones.
double attention_split_bound(const AttentionSpec& spec, KvType cache = KvType::kFp16);

// The instruction set the kernels use on this machine: "avx512-vnni", "avx2" or "generic".
const char* attention_isa();

}  // namespace sagelm::cpu
