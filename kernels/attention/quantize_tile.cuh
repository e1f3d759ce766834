// How a block quantizes one tile (sage_tiles.cuh) of K or V: the numbers are the same wherever the
// rows come from.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "kernels/attention/recipe.h"
#include "kernels/attention/sage_tiles.cuh"
#include "kernels/common/ptx.cuh"

namespace sagelm::kernels {

inline constexpr int kQuantizeThreads = 256;

template <bool kBf16>
__device__ inline float2 to_floats(uint32_t pair) {
  if constexpr (kBf16) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
  } else {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  }
}

template <bool kBf16>
__device__ inline void unpack(uint4 raw, float (&x)[8]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = to_floats<kBf16>(words[i]);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

// The magnitude's bits: an order in which NaN is above infinity, so that a maximum keeps it.
__device__ inline uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7FFFFFFFu; }

// Over kLanes neighbouring lanes, a power of two up to 32.
template <int kLanes, typename T, typename Merge>
__device__ inline T over_lanes(T x, Merge merge) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    x = merge(x, __shfl_xor_sync(0xFFFFFFFFu, x, step));
  }
  return x;
}
template <int kLanes>
__device__ inline uint32_t max_over_lanes(uint32_t x) {
  return over_lanes<kLanes>(x, [](uint32_t a, uint32_t b) { return max(a, b); });
}

// x * inverse rounded to the nearest integer (ties to even) in the low byte: adding 1.5 * 2^23
// leaves the integer in the low bits, without the slow conversion instruction.
__device__ inline uint32_t rounded_byte(float x, float inverse) {
  return __float_as_uint(fmaf(x, inverse, 12582912.0f));
}

__device__ inline uint32_t pack_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

__device__ inline uint2 to_int8(const float (&x)[8], float inverse) {
  uint32_t bytes[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) bytes[i] = rounded_byte(x[i], inverse);
  return make_uint2(pack_bytes(bytes[0], bytes[1], bytes[2], bytes[3]),
                    pack_bytes(bytes[4], bytes[5], bytes[6], bytes[7]));
}

// Where 8 bytes of a row go: chunk8 counts 8-byte halves of chunks.
template <int kDim>
__device__ inline void store_half_chunk(int8_t* tile, int row, int chunk8, uint2 bytes) {
  const int chunk = swizzled_chunk<kDim>(row, chunk8 >> 1);
  *reinterpret_cast<uint2*>(tile + row * kDim + chunk * 16 + (chunk8 & 1) * 8) = bytes;
}

// Channels 8 * chunk .. 8 * chunk + 7, 16-byte aligned.
__device__ inline void load_mean(const float* from, int chunk, float (&mean)[8]) {
  const float4 low = reinterpret_cast<const float4*>(from)[2 * chunk];
  const float4 high = reinterpret_cast<const float4*>(from)[2 * chunk + 1];
  mean[0] = low.x, mean[1] = low.y, mean[2] = low.z, mean[3] = low.w;
  mean[4] = high.x, mean[5] = high.y, mean[6] = high.z, mean[7] = high.w;
}

// The larger and the smaller of each half of two words; NaN if either is.
template <bool kBf16>
using HalfPair = std::conditional_t<kBf16, __nv_bfloat162, __half2>;
template <bool kBf16>
__device__ inline uint32_t max_halves(uint32_t a, uint32_t b) {
  using Pair = HalfPair<kBf16>;
  const Pair most = __hmax2_nan(*reinterpret_cast<Pair*>(&a), *reinterpret_cast<Pair*>(&b));
  return *reinterpret_cast<const uint32_t*>(&most);
}
template <bool kBf16>
__device__ inline uint32_t min_halves(uint32_t a, uint32_t b) {
  using Pair = HalfPair<kBf16>;
  const Pair least = __hmin2_nan(*reinterpret_cast<Pair*>(&a), *reinterpret_cast<Pair*>(&b));
  return *reinterpret_cast<const uint32_t*>(&least);
}
// Of 8 channels; magnitude's bits of the largest.
template <bool kBf16>
__device__ inline uint32_t largest_of(const uint4& raw) {
  constexpr uint32_t kMagnitudes = 0x7FFF7FFFu;
  const uint32_t most =
      max_halves<kBf16>(max_halves<kBf16>(raw.x & kMagnitudes, raw.y & kMagnitudes),
                        max_halves<kBf16>(raw.z & kMagnitudes, raw.w & kMagnitudes));
  const float2 pair = to_floats<kBf16>(most);
  return max(magnitude(pair.x), magnitude(pair.y));
}

// How a block of kQuantizeThreads shares the rows of a tile of queries or keys: kRows at a time,
// each by kLanes neighbouring lanes, of which lane l has the chunks of 8 channels l and l + kLanes.
// Where heads have kDim channels those are turned together by the rotary embedding.
template <int kDim>
struct RowShare {
  static constexpr int kLanes = kDim / 16;
  static constexpr int kRows = kQuantizeThreads / kLanes;
  static constexpr int kSteps = kTileTokens / kRows;

