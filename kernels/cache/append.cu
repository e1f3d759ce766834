#include <algorithm>
#include <cstdint>

#include "kernels/attention/quantize_tile.cuh"
#include "kernels/cache/int4_keys.cuh"
#include "kernels/cache/prefill_tiles.h"
#include "kernels/cache/quantized_kv.h"
#include "kernels/cache/step_tokens.cuh"
#include "kernels/common/ptx.cuh"
#include "kernels/ops/elements.cuh"
#include "kernels/ops/launch.cuh"
#include "kernels/ops/rotate.cuh"

namespace sagelm::kernels {
namespace {

static_assert(kQuantizedKvScales == kTileScales);
static_assert(quantized_kv_scales(true) == kInt4Scales);
constexpr int kRowThreads = 256;

// Queries in place; keys and values of rows that no page takes to their tail. A thread handles 8
// elements of the first half of a head and their partners in the second.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    append_rows(const __grid_constant__ AppendToQuantizedKv args) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const QuantizedKv& cache = args.cache;
  const int half = cache.head_dim / 2;
  const int packs = half / 8;  // per head
  const int heads = cache.num_heads + 2 * cache.num_kv_heads;
  const int task = static_cast<int>(blockIdx.y) * kRowThreads + static_cast<int>(threadIdx.x);
  if (task >= heads * packs) return;
  const int head = task / packs;
  const int i = (task - head * packs) * 8;
  const int64_t row = blockIdx.x;
  const bool is_query = head < cache.num_heads;
  const bool is_value = head >= cache.num_heads + cache.num_kv_heads;
  const int slot = is_query ? -1 : args.step.slots[row];
  if (!is_query && slot < 0) return;
  T* at = static_cast<T*>(args.qkv) + (row * heads + head) * cache.head_dim + i;
  float a[8], b[8];
  load(at, a);
  load(at + half, b);
  if (!is_value) {
    const float* angle =
        args.rotations + static_cast<int64_t>(args.step.positions[row]) * cache.head_dim;
    float cosine[8], sine[8];
    load(angle + i, cosine);
    load(angle + half + i, sine);
    rotate_pairs(a, b, cosine, sine);
  }
  if (!is_query) {
    const int kv_head = head - cache.num_heads - (is_value ? cache.num_kv_heads : 0);
    at = static_cast<T*>(cache.tails) + tail_offset(cache, slot / kTileTokens, is_value, kv_head) +
         slot % kTileTokens * cache.head_dim + i;
  }
  store(at, a);
  store(at + half, b);
}

__device__ inline float* mean_of(const AppendToQuantizedKv& args, int b, int kv_head) {
  return args.cache.means +
         (static_cast<int64_t>(args.step.means[b]) * args.cache.num_kv_heads + kv_head) *
             args.cache.head_dim;
}

// The mean of the first `count` keys of a tile to `mean`, where keys are FP16 numbers rounded to
// one. Summed in the order of recipe::kMeanRows.
template <int kDim, bool kBf16>
__device__ void mean_of_keys(const uint4 (&raw)[RowShare<kDim>::kSteps][2], int count,
                             float (&mean)[kDim]) {
  using Share = RowShare<kDim>;
  constexpr int kWarps = kQuantizeThreads / 32;
  static_assert(Share::kRows == recipe::kMeanRows<kDim>);
  __shared__ float partial[kWarps][kDim];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum[Share::kSteps][8];
#pragma unroll
    for (int i = 0; i < Share::kSteps; ++i) unpack<kBf16>(raw[i][half], sum[i]);  // zeros behind
#pragma unroll
    for (int stride = Share::kSteps / 2; stride > 0; stride /= 2) {
#pragma unroll
      for (int i = 0; i < stride; ++i) {
#pragma unroll
        for (int e = 0; e < 8; ++e) sum[i][e] += sum[i + stride][e];
      }
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
#pragma unroll
      for (int step = Share::kLanes; step < 32; step *= 2) {
        sum[0][e] += __shfl_xor_sync(0xFFFFFFFFu, sum[0][e], step);
      }
    }
    if (threadIdx.x % 32 < Share::kLanes) {
      store(&partial[threadIdx.x / 32][Share::chunk(half) * 8], sum[0]);
    }
  }
  __syncthreads();
  if (threadIdx.x < kDim) {
    float sum[kWarps];
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum[warp] = partial[warp][threadIdx.x];
#pragma unroll
    for (int stride = 1; stride < kWarps; stride *= 2) {
#pragma unroll
      for (int warp = 0; warp < kWarps; warp += 2 * stride) sum[warp] += sum[warp + stride];
    }
    const float total = count > 0 ? sum[0] / static_cast<float>(count) : 0.0f;
    mean[threadIdx.x] = kBf16 ? total : __half2float(__float2half_rn(total));
  }
  __syncthreads();
}

