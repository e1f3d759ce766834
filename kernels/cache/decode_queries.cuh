// The queries of a decode tile (kernels/attention/decode_parts.cuh) in INT8, one scale a row.
#pragma once

#include <cstdint>

#include "kernels/attention/decode_parts.cuh"
#include "kernels/attention/quantize_tile.cuh"
#include "kernels/cache/int4_keys.cuh"

namespace sagelm::kernels::mma {

// The tile's queries, rotated by the angles if there are any, as INT8 A fragments, with what makes
// base-2 logits of their products with the integers of a key of scale 1.
template <bool kBf16, int kDim>
__device__ __forceinline__ void quantize_rows(const Problem& p, int b, int kv_head, int rows,
                                              int group, float scale, const float* angles,
                                              uint32_t (&queries)[kDim / 32][4],
                                              float (&scales)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float x[kDim / 4] = {};
    const int row = threadIdx.x % 32 / 4 + 8 * r;
    if (row < rows) {
      const uint16_t* from = static_cast<const uint16_t*>(p.q.data) +
                             p.q_offset(p.q, b, row / group, kv_head * group + row % group);
#pragma unroll
      for (int i = 0; i < kDim / 16; ++i) {
        const int channel = i * 16 + threadIdx.x % 4 * 4;
        if (channel < p.head_dim) {
          const uint2 raw = *reinterpret_cast<const uint2*>(from + channel);
          const float2 low = to_floats<kBf16>(raw.x), high = to_floats<kBf16>(raw.y);
          x[4 * i] = low.x, x[4 * i + 1] = low.y, x[4 * i + 2] = high.x, x[4 * i + 3] = high.y;
        }
      }
    }
    if (angles != nullptr) {
#pragma unroll
      for (int i = 0; i < kDim / 32; ++i) {
        const int channel = i * 16 + threadIdx.x % 4 * 4;
        float cosine[4], sine[4];
        load(angles + channel, cosine);
        load(angles + kDim / 2 + channel, sine);
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          const int first = 4 * i + e, second = first + kDim / 8;
          float a[2] = {x[first], x[first + 1]}, b[2] = {x[second], x[second + 1]};
          const float c[2] = {cosine[e], cosine[e + 1]}, d[2] = {sine[e], sine[e + 1]};
          rotate_pairs(a, b, c, d);
          const float2 low = to_floats<kBf16>(to_halves<kBf16>(a[0], a[1]));
          const float2 high = to_floats<kBf16>(to_halves<kBf16>(b[0], b[1]));
          x[first] = low.x, x[first + 1] = low.y, x[second] = high.x, x[second + 1] = high.y;
        }
      }
    }
    uint32_t largest = __float_as_uint(recipe::kAmaxFloor);
#pragma unroll
    for (int i = 0; i < kDim / 4; ++i) largest = max(largest, magnitude(x[i]));
    const float amax = __uint_as_float(max_over_lanes<4>(largest));
    const float inverse = recipe::kInt8Max / amax;
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      queries[i / 2][i % 2 * 2 + r] =
          pack_bytes(rounded_byte(x[4 * i], inverse), rounded_byte(x[4 * i + 1], inverse),
                     rounded_byte(x[4 * i + 2], inverse), rounded_byte(x[4 * i + 3], inverse));
    }
    scales[r] = amax * (1.0f / recipe::kInt8Max) * scale;
  }
}

// The same for pages of INT4 keys: rotated first, in the order of their nibbles. sums: of a row's
// integers.
template <bool kBf16, int kDim>
__device__ __forceinline__ void quantize_rotated_rows(const Problem& p, int b, int kv_head,
                                                      int rows, int group, float scale,
                                                      uint32_t (&queries)[kDim / 32][4],
                                                      float (&scales)[2], float (&sums)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float x[kDim / 4] = {};  // 8 channels of every 32
    const int row = threadIdx.x % 32 / 4 + 8 * r;
    if (row < rows) {
      const uint16_t* from = static_cast<const uint16_t*>(p.q.data) +
                             p.q_offset(p.q, b, row / group, kv_head * group + row % group);
#pragma unroll
      for (int i = 0; i < kDim / 32; ++i) {
        const int channel = i * 32 + threadIdx.x % 4 * 8;
        if (channel < p.head_dim) {
          float y[8];
          unpack<kBf16>(*reinterpret_cast<const uint4*>(from + channel), y);
#pragma unroll
          for (int e = 0; e < 8; ++e) x[8 * i + e] = y[e];
        }
      }
    }
    rotate_registers(x);
    rotate_lanes<4>(x);
    uint32_t largest = __float_as_uint(recipe::kAmaxFloor);
#pragma unroll
    for (int i = 0; i < kDim / 4; ++i) {
      x[i] *= recipe::kRotatedQueryFactor<kDim>;
      largest = max(largest, magnitude(x[i]));
    }
    const float amax = __uint_as_float(max_over_lanes<4>(largest));
    const float inverse = recipe::kInt8Max / amax;
    int sum = 0;
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      const uint32_t bytes =
          pack_bytes(rounded_byte(x[4 * i], inverse), rounded_byte(x[4 * i + 1], inverse),
                     rounded_byte(x[4 * i + 2], inverse), rounded_byte(x[4 * i + 3], inverse));
      queries[i / 2][i % 2 * 2 + r] = bytes;
      sum = __dp4a(static_cast<int>(bytes), 0x01010101, sum);
    }
    sums[r] = static_cast<float>(over_lanes<4>(sum, [](int a, int c) { return a + c; }));
    scales[r] = amax * (1.0f / recipe::kInt8Max) * scale;
  }
}

}  // namespace sagelm::kernels::mma
