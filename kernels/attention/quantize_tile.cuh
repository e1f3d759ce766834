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
  if constexpr (kLanes == 32) return __reduce_max_sync(0xFFFFFFFFu, x);
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

// Where 8 bytes of a row go: chunk8 counts 8-byte halves of chunks. In rows a multiple of 8 apart
// they go to the same place of the row.
template <int kDim>
__device__ inline int8_t* half_chunk(int8_t* tile, int row, int chunk8) {
  const int chunk = swizzled_chunk<kDim>(row, chunk8 >> 1);
  return tile + row * kDim + chunk * 16 + (chunk8 & 1) * 8;
}
__device__ inline void store_half_chunk(int8_t* to, uint2 bytes) {
  *reinterpret_cast<uint2*>(to) = bytes;
}

// Channels 8 * chunk .. 8 * chunk + 7, 16-byte aligned.
__device__ inline void load_mean(const float* from, int chunk, float (&mean)[8]) {
  const float4 low = reinterpret_cast<const float4*>(from)[2 * chunk];
  const float4 high = reinterpret_cast<const float4*>(from)[2 * chunk + 1];
  mean[0] = low.x, mean[1] = low.y, mean[2] = low.z, mean[3] = low.w;
  mean[4] = high.x, mean[5] = high.y, mean[6] = high.z, mean[7] = high.w;
}

template <bool kBf16>
__device__ inline uint32_t largest_half(const uint4& raw) {
  return ptx::larger_magnitudes<kBf16>(ptx::larger_magnitudes<kBf16>(raw.x, raw.y),
                                       ptx::larger_magnitudes<kBf16>(raw.z, raw.w));
}
// Of a word's two halves; magnitude's bits, as a float, of the larger.
template <bool kBf16>
__device__ inline uint32_t largest_of(uint32_t pair) {
  return magnitude(to_floats<kBf16>(ptx::larger_magnitudes<kBf16>(pair, pair >> 16)).x);
}

// FP16 numbers are quantized in FP16 arithmetic, two at a time: once rounded by a factor that is
// FP16 too, whose inverse is the scale. What is not even the largest of these factors' levels is
// scaled as if it were.
struct HalfQuantizer {
  uint32_t factors;  // two halves, levels / largest

  // largest: magnitude's bits. kExact: for numbers that a CPU finds too.
  template <bool kExact>
  __device__ static HalfQuantizer of(uint32_t largest, float levels) {
    const uint32_t floor = __float_as_uint(levels / recipe::kLargestHalf);
    const float amax = __uint_as_float(max(largest, floor));
    const float factor = kExact ? levels / amax : levels * ptx::reciprocal(amax);
    return {ptx::to_halves<false>(factor, factor)};
  }
  __device__ float factor() const { return to_floats<false>(factors).x; }
};

__device__ inline __half2 as_half2(uint32_t x) { return *reinterpret_cast<const __half2*>(&x); }
__device__ inline uint32_t as_word(__half2 x) { return *reinterpret_cast<const uint32_t*>(&x); }