// What the blocks of a sequence's and KV head's tiles tell each other: its first page's block that
// the mean is there, the others that they have read it; the last one leaves zero again.
constexpr uint32_t kMeanIsThere = 1u << 31;
__device__ inline void announce_mean(uint32_t* news) {
  __threadfence();
  atomicOr(news, kMeanIsThere);
}
__device__ inline void await_mean(uint32_t* news) {
  while ((*static_cast<volatile uint32_t*>(news) & kMeanIsThere) == 0) {
  }
  __threadfence();
}
__device__ inline void leave_mean(uint32_t* news, int readers) {
  if (atomicAdd(news, 1u) == kMeanIsThere + static_cast<uint32_t>(readers) - 1) *news = 0;
}

// What smooths tile `tile` of `tiles` that the step adds tokens to: the mean of the sequence's
// first page, which is computed here if the page had not been filled before the step, for
// prefill_from_quantized_kv also if the step does not fill it. Blocks of other tiles wait for that
// of the first one, which begins before them.
template <int kDim, bool kBf16>
__device__ void find_mean(const AppendToQuantizedKv& args, const StepTokens<kDim, kBf16>& tokens,
                          int b, int kv_head, int tile, int tiles,
                          const uint4 (&raw)[RowShare<kDim>::kSteps][2], float (&mean)[2][8]) {
  using Share = RowShare<kDim>;
  float* kept = mean_of(args, b, kv_head);
  __shared__ alignas(16) float found[kDim];
  const float* from = kept;
  if (tokens.start < kTileTokens && !args.smooth_k) {
    if (tile == 0 && threadIdx.x < args.cache.head_dim) kept[threadIdx.x] = 0.0f;
    return;
  }
  if (tokens.start < kTileTokens) {
    uint32_t* news = args.arrivals + static_cast<int64_t>(b) * args.cache.num_kv_heads + kv_head;
    if (tile == 0) {
      mean_of_keys<kDim, kBf16>(raw, min(tokens.end, kTileTokens), found);
      if (threadIdx.x < args.cache.head_dim) kept[threadIdx.x] = found[threadIdx.x];
      if (tiles > 1) {
        __syncthreads();
        if (threadIdx.x == 0) announce_mean(news);
      }
    } else {
      if (threadIdx.x == 0) await_mean(news);
      __syncthreads();
      if (threadIdx.x < args.cache.head_dim) found[threadIdx.x] = __ldcg(kept + threadIdx.x);
      __syncthreads();
      if (threadIdx.x == 0) leave_mean(news, tiles - 1);
    }
    from = found;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (tokens.inside(Share::chunk(half))) load_mean(from, Share::chunk(half), mean[half]);
  }
}

// Keys as those of INT4 pages are before they are rounded, smoothed and rotated, in FP16.
template <int kDim, bool kBf16>
__device__ void rotate_keys(uint4 (&raw)[RowShare<kDim>::kSteps][2], int count,
                            const float (&mean)[2][8]) {
  using Share = RowShare<kDim>;
#pragma unroll
  for (int i = 0; i < Share::kSteps; ++i) {
    float x[2][8];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      unpack<kBf16>(raw[i][half], x[half]);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        x[half][e] = Share::row(i) < count ? x[half][e] - mean[half][e] : 0.0f;
      }
    }
    rotate_row<kDim>(x, recipe::kRotatedKeyFactor<kDim>);
    raw[i][0] = pack<false>(x[0]);
    raw[i][1] = pack<false>(x[1]);
  }
}

