// From logits to the operand of P V in registers: SageAttention 2's P = 2^(logit - reference) in
// e4m3 (arXiv:2411.10958, section 3.3), with a reference per row in the place of a running maximum.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/attention/recipe.h"
#include "kernels/attention/rows_sm90.cuh"
#include "kernels/common/ptx.cuh"

namespace sagelm::kernels::sage2 {

using namespace hopper;

// The exponentials of a tile are taken against a row's reference. It is moved only when a weight
// comes near the largest e4m3 number, to where the tile's largest weight has so many bits.
constexpr float kFirstBits = recipe::kLog2E4m3Max - 5.0f;
// The reference of a row that has seen no key: any logit is infinitely above it.
constexpr float kNothing = -1e30f;

// How a tile's integers become weights: 2^(logit * scale - offset), times the scale of V.
struct TileScales {
  float scale[2];
  float value_bits;     // log2 of the scale of V
  float value_inverse;  // 1 / scale of V
};

// Whether a weight of e4m3 numbers, to whose codes kNearMost has been added, is 256 (the code 0x78)
// or more, or NaN. If none is, then none has saturated.
constexpr uint32_t kNearMost = 0x08080808u;
__device__ inline bool near_most(uint32_t carries) { return (carries & 0x80808080u) != 0; }

// A tile's logits to P. ends: keys from there on are masked, relative to the first key of this
// thread (4c of the tile). Returns the union of what near_most takes.
template <bool kMask>
__device__ __forceinline__ uint32_t exponentiate(const int32_t (&logits)[64], uint32_t (&p)[16],
                                                 const float (&scale)[2], const float (&offset)[2],
                                                 const int (&ends)[2]) {
  uint32_t carries = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float x[16];
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      const int r = (k >> 1) & 1, at = 16 * i + k;
      x[k] = ptx::exp2_fast(fmaf(static_cast<float>(logits[at]), scale[r], -offset[r]));
      if constexpr (kMask) {
        const int key = 16 * (at >> 3) + 2 * ((at >> 2) & 1) + (at & 1);
        if (key >= ends[r]) x[k] = 0.0f;
      }
    }
    p[4 * i] = ptx::to_e4m3(x[0], x[1], x[4], x[5]);
    p[4 * i + 1] = ptx::to_e4m3(x[2], x[3], x[6], x[7]);
    p[4 * i + 2] = ptx::to_e4m3(x[8], x[9], x[12], x[13]);
    p[4 * i + 3] = ptx::to_e4m3(x[10], x[11], x[14], x[15]);
#pragma unroll
    for (int k = 0; k < 4; ++k) carries |= p[4 * i + k] + kNearMost;
  }
  return carries;
}

// The second level of accumulation: sums of the matrix unit's sums, in halves of 2^-20 of them,
// packed as the accumulators lie: element i is of row i % 2. A row's weights add up to about 14 at
// least (kFirstBits) and to 2^8 a key at most, so that these stay in the range of halves.
template <int kDim>
struct FlushedSums {
  __half2 sums[kDim / 4];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kDim / 4; ++i) sums[i] = __floats2half2_rn(0.0f, 0.0f);
  }
  __device__ void take(const float (&products)[kDim / 2]) {
#pragma unroll
    for (int i = 0; i < kDim / 4; ++i) {
      sums[i] = __hadd2(
          sums[i], __floats2half2_rn(products[2 * i] * 0x1p-20f, products[2 * i + 1] * 0x1p-20f));
    }
  }
  __device__ void scale_row(int r, float factor) {
#pragma unroll
    for (int i = r; i < kDim / 4; i += 2) {
      const float2 x = __half22float2(sums[i]);
      sums[i] = __floats2half2_rn(x.x * factor, x.y * factor);
    }
  }
  __device__ void add_to(float (&products)[kDim / 2]) const {
#pragma unroll
    for (int i = 0; i < kDim / 4; ++i) {
      const float2 x = __half22float2(sums[i]);
      products[2 * i] = fmaf(x.x, 0x1p20f, products[2 * i]);
      products[2 * i + 1] = fmaf(x.y, 0x1p20f, products[2 * i + 1]);
    }
  }
};

// The largest logit of row r, in bits, among its keys, with kMask those before `end`; kNothing if
// there is none.
template <bool kMask>
__device__ inline float largest_logit(const int32_t (&logits)[64], int r, const TileScales& tile,
                                      int end) {
  float most = kNothing;
#pragma unroll
  for (int j = 0; j < 16; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int key = 16 * (j >> 1) + 2 * (j & 1) + e;
      if (!kMask || key < end) most = fmaxf(most, static_cast<float>(logits[4 * j + 2 * r + e]));
    }
  }
  // The scale belongs to this thread's keys.
  return quad_max(most == kNothing ? kNothing : most * tile.scale[r] + tile.value_bits);
}

// References from the first keys, such that their weights fit whatever they are.
template <bool kMask>
__device__ inline void set_references(const int32_t (&logits)[64], RowState& rows,
                                      const TileScales& tile, const int (&ends)[2]) {
  rows.reference[0] = largest_logit<kMask>(logits, 0, tile, ends[0]) - kFirstBits;
  rows.reference[1] = largest_logit<kMask>(logits, 1, tile, ends[1]) - kFirstBits;
}

// Moves the references of rows with a weight near the most; the weights p are then to be computed
// again. A row without a weight so far takes its reference from these keys.
template <int kDim>
__device__ inline void move_references(const int32_t (&logits)[64], const uint32_t (&p)[16],
                                       RowState& rows, float (&products)[kDim / 2],
                                       FlushedSums<kDim>& flushed, const TileScales& tile,
                                       const int (&ends)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    uint32_t carries = 0;
#pragma unroll
    for (int i = r; i < 16; i += 2) carries |= p[i] + kNearMost;
    carries |= __shfl_xor_sync(0xFFFFFFFFu, carries, 1);
    carries |= __shfl_xor_sync(0xFFFFFFFFu, carries, 2);
    const float largest = largest_logit<true>(logits, r, tile, ends[r]);
    const float before = rows.reference[r];
    if (near_most(carries)) rows.reference[r] = largest - kFirstBits;
    const float factor = ptx::exp2_fast(before - rows.reference[r]);
    rows.sum[r] *= factor;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      products[4 * j + 2 * r] *= factor;
      products[4 * j + 2 * r + 1] *= factor;
    }
    flushed.scale_row(r, factor);
  }
}

}  // namespace sagelm::kernels::sage2
