#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/attention/recipe.h"
#include "kernels/attention/sage_quantize_sm90.h"
#include "kernels/common/launch.h"
#include "kernels/common/ptx.cuh"
#include "kernels/common/sm90.cuh"

namespace sagelm::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kMeanTokens = 256;

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

__device__ inline const uint4* row_chunk(const Tensor& x, int64_t offset, int chunk) {
  return reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(x.data) + offset) + chunk;
}

// The magnitude's bits: an order in which NaN is above infinity, so that a maximum keeps it.
__device__ inline uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7FFFFFFFu; }

template <int kLanes>
__device__ inline uint32_t max_over_lanes(uint32_t x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    x = max(x, __shfl_xor_sync(0xFFFFFFFFu, x, step));
  }
  return x;
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

template <int kDim, bool kBf16>
__global__ void __launch_bounds__(kThreads) key_means(Problem p, float* means) {
  constexpr int kLanes = kDim / 8;
  constexpr int kRows = kThreads / kLanes;
  const int head = blockIdx.x, b = blockIdx.y;
  const int length = p.kv_len(b);
  const int samples = min(length, kMeanTokens);
  const int lane = threadIdx.x % kLanes, first = threadIdx.x / kLanes;
  float sum[8] = {};
  if (lane * 8 < p.head_dim) {
#pragma unroll 4
    for (int i = first; i < samples; i += kRows) {
      const int token = static_cast<int>(static_cast<int64_t>(i) * length / samples);
      float x[8];
      unpack<kBf16>(__ldg(row_chunk(p.k, p.kv_offset(p.k, b, token, head), lane)), x);
#pragma unroll
      for (int e = 0; e < 8; ++e) sum[e] += x[e];
    }
  }
  __shared__ float partial[kRows][kDim];
#pragma unroll
  for (int e = 0; e < 8; ++e) partial[first][lane * 8 + e] = sum[e];
  __syncthreads();
  if (threadIdx.x < kDim) {
    float total = 0;
    for (int row = 0; row < kRows; ++row) total += partial[row][threadIdx.x];
    means[(static_cast<int64_t>(b) * p.num_kv_heads + head) * kDim + threadIdx.x] =
        samples > 0 ? total / static_cast<float>(samples) : 0.0f;
  }
}

template <int kDim, bool kBf16>
__device__ void quantize_queries(const Problem& p, const SageTiles& tiles, int tile, int head,
                                 int b) {
  constexpr int kLanes = kDim / 8;
  constexpr int kRows = kThreads / kLanes;
  constexpr int kSteps = kTileTokens / kRows;
  const int length = p.q_len(b);
  if (tile * kTileTokens >= length) return;
  const int lane = threadIdx.x % kLanes, first = threadIdx.x / kLanes;
  const bool inside = lane * 8 < p.head_dim;
  const int64_t index = (static_cast<int64_t>(b) * p.num_heads + head) * tiles.query_tiles + tile;
  int8_t* to = tiles.queries + index * (kTileTokens * kDim);
  float mean[8] = {};
  if (tiles.query_biases != nullptr) {
    const int kv_head = head / (p.num_heads / p.num_kv_heads);
    const float* from =
        tiles.key_means + (static_cast<int64_t>(b) * p.num_kv_heads + kv_head) * kDim + lane * 8;
#pragma unroll
    for (int e = 0; e < 8; ++e) mean[e] = from[e];
  }
  uint4 raw[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int token = tile * kTileTokens + i * kRows + first;
    raw[i] = inside && token < length ? __ldg(row_chunk(p.q, p.q_offset(p.q, b, token, head), lane))
                                      : make_uint4(0, 0, 0, 0);
  }
  const float logit_scale = p.softmax_scale * recipe::kLog2E;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    float x[8];
    unpack<kBf16>(raw[i], x);
    uint32_t largest = __float_as_uint(recipe::kAmaxFloor);
    float bias = 0;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      largest = max(largest, magnitude(x[e]));
      bias = fmaf(x[e], mean[e], bias);
    }
    const float amax = __uint_as_float(max_over_lanes<kLanes>(largest));
    const int row = i * kRows + first;
    store_half_chunk<kDim>(to, row, lane, to_int8(x, recipe::kInt8Max / amax));
    if (lane == 0) {
      tiles.query_scales[index * kTileTokens + row] =
          amax * (1.0f / recipe::kInt8Max) * logit_scale;
    }
    if (tiles.query_biases != nullptr) {
#pragma unroll
      for (int step = kLanes / 2; step > 0; step /= 2) {
        bias += __shfl_xor_sync(0xFFFFFFFFu, bias, step);
      }
      if (lane == 0) tiles.query_biases[index * kTileTokens + row] = bias * logit_scale;
    }
  }
}