// 8 numbers times the factor, rounded to the nearest integers (ties to even): adding 1.5 * 2^10
// leaves them in the low bytes.
__device__ inline uint2 to_int8(const uint4& raw, uint32_t factors) {
  const __half2 shift = __float2half2_rn(1536.0f), factor = as_half2(factors);
  const auto rounded = [&](uint32_t x) { return as_word(__hfma2(as_half2(x), factor, shift)); };
  return make_uint2(__byte_perm(rounded(raw.x), rounded(raw.y), 0x6420),
                    __byte_perm(rounded(raw.z), rounded(raw.w), 0x6420));
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
// `count` on, and channels beyond the head's, are zeros. mean: of the thread's channels, where keys
// are FP16 numbers it is too.
template <int kDim, bool kBf16>
__device__ __forceinline__ void quantize_key_tile(uint4 (&raw)[RowShare<kDim>::kSteps][2],
                                                  int count, const float (&mean)[2][8], int8_t* to,
                                                  float* scales) {
  using Share = RowShare<kDim>;
  // So that a thread's keys are of one group, and their tile rows as far apart as they are.
  static_assert(Share::kRows % 16 == 0);
  constexpr int kGroupLanes = 4 * Share::kLanes;  // of four keys in a row, which are of one group
  static_assert(kGroupLanes <= 32);
  __shared__ uint32_t group_largest[kKeyGroups];
  if (threadIdx.x < kKeyGroups) group_largest[threadIdx.x] = 0;
  uint32_t largest = 0;
  // The smoothed keys; rows past the end stay zeros.
  float x[Share::kSteps][2][8];
  if constexpr (kBf16) {
#pragma unroll
    for (int i = 0; i < Share::kSteps; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        unpack<kBf16>(raw[i][half], x[i][half]);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          x[i][half][e] = Share::row(i) < count ? x[i][half][e] - mean[half][e] : 0.0f;
          largest = max(largest, magnitude(x[i][half][e]));
        }
      }
    }
  } else {
    uint32_t most = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      __half2 means[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        means[e] = __floats2half2_rn(mean[half][2 * e], mean[half][2 * e + 1]);
      }
#pragma unroll
      for (int i = 0; i < Share::kSteps; ++i) {
        uint4& row = raw[i][half];
        if (count >= kTileTokens || Share::row(i) < count) {
          row.x = as_word(__hsub2_rn(as_half2(row.x), means[0]));
          row.y = as_word(__hsub2_rn(as_half2(row.y), means[1]));
          row.z = as_word(__hsub2_rn(as_half2(row.z), means[2]));
          row.w = as_word(__hsub2_rn(as_half2(row.w), means[3]));
        }
        most = ptx::larger_magnitudes<false>(most, largest_half<false>(row));
      }
    }
    largest = largest_of<false>(most);
  }
  __syncthreads();
  largest = max_over_lanes<kGroupLanes>(largest);
  const int group = (Share::row(0) >> 2) & 3;
  if (threadIdx.x % kGroupLanes == 0) atomicMax(&group_largest[group], largest);
  __syncthreads();
  largest = group_largest[group];
  // Of the thread's first row, in whose distance the others follow.
  const int first_row = row_of_key(Share::row(0));
  int8_t* const first[2] = {half_chunk<kDim>(to, first_row, Share::chunk(0)),
                            half_chunk<kDim>(to, first_row, Share::chunk(1))};
  float scale;
  if constexpr (kBf16) {
    const float amax = __uint_as_float(max(largest, __float_as_uint(recipe::kAmaxFloor)));
    const float inverse = recipe::kInt8Max / amax;
    scale = amax * (1.0f / recipe::kInt8Max);
#pragma unroll
    for (int i = 0; i < Share::kSteps; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        store_half_chunk(first[half] + i * Share::kRows * kDim, to_int8(x[i][half], inverse));
      }
    }
  } else {
    const auto quantizer = HalfQuantizer::of<true>(largest, recipe::kInt8Max);
    scale = 1.0f / quantizer.factor();
#pragma unroll
    for (int i = 0; i < Share::kSteps; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        store_half_chunk(first[half] + i * Share::kRows * kDim,
                         to_int8(raw[i][half], quantizer.factors));
      }
    }
  }
  if (threadIdx.x % kGroupLanes == 0 && Share::row(0) < 4 * kKeyGroups) scales[group] = scale;
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
    store_half_chunk(half_chunk<kDim>(to, row, Share::chunk(half)), to_int8(x[half], inverse));
  }
  if (Share::lane() == 0) scales[row] = amax * (1.0f / recipe::kInt8Max) * logit_scale;
}
template <int kDim, bool kBf16>
__device__ inline void quantize_query_row(const uint4 (&raw)[2], int row, float logit_scale,
                                          int8_t* to, float* scales) {
  using Share = RowShare<kDim>;
  uint32_t most =
      ptx::larger_magnitudes<kBf16>(largest_half<kBf16>(raw[0]), largest_half<kBf16>(raw[1]));
  if constexpr (kBf16) {
    float x[2][8];
    unpack<kBf16>(raw[0], x[0]);
    unpack<kBf16>(raw[1], x[1]);
    quantize_query_row<kDim>(x, largest_of<kBf16>(most), row, logit_scale, to, scales);
  } else {
    most = over_lanes<Share::kLanes>(
        most, [](uint32_t a, uint32_t b) { return ptx::larger_magnitudes<kBf16>(a, b); });
    const auto quantizer = HalfQuantizer::of<false>(largest_of<kBf16>(most), recipe::kInt8Max);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      store_half_chunk(half_chunk<kDim>(to, row, Share::chunk(half)),
                       to_int8(raw[half], quantizer.factors));
    }
    if (Share::lane() == 0) scales[row] = logit_scale * ptx::reciprocal(quantizer.factor());
  }
}

