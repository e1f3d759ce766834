#include <algorithm>

#include "kernels/attention/quantize_tile.cuh"
#include "kernels/attention/recipe.h"
#include "kernels/attention/sage_quantize_sm90.h"
#include "kernels/common/launch.h"
#include "kernels/ops/launch.cuh"

namespace sagelm::kernels {
namespace {

constexpr int kThreads = kQuantizeThreads;
constexpr int kBlocks = 3;  // on a multiprocessor
constexpr int kMeanThreads = 1024;
constexpr int kMeanTokens = 256;

__device__ inline const uint4* row_chunk(const Tensor& x, int64_t offset, int chunk) {
  return reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(x.data) + offset) + chunk;
}

// All of a head's samples at once, since quantizing waits for them.
template <int kDim, bool kBf16>
__global__ void __launch_bounds__(kMeanThreads) key_means(Problem p, float* means) {
  // In this order: blocks of the next kernel that need no means do not wait for anything.
  wait_for_previous_kernel();
  allow_next_kernel();
  constexpr int kLanes = kDim / 8;
  constexpr int kRows = kMeanThreads / kLanes;
  constexpr int kSums = kMeanThreads / kDim;  // of a channel in the second step
  constexpr int kWarps = kMeanThreads / 32;
  const int head = blockIdx.x, b = blockIdx.y;
  const int length = p.kv_len(b);
  const int samples = min(length, kMeanTokens);
  const int lane = threadIdx.x % kLanes, first = threadIdx.x / kLanes;
  float sum[8] = {};
  if (lane * 8 < p.head_dim) {
#pragma unroll
    for (int j = 0; j < kMeanTokens / kRows; ++j) {
      const int i = first + j * kRows;
      if (i >= samples) break;
      const int token = static_cast<int>(static_cast<int64_t>(i) * length / samples);
      float x[8];
      unpack<kBf16>(__ldg(row_chunk(p.k, p.kv_offset(p.k, b, token, head), lane)), x);
#pragma unroll
      for (int e = 0; e < 8; ++e) sum[e] += x[e];
    }
  }
  __shared__ float partial[kWarps][kDim], sums[kSums][kDim];
#pragma unroll
  for (int e = 0; e < 8; ++e) {
#pragma unroll
    for (int step = kLanes; step < 32; step *= 2) {
      sum[e] += __shfl_xor_sync(0xFFFFFFFFu, sum[e], step);
    }
    if (threadIdx.x % 32 < kLanes) partial[threadIdx.x / 32][lane * 8 + e] = sum[e];
  }
  __syncthreads();
  const int channel = threadIdx.x % kDim, part = threadIdx.x / kDim;
  float total = 0;
#pragma unroll
  for (int warp = part; warp < kWarps; warp += kSums) total += partial[warp][channel];
  sums[part][channel] = total;
  __syncthreads();
  if (part == 0) {
#pragma unroll
    for (int i = 1; i < kSums; ++i) total += sums[i][channel];
    const float mean = samples > 0 ? total / static_cast<float>(samples) : 0.0f;
    means[(static_cast<int64_t>(b) * p.num_kv_heads + head) * kDim + channel] =
        kBf16 ? mean : __half2float(__float2half_rn(mean));
  }
}

// A thread's share of a tile's rows, of which there are `count`: kSteps times two chunks, from row
// `first` on in steps of kRow rows, the second of two kHalfRow rows and kHalfChunk chunks behind
// the first. Zeros past the last row and beyond the head's channels. place(row): offset of a row in
// elements. That takes divisions where rows are paged; else they lie x.token_stride apart.
template <int kRow, int kHalfRow, int kHalfChunk, int kSteps, typename Place>
__device__ __forceinline__ void load_share(uint4 (&raw)[kSteps][2], const Tensor& x, int head_dim,
                                           int first, int chunk, int count, bool paged,
                                           const Place& place) {
  const auto load = [&](int i, int half, const uint16_t* row) {
    const bool inside =
        (chunk + half * kHalfChunk) * 8 < head_dim && first + i * kRow + half * kHalfRow < count;
    raw[i][half] = inside ? __ldg(reinterpret_cast<const uint4*>(row) + chunk + half * kHalfChunk)
                          : make_uint4(0, 0, 0, 0);
  };
  const uint16_t* data = static_cast<const uint16_t*>(x.data);
  if (paged) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = min(first + i * kRow + half * kHalfRow, count - 1);
        load(i, half, data + place(row));
      }
    }
  } else {
    const uint16_t* row = data + place(0) + first * x.token_stride;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        load(i, half, row);
        if (half == 0) row += kHalfRow * x.token_stride;
      }
      row += (kRow - kHalfRow) * x.token_stride;
    }
  }
}

