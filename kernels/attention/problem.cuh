// One attention call as the kernels see it: where a sequence's rows lie, whatever the layout.
#pragma once

#include <cstdint>

#include "sagelm/attention.h"

namespace sagelm::kernels {

// Element [b, t, h, d] of a [batch, tokens, heads, head_dim] tensor; strides in elements.
struct Tensor {
  void* data;
  int64_t batch_stride;
  int64_t token_stride;
  int64_t head_stride;
};

// Passed to kernels by value. Meaning of the fields: sagelm/attention.h.
struct Problem {
  Tensor q, k, v, out;
  float* lse;
  const int32_t* cu_q_lens;
  const int32_t* cu_kv_lens;
  const int32_t* kv_lens;
  const int32_t* page_table;
  int32_t page_table_stride;
  int32_t page_tokens;
  int32_t batch, num_heads, num_kv_heads, head_dim;
  int32_t max_q_len, max_kv_len;
  float softmax_scale;  // never 0
  bool causal;
  bool smooth_k;
  bool bf16;
  // Of decode steps that attention itself appends to the cache (decode_parts.cuh); else null.
  const float* rotations;  // [positions][2][head_dim / 2], as kernels/ops/rope_append.h has them
  uint32_t* arrivals;      // [batch][num_kv_heads], zeros before and after
  // Of sequences whose keys several items share (work_sm90.cuh); else null and 0.
  int32_t key_parts;  // of any sequence at most
  int32_t part_rows;  // of a sequence, of all its parts together
  void* part_out;     // [batch][part_rows][num_heads][head_dim], as out
  float* part_lse;    // [batch][part_rows][num_heads]

#ifdef __CUDACC__
  __device__ int q_len(int b) const {
    return cu_q_lens != nullptr ? cu_q_lens[b + 1] - cu_q_lens[b] : max_q_len;
  }
  __device__ int kv_len(int b) const {
    if (kv_lens != nullptr) return kv_lens[b];
    return cu_kv_lens != nullptr ? cu_kv_lens[b + 1] - cu_kv_lens[b] : max_kv_len;
  }
  // Offset in elements of row [b, t, h].
  __device__ int64_t q_offset(const Tensor& x, int b, int t, int h) const {
    const int64_t start = cu_q_lens != nullptr ? cu_q_lens[b] * x.token_stride : b * x.batch_stride;
    return start + t * x.token_stride + h * x.head_stride;
  }
  __device__ int64_t kv_offset(const Tensor& x, int b, int t, int h) const {
    int64_t start;
    if (page_table != nullptr) {
      start = page_table[static_cast<int64_t>(b) * page_table_stride + t / page_tokens] *
              x.batch_stride;
      t %= page_tokens;
    } else {
      start = cu_kv_lens != nullptr ? cu_kv_lens[b] * x.token_stride : b * x.batch_stride;
    }
    return start + t * x.token_stride + h * x.head_stride;
  }
#endif
};

}  // namespace sagelm::kernels
