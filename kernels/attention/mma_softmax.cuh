// The online softmax of 16 query rows against 8 * kBlocks keys held in mma.sync accumulators, in
// base 2. A thread has rows g and g + 8; the four threads of a quad share them.
#pragma once

#include "kernels/attention/recipe.h"
#include "kernels/common/ptx.cuh"

namespace sagelm::kernels::mma {

using namespace ptx;

// Below any logit, so that no difference of two maxima is infinity - infinity.
inline constexpr float kNoMaximum = -1e30f;

// INT8 products start from the integer whose bits, read as a float, are 1.5 * 2^23: the sum, below
// 2^22 in magnitude as 127 * 127 * 256 is, then reads as that float plus the integer, and needs no
// conversion.
inline constexpr int32_t kIntegerSeed = 0x4B400000;
inline constexpr float kIntegerZero = 12582912.0f;

struct SoftmaxRows {
  float top[2];  // running maximum of the scaled logits
  float sum[2];  // this thread's share of the sum of 2^(logit - top), times the factor of P

  __device__ __forceinline__ void clear() {
    top[0] = top[1] = kNoMaximum;
    sum[0] = sum[1] = 0.0f;
  }
  // The whole rows' sums.
  __device__ __forceinline__ void add_over_quad() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(0xFFFFFFFFu, sum[r], 1);
      sum[r] += __shfl_xor_sync(0xFFFFFFFFu, sum[r], 2);
    }
  }
};

// Replaces the products s (kIntegerZero added where kInt8; -infinity where masked) by P and says
// by how much earlier sums of these rows shrink. scale[r], positive, makes base-2 logits of the
// products of row g + 8r. kE4m3: P comes out times 448.
template <bool kInt8, bool kE4m3, int kBlocks>
__device__ __forceinline__ void softmax(float (&s)[kBlocks][4], const float (&scale)[2],
                                        SoftmaxRows& rows, float (&shrink)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float largest = fmaxf(s[0][2 * r], s[0][2 * r + 1]);
#pragma unroll
    for (int n = 1; n < kBlocks; ++n) {
      largest = fmaxf(largest, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
    }
    // Scaled before the quad compares: its threads' keys may have different scales.
    largest = (kInt8 ? largest - kIntegerZero : largest) * scale[r];
    largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, 2));
    const float top = fmaxf(rows.top[r], largest);
    shrink[r] = exp2_fast(rows.top[r] - top);
    rows.top[r] = top;
    float offset = kE4m3 ? recipe::kLog2E4m3Max - top : -top;
    if constexpr (kInt8) offset = fmaf(-kIntegerZero, scale[r], offset);
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int e = 2 * r; e < 2 * r + 2; ++e) {
        s[n][e] = exp2_fast(fmaf(s[n][e], scale[r], offset));
        sum += s[n][e];
      }
    }
    rows.sum[r] = fmaf(rows.sum[r], shrink[r], sum);
  }
}

// Keys first .. first + 8 kBlocks - 1 are in s; row g + 8r sees those below seen[r].
template <int kBlocks>
__device__ __forceinline__ void mask(float (&s)[kBlocks][4], int first, const int (&seen)[2]) {
  const int key = first + 2 * (threadIdx.x % 4);
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (key + 8 * n + (e & 1) >= seen[e >> 1]) s[n][e] = -INFINITY;
    }
  }
}

}  // namespace sagelm::kernels::mma
