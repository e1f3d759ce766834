// Smoothing and quantization for the sm_80 kernels.
#include <algorithm>

#include "kernels/attention/mma_operands.h"
#include "kernels/attention/quantize_tile.cuh"
#include "kernels/attention/recipe.h"
#include "kernels/common/launch.h"
#include "kernels/common/ptx.cuh"

namespace sagelm::kernels {
namespace {

using ptx::chunk_offset;
using ptx::from_halves;

constexpr int kThreads = 256;
constexpr int kChunkTokens = 256;

// Eight channels of a row, read by one thread; zeros for a row or channels that do not exist.
struct Piece {
  uint4 raw;

  __device__ void load(const Tensor& x, int64_t offset, int channel) {
    raw = __ldg(
        reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(x.data) + offset + channel));
  }
  __device__ void unpack(bool bf16, float (&x)[8]) const {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = from_halves(words[i], bf16);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }
};

__device__ inline uint32_t largest_magnitude(const float (&x)[8]) {
  uint32_t top = 0;
#pragma unroll
  for (int e = 0; e < 8; ++e) top = max(top, magnitude(x[e]));
  return top;
}

__device__ inline uint32_t to_int8(const float* x, float inverse) {
  return pack_bytes(rounded_byte(x[0], inverse), rounded_byte(x[1], inverse),
                    rounded_byte(x[2], inverse), rounded_byte(x[3], inverse));
}

// Sums of K and largest |V| of kChunkTokens tokens, per channel. Threads share rows as they do
// everywhere here: kDim / 8 neighbours take one row.
template <int kDim>
__global__ void __launch_bounds__(kThreads)
    measure_chunk(const __grid_constant__ Problem p, const __grid_constant__ MmaOperands operands) {
  constexpr int kLanes = kDim / 8;
  constexpr int kRows = kThreads / kLanes;
  __shared__ float sums[kRows][kDim];
  __shared__ uint32_t tops[kRows][kDim];
  const int chunk = blockIdx.x, head = blockIdx.y, b = blockIdx.z;
  const int begin = chunk * kChunkTokens;
  const int end = min(begin + kChunkTokens, p.kv_len(b));
  if (begin >= end) return;
  const int channel = threadIdx.x % kLanes * 8, first = threadIdx.x / kLanes;
  float sum[8] = {};
  uint32_t top[8] = {};
  if (channel < p.head_dim) {
    for (int token = begin + first; token < end; token += kRows) {
      Piece piece;
      float x[8];
      if (operands.chunk_sums != nullptr) {
        piece.load(p.k, p.kv_offset(p.k, b, token, head), channel);
        piece.unpack(p.bf16, x);
#pragma unroll
        for (int e = 0; e < 8; ++e) sum[e] += x[e];
      }
      if (operands.chunk_tops != nullptr) {
        piece.load(p.v, p.kv_offset(p.v, b, token, head), channel);
        piece.unpack(p.bf16, x);
#pragma unroll
        for (int e = 0; e < 8; ++e) top[e] = max(top[e], magnitude(x[e]));
      }
    }
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    sums[first][channel + e] = sum[e];
    tops[first][channel + e] = top[e];
  }
  __syncthreads();
  if (threadIdx.x >= kDim) return;
  float total = 0.0f;
  uint32_t largest = 0;
  for (int r = 0; r < kRows; ++r) {
    total += sums[r][threadIdx.x];
    largest = max(largest, tops[r][threadIdx.x]);
  }
  const int64_t to =
      ((static_cast<int64_t>(b) * p.num_kv_heads + head) * operands.chunks + chunk) * kDim +
      threadIdx.x;
  if (operands.chunk_sums != nullptr) operands.chunk_sums[to] = total;
  if (operands.chunk_tops != nullptr) operands.chunk_tops[to] = largest;
}

// The chunks of a sequence and head together: mean key and value scales. One thread a channel.
__global__ void merge_chunks(const __grid_constant__ Problem p,
                             const __grid_constant__ MmaOperands operands) {
  const int head = blockIdx.x, b = blockIdx.y, dim = static_cast<int>(blockDim.x);
  const int length = p.kv_len(b);
  const int chunks = (length + kChunkTokens - 1) / kChunkTokens;
  const int64_t index = static_cast<int64_t>(b) * p.num_kv_heads + head;
  const int64_t from = index * operands.chunks * dim + threadIdx.x;
  const int64_t to = index * dim + threadIdx.x;
  if (operands.chunk_sums != nullptr) {
    float total = 0.0f;
#pragma unroll 8
    for (int i = 0; i < chunks; ++i) total += operands.chunk_sums[from + i * dim];
    operands.key_means[to] = length > 0 ? total / static_cast<float>(length) : 0.0f;
  }
  if (operands.chunk_tops != nullptr) {
    uint32_t top = __float_as_uint(recipe::kAmaxFloor);
#pragma unroll 8
    for (int i = 0; i < chunks; ++i) top = max(top, operands.chunk_tops[from + i * dim]);
    operands.value_scales[to] = __uint_as_float(top) / recipe::kE4m3Max;
  }
}

// Means of groups of kMmaMeanRows queries; of rows that do not exist, zeros.
template <int kDim>
__global__ void __launch_bounds__(kThreads)
    average_queries(const __grid_constant__ Problem p,
                    const __grid_constant__ MmaOperands operands) {
  constexpr int kLanes = kDim / 8;
  constexpr int kRows = kThreads / kLanes;
  __shared__ float sums[kRows][kDim];
  const int group = blockIdx.x, head = blockIdx.y, b = blockIdx.z;
  const int begin = group * kMmaMeanRows;
  const int end = min(begin + kMmaMeanRows, p.q_len(b));
  const int channel = threadIdx.x % kLanes * 8, first = threadIdx.x / kLanes;
  float sum[8] = {};
  if (channel < p.head_dim) {
    for (int row = begin + first; row < end; row += kRows) {
      Piece piece;
      float x[8];
      piece.load(p.q, p.q_offset(p.q, b, row, head), channel);
      piece.unpack(p.bf16, x);
#pragma unroll
      for (int e = 0; e < 8; ++e) sum[e] += x[e];
    }
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) sums[first][channel + e] = sum[e];
  __syncthreads();
  if (threadIdx.x >= kDim) return;
  float total = 0.0f;
  for (int r = 0; r < kRows; ++r) total += sums[r][threadIdx.x];
  const float mean = end > begin ? total / static_cast<float>(end - begin) : 0.0f;
  const int64_t to =
      ((static_cast<int64_t>(b) * p.num_heads + head) * gridDim.x + group) * kDim + threadIdx.x;
  const uint32_t halves =
      p.bf16 ? ptx::to_halves<true>(mean, 0.0f) : ptx::to_halves<false>(mean, 0.0f);
  operands.query_means[to] = static_cast<uint16_t>(halves);
}

// kRows rows of Q or K as integers up to `levels` with the scale of each row's group.
// group_of(row) < kGroups; load(row, channel, x) gives eight channels, done(row, scale, first_lane)
// is called once a row by all of its lanes.
template <int kDim, int kRows, int kGroups, typename GroupOf, typename Load, typename Done>
__device__ inline void quantize_rows(float levels, int8_t* to, GroupOf group_of, Load load,
                                     Done done) {
  constexpr int kLanes = kDim / 8;
  constexpr int kRowsAtOnce = kThreads / kLanes;
  constexpr int kSteps = kRows / kRowsAtOnce;
  __shared__ uint32_t tops[kGroups];
  const int lane = threadIdx.x % kLanes, first = threadIdx.x / kLanes;
  if (threadIdx.x < kGroups) tops[threadIdx.x] = __float_as_uint(recipe::kAmaxFloor);
  __syncthreads();
  float x[kSteps][8];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int row = i * kRowsAtOnce + first;
    load(row, lane * 8, x[i]);
    const uint32_t top = max_over_lanes<kLanes>(largest_magnitude(x[i]));
    if (lane == 0) atomicMax(&tops[group_of(row)], top);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int row = i * kRowsAtOnce + first;
    const float top = __uint_as_float(tops[group_of(row)]);
    const float inverse = levels / top;
    *reinterpret_cast<uint2*>(to + chunk_offset<kDim>(row, lane / 2) + lane % 2 * 8) =
        make_uint2(to_int8(x[i], inverse), to_int8(x[i] + 4, inverse));
    done(row, top / levels, lane == 0);
  }
}

