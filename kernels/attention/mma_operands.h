// What the sm_80 launches hand to each other: quantized tiles in the workspace.
//
// Tiles lie in global memory exactly as in shared memory (chunk_offset in mma_ptx.cuh), so that
// loading one is a linear copy. `dim` is head_dim padded to an instance, the padding holds zeros;
// so do the rows of a tile beyond its sequence. All sequences have room for the longest.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/attention/problem.cuh"

namespace sagelm::kernels {

inline constexpr int kMmaQueryTile = 128;
inline constexpr int kMmaKeyTile = 64;
inline constexpr int kMmaKeyScales = 4;  // a tile
inline constexpr int kMmaMeanRows = 64;  // queries that SAGE2_4B smooths by one mean

struct MmaOperands {
  int8_t* queries;        // [batch][heads][query_tiles][128][dim]; of SAGE2_4B -7 to 7, as the keys
  float* query_scales;    // [batch][heads][query_tiles * 128]: softmax_scale * log2(e) included
  float* query_biases;    // as query_scales: softmax_scale * log2(e) * q.mean, of q as it is
                          // quantized; null: K not smoothed
  uint16_t* query_means;  // SAGE2_4B: mean queries, as Q's type rounds them, [batch][heads]
                          // [query_tiles * 128 / kMmaMeanRows][dim]; null for the others
  int8_t* keys;           // [batch][kv_heads][key_tiles][64][dim]
  float* key_scales;      // [batch][kv_heads][key_tiles][kMmaKeyScales]
  float* key_means;       // [batch][kv_heads][dim]; null: K not smoothed
  uint8_t* values;        // e4m3 [batch][kv_heads][key_tiles][dim][64]; in every 16 tokens place p
                          // holds token 2 (p >> 2) + 8 ((p >> 1) & 1) + (p & 1). Null for SAGE1
  float* value_scales;    // [batch][kv_heads][dim]; null for SAGE1
  float* chunk_sums;      // [batch][kv_heads][chunks][dim], of K; null: K not smoothed
  uint32_t* chunk_tops;   // as chunk_sums: bits of the largest |V|; null for SAGE1
  int query_tiles, key_tiles, chunks;
};

// The instance that serves a head size: 64, 128 or 256.
inline int mma_padded_dim(int head_dim) {
  return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256;
}

// Lays the operands of a quantized variant out in a workspace (null: only to learn the size, in
// *bytes).
MmaOperands place_mma_operands(sagelm_attention_variant variant, const Problem& problem,
                               void* workspace, size_t* bytes);

// Fills them: statistics of K and V where needed (two launches), the means of Q where they are
// (one), then one pass over Q, K and V.
cudaError_t quantize_mma_operands(const Problem& problem, const MmaOperands& operands,
                                  cudaStream_t stream);

// The attention kernels, one file each.
cudaError_t mma_attend_fp16(const Problem& problem, cudaStream_t stream);
cudaError_t mma_attend_sage1(const Problem& problem, const MmaOperands& operands,
                             cudaStream_t stream);
cudaError_t mma_attend_sage2(const Problem& problem, const MmaOperands& operands,
                             cudaStream_t stream);
cudaError_t mma_attend_sage2_4b(const Problem& problem, const MmaOperands& operands,
                                cudaStream_t stream);

}  // namespace sagelm::kernels
