// Attention on the CPU for one sequence: the FP16 reference and bit-faithful models of the
// quantized variants (kernels/attention/recipe.h holds their numbers).
#pragma once

#include <cstdint>
#include <span>

#include "backend/attention_variant.h"

namespace sagelm::cpu {

// Keys and values of one sequence in pages of page_size tokens: page p holds FP16 values
// [num_kv_heads][page_size][head_dim] starting at k_pages[p] and v_pages[p]. A contiguous
// [num_kv_heads][kv_len][head_dim] tensor is one page with page_size = kv_len.
struct PagedKv {
  std::span<const uint16_t* const> k_pages;
  std::span<const uint16_t* const> v_pages;
  int64_t page_size = 0;
};

struct AttentionArgs {
  const float* q = nullptr;  // [q_len, num_heads, head_dim], rows q_row_stride elements apart
  int64_t q_row_stride = 0;
  float* out = nullptr;      // [q_len, num_heads, head_dim], rows out_row_stride elements apart
  int64_t out_row_stride = 0;
  float* lse = nullptr;      // optional [num_heads, q_len]: natural-log sum of exp of scaled logits
  PagedKv kv;
  int64_t q_len = 0;
  int64_t kv_len = 0;        // >= q_len when causal: the last query row sees the last key
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;  // divides num_heads
  int64_t head_dim = 0;      // 1..256
  float softmax_scale = 0;   // normally 1/sqrt(head_dim)
  bool causal = true;
};

// Runs the sequences of a ragged batch one after the other in parallel over heads and query
// blocks (OpenMP). A sequence's result never depends on the others, on the number of threads, or
// on how many of its query rows are computed at once beyond the variant's quantization groups.
// Throws Error for arguments that cannot be honoured. NaN and Inf in Q, K or V reach the output.
void attention(std::span<const AttentionArgs> sequences, const AttentionSpec& spec);

// Splitting a sequence into chunks or single tokens gives the same result as one pass within this
// relative L1 distance of the outputs (sum |a - b| / sum |b|). 0: bit for bit. Query scale groups
// sit at absolute positions, so what remains is: the K mean and the per-channel V scales follow the
// keys seen so far, a scale group cut by a chunk's end has fewer members, and for sage2-4b so does
// the mean of a query block.
double attention_split_bound(const AttentionSpec& spec);

// The instruction set the kernels use on this machine: "avx512-vnni", "avx2" or "generic".
const char* attention_isa();

}  // namespace sagelm::cpu