__device__ inline float levels_of(const MmaOperands& operands) {
  return operands.query_means != nullptr ? recipe::kInt4Max : recipe::kInt8Max;
}

template <int kDim>
__device__ void quantize_queries(const Problem& p, const MmaOperands& operands, int tile, int head,
                                 int b) {
  const int begin = tile * kMmaQueryTile;
  const int length = p.q_len(b);
  if (begin >= length) return;
  const int64_t index = static_cast<int64_t>(b) * p.num_heads + head;
  const int64_t first = (index * operands.query_tiles + tile) * kMmaQueryTile;
  const int64_t kv_index =
      static_cast<int64_t>(b) * p.num_kv_heads + head / (p.num_heads / p.num_kv_heads);
  const float scale = p.softmax_scale * recipe::kLog2E;
  const float* means =
      operands.query_biases != nullptr ? operands.key_means + kv_index * kDim : nullptr;
  quantize_rows<kDim, kMmaQueryTile, kMmaQueryTile>(
      levels_of(operands), operands.queries + first * kDim, [](int row) { return row; },
      [&](int row, int channel, float(&x)[8]) {
        Piece piece{};
        const bool inside = begin + row < length && channel < p.head_dim;
        if (inside) piece.load(p.q, p.q_offset(p.q, b, begin + row, head), channel);
        piece.unpack(p.bf16, x);
        if (inside && operands.query_means != nullptr) {
          Piece mean;
          float y[8];
          mean.load({operands.query_means, 0, 0, 0}, (first + row) / kMmaMeanRows * kDim, channel);
          mean.unpack(p.bf16, y);
#pragma unroll
          for (int e = 0; e < 8; ++e) x[e] -= y[e];
        }
        if (means == nullptr) return;
        float product = 0.0f;
#pragma unroll
        for (int e = 0; e < 8; ++e) product = fmaf(x[e], means[channel + e], product);
        product = over_lanes<kDim / 8>(product, [](float a, float c) { return a + c; });
        if (channel == 0) operands.query_biases[first + row] = product * scale;
      },
      [&](int row, float row_scale, bool first_lane) {
        if (first_lane) operands.query_scales[first + row] = row_scale * scale;
      });
}