  __device__ static int lane() { return static_cast<int>(threadIdx.x) % kLanes; }
  __device__ static int chunk(int half) { return lane() + half * kLanes; }
  // The thread's row of the i-th kRows.
  __device__ static int row(int i) { return i * kRows + static_cast<int>(threadIdx.x) / kLanes; }
};

template <int kDim>
__device__ inline void load_means(const float* from, float (&mean)[2][8]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) load_mean(from, RowShare<kDim>::chunk(half), mean[half]);
}

// A tile of keys, of which the thread has its share of the rows as 16-bit numbers: those from
// `count` on, and channels beyond the head's, are zeros. mean: of the thread's channels.
template <int kDim, bool kBf16>
__device__ __forceinline__ void quantize_key_tile(const uint4 (&raw)[RowShare<kDim>::kSteps][2],
                                                  int count, const float (&mean)[2][8], int8_t* to,
                                                  float* scales) {
  using Share = RowShare<kDim>;
  static_assert(Share::kRows % 16 == 0);  // so that a thread's keys are of one group
  __shared__ uint32_t group_largest[kKeyGroups];
  if (threadIdx.x < kKeyGroups) {
    group_largest[threadIdx.x] = __float_as_uint(recipe::kAmaxFloor);
  }
  // The largest magnitude after smoothing is that of a channel's largest or smallest key. Rows past
  // the end hold zeros, not minus the mean: they take no part.
  uint32_t largest = 0;
  if (Share::row(0) < count) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 most = raw[0][half], least = most;
#pragma unroll
      for (int i = 1; i < Share::kSteps; ++i) {
        if (Share::row(i) >= count) break;
        const uint4& row = raw[i][half];
        most = make_uint4(max_halves<kBf16>(most.x, row.x), max_halves<kBf16>(most.y, row.y),
                          max_halves<kBf16>(most.z, row.z), max_halves<kBf16>(most.w, row.w));
        least = make_uint4(min_halves<kBf16>(least.x, row.x), min_halves<kBf16>(least.y, row.y),
                           min_halves<kBf16>(least.z, row.z), min_halves<kBf16>(least.w, row.w));
      }
      float x[8], y[8];
      unpack<kBf16>(most, x);
      unpack<kBf16>(least, y);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        largest =
            max(largest, max(magnitude(x[e] - mean[half][e]), magnitude(y[e] - mean[half][e])));
      }
    }
  }
  __syncthreads();
  constexpr int kGroupLanes = 4 * Share::kLanes;  // of four keys in a row, which are of one group
  static_assert(kGroupLanes <= 32);
  largest = max_over_lanes<kGroupLanes>(largest);
  const int group = (Share::row(0) >> 2) & 3;
  if (threadIdx.x % kGroupLanes == 0) atomicMax(&group_largest[group], largest);
  __syncthreads();
  const float inverse = recipe::kInt8Max / __uint_as_float(group_largest[group]);
#pragma unroll
  for (int i = 0; i < Share::kSteps; ++i) {
    const int key = Share::row(i);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x[8];
      unpack<kBf16>(raw[i][half], x);
#pragma unroll
      for (int e = 0; e < 8; ++e) x[e] = key < count ? x[e] - mean[half][e] : 0.0f;
      store_half_chunk<kDim>(to, row_of_key(key), Share::chunk(half), to_int8(x, inverse));
    }
  }
  if (threadIdx.x < kKeyGroups) {
    scales[threadIdx.x] = __uint_as_float(group_largest[threadIdx.x]) * (1.0f / recipe::kInt8Max);
  }
}

// Row `row` of a tile of queries, of which this thread has the channels x, with a scale of its own:
// the product of a row's and a key's integers, times both scales, is a logit in bits. largest: of
// the magnitudes of x.
template <int kDim>
__device__ inline void quantize_query_row(const float (&x)[2][8], uint32_t largest, int row,
                                          float logit_scale, int8_t* to, float* scales) {
  using Share = RowShare<kDim>;
  const float amax = __uint_as_float(
      max_over_lanes<Share::kLanes>(max(largest, __float_as_uint(recipe::kAmaxFloor))));
  const float inverse = recipe::kInt8Max / amax;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    store_half_chunk<kDim>(to, row, Share::chunk(half), to_int8(x[half], inverse));
  }
  if (Share::lane() == 0) scales[row] = amax * (1.0f / recipe::kInt8Max) * logit_scale;
}
template <int kDim, bool kBf16>
__device__ inline void quantize_query_row(const uint4 (&raw)[2], int row, float logit_scale,
                                          int8_t* to, float* scales) {
  float x[2][8];
  unpack<kBf16>(raw[0], x[0]);
  unpack<kBf16>(raw[1], x[1]);
  quantize_query_row<kDim>(x, max(largest_of<kBf16>(raw[0]), largest_of<kBf16>(raw[1])), row,
                           logit_scale, to, scales);
}