template <int kDim, bool kBf16>
__device__ void quantize_queries(const Problem& p, const SageTiles& tiles, int tile, int head,
                                 int b) {
  using Share = RowShare<kDim>;
  const int length = p.q_len(b), first = tile * kTileTokens;
  if (first >= length) return;
  const int64_t place = tiles.first_query(p.cu_q_lens, b, head) + first;
  float mean[2][8] = {};
  if (tiles.query_biases != nullptr) {
    const int kv_head = head / (p.num_heads / p.num_kv_heads);
    load_means<kDim>(tiles.key_means + (static_cast<int64_t>(b) * p.num_kv_heads + kv_head) * kDim,
                     mean);
  }
  uint4 raw[Share::kSteps][2];
  load_share<Share::kRows, 0, Share::kLanes>(
      raw, p.q, p.head_dim, Share::row(0), Share::chunk(0), length - first, false,
      [&](int row) { return p.q_offset(p.q, b, first + row, head); });
  const float logit_scale = p.softmax_scale * recipe::kLog2E;
#pragma unroll
  for (int i = 0; i < Share::kSteps; ++i) {
    const int row = Share::row(i);
    quantize_query_row<kDim, kBf16>(raw[i], row, logit_scale, tiles.queries + place * kDim,
                                    tiles.query_scales + place);
    if (tiles.query_biases != nullptr) {
      float bias = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x[8];
        unpack<kBf16>(raw[i][half], x);
#pragma unroll
        for (int e = 0; e < 8; ++e) bias = fmaf(x[e], mean[half][e], bias);
      }
      bias = over_lanes<Share::kLanes>(bias, [](float a, float b) { return a + b; });
      if (Share::lane() == 0) tiles.query_biases[place + row] = bias * logit_scale;
    }
  }
}

template <int kDim, bool kBf16>
__device__ void quantize_keys(const Problem& p, const SageTiles& tiles, int tile, int head, int b) {
  using Share = RowShare<kDim>;
  const int length = p.kv_len(b), first = tile * kTileTokens;
  if (first >= length) return;
  const int64_t sequence_head = static_cast<int64_t>(b) * p.num_kv_heads + head;
  const int64_t index = sequence_head * tiles.kv_tiles + tile;
  uint4 raw[Share::kSteps][2];
  load_share<Share::kRows, 0, Share::kLanes>(
      raw, p.k, p.head_dim, Share::row(0), Share::chunk(0), length - first, p.page_table != nullptr,
      [&](int row) { return p.kv_offset(p.k, b, first + row, head); });
  float mean[2][8] = {};
  if (p.smooth_k) load_means<kDim>(tiles.key_means + sequence_head * kDim, mean);
  quantize_key_tile<kDim, kBf16>(raw, length - first, mean,
                                 tiles.keys + index * (kTileTokens * kDim),
                                 tiles.scales + index * kTileScales);
}

template <int kDim, bool kBf16>
__device__ void quantize_values(const Problem& p, const SageTiles& tiles, int tile, int head,
                                int b) {
  const int length = p.kv_len(b), first = tile * kTileTokens;
  if (first >= length) return;
  const int64_t index = (static_cast<int64_t>(b) * p.num_kv_heads + head) * tiles.kv_tiles + tile;
  using Share = ValueShare<kDim>;
  uint4 raw[Share::kSteps][2];
  load_share<2, 1, 0>(raw, p.v, p.head_dim, Share::token(0, 0), Share::chunk(), length - first,
                      p.page_table != nullptr,
                      [&](int row) { return p.kv_offset(p.v, b, first + row, head); });
  quantize_value_tile<kDim, kBf16>(raw, tiles.values + index * (kTileTokens * kDim),
                                   tiles.scales + index * kTileScales);
}

// blockIdx.z: the heads of V, which take the longest, then those of Q, then those of K, whose means
// are there by then.
template <int kDim, bool kBf16>
__global__ void __launch_bounds__(kThreads, kBlocks) quantize(Problem p, SageTiles tiles) {
  const int tile = blockIdx.x, b = blockIdx.y;
  int head = blockIdx.z;
  if (head >= p.num_heads + p.num_kv_heads || !p.smooth_k || tiles.query_biases != nullptr) {
    wait_for_previous_kernel();
  }
  allow_next_kernel();
  if (head < p.num_kv_heads) {
    quantize_values<kDim, kBf16>(p, tiles, tile, head, b);
    return;
  }
  head -= p.num_kv_heads;
  if (head < p.num_heads) {
    quantize_queries<kDim, kBf16>(p, tiles, tile, head, b);
  } else {
    quantize_keys<kDim, kBf16>(p, tiles, tile, head - p.num_heads, b);
  }
}

template <int kDim, bool kBf16>
cudaError_t launch_quantize(const Problem& p, const SageTiles& tiles, cudaStream_t stream) {
  if (p.smooth_k) {
    const cudaError_t error = launch(key_means<kDim, kBf16>, dim3(p.num_kv_heads, p.batch),
                                     kMeanThreads, stream, p, tiles.key_means);
    if (error != cudaSuccess) return error;
  }
  const int most = std::max(tiles.query_tiles, tiles.kv_tiles);
  return launch(quantize<kDim, kBf16>, dim3(most, p.batch, p.num_heads + 2 * p.num_kv_heads),
                kThreads, stream, p, tiles);
}

}  // namespace

SageTiles place_sage_tiles(const Problem& p, int dim, void* workspace, size_t* bytes) {
  SageTiles tiles{};
  tiles.query_tiles = (p.max_q_len + kTileTokens - 1) / kTileTokens;
  tiles.kv_tiles = (p.max_kv_len + kTileTokens - 1) / kTileTokens;
  tiles.head_query_tiles = p.batch * tiles.query_tiles;
  const size_t query_tiles = static_cast<size_t>(p.num_heads) * tiles.head_query_tiles;
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
    return p.bf16 ? launch_quantize<64, true>(p, tiles, stream)
                  : launch_quantize<64, false>(p, tiles, stream);
  }
  return p.bf16 ? launch_quantize<128, true>(p, tiles, stream)
                : launch_quantize<128, false>(p, tiles, stream);
}

}  // namespace sagelm::kernels