// Tile `tile` of those that the step adds tokens of a KV head to: the pages that it fills,
// then, where the tiles have room for it, the tail. The first one has the tail's old tokens, and
// its block then puts the new ones there.
template <int kDim, bool kBf16, bool kInt4, bool kIsValue>
__device__ void add_tokens(const AppendToQuantizedKv& args, const SageTiles& tiles, int b,
                           int kv_head, int tile) {
  constexpr int kTileBytes = kTileTokens * kDim;
  const QuantizedKv& cache = args.cache;
  const QuantizedKvStep& step = args.step;
  StepTokens<kDim, kBf16> tokens(args, b, kv_head, kIsValue ? Part::kValue : Part::kKey);
  const int first_page = tokens.start / kTileTokens, page = first_page + tile;
  const int pages = tokens.end / kTileTokens, rest = tokens.end - pages * kTileTokens;
  const bool with_tail = args.prefill != nullptr && rest > 0;
  if (page > pages || (page == pages && !with_tail)) return;
  tokens.first_position = page * kTileTokens;
  // On their way before it is known where they go.
  std::conditional_t<kIsValue, uint4[ValueShare<kDim>::kSteps][2], uint4[RowShare<kDim>::kSteps][2]>
      raw;
  if constexpr (kIsValue) {
    tokens.load_values(raw);
  } else {
    tokens.load_keys(raw);
  }
  const bool is_page = page < pages;  // else the tail's copy, whose keys are INT8
  const int id =
      is_page ? step.page_table[static_cast<int64_t>(b) * step.page_table_stride + page] : b;
  const int page_scales = kInt4 && is_page ? kInt4Scales : kTileScales;
  const auto place = [&] { return static_cast<int64_t>(id) * cache.num_kv_heads + kv_head; };
  if constexpr (kIsValue) {
    using Share = ValueShare<kDim>;
    const int chunk = Share::chunk();
    quantize_value_tile<kDim, kBf16>(
        raw, (is_page ? cache.values : tiles.tail_values) + place() * kTileBytes,
        (is_page ? cache.scales : tiles.tail_scales) + place() * page_scales);
    if (tile > 0) return;
    __syncthreads();
    tokens.first_position = pages * kTileTokens;
    for (int token = static_cast<int>(threadIdx.x) / Share::kLanes; token < rest;
         token += kQuantizeThreads / Share::kLanes) {
      if (!tokens.is_row(token) || !tokens.inside(chunk)) continue;
      *reinterpret_cast<uint4*>(tokens.tail_row(token) + chunk * 8) =
          tokens.load_chunk(token, chunk);
    }
  } else {
    using Share = RowShare<kDim>;
    tokens.rotate_keys(raw);
    float mean[2][8] = {};
    find_mean<kDim, kBf16>(args, tokens, b, kv_head, tile, pages - first_page + (with_tail ? 1 : 0),
                           raw, mean);
    const int count = min(kTileTokens, tokens.end - page * kTileTokens);
    float* scales = (is_page ? cache.scales : tiles.tail_scales) + place() * page_scales;
    if (kInt4 && is_page) {
      quantize_int4_key_tile<kDim, kBf16>(
          raw, mean, reinterpret_cast<uint8_t*>(cache.keys) + place() * (kTileBytes / 2),
          reinterpret_cast<uint32_t*>(scales) + kInt4Words);
    } else {
      int8_t* to = (is_page ? cache.keys : tiles.tail_keys) + place() * kTileBytes;
      if constexpr (kInt4) {
        rotate_keys<kDim, kBf16>(raw, count, mean);
        quantize_key_tile<kDim, false>(raw, count, {}, to, scales);
      } else {
        quantize_key_tile<kDim, kBf16>(raw, count, mean, to, scales);
      }
    }
    if (tile > 0) return;
    __syncthreads();
    tokens.first_position = pages * kTileTokens;
    for (int i = 0; i * Share::kRows < rest; ++i) {
      const int token = Share::row(i);
      uint4 row[2];
      tokens.load_row(token, row);
      tokens.template rotate<1>(token, &row);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int chunk = Share::chunk(half);
        if (!tokens.is_row(token) || !tokens.inside(chunk)) continue;
        *reinterpret_cast<uint4*>(tokens.tail_row(token) + chunk * 8) = row[half];
      }
    }
  }
}