template <int kDim, bool kBf16>
__device__ void quantize_keys(const Problem& p, const SageTiles& tiles, int tile, int head, int b) {
  constexpr int kLanes = kDim / 8;
  constexpr int kRows = kThreads / kLanes;  // a multiple of 16: a thread's keys are of one group
  constexpr int kSteps = kTileTokens / kRows;
  const int length = p.kv_len(b);
  if (tile * kTileTokens >= length) return;
  const int lane = threadIdx.x % kLanes, first = threadIdx.x / kLanes;
  const bool inside = lane * 8 < p.head_dim;
  const int64_t sequence_head = static_cast<int64_t>(b) * p.num_kv_heads + head;
  const int64_t index = sequence_head * tiles.kv_tiles + tile;
  float mean[8] = {};
  if (p.smooth_k) {
    const float4* from =
        reinterpret_cast<const float4*>(tiles.key_means + sequence_head * kDim) + lane * 2;
    const float4 low = from[0], high = from[1];
    mean[0] = low.x, mean[1] = low.y, mean[2] = low.z, mean[3] = low.w;
    mean[4] = high.x, mean[5] = high.y, mean[6] = high.z, mean[7] = high.w;
  }
  __shared__ uint32_t group_largest[kKeyGroups];
  if (threadIdx.x < kKeyGroups) {
    group_largest[threadIdx.x] = __float_as_uint(recipe::kAmaxFloor);
  }
  uint4 raw[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int token = tile * kTileTokens + i * kRows + first;
    raw[i] = inside && token < length
                 ? __ldg(row_chunk(p.k, p.kv_offset(p.k, b, token, head), lane))
                 : make_uint4(0, 0, 0, 0);
  }
  // Rows past the end hold zeros, not minus the mean: they take no part in the scale.
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    if (tile * kTileTokens + i * kRows + first < length) {
      float x[8];
      unpack<kBf16>(raw[i], x);
#pragma unroll
      for (int e = 0; e < 8; ++e) largest = max(largest, magnitude(x[e] - mean[e]));
    }
  }
  __syncthreads();
  largest = max_over_lanes<32>(largest);
  const int group = (first >> 2) & 3;
  if (threadIdx.x % 32 == 0) atomicMax(&group_largest[group], largest);
  __syncthreads();
  const float inverse = recipe::kInt8Max / __uint_as_float(group_largest[group]);
  int8_t* to = tiles.keys + index * (kTileTokens * kDim);
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int key = i * kRows + first;
    float x[8];
    unpack<kBf16>(raw[i], x);
    const bool real = tile * kTileTokens + key < length;
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] = real ? x[e] - mean[e] : 0.0f;
    store_half_chunk<kDim>(to, row_of_key(key), lane, to_int8(x, inverse));
  }
  if (threadIdx.x < kKeyGroups) {
    tiles.scales[index * kTileScales + threadIdx.x] =
        __uint_as_float(group_largest[threadIdx.x]) * (1.0f / recipe::kInt8Max);
  }
}

// 16-bit columns of a value tile in shared memory: [64 token pairs][kDim channels], each element
// the two e4m3 of a channel, so that 8x8 matrix loads transpose it. The chunks of a pair's row are
// spread so that the eight rows that one matrix load takes lie in different banks.
__device__ inline int spread(int pair) { return (pair & 1) | (((pair >> 3) & 3) << 1); }

template <int kDim, bool kBf16>
__device__ void quantize_values(const Problem& p, const SageTiles& tiles, int tile, int head,
                                int b) {
  constexpr int kLanes = kDim / 8;
  constexpr int kPairs = kThreads / kLanes;
  constexpr int kSteps = kTileTokens / 2 / kPairs;
  const int length = p.kv_len(b);
  if (tile * kTileTokens >= length) return;
  const int lane = threadIdx.x % kLanes, first = threadIdx.x / kLanes;
  const bool inside = lane * 8 < p.head_dim;
  const int64_t index = (static_cast<int64_t>(b) * p.num_kv_heads + head) * tiles.kv_tiles + tile;
  __shared__ uint32_t tile_largest;
  __shared__ alignas(16) uint8_t pairs[kTileTokens * kDim];
  if (threadIdx.x == 0) tile_largest = __float_as_uint(recipe::kAmaxFloor);
  uint4 raw[kSteps][2];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = tile * kTileTokens + (i * kPairs + first) * 2 + half;
      raw[i][half] = inside && token < length
                         ? __ldg(row_chunk(p.v, p.kv_offset(p.v, b, token, head), lane))
                         : make_uint4(0, 0, 0, 0);
    }
  }
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x[8];
      unpack<kBf16>(raw[i][half], x);
