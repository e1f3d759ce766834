// The queries of a decode tile (kernels/attention/decode_parts.cuh) in INT8, one scale a row.
#pragma once

#include <cstdint>

#include "kernels/attention/decode_parts.cuh"
#include "kernels/attention/quantize_tile.cuh"
#include "kernels/cache/int4_keys.cuh"

namespace sagelm::kernels::mma {

// The tile's queries, turned by their position's angles if there are any, as INT8 A fragments, with
// what makes base-2 logits of their products with the integers of a key of scale 1. For pages of
// INT4 keys (kInt4) they are rotated by the Hadamard matrix as those are, in the order of their
// nibbles, and sums are those of a row's integers.
// kTiles: of 8 rows each.
template <int kTiles, bool kBf16, int kDim, bool kInt4>
__device__ __forceinline__ void quantize_rows(const Problem& p, int b, int kv_head, int rows,
                                              int group, float scale, const float* angles,
                                              uint32_t (&queries)[kDim / 32][4], float (&scales)[2],
                                              float (&sums)[2]) {
  constexpr int kMine = kInt4 ? 8 : 4;  // neighbouring channels of a thread, of every 4 * kMine
  constexpr int kChunks = kDim / 4 / kMine;
  const int first_channel = threadIdx.x % 4 * kMine;
#pragma unroll
  for (int r = 0; r < kTiles; ++r) {
    float x[kDim / 4] = {};
    const int row = threadIdx.x % 32 / 4 + 8 * r;
    if (row < rows) {
      const uint16_t* from = static_cast<const uint16_t*>(p.q.data) +
                             p.q_offset(p.q, b, row / group, kv_head * group + row % group);
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const int channel = i * 4 * kMine + first_channel;
        if (channel >= p.head_dim) continue;
        if constexpr (kInt4) {
          float y[8];
          unpack<kBf16>(*reinterpret_cast<const uint4*>(from + channel), y);
#pragma unroll
          for (int e = 0; e < 8; ++e) x[8 * i + e] = y[e];
        } else {
          const uint2 raw = *reinterpret_cast<const uint2*>(from + channel);
          const float2 low = to_floats<kBf16>(raw.x), high = to_floats<kBf16>(raw.y);
          x[4 * i] = low.x, x[4 * i + 1] = low.y, x[4 * i + 2] = high.x, x[4 * i + 3] = high.y;
        }
      }
    }
    if (angles != nullptr) {
#pragma unroll
      for (int i = 0; i < kDim / 32; ++i) {
        const int first = 4 * i, second = first + kDim / 8;
        const int channel = first / kMine * (4 * kMine) + first_channel + first % kMine;
        float cosine[4], sine[4];
        load(angles + channel, cosine);
        load(angles + kDim / 2 + channel, sine);
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          float a[2] = {x[first + e], x[first + e + 1]}, c[2] = {x[second + e], x[second + e + 1]};
          const float u[2] = {cosine[e], cosine[e + 1]}, v[2] = {sine[e], sine[e + 1]};
          rotate_pairs(a, c, u, v);
          const float2 low = to_floats<kBf16>(to_halves<kBf16>(a[0], a[1]));
          const float2 high = to_floats<kBf16>(to_halves<kBf16>(c[0], c[1]));
          x[first + e] = low.x, x[first + e + 1] = low.y;
          x[second + e] = high.x, x[second + e + 1] = high.y;
        }
      }
    }
    if constexpr (kInt4) {
      rotate_registers(x);
      rotate_lanes<4>(x);
#pragma unroll
      for (float& value : x) value *= recipe::kRotatedQueryFactor<kDim>;
    }
    uint32_t largest = __float_as_uint(recipe::kAmaxFloor);
#pragma unroll
    for (int i = 0; i < kDim / 4; ++i) largest = max(largest, magnitude(x[i]));
    const float amax = __uint_as_float(max_over_lanes<4>(largest));
    const float inverse = recipe::kInt8Max / amax;
    int sum = 0;
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      const uint32_t bytes =
          pack_bytes(rounded_byte(x[4 * i], inverse), rounded_byte(x[4 * i + 1], inverse),
                     rounded_byte(x[4 * i + 2], inverse), rounded_byte(x[4 * i + 3], inverse));
      queries[i / 2][i % 2 * 2 + r] = bytes;
      if constexpr (kInt4) sum = __dp4a(static_cast<int>(bytes), 0x01010101, sum);
    }
    if constexpr (kInt4) {
      sums[r] = static_cast<float>(over_lanes<4>(sum, [](int a, int c) { return a + c; }));
    }
    scales[r] = amax * (1.0f / recipe::kInt8Max) * scale;
  }
}

}  // namespace sagelm::kernels::mma