// Part `part` of the sequence's query tile `tile`: a few rows of kQueryHeads heads, which share
// the loads of their angles.
constexpr int kQueryHeads = 4;
template <int kDim>
int num_query_parts(const QuantizedKv& cache) {
  return (cache.num_heads + kQueryHeads - 1) / kQueryHeads * RowShare<kDim>::kSteps;
}
template <int kDim, bool kBf16, bool kInt4>
__device__ void quantize_queries(const AppendToQuantizedKv& args, const SageTiles& tiles, int b,
                                 int part, int tile) {
  using Share = RowShare<kDim>;
  const int first_head = part / Share::kSteps * kQueryHeads;
  const int heads = min(kQueryHeads, args.cache.num_heads - first_head);
  StepTokens<kDim, kBf16> tokens(args, b, first_head, Part::kQuery);
  const int first_row = tile * kTileTokens;
  if (tokens.start + first_row >= tokens.end) return;
  tokens.first_position = tokens.start + first_row;
  const float logit_scale = args.softmax_scale * recipe::kLog2E;
  const int row = Share::row(part % Share::kSteps);
  uint4 raw[kQueryHeads][2] = {};
  if (tokens.is_whole() && heads == kQueryHeads) {
    const uint16_t* from = tokens.row_of(row) + Share::lane() * 8;
#pragma unroll
    for (int h = 0; h < kQueryHeads; ++h) {
      raw[h][0] = ptx::load_once(from + h * kDim);
      raw[h][1] = ptx::load_once(from + h * kDim + kDim / 2);
    }
    tokens.template rotate_whole<kQueryHeads>(tokens.angles_of(row), raw);
  } else {
#pragma unroll
    for (int h = 0; h < kQueryHeads; ++h) {
      if (h < heads) tokens.load_row(row, raw[h], h);
    }
    tokens.template rotate<kQueryHeads>(row, raw);
  }
  const int64_t at = tiles.first_query(args.step.cu_q_lens, b, first_head) + first_row;
  const int64_t head_rows = int64_t{tiles.head_query_tiles} * kTileTokens;
#pragma unroll
  for (int h = 0; h < kQueryHeads; ++h) {
    if (h >= heads) break;
    int8_t* to = tiles.queries + (at + h * head_rows) * kDim;
    float* scales = tiles.query_scales + at + h * head_rows;
    if constexpr (kInt4) {
      float x[2][8];
      unpack<kBf16>(raw[h][0], x[0]);
      unpack<kBf16>(raw[h][1], x[1]);
      rotate_row<kDim>(x, recipe::kRotatedQueryFactor<kDim>);
      uint32_t largest = 0;
#pragma unroll
      for (int e = 0; e < 16; ++e) largest = max(largest, magnitude(x[e / 8][e % 8]));
      quantize_query_row<kDim>(x, largest, row, logit_scale, to, scales);
    } else {
      quantize_query_row<kDim, kBf16>(raw[h], row, logit_scale, to, scales);
    }
  }
}

// The blocks of a sequence: rounds of a tile of all KV heads, of K, whose first tiles have means
// that others wait for, and of V, and of all query heads (for prefill_from_quantized_kv). Blocks
// that run at the same time share their rows' angles, and those of different kinds complement each
// other.
struct Rounds {
  // Whether a sequence may end within a page that attention wants a copy of.
  static bool has_tails(const AppendToQuantizedKv& args) {
    return args.prefill != nullptr && (args.step.num_sequences > 1 || args.step.max_q_len == 1 ||
                                       args.step.max_kv_len % kTileTokens != 0);
  }

  int query_parts, query_tiles;
  int kv_heads, kv_tiles;  // tiles of keys or values at most

  Rounds(const AppendToQuantizedKv& args, int query_parts, int query_tiles)
      : query_parts(query_parts),
        query_tiles(query_tiles),
        kv_heads(args.cache.num_kv_heads),
        kv_tiles(args.step.max_closed_pages + (has_tails(args) ? 1 : 0)) {}

