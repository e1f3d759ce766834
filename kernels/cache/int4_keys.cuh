// INT4 keys of the quantized cache: rotated (kernels/attention/recipe.h), cut into 16 steps between
// a key's least and largest channel, two to a byte.
//
// A key's row of kDim / 2 bytes lies where its INT8 row would (row_of_key), in chunks of 16 bytes,
// 32 channels each: word w of a row holds channels 8w .. 8w + 3 in the low nibbles of its bytes and
// 8w + 4 .. 8w + 7 in the high ones, in two's complement. Read by ldmatrix, a chunk is then the B
// operand of one INT8 product for queries in the same order: a thread takes its word's low nibbles
// for the first half of the operand's channels, the high ones for the second. A word per key says
// what the integers mean: BF16 step in its low half, BF16 middle in its high one.
#pragma once

#include <cstdint>

#include "kernels/attention/quantize_tile.cuh"
#include "kernels/attention/recipe.h"
#include "kernels/attention/sage_tiles.cuh"
#include "kernels/common/ptx.cuh"

namespace sagelm::kernels {

// Before the words in a page's scales: those of INT8 keys, not used, and the values'.
inline constexpr int kInt4Words = kTileScales;
inline constexpr int kInt4Scales = kInt4Words + kTileTokens;

__device__ inline float int4_step(uint32_t word) { return __uint_as_float(word << 16); }
__device__ inline float int4_middle(uint32_t word) { return __uint_as_float(word & 0xFFFF0000u); }

// The nearest BF16.
__device__ inline float to_bf16(float x) {
  return __uint_as_float(ptx::to_halves<true>(0.0f, x) & 0xFFFF0000u);
}

// Byte offset of a chunk of a tile row.
template <int kDim>
__host__ __device__ constexpr int int4_chunk_offset(int row, int chunk) {
  if constexpr (kDim == 128) return ptx::chunk_offset<64>(row, chunk);
  return row * 32 + (chunk ^ (row >> 2 & 1)) * 16;
}

// Bytes 16 times the integers of the low and the high nibbles.
__device__ __forceinline__ uint32_t low_nibbles(uint32_t word) { return word << 4 & 0xF0F0F0F0u; }
__device__ __forceinline__ uint32_t high_nibbles(uint32_t word) { return word & 0xF0F0F0F0u; }

// Butterflies of the Hadamard product among kCount elements of a thread...
template <int kCount>
__device__ __forceinline__ void rotate_registers(float (&x)[kCount]) {
#pragma unroll
  for (int half = 1; half < kCount; half *= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if ((i & half) != 0) continue;
      const float a = x[i], b = x[i + half];
      x[i] = a + b;
      x[i + half] = a - b;
    }
  }
}
// ... and among kLanes neighbouring lanes.
template <int kLanes, int kCount>
__device__ __forceinline__ void rotate_lanes(float (&x)[kCount]) {
#pragma unroll
  for (int half = 1; half < kLanes; half *= 2) {
    const float sign = (threadIdx.x & half) != 0 ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x[i] = fmaf(x[i], sign, __shfl_xor_sync(0xFFFFFFFFu, x[i], half));
    }
  }
}

// All of it, of a row as RowShare shares it.
template <int kDim>
__device__ __forceinline__ void rotate_row(float (&x)[2][8], float factor) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    rotate_registers(x[half]);
    rotate_lanes<RowShare<kDim>::kLanes>(x[half]);
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const float a = x[0][e], b = x[1][e];
    x[0][e] = (a + b) * factor;
    x[1][e] = (a - b) * factor;
  }
}

// As quantize_key_tile, of a full tile.
template <int kDim, bool kBf16>
__device__ __forceinline__ void quantize_int4_key_tile(
    const uint4 (&raw)[RowShare<kDim>::kSteps][2], const float (&mean)[2][8], uint8_t* to,
    uint32_t* words) {
  using Share = RowShare<kDim>;
  const int first_row = row_of_key(Share::row(0));  // in whose distance the others follow
  uint8_t* first[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int chunk = Share::chunk(half);
    first[half] = to + int4_chunk_offset<kDim>(first_row, chunk / 4) + chunk % 4 * 4;
  }
#pragma unroll
  for (int i = 0; i < Share::kSteps; ++i) {
    const int key = Share::row(i);
    float x[2][8];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      unpack<kBf16>(raw[i][half], x[half]);
#pragma unroll
      for (int e = 0; e < 8; ++e) x[half][e] -= mean[half][e];
    }
    rotate_row<kDim>(x, recipe::kRotatedKeyFactor<kDim>);
    float low = x[0][0], top = low;  // NaN if any channel is
#pragma unroll
    for (int e = 1; e < 16; ++e) {
      low = ptx::min_or_nan(low, x[e / 8][e % 8]);
      top = ptx::max_or_nan(top, x[e / 8][e % 8]);
    }
    low = over_lanes<Share::kLanes>(low, [](float a, float b) { return ptx::min_or_nan(a, b); });
    top = over_lanes<Share::kLanes>(top, [](float a, float b) { return ptx::max_or_nan(a, b); });
    const bool finite = max(magnitude(low), magnitude(top)) < 0x7F800000u;
    const float range = fmaxf(top - low, recipe::kAmaxFloor);
    const float step = to_bf16(finite ? range / recipe::kInt4Steps : NAN);
    const float middle = to_bf16(fmaf(step, recipe::kInt4Middle, low));
    const float inverse = 1.0f / step;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t bytes = 0;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float steps = fminf(fmaxf((x[half][e] - middle) * inverse, -8.0f), 7.0f);
        bytes |= (rounded_byte(steps, 1.0f) & 0xFu) << (e % 4 * 8 + e / 4 * 4);
      }
      *reinterpret_cast<uint32_t*>(first[half] + i * Share::kRows * (kDim / 2)) = bytes;
    }
    if (Share::lane() == 0) words[key] = __float_as_uint(step) >> 16 | __float_as_uint(middle);
  }
}

}  // namespace sagelm::kernels