// Next elements of two runs of values (recipe.h), already scaled, as e4m3, a in the low byte.
// errors: the runs' sums of errors. Rounded step by step, so that a CPU can do the same.
template <int kDim>
__device__ inline uint32_t round_values(float a, float b, float2& errors) {
  constexpr float kPart = 1.0f / static_cast<float>(recipe::kValueRun<kDim>);  // exact products
  const uint32_t codes = ptx::to_e4m3(fmaf(-kPart, errors.x, a), fmaf(-kPart, errors.y, b));
  const uint32_t halves = ptx::halves_from_e4m3(codes);
  const float2 rounded = __half22float2(*reinterpret_cast<const __half2*>(&halves));
  errors.x = __fadd_rn(errors.x, __fsub_rn(rounded.x, a));
  errors.y = __fadd_rn(errors.y, __fsub_rn(rounded.y, b));
  return codes;
}

// 16-bit columns of a value tile in shared memory: [64 token pairs][kDim channels], each element
// the two e4m3 of a channel, so that 8x8 matrix loads transpose it. The chunks of a pair's row are
// spread so that the eight rows that one matrix load takes lie in different banks.
__device__ inline int spread(int pair) { return (pair & 1) | (((pair >> 3) & 3) << 1); }

// A tile of values. Threads of a block of kQuantizeThreads hold chunks of 8 channels, chunk
// threadIdx.x % (kDim / 8) each: load(token) gives that chunk of a token, zeros past the last one
// and beyond the head's channels.
template <int kDim, bool kBf16, typename Load>
__device__ inline void quantize_value_tile(const Load& load, uint8_t* to, float* scales) {
  constexpr int kLanes = kDim / 8;
  constexpr int kPairs = kQuantizeThreads / kLanes;
  constexpr int kSteps = kTileTokens / 2 / kPairs;
  static_assert(2 * kSteps == recipe::kValueRun<kDim>);
  const int lane = threadIdx.x % kLanes, first = threadIdx.x / kLanes * kSteps;
  __shared__ uint32_t tile_largest;
  __shared__ alignas(16) uint8_t pairs[kTileTokens * kDim];
  if (threadIdx.x == 0) tile_largest = __float_as_uint(recipe::kAmaxFloor);
  uint4 raw[kSteps][2];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) raw[i][half] = load((first + i) * 2 + half);
  }
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) largest = max(largest, largest_of<kBf16>(raw[i][half]));
  }
  __syncthreads();
  largest = max_over_lanes<32>(largest);
  if (threadIdx.x % 32 == 0) atomicMax(&tile_largest, largest);
  __syncthreads();
  const float amax = __uint_as_float(tile_largest);
  const float inverse = recipe::kTileValueMax / amax;
  // Two channels after two channels, to spare registers.
  uint32_t words[kSteps][4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    float2 errors = {};
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      uint32_t codes[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4& x = raw[i][half];
        const float2 pair = to_floats<kBf16>(w == 0 ? x.x : w == 1 ? x.y : w == 2 ? x.z : x.w);
        codes[half] =
            round_values<kDim>(__fmul_rn(pair.x, inverse), __fmul_rn(pair.y, inverse), errors);
      }
      words[i][w] = __byte_perm(codes[0], codes[1], 0x5140);
    }
  }
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int pair = first + i;
    *reinterpret_cast<uint4*>(pairs + pair * (2 * kDim) + ((lane ^ spread(pair)) * 16)) =
        make_uint4(words[i][0], words[i][1], words[i][2], words[i][3]);
  }
  __syncthreads();
  const int warp = threadIdx.x / 32, l = threadIdx.x % 32;
  // Unit: 8 channels of 64 tokens. Matrix m takes the pairs 8a + 2m and 8a + 2m + 1, a = 0 .. 3, so
  // that lane 4g + c ends with the 16 tokens from 16c on of channel g.
  for (int unit = warp; unit < kLanes * 2; unit += kQuantizeThreads / 32) {
    const int block = unit >> 1, half = unit & 1;
    const int m = l >> 3, r = l & 7;
    const int pair = half * 32 + 8 * (r >> 1) + 2 * m + (r & 1);
    uint32_t tokens[4];
    ptx::load_matrices_transposed(
        tokens, ptx::smem_address(pairs + pair * (2 * kDim) + ((block ^ spread(pair)) * 16)));
    const int channel = block * 8 + (l >> 2);
    const int chunk = swizzled_chunk<128>(channel, half * 4 + (l & 3));
    *reinterpret_cast<uint4*>(to + channel * kTileTokens + chunk * 16) =
        make_uint4(tokens[0], tokens[1], tokens[2], tokens[3]);
  }
  if (threadIdx.x == 0) {
    const float scale = amax * (1.0f / recipe::kTileValueMax);
    scales[kKeyGroups] = scale;
    scales[kKeyGroups + 1] = log2f(scale);
    scales[kKeyGroups + 2] = 1.0f / scale;
  }
}

}  // namespace sagelm::kernels