template <int kDim>
__device__ void quantize_keys(const Problem& p, const MmaOperands& operands, int tile, int head,
                              int b) {
  const int begin = tile * kMmaKeyTile;
  const int length = p.kv_len(b);
  if (begin >= length) return;
  const int64_t kv_index = static_cast<int64_t>(b) * p.num_kv_heads + head;
  const int64_t index = kv_index * operands.key_tiles + tile;
  const float* means =
      operands.key_means != nullptr ? operands.key_means + kv_index * kDim : nullptr;
  quantize_rows<kDim, kMmaKeyTile, kMmaKeyScales>(
      levels_of(operands), operands.keys + index * (kMmaKeyTile * kDim),
      [](int row) { return row % 8 / 2; },
      [&](int row, int channel, float(&x)[8]) {
        Piece piece{};
        const bool inside = begin + row < length && channel < p.head_dim;
        if (inside) piece.load(p.k, p.kv_offset(p.k, b, begin + row, head), channel);
        piece.unpack(p.bf16, x);
        if (!inside || means == nullptr) return;
#pragma unroll
        for (int e = 0; e < 8; ++e) x[e] -= means[channel + e];
      },
      [&](int row, float row_scale, bool first_lane) {
        // Rows 0, 2, 4 and 6 are of the four groups in turn.
        if (first_lane && row < 8 && row % 2 == 0) {
          operands.key_scales[index * kMmaKeyScales + row / 2] = row_scale;
        }
      });
}

