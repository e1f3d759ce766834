// From logits to the operand of P V in registers, in FP16 or BF16: P = 2^(logit - reference), with
// a reference per row in the place of a running maximum.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/attention/rows_sm90.cuh"
#include "kernels/common/ptx.cuh"

namespace sagelm::kernels::fp16 {

using namespace hopper;

// A row's reference is moved only when a weight comes near FP16's largest number, to where the
// tile's largest weight has so many bits: all that is above 2^-22 of it then has all of FP16's
// digits. BF16 would have the range for any reference; the sums of P V are FP32.
constexpr float kFirstBits = 8.0f;
// The reference of a row that has seen no key: any logit is infinitely above it.
constexpr float kNothing = -1e30f;

// Weights are not negative, so as integers they are in the same order, and NaN is the largest.
// `most` holds two of them: whether one is 2^14 or more, or NaN.
template <bool kBf16>
__device__ inline bool near_most(uint32_t most) {
  constexpr uint32_t kNearMost = kBf16 ? 0x4680u : 0x7400u;
  return (most >> 16) >= kNearMost || (most & 0xFFFFu) >= kNearMost;
}

// A tile's logits (scale turns them to bits) to P; sums is set to those of the weights, before they
// are rounded. Returns the largest weights for near_most.
template <bool kBf16>
__device__ __forceinline__ uint32_t exponentiate(const float (&logits)[64], uint32_t (&p)[32],
                                                 float scale, const RowState& rows,
                                                 float (&sums)[2]) {
  uint32_t most = 0;
  sums[0] = sums[1] = 0.0f;
#pragma unroll
  for (int i = 0; i < 32; i += 2) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float* pair = logits + 2 * (i + r);
      const float low = ptx::exp2_fast(fmaf(pair[0], scale, -rows.reference[r]));
      const float high = ptx::exp2_fast(fmaf(pair[1], scale, -rows.reference[r]));
      sums[r] += low;
      sums[r] += high;
      p[i + r] = ptx::to_halves<kBf16>(low, high);
    }
    most = __vimax3_u16x2(most, p[i], p[i + 1]);
  }
  return most;
}

// ends: keys from there on are masked, relative to the first key of this thread (2c of the tile),
// whose last one is kLastKey.
constexpr int kLastKey = 8 * 15 + 1;
__device__ inline void mask(float (&logits)[64], const int (&ends)[2]) {
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    const int key = 8 * (i >> 2) + (i & 1);
    if (key >= ends[(i >> 1) & 1]) logits[i] = -INFINITY;
  }
}

// A reference from a tile's logits of row r, such that their weights fit whatever they are.
__device__ inline float reference_of(const float (&logits)[64], int r, float scale) {
  float most = -INFINITY;
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    if (((i >> 1) & 1) == r) most = fmaxf(most, logits[i]);
  }
  return fmaxf(quad_max(most) * scale, kNothing) - kFirstBits;
}

// Moves the references of rows with a weight in p near the most; the weights are then to be
// computed again. A row without a weight so far takes its reference from these keys.
template <bool kBf16, int kCount>
__device__ inline void move_references(const float (&logits)[64], const uint32_t (&p)[32],
                                       float scale, RowState& rows, float (&products)[kCount]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    uint32_t most = 0;
#pragma unroll
    for (int i = r; i < 32; i += 2) most = __vmaxu2(most, p[i]);
    most = __vmaxu2(most, __shfl_xor_sync(0xFFFFFFFFu, most, 1));
    most = __vmaxu2(most, __shfl_xor_sync(0xFFFFFFFFu, most, 2));
    const float largest = reference_of(logits, r, scale);
    const float before = rows.reference[r];
    if (near_most<kBf16>(most)) rows.reference[r] = largest;
    const float factor = ptx::exp2_fast(before - rows.reference[r]);
    rows.sum[r] *= factor;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (((i >> 1) & 1) == r) products[i] *= factor;
    }
  }
}

}  // namespace sagelm::kernels::fp16
