// A query row's softmax as the Hopper kernels carry it along, and how finished rows are stored.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/attention/problem.cuh"
#include "kernels/attention/recipe.h"
#include "kernels/attention/work_sm90.cuh"

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
  float sum[2];  // of the weights of this thread's keys
};

// Divides by the sum and stores a warp's 16 rows, through shared memory for whole-row writes.
template <int kDim>
__device__ inline void store_rows(const Problem& p, const WorkItem& item, int first_row,
                                  const RowState& rows, const float (&out)[kDim / 2],
                                  uint16_t (&staging)[16][kDim + 8], const float* biases) {
  const int lane = threadIdx.x % 32, g = lane >> 2, c = lane & 3;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = quad_sum(rows.sum[r]);
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      const float low = out[4 * j + 2 * r] * inverse;
      const float high = out[4 * j + 2 * r + 1] * inverse;
      uint32_t* slot = reinterpret_cast<uint32_t*>(&staging[g + 8 * r][8 * j + 2 * c]);
      if (p.bf16) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        *slot = *reinterpret_cast<const uint32_t*>(&pair);
      } else {
        const __half2 pair = __floats2half2_rn(low, high);
        *slot = *reinterpret_cast<const uint32_t*>(&pair);
      }
    }
    const int row = first_row + g + 8 * r;
    if (p.lse != nullptr && c == 0 && row < item.q_len) {
      const float bias = biases != nullptr ? biases[g + 8 * r] : 0.0f;
      p.lse[(static_cast<int64_t>(item.b) * p.num_heads + item.head) * p.max_q_len + row] =
          sum == 0.0f ? -INFINITY : (rows.reference[r] + log2f(sum) + bias) * recipe::kLn2;
    }
  }
  __syncwarp();
  constexpr int kLanes = kDim / 8;
  const int chunk = lane % kLanes;
  if (chunk * 8 < p.head_dim) {
#pragma unroll
    for (int i = 0; i < 16; i += 32 / kLanes) {
      const int row = i + lane / kLanes;
      if (first_row + row < item.q_len) {
        uint16_t* to = static_cast<uint16_t*>(p.out.data) +
                       p.q_offset(p.out, item.b, first_row + row, item.head) + chunk * 8;
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&staging[row][chunk * 8]);
      }
    }
  }
  __syncwarp();
}

}  // namespace sagelm::kernels::hopper
