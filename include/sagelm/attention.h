/* SageLM's attention kernels as a plain C interface over device pointers (libsagelm_attention.so).
 *
 *   O = softmax(scale * Q K^T) V, exactly (SAGELM_ATTENTION_FP16) or with quantized products after
 *   SageAttention (arXiv:2410.02367), SageAttention2 (arXiv:2411.10958).
 *
 * All tensors are FP16 or BF16 in device memory, addressed as [batch, tokens, heads, head_dim] by
 * strides in elements, so that both [batch, heads, tokens, dim] and [batch, tokens, heads, dim] can
 * be given; head_dim is contiguous, and every row starts on a 16-byte boundary.
 *
 * Semantics, all of them tested:
 *  - the causal mask is aligned to the bottom right: query row i of a sequence sees the keys
 *    0 .. kv_len - q_len + i, so that a cached prefix, a chunked prefill and decode are exact. A
 *    causal call needs q_len <= kv_len of every sequence; a row beyond that is not computed;
 *  - num_heads is a multiple of num_kv_heads; query head h attends to key head
 *    h / (num_heads / num_kv_heads);
 *  - inputs are never written; a sequence's result does not depend on its neighbours in the batch,
 *    and is the same, bit by bit, from run to run;
 *  - a sequence without keys gives zeros and a log-sum-exp of -infinity;
 *  - what a kernel cannot do is refused with a sentence, never dropped.
 *
 * Calls enqueue work on `stream` and return; they never allocate or synchronise. They may be
 * captured in a CUDA graph. Thread-safe. */
#ifndef SAGELM_ATTENTION_H_
#define SAGELM_ATTENTION_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SAGELM_ATTENTION_ABI_VERSION 1

typedef enum sagelm_attention_variant {
  SAGELM_ATTENTION_FP16 = 0,  /* FP16/BF16 products, FP32 softmax and accumulation */
  SAGELM_ATTENTION_SAGE1 = 1, /* INT8 QK, a scale per query and per 16 of 64 keys, FP16 PV */
  SAGELM_ATTENTION_SAGE2 = 2, /* INT8 QK, FP8 e4m3 PV accumulated in two levels; sm_89 and later */
  /* SAGE2 with Q and K of 4 bits and smoothed Q: for comparisons, its integers take INT8 products
   * (Hopper has none for INT4) and it is slower than SAGE2; sm_89 and later */
  SAGELM_ATTENTION_SAGE2_4B = 3
} sagelm_attention_variant;

typedef enum sagelm_attention_dtype {
  SAGELM_ATTENTION_F16 = 0,
  SAGELM_ATTENTION_BF16 = 1
} sagelm_attention_dtype;

/* Which implementation runs. AUTO takes the fastest one for the device; the others are for tests
 * and benchmarks, and are refused where they can't run. */
typedef enum sagelm_attention_kernel {
  SAGELM_ATTENTION_KERNEL_AUTO = 0,
  SAGELM_ATTENTION_KERNEL_MMA = 1,  /* mma.sync, sm_80 and later */
  SAGELM_ATTENTION_KERNEL_WGMMA = 2 /* warp-group products, sm_90a */
} sagelm_attention_kernel;

typedef enum sagelm_attention_status {
  SAGELM_ATTENTION_OK = 0,
  SAGELM_ATTENTION_INVALID = 1,     /* an argument contradicts another or this header */
  SAGELM_ATTENTION_UNSUPPORTED = 2, /* no kernel for this on this device */
  SAGELM_ATTENTION_CUDA_ERROR = 3   /* a launch failed */
} sagelm_attention_status;

/* Element [b, t, h, d] is data[b * batch_stride + t * token_stride + h * head_stride + d]. */
typedef struct sagelm_attention_tensor {
  void* data;
  int64_t batch_stride; /* of K and V with a page table: from one page to the next */
  int64_t token_stride;
  int64_t head_stride;
} sagelm_attention_tensor;

/* Zero-initialise, then set what applies. */
typedef struct sagelm_attention_args {
  size_t struct_size; /* sizeof(sagelm_attention_args) */
  sagelm_attention_variant variant;
  sagelm_attention_dtype dtype; /* of Q, K, V and O */
  sagelm_attention_kernel kernel;

  int32_t batch;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;   /* a multiple of 8 up to 256 */
  int32_t max_q_len;  /* of a sequence; all have it unless cu_q_lens is given */
  int32_t max_kv_len; /* of a sequence; all have it unless cu_kv_lens or kv_lens is given */

  int32_t causal;
  int32_t no_smooth_k; /* 1: quantize K as it is. Smoothing subtracts a mean key per sequence and
                          head, which leaves softmax unchanged */
  float softmax_scale; /* 0: 1 / sqrt(head_dim) */

  sagelm_attention_tensor q, k, v, out;
  float* lse; /* null, or [batch, num_heads, max_q_len]: natural log of the sum of
                 exp(scale * q.k) over the keys seen */

  /* Ragged batches: device arrays, or null. With cu_q_lens [batch + 1], sequence b has the tokens
   * cu_q_lens[b] .. cu_q_lens[b + 1] - 1 of q and out, whose batch strides are not used; cu_kv_lens
   * the same for k and v. kv_lens [batch] gives lengths without moving the starts. */
  const int32_t* cu_q_lens;
  const int32_t* cu_kv_lens;
  const int32_t* kv_lens;

  /* Paged K and V: token t of sequence b lies in page page_table[b * page_table_stride +
   * t / page_tokens] at t % page_tokens. Needs kv_lens; page_tokens is a multiple of 16. */
  const int32_t* page_table;
  int32_t page_table_stride;
  int32_t page_tokens;

  void* workspace; /* device memory, 256-byte aligned, its contents not kept between calls */
  size_t workspace_bytes;
  void* stream; /* cudaStream_t */
} sagelm_attention_args;

/* Bytes of workspace that sagelm_attention needs for these arguments (pointers are not looked at).
 */
sagelm_attention_status sagelm_attention_workspace_bytes(const sagelm_attention_args* args,
                                                         size_t* bytes);
sagelm_attention_status sagelm_attention(const sagelm_attention_args* args);

/* One sentence on this thread's last status that was not OK; valid until its next call. */
const char* sagelm_attention_last_error(void);
/* "sage2-wgmma-sm90a" and the like: what sagelm_attention would run; null where it would refuse. */
const char* sagelm_attention_kernel_name(const sagelm_attention_args* args);

#ifdef __cplusplus
}
#endif

#endif /* SAGELM_ATTENTION_H_ */