#pragma unroll
      for (int e = 0; e < 8; ++e) largest = max(largest, magnitude(x[e]));
    }
  }
  __syncthreads();
  largest = max_over_lanes<32>(largest);
  if (threadIdx.x % 32 == 0) atomicMax(&tile_largest, largest);
  __syncthreads();
  const float amax = __uint_as_float(tile_largest);
  const float inverse = recipe::kE4m3Max / amax;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int pair = i * kPairs + first;
    float even[8], odd[8];
    unpack<kBf16>(raw[i][0], even);
    unpack<kBf16>(raw[i][1], odd);
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      words[w] = ptx::to_e4m3(even[2 * w] * inverse, odd[2 * w] * inverse,
                              even[2 * w + 1] * inverse, odd[2 * w + 1] * inverse);
    }
    *reinterpret_cast<uint4*>(pairs + pair * (2 * kDim) + ((lane ^ spread(pair)) * 16)) =
        make_uint4(words[0], words[1], words[2], words[3]);
  }
  __syncthreads();
  uint8_t* to = tiles.values + index * (kTileTokens * kDim);
  const int warp = threadIdx.x / 32, l = threadIdx.x % 32;
  // Unit: 8 channels of 64 tokens. Matrix m takes the pairs 8a + 2m and 8a + 2m + 1, a = 0 .. 3, so
  // that lane 4g + c ends with the 16 tokens from 16c on of channel g.
  for (int unit = warp; unit < kLanes * 2; unit += kThreads / 32) {
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
    const float scale = amax * (1.0f / recipe::kE4m3Max);
    tiles.scales[index * kTileScales + kKeyGroups] = scale;
    tiles.scales[index * kTileScales + kKeyGroups + 1] = log2f(scale);
    tiles.scales[index * kTileScales + kKeyGroups + 2] = 1.0f / scale;
  }
}

// blockIdx.y: the heads of Q, then those of K, then those of V.
template <int kDim, bool kBf16>
__global__ void __launch_bounds__(kThreads) quantize(Problem p, SageTiles tiles) {
  const int tile = blockIdx.x, b = blockIdx.z;
  int head = blockIdx.y;
  if (head < p.num_heads) {
    quantize_queries<kDim, kBf16>(p, tiles, tile, head, b);
    return;
  }
  head -= p.num_heads;
  if (head < p.num_kv_heads) {
    quantize_keys<kDim, kBf16>(p, tiles, tile, head, b);
  } else {
    quantize_values<kDim, kBf16>(p, tiles, tile, head - p.num_kv_heads, b);
  }
}

template <int kDim, bool kBf16>
cudaError_t launch(const Problem& p, const SageTiles& tiles, cudaStream_t stream) {
  if (p.smooth_k) {
    key_means<kDim, kBf16>
        <<<dim3(p.num_kv_heads, p.batch), kThreads, 0, stream>>>(p, tiles.key_means);
  }
  const int most = tiles.query_tiles > tiles.kv_tiles ? tiles.query_tiles : tiles.kv_tiles;
  quantize<kDim, kBf16>
      <<<dim3(most, p.num_heads + 2 * p.num_kv_heads, p.batch), kThreads, 0, stream>>>(p, tiles);
  return cudaGetLastError();
}

}  // namespace

SageTiles place_sage_tiles(const Problem& p, int dim, void* workspace, size_t* bytes) {
  SageTiles tiles{};
  tiles.query_tiles = (p.max_q_len + kTileTokens - 1) / kTileTokens;
  tiles.kv_tiles = (p.max_kv_len + kTileTokens - 1) / kTileTokens;
  const size_t query_tiles = static_cast<size_t>(p.batch) * p.num_heads * tiles.query_tiles;
  const size_t kv_heads = static_cast<size_t>(p.batch) * p.num_kv_heads;
  const size_t kv_tiles = kv_heads * tiles.kv_tiles;
  const size_t tile_bytes = static_cast<size_t>(kTileTokens) * dim;
  WorkspaceLayout layout(workspace);
  layout.place(tiles.queries, query_tiles * tile_bytes);
  layout.place(tiles.keys, kv_tiles * tile_bytes);
  layout.place(tiles.values, kv_tiles * tile_bytes);
  layout.place(tiles.key_means, kv_heads * dim);
  layout.place(tiles.query_scales, query_tiles * kTileTokens);
  layout.place(tiles.query_biases, query_tiles * kTileTokens);
  layout.place(tiles.scales, kv_tiles * kTileScales);
  if (p.lse == nullptr || !p.smooth_k) tiles.query_biases = nullptr;
  *bytes = layout.bytes();
  return tiles;
}

cudaError_t quantize_to_sage_tiles(const Problem& p, int dim, const SageTiles& tiles,
                                   cudaStream_t stream) {
  if (dim == 64) {
    return p.bf16 ? launch<64, true>(p, tiles, stream) : launch<64, false>(p, tiles, stream);
  }
  return p.bf16 ? launch<128, true>(p, tiles, stream) : launch<128, false>(p, tiles, stream);
}

}  // namespace sagelm::kernels
