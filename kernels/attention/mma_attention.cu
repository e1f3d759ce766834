#include "kernels/attention/mma_attention.h"
#include "kernels/attention/mma_decode.h"
#include "kernels/attention/mma_operands.h"

namespace sagelm::kernels {

size_t mma_attention_workspace_bytes(sagelm_attention_variant variant, const Problem& problem) {
  if (variant == SAGELM_ATTENTION_FP16) {
    return mma_decode_takes(problem) ? mma_decode_workspace_bytes(problem) : 0;
  }
  size_t bytes = 0;
  place_mma_operands(variant, problem, nullptr, &bytes);
  return bytes;
}

const char* mma_attention_refusal(sagelm_attention_variant variant, const Problem& problem,
                                  int compute_capability) {
  // Every base-2 scale, times the smallest scales of the quantized operands, stays a normal float.
  constexpr float kSmallestScale = 1e-9f, kLargestScale = 1e9f;
  constexpr int kMaxBatch = 65535, kMaxHeads = 65535;  // of a launch's grid
  if (compute_capability < 80) return "attention needs a GPU of compute capability 8.0 or later";
  const bool e4m3 = variant == SAGELM_ATTENTION_SAGE2 || variant == SAGELM_ATTENTION_SAGE2_4B;
  if (e4m3 && compute_capability < 89) {
    return "sage2 attention needs a GPU of compute capability 8.9 or later, for its FP8 products";
  }
  if (problem.head_dim < 8 || problem.head_dim > 256 || problem.head_dim % 8 != 0) {
    return "head_dim must be a multiple of 8 from 8 to 256";
  }
  if (!(problem.softmax_scale >= kSmallestScale && problem.softmax_scale <= kLargestScale)) {
    return "softmax_scale must lie between 1e-9 and 1e9";
  }
  if (problem.page_table != nullptr && problem.page_tokens % 16 != 0) {
    return "page_tokens must be a multiple of 16";
  }
  if (problem.batch > kMaxBatch) return "the batch may hold at most 65535 sequences";
  if (int64_t{problem.num_heads} + 2 * int64_t{problem.num_kv_heads} > kMaxHeads) {
    return "the query, key and value heads together may be at most 65535";
  }
  // The longest sequence's tiles of 64 queries, of all heads and sequences, are one grid.
  const int64_t tiles = (int64_t{problem.max_q_len} + 63) / 64;
  if (tiles * problem.batch * problem.num_heads > INT32_MAX) {
    return "batch * num_heads * max_q_len is too large for one launch";
  }
  return nullptr;
}

cudaError_t mma_attention(sagelm_attention_variant variant, const Problem& problem, void* workspace,
                          cudaStream_t stream) {
  if (variant == SAGELM_ATTENTION_FP16) {
    return mma_decode_takes(problem) ? mma_decode(problem, workspace, stream)
                                     : mma_attend_fp16(problem, stream);
  }
  size_t bytes = 0;
  const MmaOperands operands = place_mma_operands(variant, problem, workspace, &bytes);
  if (problem.batch == 0 || problem.max_q_len == 0) return cudaSuccess;
  const cudaError_t error = quantize_mma_operands(problem, operands, stream);
  if (error != cudaSuccess) return error;
  switch (variant) {
    case SAGELM_ATTENTION_SAGE1:
      return mma_attend_sage1(problem, operands, stream);
    case SAGELM_ATTENTION_SAGE2:
      return mma_attend_sage2(problem, operands, stream);
    default:
      return mma_attend_sage2_4b(problem, operands, stream);
  }
}

}  // namespace sagelm::kernels
