// The quantized KV cache on Hopper: pages of 128 tokens, each one tile of the attention kernels
// (kernels/attention/sage_tiles.cuh), and FP16 or BF16 tails (docs/kv-cache.md). A page is
// quantized when the step that fills it appends to it, and never again.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/ops/element.h"

namespace sagelm::kernels {

// Null if the kernels take such heads, else one sentence why not.
const char* quantized_kv_refusal(int32_t num_heads, int32_t num_kv_heads, int32_t head_dim);

// Channels of a head in a page; those past head_dim hold zeros.
inline int32_t quantized_kv_dim(int32_t head_dim) { return head_dim <= 64 ? 64 : 128; }

// Floats of a page and KV head: 4 key groups; the values', its log2 and its inverse; 1 unused.
inline constexpr int kQuantizedKvScales = 8;
// With INT4 keys, whose groups are not used, a word per key follows (kernels/cache/int4_keys.cuh).
inline constexpr int32_t quantized_kv_scales(bool int4_keys) {
  return kQuantizedKvScales + (int4_keys ? 128 : 0);
}

// The cache of one layer. Every start lies on a 16-byte boundary; dim is
// quantized_kv_dim(head_dim).
struct QuantizedKv {
  Element type = Element::kF16;  // 16 bits; of the tails, QKV and the output
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  bool int4_keys = false;
  int8_t* keys = nullptr;     // [page][kv_head][128 * dim]; INT4: half of that, two to a byte
  uint8_t* values = nullptr;  // e4m3 [page][kv_head][dim * 128]
  float* scales = nullptr;    // [page][kv_head][quantized_kv_scales(int4_keys)]
  float* means = nullptr;     // [mean][kv_head][head_dim]: mean key of a sequence's first page
  void* tails = nullptr;      // [tail][2: keys, values][kv_head][128][head_dim]
};

// What a step is about; arrays on the device.
struct QuantizedKvStep {
  int32_t rows = 0;
  int32_t num_sequences = 0;
  int32_t max_q_len = 0;
  int32_t max_kv_len = 0;               // of one sequence with several rows its length
  int32_t max_closed_pages = 0;         // most pages that any sequence fills in this step
  bool closes_first_page = false;       // whether one of them is the first of its sequence
  bool begins_in_first_page = false;    // whether any sequence had no full page before the step
  const int32_t* positions = nullptr;   // [rows]
  const int32_t* slots = nullptr;       // [rows]: tail * 128 + position % 128, or -1 where the
                                        // row's sequence fills a page in this step
  const int32_t* cu_q_lens = nullptr;   // [num_sequences + 1], first row of each sequence
  const int32_t* kv_lens = nullptr;     // [num_sequences], with the step's tokens
  const int32_t* page_table = nullptr;  // [num_sequences][page_table_stride], the full pages
  int32_t page_table_stride = 0;
  const int32_t* tails = nullptr;  // [num_sequences]
  const int32_t* means = nullptr;  // [num_sequences]: where in QuantizedKv::means each
                                   // sequence's mean lies (`tails` if it is kept with them)
};

struct AppendToQuantizedKv {
  QuantizedKv cache;
  QuantizedKvStep step;
  void* qkv = nullptr;               // [rows, (num_heads + 2 * num_kv_heads) * head_dim]
  const float* rotations = nullptr;  // [positions][2][head_dim / 2] (kernels/ops/rope_append.h)
  bool smooth_k = true;              // false: the means of first pages are zeros
  // [num_sequences][num_kv_heads] zeros, which they are again afterwards; needed where the tokens
  // of a first page and of another one come in one step.
  uint32_t* arrivals = nullptr;
  // For prefill_from_quantized_kv:
  void* prefill = nullptr;     // its workspace
  float softmax_scale = 0.0f;  // not 0 then
};

// Rotates the query columns of qkv in place, and appends the rotated keys and the values: pages
// that become full are quantized from the old tail and from qkv, then the tail holds the tokens
// past them. Pages depend on the tokens alone, not on how they were cut into steps. One launch, two
// where a page fills.
//
// With a workspace of prefill_from_quantized_kv qkv stays as it is, and the workspace gets the
// queries, rotated by their positions, in INT8 and a copy of every tail as a page of INT8 keys, in
// one launch.
cudaError_t append_to_quantized_kv(const AppendToQuantizedKv& args, cudaStream_t stream);

// Causal attention of the step's rows over the cache by the sage2 kernel, which reads the pages as
// they lie, but for INT4 keys: those are first unpacked to INT8, one scale for 32 keys, still
// rotated by their Hadamard matrix, as queries and tails then are too. For steps of many rows.
// Its workspace begins with what the step's append left there; if it has no room for the unpacked
// keys of all sequences, it takes fewer at once.
struct PrefillFromQuantizedKv {
  QuantizedKv cache;
  QuantizedKvStep step;
  void* out = nullptr;  // row i at out + i * out_stride: [num_heads][head_dim]
  int64_t out_stride = 0;
};
size_t quantized_kv_prefill_workspace_bytes(const QuantizedKv& cache, const QuantizedKvStep& step,
                                            int32_t sequences_at_once = 1);
cudaError_t prefill_from_quantized_kv(const PrefillFromQuantizedKv& args, void* workspace,
                                      size_t workspace_bytes, cudaStream_t stream);

struct DecodeFromQuantizedKv {
  QuantizedKv cache;
  QuantizedKvStep step;
  const void* queries = nullptr;  // row i at queries + i * query_stride: [num_heads][head_dim]
  int64_t query_stride = 0;       // elements
  void* out = nullptr;            // likewise
  int64_t out_stride = 0;
  float* lse = nullptr;        // if wanted: natural, [num_sequences][num_heads][max_q_len]
  float softmax_scale = 0.0f;  // not 0
  // If given, the step has not been appended to the cache, and the kernel does that too (see
  // quantized_kv_decode_appends): `queries` are whole rows of qkv as the projection left them,
  // rotations as above, arrivals [num_sequences][num_kv_heads] zeros, which they are again
  // afterwards. No log-sum-exp then.
  const float* rotations = nullptr;
  uint32_t* arrivals = nullptr;
};

// Whether a decode may append too: one row a sequence, none of which fills a page, and heads of 64
// or 128. The cache's other bytes must be settled: written by kernels that ended before this step.
bool quantized_kv_decode_appends(const QuantizedKv& cache, const QuantizedKvStep& step);

// Whether every KV head's query rows fit the kernel's 16: max_q_len * num_heads / num_kv_heads.
bool quantized_kv_decode_takes(const DecodeFromQuantizedKv& args);
size_t quantized_kv_decode_workspace_bytes(const DecodeFromQuantizedKv& args);
// Causal attention of the step's rows over the cache, that the step has been appended to: INT8
// queries (one scale a row) and keys, P in FP16 with values exactly as e4m3 holds them; tails in
// their own type. A sequence's result does not depend on the others of the batch. workspace:
// 16-byte aligned. Two launches, one where no sequence has a full page.
cudaError_t decode_from_quantized_kv(const DecodeFromQuantizedKv& args, void* workspace,
                                     cudaStream_t stream);

}  // namespace sagelm::kernels
