// A query row's softmax as the Hopper kernels carry it along, and how finished rows are stored.
#pragma once

#include <cstdint>

#include "kernels/attention/problem.cuh"
#include "kernels/attention/recipe.h"
#include "kernels/attention/work_sm90.cuh"
#include "kernels/common/ptx.cuh"
#include "kernels/common/sm90.cuh"

namespace sagelm::kernels::hopper {

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
  return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}

// What a consumer thread carries along its two query rows, g and g + 8 of its warp's 16. Weights
// of keys are 2^(logit - reference): the reference is shared by the four threads of a row.
struct RowState {
  float reference[2];
  float sum[2];  // of the weights of this thread's keys, or of all
};

// A warp's finished rows, pair(i) the i-th pair of 16-bit numbers as the accumulators lie, to
// `staging`.
template <int kPitch, typename Pair>
__device__ inline void stage_pairs(uint16_t (&staging)[16][kPitch], const Pair& pair) {
  const int lane = threadIdx.x % 32;
  const uint32_t address = ptx::smem_address(&staging[(lane & 7) + (lane & 8)][lane >= 16 ? 8 : 0]);
#pragma unroll
  for (int j = 0; j < (kPitch - 8) / 8; j += 2) {
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = pair(2 * j + i);
    sm90::store_matrices(address + 16 * j, pairs);
  }
}

// A warp's finished rows, two to a register as the accumulators lie, to `staging`.
template <int kDim, bool kBf16>
__device__ inline void stage_rows(const float (&out)[kDim / 2], uint16_t (&staging)[16][kDim + 8]) {
  stage_pairs(staging, [&](int i) { return ptx::to_halves<kBf16>(out[2 * i], out[2 * i + 1]); });
}

// Of a warp's rows that are its threads' rows g and g + 8, with the sums of all of a row's weights:
// stores what is wanted of them, and gives their inverses.
struct RowInverses {
  float of[2];
};
__device__ inline RowInverses finish_sums(const Problem& p, const WorkItem& item, int first_row,
                                          const RowState& rows, const float* biases) {
  const int lane = threadIdx.x % 32, g = lane >> 2, c = lane & 3;
  RowInverses inverses;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    inverses.of[r] = rows.sum[r] == 0.0f ? 0.0f : ptx::reciprocal(rows.sum[r]);
  }
  if ((p.lse != nullptr || item.parts > 1) && c == 0) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + g + 8 * r;
      if (row >= item.q_len) continue;
      const float bias = biases != nullptr ? biases[g + 8 * r] : 0.0f;
      float* lse =
          item.parts > 1
              ? p.part_lse + item.part_place(p, row)
              : p.lse + (static_cast<int64_t>(item.b) * p.num_heads + item.head) * p.max_q_len +
                    row;
      *lse = rows.sum[r] == 0.0f ? -INFINITY
                                 : (rows.reference[r] + log2f(rows.sum[r]) + bias) * recipe::kLn2;
    }
  }
  return inverses;
}

// Stores a warp's 16 rows as they lie in shared memory, so that whole rows are written.
template <int kDim>
__device__ inline void store_staged(const Problem& p, const WorkItem& item, int first_row,
                                    const uint16_t (&staging)[16][kDim + 8]) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
  constexpr int kLanes = kDim / 8, kRows = 32 / kLanes;
  const int chunk = lane % kLanes, first = lane / kLanes;
  uint4 chunks[16 / kRows];
#pragma unroll
  for (int i = 0; i < 16 / kRows; ++i) {
    chunks[i] = *reinterpret_cast<const uint4*>(&staging[first + i * kRows][chunk * 8]);
  }
  __syncwarp();
  if (chunk * 8 < p.head_dim) {
    const int row = first_row + first;
    uint16_t* to = item.out + row * item.out_stride + chunk * 8;
#pragma unroll
    for (int i = 0; i < 16 / kRows; ++i) {
      if (row + i * kRows < item.q_len) *reinterpret_cast<uint4*>(to) = chunks[i];
      to += kRows * item.out_stride;
    }
  }
}

// Adds the sums of a row's four threads, divides by them and stores a warp's 16 rows.
template <int kDim>
__device__ inline void store_rows(const Problem& p, const WorkItem& item, int first_row,
                                  RowState rows, float (&out)[kDim / 2],
                                  uint16_t (&staging)[16][kDim + 8], const float* biases) {
#pragma unroll
  for (float& sum : rows.sum) sum = quad_sum(sum);
  const RowInverses inverses = finish_sums(p, item, first_row, rows, biases);
#pragma unroll
  for (int i = 0; i < kDim / 2; ++i) out[i] *= inverses.of[i / 2 % 2];
  if (p.bf16) {
    stage_rows<kDim, true>(out, staging);
  } else {
    stage_rows<kDim, false>(out, staging);
  }
  store_staged<kDim>(p, item, first_row, staging);
}

}  // namespace sagelm::kernels::hopper
