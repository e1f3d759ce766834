// From logits to the operand of P V in registers: SageAttention 2's P = 2^(logit - reference) in
// e4m3 (arXiv:2411.10958, section 3.3), with a reference per row in the place of a running maximum.
#pragma once

#include <cstdint>

#include "kernels/attention/recipe.h"
#include "kernels/attention/rows_sm90.cuh"
#include "kernels/common/ptx.cuh"

namespace sagelm::kernels::sage2 {

using namespace hopper;

// The exponentials of a tile are taken against a row's reference, the reference is moved only when
// those of one thread add up to more than e4m3 can hold of one of them, and then so far that they
// add up to this many bits less.
constexpr float kSlack = 2.0f;
constexpr float kSumBits = recipe::kLog2E4m3Max - kSlack;
// Before any sum is known, the largest weight gets so many bits: 32 of them still fit.
constexpr float kFirstBits = recipe::kLog2E4m3Max - 5.0f;
// The reference of a row that has seen no key: any logit is infinitely above it.
constexpr float kNothing = -1e30f;

// How a tile's integers become weights: 2^(logit * scale - offset), times the scale of V.
struct TileScales {
  float scale[2];
  float value_bits;     // log2 of the scale of V
  float value_inverse;  // 1 / scale of V
};

// A tile's logits to P and to the sums of its weights. ends: keys from there on are masked,
// relative to the first key of this thread (4c of the tile).
template <bool kMask>
__device__ __forceinline__ void exponentiate(const int32_t (&logits)[64], uint32_t (&p)[16],
                                             const float (&scale)[2], const float (&offset)[2],
                                             const int (&ends)[2], float (&sum)[2]) {
  sum[0] = sum[1] = 0.0f;
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
      sum[r] += x[k];
    }
    p[4 * i] = ptx::to_e4m3(x[0], x[1], x[4], x[5]);
    p[4 * i + 1] = ptx::to_e4m3(x[2], x[3], x[6], x[7]);
    p[4 * i + 2] = ptx::to_e4m3(x[8], x[9], x[12], x[13]);
    p[4 * i + 3] = ptx::to_e4m3(x[10], x[11], x[14], x[15]);
  }
}

__device__ inline bool sums_fit(const float (&sum)[2]) {
  return sum[0] <= recipe::kE4m3Max && sum[1] <= recipe::kE4m3Max;  // NaN does not
}

// The largest logit of row r, in bits, among its keys before `end`; kNothing if there is none.
__device__ inline float largest_logit(const int32_t (&logits)[64], int r, const TileScales& tile,
                                      int end) {
  float most = kNothing;
#pragma unroll
  for (int j = 0; j < 16; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int key = 16 * (j >> 1) + 2 * (j & 1) + e;
      if (key < end) most = fmaxf(most, static_cast<float>(logits[4 * j + 2 * r + e]));
    }
  }
  // The scale belongs to this thread's keys.
  return quad_max(most == kNothing ? kNothing : most * tile.scale[r] + tile.value_bits);
}

// References from the first keys, such that their weights fit whatever they are.
__device__ inline void set_references(const int32_t (&logits)[64], RowState& rows,
                                      const TileScales& tile, const int (&ends)[2]) {
  rows.reference[0] = largest_logit(logits, 0, tile, ends[0]) - kFirstBits;
  rows.reference[1] = largest_logit(logits, 1, tile, ends[1]) - kFirstBits;
}

// Moves the references of rows whose weights do not fit, and computes the weights again. A row
// without a weight so far takes its reference from these keys.
template <int kCount>
__device__ inline void move_references(const int32_t (&logits)[64], uint32_t (&p)[16],
                                       RowState& rows, float (&products)[kCount],
                                       const TileScales& tile, const int (&ends)[2],
                                       float (&sum)[2]) {
  // A second time where the sums of the first overflowed: they did not say how far to go.
  for (int attempt = 0; attempt < 2; ++attempt) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float largest = quad_max(sum[r]);
      const float before = rows.reference[r];
      const bool overflowed = !(largest < 1e30f);
      // All lanes together: rows of a warp may differ.
      if (__any_sync(0xFFFFFFFFu, overflowed)) {
        const float logit = largest_logit(logits, r, tile, ends[r]);
        if (overflowed) rows.reference[r] = logit - kFirstBits;
      }
      if (!overflowed && largest > recipe::kE4m3Max) {
        rows.reference[r] = before + (__log2f(largest) - kSumBits);
      }
      const float factor = ptx::exp2_fast(before - rows.reference[r]);
      rows.sum[r] *= factor;
#pragma unroll
      for (int j = 0; j < kCount / 4; ++j) {
        products[4 * j + 2 * r] *= factor;
        products[4 * j + 2 * r + 1] *= factor;
      }
    }
    const float offset[2] = {rows.reference[0] - tile.value_bits,
                             rows.reference[1] - tile.value_bits};
    exponentiate<true>(logits, p, tile.scale, offset, ends, sum);
    if (!__any_sync(0xFFFFFFFFu, !sums_fit(sum))) break;
  }
}

}  // namespace sagelm::kernels::sage2