// Next elements of two runs of values (recipe.h), already scaled, as e4m3, a in the low byte.
// moves: the runs' next moves over kValueMove. Rounded step by step, so that a CPU can do the same.
template <int kDim>
__device__ inline uint32_t round_values(float a, float b, float2& moves) {
  constexpr float kGain = recipe::kValueGain<kDim>;
  const auto moved = [](float x, float move) {
    return fmaf(recipe::kValueMove, fminf(fmaxf(move, -fabsf(x)), fabsf(x)), x);
  };
  const uint32_t codes = ptx::to_e4m3(moved(a, moves.x), moved(b, moves.y));
  const uint32_t halves = ptx::halves_from_e4m3(codes);
  const float2 rounded = __half22float2(*reinterpret_cast<const __half2*>(&halves));
  moves.x = fmaf(-kGain, __fsub_rn(rounded.x, a), moves.x);
  moves.y = fmaf(-kGain, __fsub_rn(rounded.y, b), moves.y);
  return codes;
}
// Of FP16 values, in FP16.
template <int kDim>
__device__ inline uint16_t round_values(__half2 x, __half2& moves) {
  const __half2 gain = __float2half2_rn(-recipe::kValueGain<kDim>);
  const __half2 part = __float2half2_rn(recipe::kValueMove);
  const __half2 move = as_half2(ptx::limit_magnitudes(as_word(moves), as_word(x)));
  const uint16_t codes = ptx::to_e4m3(as_word(__hfma2(part, move, x)));
  moves = __hfma2(gain, __hsub2_rn(as_half2(ptx::halves_from_e4m3(codes)), x), moves);
  return codes;
}

// 16-bit columns of a value tile in shared memory: [64 token pairs][kDim channels], each element
// the two e4m3 of a channel, so that 8x8 matrix loads transpose it. The chunks of a pair's row are
// spread so that the eight rows that one matrix load takes lie in different banks.
__device__ inline int spread(int pair) { return (pair & 1) | (((pair >> 3) & 3) << 1); }

// How a block of kQuantizeThreads shares a tile of values: a thread has a chunk of 8 channels of
// kSteps pairs of tokens in a row, which are a run (recipe.h).
template <int kDim>
struct ValueShare {
  static constexpr int kLanes = kDim / 8;
  static constexpr int kSteps = kTileTokens / 2 / (kQuantizeThreads / kLanes);
  static_assert(2 * kSteps == recipe::kValueRun<kDim>);

  __device__ static int chunk() { return static_cast<int>(threadIdx.x) % kLanes; }
  __device__ static int first() { return static_cast<int>(threadIdx.x) / kLanes * kSteps; }
  __device__ static int token(int i, int half) { return (first() + i) * 2 + half; }
};

