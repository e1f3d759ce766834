// Attention with mma.sync, for sm_80 and later (SAGE2: sm_89), any shape of sagelm/attention.h.
//
// FP16   follows FlashAttention-2 (arXiv:2307.08691): 128 queries against tiles of 64 keys, P and V
//        in the inputs' type, FP32 accumulation. Calls with at most 16 query rows per KV head
//        (max_q_len * num_heads / num_kv_heads, decode) split each sequence into parts of 256 keys
//        whatever the batch, and combine them in a second launch.
// SAGE1  (arXiv:2410.02367, with the finer scales of 2411.10958) INT8 Q K^T, a scale per query and
//        per keys {8i+2c, 8i+2c+1} of every 64, which are those of one thread. FP16 inputs: P and
//        V in FP16, the 64 keys of a tile summed in FP16 (|V| stays below 1023), then in FP32. BF16
//        inputs: P and V in BF16 with FP32 sums, since V may exceed FP16's range.
// SAGE2  (arXiv:2411.10958, the 8-bit variant) INT8 Q K^T as SAGE1; P * 448 and V (a scale per
//        channel over the sequence) in e4m3, the 64 keys of a tile summed on their own. Without
//        e4m3 matrix units for mma.sync, as on sm_90, the product is emulated: right, not fast.
// SAGE2_4B (arXiv:2411.10958, the 4-bit variant) SAGE2 with integers up to 7 and smoothed Q: the
//        mean of every 64 queries (as Q's type rounds it) is taken off before Q is quantized, and
//        its product with K as it came, in 16-bit products with FP32 sums, is added to the logits.
//        The integers lie in INT8 operands and take INT8 products: Hopper has no INT4 ones, and
//        mma.sync emulates them there. In a call of plain tensors the format buys nothing, it costs
//        the products of the means; what it is for is a cache of half the bytes of K
//        (docs/kv-cache.md).
//
// The quantized variants read K and V twice before they attend, also for a single query: decode is
// better served by FP16. K is smoothed by the mean of all keys of its sequence and head. NaN or
// infinity in Q, K or V makes its whole scale group NaN.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "kernels/attention/problem.cuh"

namespace sagelm::kernels {

// Depends on the lengths, heads and sizes of the problem, on no pointer of it.
size_t mma_attention_workspace_bytes(sagelm_attention_variant variant, const Problem& problem);

// Null, or one sentence on why the call cannot run; compute_capability is 90 for sm_90.
const char* mma_attention_refusal(sagelm_attention_variant variant, const Problem& problem,
                                  int compute_capability);

// Enqueues the call, which must not be one that mma_attention_refusal refuses. The workspace is
// 256-byte aligned.
cudaError_t mma_attention(sagelm_attention_variant variant, const Problem& problem, void* workspace,
                          cudaStream_t stream);

}  // namespace sagelm::kernels