// Transposes a tile through shared memory: a thread writes 16 tokens of one channel.
template <int kDim>
__device__ void quantize_values(const Problem& p, const MmaOperands& operands, int tile, int head,
                                int b) {
  constexpr int kLanes = kDim / 8;
  __shared__ __align__(16) uint16_t rows[kMmaKeyTile][kDim];
  const int begin = tile * kMmaKeyTile;
  const int length = p.kv_len(b);
  if (begin >= length) return;
  const int64_t kv_index = static_cast<int64_t>(b) * p.num_kv_heads + head;
  for (int row = threadIdx.x / kLanes; row < kMmaKeyTile; row += kThreads / kLanes) {
    const int channel = threadIdx.x % kLanes * 8;
    Piece piece{};
    if (begin + row < length && channel < p.head_dim) {
      piece.load(p.v, p.kv_offset(p.v, b, begin + row, head), channel);
    }
    *reinterpret_cast<uint4*>(&rows[row][channel]) = piece.raw;
  }
  __syncthreads();
  uint8_t* to = operands.values + (kv_index * operands.key_tiles + tile) * (kMmaKeyTile * kDim);
  for (int i = threadIdx.x; i < kDim * (kMmaKeyTile / 16); i += kThreads) {
    const int channel = i % kDim, chunk = i / kDim;
    const float inverse = 1.0f / operands.value_scales[kv_index * kDim + channel];
    const auto scaled = [&](int token) {
      return __fmul_rn(from_halves(rows[chunk * 16 + token][channel], p.bf16).x, inverse);
    };
    uint32_t words[4];
    float2 moves = {};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if (2 * w % recipe::kValueRun<kDim> == 0) moves = {};
      // Places 4w .. 4w + 3 hold tokens 2w, 2w + 1, 2w + 8, 2w + 9.
      const uint32_t even = round_values<kDim>(scaled(2 * w), scaled(2 * w + 8), moves);
      const uint32_t odd = round_values<kDim>(scaled(2 * w + 1), scaled(2 * w + 9), moves);
      words[w] = __byte_perm(even, odd, 0x5140);
    }
    *reinterpret_cast<uint4*>(to + chunk_offset<kMmaKeyTile>(channel, chunk)) =
        make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// blockIdx.y: the heads of Q, then those of K, then, for SAGE2, those of V.
template <int kDim>
__global__ void __launch_bounds__(kThreads)
    quantize(const __grid_constant__ Problem p, const __grid_constant__ MmaOperands operands) {
  const int tile = blockIdx.x, b = blockIdx.z;
  const int head = blockIdx.y;
  if (head < p.num_heads) {
    quantize_queries<kDim>(p, operands, tile, head, b);
  } else if (head < p.num_heads + p.num_kv_heads) {
    quantize_keys<kDim>(p, operands, tile, head - p.num_heads, b);
  } else {
    quantize_values<kDim>(p, operands, tile, head - p.num_heads - p.num_kv_heads, b);
  }
}

template <int kDim>
cudaError_t launch_quantize(const Problem& p, const MmaOperands& operands, cudaStream_t stream) {
  const unsigned kv_heads = p.num_kv_heads, batch = p.batch;
  const bool measures = operands.chunk_sums != nullptr || operands.chunk_tops != nullptr;
  if (measures && operands.chunks > 0) {
    measure_chunk<kDim>
        <<<dim3(operands.chunks, kv_heads, batch), kThreads, 0, stream>>>(p, operands);
  }
  if (measures) merge_chunks<<<dim3(kv_heads, batch), kDim, 0, stream>>>(p, operands);
  if (operands.query_means != nullptr && operands.query_tiles > 0) {
    const unsigned groups = operands.query_tiles * (kMmaQueryTile / kMmaMeanRows);
    average_queries<kDim><<<dim3(groups, p.num_heads, batch), kThreads, 0, stream>>>(p, operands);
  }
  const unsigned tiles = std::max(operands.query_tiles, operands.key_tiles);
  const unsigned heads = p.num_heads + kv_heads * (operands.values != nullptr ? 2 : 1);
  if (tiles > 0) {
    quantize<kDim><<<dim3(tiles, heads, batch), kThreads, 0, stream>>>(p, operands);
  }
  return cudaGetLastError();
}

}  // namespace

MmaOperands place_mma_operands(sagelm_attention_variant variant, const Problem& p, void* workspace,
                               size_t* bytes) {
  MmaOperands operands{};
  const size_t dim = mma_padded_dim(p.head_dim);
  operands.query_tiles = (p.max_q_len + kMmaQueryTile - 1) / kMmaQueryTile;
  operands.key_tiles = (p.max_kv_len + kMmaKeyTile - 1) / kMmaKeyTile;
  operands.chunks = (p.max_kv_len + kChunkTokens - 1) / kChunkTokens;
  const size_t query_rows =
      static_cast<size_t>(p.batch) * p.num_heads * operands.query_tiles * kMmaQueryTile;
  const size_t kv_heads = static_cast<size_t>(p.batch) * p.num_kv_heads;
  const size_t key_tiles = kv_heads * operands.key_tiles;
  const size_t chunk_channels = kv_heads * operands.chunks * dim;
  WorkspaceLayout layout(workspace);
  layout.place(operands.queries, query_rows * dim);
  layout.place(operands.query_scales, query_rows);
  layout.place(operands.keys, key_tiles * kMmaKeyTile * dim);
  layout.place(operands.key_scales, key_tiles * kMmaKeyScales);
  if (p.smooth_k) {
    layout.place(operands.query_biases, query_rows);
    layout.place(operands.key_means, kv_heads * dim);
    layout.place(operands.chunk_sums, chunk_channels);
  }
  if (variant == SAGELM_ATTENTION_SAGE2_4B) {
    layout.place(operands.query_means, query_rows / kMmaMeanRows * dim);
  }
  if (variant != SAGELM_ATTENTION_SAGE1) {
    layout.place(operands.values, key_tiles * kMmaKeyTile * dim);
    layout.place(operands.value_scales, kv_heads * dim);
    layout.place(operands.chunk_tops, chunk_channels);
  }
  *bytes = layout.bytes();
  return operands;
}

cudaError_t quantize_mma_operands(const Problem& p, const MmaOperands& operands,
                                  cudaStream_t stream) {
  switch (mma_padded_dim(p.head_dim)) {
    case 64:
      return launch_quantize<64>(p, operands, stream);
    case 128:
      return launch_quantize<128>(p, operands, stream);
    default:
      return launch_quantize<256>(p, operands, stream);
  }
}

}  // namespace sagelm::kernels