// A tile of values, of which the thread has its share: zeros past the last token and beyond the
// head's channels.
template <int kDim, bool kBf16>
__device__ __forceinline__ void quantize_value_tile(const uint4 (&raw)[ValueShare<kDim>::kSteps][2],
                                                    uint8_t* to, float* scales) {
  using Share = ValueShare<kDim>;
  constexpr int kLanes = Share::kLanes, kSteps = Share::kSteps;
  const int lane = Share::chunk();
  __shared__ uint32_t tile_largest;
  __shared__ alignas(16) uint8_t pairs[kTileTokens * kDim];
  if (threadIdx.x == 0) tile_largest = __float_as_uint(recipe::kAmaxFloor);
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      most = ptx::larger_magnitudes<kBf16>(most, largest_half<kBf16>(raw[i][half]));
    }
  }
  __syncthreads();
  const uint32_t largest = max_over_lanes<32>(largest_of<kBf16>(most));
  if (threadIdx.x % 32 == 0) atomicMax(&tile_largest, largest);
  __syncthreads();
  const float amax = __uint_as_float(tile_largest);
  const float inverse = recipe::kTileValueMax / amax;
  const auto quantizer = HalfQuantizer::of<true>(tile_largest, recipe::kTileValueMax);
  // Two channels after two channels, to spare registers.
  uint32_t words[kSteps][4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    std::conditional_t<kBf16, float2, __half2> moves = {};
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      std::conditional_t<kBf16, uint32_t, uint16_t> codes[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4& x = raw[i][half];
        const uint32_t two = w == 0 ? x.x : w == 1 ? x.y : w == 2 ? x.z : x.w;
        if constexpr (kBf16) {
          const float2 pair = to_floats<kBf16>(two);
          codes[half] =
              round_values<kDim>(__fmul_rn(pair.x, inverse), __fmul_rn(pair.y, inverse), moves);
        } else {
          codes[half] =
              round_values<kDim>(__hmul2_rn(as_half2(two), as_half2(quantizer.factors)), moves);
        }
      }
      words[i][w] = __byte_perm(codes[0] | codes[1] << 16, 0, 0x3120);
    }
  }
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int pair = Share::first() + i;
    *reinterpret_cast<uint4*>(pairs + pair * (2 * kDim) + ((lane ^ spread(pair)) * 16)) =
        make_uint4(words[i][0], words[i][1], words[i][2], words[i][3]);
  }
  __syncthreads();
  const int warp = threadIdx.x / 32, l = threadIdx.x % 32;
  // Unit: 8 channels of 64 tokens. Matrix m takes the pairs 8a + 2m and 8a + 2m + 1, a = 0 .. 3, so
  // that lane 4g + c ends with the 16 tokens from 16c on of channel g. A warp's units are of one
  // half of the tokens, and kStride blocks of channels apart, a power of two: the bits that these
  // differ in change places in shared memory, and not those in the tile's rows.
  constexpr int kStride = kQuantizeThreads / 32 / 2;
  const int block = warp >> 1, half = warp & 1;
  const int m = l >> 3, r = l & 7;
  const int pair = half * 32 + 8 * (r >> 1) + 2 * m + (r & 1);
  const uint32_t from = ptx::smem_address(pairs + pair * (2 * kDim));
  const int place = (block ^ spread(pair)) * 16;
  const int channel = block * 8 + (l >> 2);
  uint8_t* const out =
      to + channel * kTileTokens + swizzled_chunk<128>(channel, half * 4 + (l & 3)) * 16;
#pragma unroll
  for (int i = 0; i < kLanes / kStride; ++i) {
    uint32_t tokens[4];
    ptx::load_matrices_transposed(tokens, from + (place ^ (i * kStride * 16)));
    *reinterpret_cast<uint4*>(out + i * kStride * 8 * kTileTokens) =
        make_uint4(tokens[0], tokens[1], tokens[2], tokens[3]);
  }
  if (threadIdx.x == 0) {
    const float scale = kBf16 ? amax * (1.0f / recipe::kTileValueMax) : 1.0f / quantizer.factor();
    scales[kValueScale] = scale;
    scales[kValueScaleInverse] = 1.0f / scale;
  }
}

}  // namespace sagelm::kernels