  __host__ __device__ int width() const { return query_parts + 2 * kv_heads; }
  int count() const { return std::max(query_tiles, kv_tiles); }
};

// blockIdx.y: the round; z: the sequence.
template <int kDim, bool kBf16, bool kInt4>
__global__ void __launch_bounds__(kQuantizeThreads, 3)
    fill_tiles(const __grid_constant__ AppendToQuantizedKv args,
               const __grid_constant__ SageTiles tiles, const Rounds rounds) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int b = blockIdx.z, heads = rounds.kv_heads;
  const int tile = blockIdx.y, place = blockIdx.x;
  if (place < heads) {
    add_tokens<kDim, kBf16, kInt4, false>(args, tiles, b, place, tile);
  } else if (place < 2 * heads) {
    add_tokens<kDim, kBf16, kInt4, true>(args, tiles, b, place - heads, tile);
  } else {
    quantize_queries<kDim, kBf16, kInt4>(args, tiles, b, place - 2 * heads, tile);
  }
}

// Whether sequences may have no full page before the step that they have, or need, afterwards.
bool finds_means(const AppendToQuantizedKv& args) {
  return args.smooth_k &&
         (args.prefill != nullptr ? args.step.begins_in_first_page : args.step.closes_first_page);
}

template <int kDim, bool kBf16>
cudaError_t launch_fill(const AppendToQuantizedKv& args, cudaStream_t stream) {
  SageTiles tiles{};
  if (args.prefill != nullptr) {
    size_t bytes = 0;
    tiles = quantized_kv_tiles(args.cache, args.step, 0, args.prefill, &bytes);
  }
  const Rounds rounds(args, args.prefill != nullptr ? num_query_parts<kDim>(args.cache) : 0,
                      tiles.query_tiles);
  if (finds_means(args) && rounds.kv_tiles > 1 && args.arrivals == nullptr) {
    return cudaErrorInvalidValue;
  }
  const auto kernel =
      args.cache.int4_keys ? fill_tiles<kDim, kBf16, true> : fill_tiles<kDim, kBf16, false>;
  return launch(kernel,
                dim3(static_cast<unsigned>(rounds.width()), static_cast<unsigned>(rounds.count()),
                     static_cast<unsigned>(args.step.num_sequences)),
                kQuantizeThreads, stream, args, tiles, rounds);
}

}  // namespace

const char* quantized_kv_refusal(int32_t num_heads, int32_t num_kv_heads, int32_t head_dim) {
  if (head_dim < 16 || head_dim > 128 || head_dim % 16 != 0) {
    return "the quantized cache takes head sizes that are multiples of 16 up to 128";
  }
  if (num_kv_heads < 1 || num_heads < 1 || num_heads % num_kv_heads != 0) {
    return "the query heads must be a multiple of the KV heads";
  }
  return nullptr;
}

cudaError_t append_to_quantized_kv(const AppendToQuantizedKv& args, cudaStream_t stream) {
  const QuantizedKv& cache = args.cache;
  if (quantized_kv_refusal(cache.num_heads, cache.num_kv_heads, cache.head_dim) != nullptr) {
    return cudaErrorInvalidValue;
  }
  if (args.step.rows == 0) return cudaSuccess;
  return with_half_type(cache.type, [&](auto element) {
    using T = decltype(element);
    constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
    const auto fill = [&] {
      return quantized_kv_dim(cache.head_dim) == 64 ? launch_fill<64, kBf16>(args, stream)
                                                    : launch_fill<128, kBf16>(args, stream);
    };
    if (args.prefill != nullptr) return fill();
    const int64_t tasks = int64_t{cache.num_heads + 2 * cache.num_kv_heads} * (cache.head_dim / 16);
    const dim3 grid(static_cast<unsigned>(args.step.rows),
                    static_cast<unsigned>((tasks + kRowThreads - 1) / kRowThreads));
    const cudaError_t error = launch(append_rows<T>, grid, kRowThreads, stream, args);
    return error != cudaSuccess || args.step.max_closed_pages == 0 ? error : fill();
  });
}

}  // namespace sagelm::kernels
