#include <algorithm>
#include <cstdint>

#include "kernels/attention/quantize_tile.cuh"
#include "kernels/cache/int4_keys.cuh"
#include "kernels/cache/prefill_tiles.h"
#include "kernels/cache/quantized_kv.h"
#include "kernels/common/ptx.cuh"
#include "kernels/ops/elements.cuh"
#include "kernels/ops/launch.cuh"
#include "kernels/ops/rotate.cuh"

namespace sagelm::kernels {
namespace {

static_assert(kQuantizedKvScales == kTileScales);
static_assert(quantized_kv_scales(true) == kInt4Scales);
constexpr int kRowThreads = 256;

__device__ inline int64_t tail_offset(const QuantizedKv& cache, int tail, bool is_value,
                                      int kv_head) {
  return ((static_cast<int64_t>(tail) * 2 + (is_value ? 1 : 0)) * cache.num_kv_heads + kv_head) *
         kTileTokens * cache.head_dim;
}

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

template <bool kBf16>
__device__ inline uint4 pack(const float (&x)[8]) {
  return make_uint4(ptx::to_halves<kBf16>(x[0], x[1]), ptx::to_halves<kBf16>(x[2], x[3]),
                    ptx::to_halves<kBf16>(x[4], x[5]), ptx::to_halves<kBf16>(x[6], x[7]));
}

enum class Part { kQuery, kKey, kValue };

// Where the tokens of a sequence are while its tiles are being filled: before the step's first row
// in the tail, then in QKV. As the loads of quantize_tile.cuh; queries and keys are rotated.
template <int kDim, bool kBf16>
struct StepTokens {
  static constexpr int kLanes = kDim / 8;

  const uint16_t* tail;  // token 0 of its page, this thread's chunk; not of queries
  const uint16_t* rows;  // the step's first row, likewise
  const float* angles;   // of position 0, of this chunk's pairs; null for values
  int64_t row_stride;    // elements
  int head_dim;
  int start, end;      // positions of the step's tokens
  int first_position;  // of token 0
  bool inside;         // whether the head has this chunk

  // head: among the query or the KV heads.
  __device__ StepTokens(const AppendToQuantizedKv& args, int b, int head, Part part)
      : head_dim(args.cache.head_dim) {
    const QuantizedKv& cache = args.cache;
    const QuantizedKvStep& step = args.step;
    const int chunk = threadIdx.x % kLanes;
    const int first_row = step.cu_q_lens[b];
    const bool is_value = part == Part::kValue;
    const int column_head =
        head + (part == Part::kQuery ? 0 : cache.num_heads + (is_value ? cache.num_kv_heads : 0));
    const int half_chunks = head_dim / 16;
    row_stride = static_cast<int64_t>(cache.num_heads + 2 * cache.num_kv_heads) * head_dim;
    end = step.kv_lens[b];
    start = end - (step.cu_q_lens[b + 1] - first_row);
    first_position = 0;
    inside = chunk * 8 < head_dim;
    tail = static_cast<const uint16_t*>(cache.tails) +
           tail_offset(cache, step.tails[b], is_value, head) + chunk * 8;
    rows = static_cast<const uint16_t*>(args.qkv) + first_row * row_stride +
           column_head * head_dim + chunk * 8;
    angles = is_value ? nullptr : args.rotations + chunk % half_chunks * 8;
  }

  __device__ bool is_row(int token) const {
    const int position = first_position + token;
    return inside && position >= start && position < end;
  }
  __device__ uint4 operator()(int token) const { return of_head(token, 0); }
  // Of the query head that many further.
  __device__ uint4 of_head(int token, int heads) const {
    const int position = first_position + token;
    if (!inside || position >= end) return make_uint4(0, 0, 0, 0);
    const uint16_t* from = position < start
                               ? tail + token * head_dim
                               : rows + (position - start) * row_stride + heads * head_dim;
    return *reinterpret_cast<const uint4*>(from);
  }
  __device__ void finish(int token, uint4& raw) const {
    float cosine[8], sine[8];
    load_angles(token, cosine, sine);
    rotate(raw, is_row(token), cosine, sine);
  }
  __device__ void load_angles(int token, float (&cosine)[8], float (&sine)[8]) const {
    if (!is_row(token)) return;
    const float* angle = angles + static_cast<int64_t>(first_position + token) * head_dim;
    load(angle, cosine);
    load(angle + head_dim / 2, sine);
  }
  // The partners are in a lane of the same warp.
  __device__ void rotate(uint4& raw, bool wanted, const float (&cosine)[8],
                         const float (&sine)[8]) const {
    const int chunk = threadIdx.x % kLanes, half_chunks = head_dim / 16;
    const bool second = chunk >= half_chunks;
    const int lane = threadIdx.x % 32 + (second ? -half_chunks : half_chunks);
    uint4 other;
    other.x = __shfl_sync(0xFFFFFFFFu, raw.x, lane);
    other.y = __shfl_sync(0xFFFFFFFFu, raw.y, lane);
    other.z = __shfl_sync(0xFFFFFFFFu, raw.z, lane);
    other.w = __shfl_sync(0xFFFFFFFFu, raw.w, lane);
    if (!wanted) return;
    float x[8], partner[8];
    unpack<kBf16>(raw, x);
    unpack<kBf16>(other, partner);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      x[e] = second ? rotate_second(x[e], partner[e], cosine[e], sine[e])
                    : rotate_first(x[e], partner[e], cosine[e], sine[e]);
    }
    raw = pack<kBf16>(x);
  }
};

// Keys as those of INT4 pages are before they are rounded, smoothed and rotated, in FP16.
template <int kDim, bool kBf16>
struct RotatedKeys {
  const StepTokens<kDim, kBf16>& tokens;
  const float (&mean)[8];
  int count;

  __device__ uint4 operator()(int token) const { return tokens(token); }
  __device__ void finish(int token, uint4& raw) const {
    tokens.finish(token, raw);
    float x[8];
    unpack<kBf16>(raw, x);
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] = token < count ? x[e] - mean[e] : 0.0f;
    rotate_row<kDim>(x, recipe::kRotatedKeyFactor<kDim>);
    raw = pack<false>(x);
  }
};

__device__ inline float* mean_of(const AppendToQuantizedKv& args, int b, int kv_head) {
  return args.cache.means +
         (static_cast<int64_t>(args.step.means[b]) * args.cache.num_kv_heads + kv_head) *
             args.cache.head_dim;
}

// Whether the step begins with first_page_means.
__host__ __device__ inline bool needs_means(const AppendToQuantizedKv& args) {
  return args.prefill != nullptr ? args.step.begins_in_first_page : args.step.closes_first_page;
}

// Mean keys of the first pages that this step fills; for prefill_from_quantized_kv also those of
// tails that no page precedes yet. Sums of so few FP16 numbers are exact in float64: the order is
// of no account.
template <int kDim, bool kBf16>
__global__ void __launch_bounds__(kQuantizeThreads)
    first_page_means(const __grid_constant__ AppendToQuantizedKv args) {
  constexpr int kLanes = kDim / 8;
  constexpr int kRows = kQuantizeThreads / kLanes;
  constexpr int kSteps = kTileTokens / kRows;
  // In this order: blocks of the next kernel that need no means do not wait for anything.
  wait_for_previous_kernel();
  allow_next_kernel();
  const int kv_head = blockIdx.x, b = blockIdx.y;
  const StepTokens<kDim, kBf16> tokens(args, b, kv_head, Part::kKey);
  const int count = min(tokens.end, kTileTokens);
  if (tokens.start >= kTileTokens || (count < kTileTokens && args.prefill == nullptr)) return;
  float* mean = mean_of(args, b, kv_head);
  if (!args.smooth_k) {
    if (threadIdx.x < args.cache.head_dim) mean[threadIdx.x] = 0.0f;
    return;
  }
  const int lane = threadIdx.x % kLanes, first = threadIdx.x / kLanes;
  uint4 raw[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) raw[i] = tokens(i * kRows + first);
  double sum[8] = {};
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    tokens.finish(i * kRows + first, raw[i]);
    float x[8];
    unpack<kBf16>(raw[i], x);
#pragma unroll
    for (int e = 0; e < 8; ++e) sum[e] += static_cast<double>(x[e]);
  }
  __shared__ double partial[kRows][kDim];
#pragma unroll
  for (int e = 0; e < 8; ++e) partial[first][lane * 8 + e] = sum[e];
  __syncthreads();
  if (threadIdx.x < args.cache.head_dim) {
    double total = 0;
    for (int row = 0; row < kRows; ++row) total += partial[row][threadIdx.x];
    mean[threadIdx.x] = count > 0 ? static_cast<float>(total / count) : 0.0f;
  }
}

// Tile blockIdx.y of those that the step adds tokens of a KV head to: the pages that it fills,
// then, where the tiles have room for it, the tail. The first one has the tail's old tokens, and
// its block then puts the new ones there.
template <int kDim, bool kBf16, bool kInt4, bool kIsValue>
__device__ void add_tokens(const AppendToQuantizedKv& args, const SageTiles& tiles, int b,
                           int kv_head) {
  constexpr int kLanes = kDim / 8;
  constexpr int kRows = kQuantizeThreads / kLanes;
  constexpr int kTileBytes = kTileTokens * kDim;
  const QuantizedKv& cache = args.cache;
  const QuantizedKvStep& step = args.step;
  StepTokens<kDim, kBf16> tokens(args, b, kv_head, kIsValue ? Part::kValue : Part::kKey);
  const int page = tokens.start / kTileTokens + blockIdx.y, pages = tokens.end / kTileTokens;
  const int rest = tokens.end - pages * kTileTokens;
  const bool with_tail = args.prefill != nullptr && rest > 0;
  if (page > pages || (page == pages && !with_tail)) return;
  int64_t place = static_cast<int64_t>(b) * cache.num_kv_heads + kv_head;
  int8_t* keys = tiles.tail_keys;
  uint8_t* values = tiles.tail_values;
  float* scales = tiles.tail_scales;
  const bool int4_page = kInt4 && page < pages;  // keys of a tail's copy are INT8
  if (page < pages) {
    const int64_t at = static_cast<int64_t>(b) * step.page_table_stride + page;
    place = static_cast<int64_t>(step.page_table[at]) * cache.num_kv_heads + kv_head;
    keys = cache.keys;
    values = cache.values;
    scales = cache.scales;
  }
  tokens.first_position = page * kTileTokens;
  scales += place * (int4_page ? kInt4Scales : kTileScales);
  if constexpr (kIsValue) {
    quantize_value_tile<kDim, kBf16>(tokens, values + place * kTileBytes, scales);
  } else {
    float mean[8] = {};
    if (tokens.inside) load_mean(mean_of(args, b, kv_head), threadIdx.x % kLanes, mean);
    if (int4_page) {
      quantize_int4_key_tile<kDim, kBf16>(
          tokens, mean, reinterpret_cast<uint8_t*>(keys) + place * (kTileBytes / 2),
          reinterpret_cast<uint32_t*>(scales) + kInt4Words);
    } else {
      const int count = min(kTileTokens, tokens.end - page * kTileTokens);
      int8_t* to = keys + place * kTileBytes;
      if constexpr (kInt4) {
        const RotatedKeys<kDim, kBf16> rotated{tokens, mean, count};
        quantize_key_tile<kDim, false>(rotated, count, {}, to, scales);
      } else {
        quantize_key_tile<kDim, kBf16>(tokens, count, mean, to, scales);
      }
    }
  }
  if (blockIdx.y > 0) return;
  __syncthreads();
  tokens.first_position = pages * kTileTokens;
  uint16_t* to = static_cast<uint16_t*>(cache.tails) +
                 tail_offset(cache, step.tails[b], kIsValue, kv_head) + threadIdx.x % kLanes * 8;
  for (int base = 0; base < rest; base += kRows) {
    const int token = base + static_cast<int>(threadIdx.x) / kLanes;
    uint4 raw = tokens(token);
    if constexpr (!kIsValue) tokens.finish(token, raw);
    if (tokens.is_row(token)) *reinterpret_cast<uint4*>(to + token * cache.head_dim) = raw;
  }
}

// Part `part` of the sequence's query tile blockIdx.y: rows of kQueryHeads heads, which share the
// loads of their angles.
constexpr int kQueryHeads = 4;
constexpr int kQueryRows = kTileTokens / kQueryHeads;
__host__ __device__ inline int num_query_parts(const QuantizedKv& cache) {
  return (cache.num_heads + kQueryHeads - 1) / kQueryHeads * kQueryHeads;
}
template <int kDim, bool kBf16, bool kInt4>
__device__ void quantize_queries(const AppendToQuantizedKv& args, const SageTiles& tiles, int b,
                                 int part) {
  constexpr int kLanes = kDim / 8;
  constexpr int kRows = kQuantizeThreads / kLanes;
  const int first_head = part / kQueryHeads * kQueryHeads;
  const int heads = min(kQueryHeads, args.cache.num_heads - first_head);
  StepTokens<kDim, kBf16> tokens(args, b, first_head, Part::kQuery);
  const int first_row = blockIdx.y * kTileTokens;
  if (tokens.start + first_row >= tokens.end) return;
  tokens.first_position = tokens.start + first_row;
  const float logit_scale = args.softmax_scale * recipe::kLog2E;
#pragma unroll
  for (int i = 0; i < kQueryRows / kRows; ++i) {
    const int row =
        part % kQueryHeads * kQueryRows + i * kRows + static_cast<int>(threadIdx.x) / kLanes;
    uint4 raw[kQueryHeads];
#pragma unroll
    for (int h = 0; h < kQueryHeads; ++h) {
      raw[h] = h < heads ? tokens.of_head(row, h) : make_uint4(0, 0, 0, 0);
    }
    float cosine[8], sine[8];
    tokens.load_angles(row, cosine, sine);
#pragma unroll
    for (int h = 0; h < kQueryHeads; ++h) {
      if (h >= heads) break;
      tokens.rotate(raw[h], tokens.is_row(row), cosine, sine);
      float x[8];
      unpack<kBf16>(raw[h], x);
      if constexpr (kInt4) rotate_row<kDim>(x, recipe::kRotatedQueryFactor<kDim>);
      const int64_t at = tiles.first_query(args.step.cu_q_lens, b, first_head + h) + first_row;
      quantize_query_row<kDim>(x, row, logit_scale, tiles.queries + at * kDim,
                               tiles.query_scales + at);
    }
  }
}

// blockIdx.x: for prefill_from_quantized_kv the parts of query tiles; the heads of V, then those of
// K, which wait for the means. Blocks that run at the same time share their rows' angles.
template <int kDim, bool kBf16, bool kInt4>
__global__ void __launch_bounds__(kQuantizeThreads, 3)
    fill_tiles(const __grid_constant__ AppendToQuantizedKv args,
               const __grid_constant__ SageTiles tiles) {
  const int query_parts = args.prefill != nullptr ? num_query_parts(args.cache) : 0;
  const int head = static_cast<int>(blockIdx.x) - query_parts, b = blockIdx.z;
  if (head >= args.cache.num_kv_heads || !needs_means(args)) wait_for_previous_kernel();
  allow_next_kernel();
  if (head < 0) {
    quantize_queries<kDim, kBf16, kInt4>(args, tiles, b, head + query_parts);
  } else if (head < args.cache.num_kv_heads) {
    add_tokens<kDim, kBf16, kInt4, true>(args, tiles, b, head);
  } else {
    add_tokens<kDim, kBf16, kInt4, false>(args, tiles, b, head - args.cache.num_kv_heads);
  }
}

template <int kDim, bool kBf16>
cudaError_t launch_fill(const AppendToQuantizedKv& args, cudaStream_t stream) {
  const auto kv_heads = static_cast<unsigned>(args.cache.num_kv_heads);
  const auto sequences = static_cast<unsigned>(args.step.num_sequences);
  if (needs_means(args)) {
    const cudaError_t error = launch(first_page_means<kDim, kBf16>, dim3(kv_heads, sequences),
                                     kQuantizeThreads, stream, args);
    if (error != cudaSuccess) return error;
  }
  SageTiles tiles{};
  int tiles_each = args.step.max_closed_pages;
  unsigned heads = 2 * kv_heads;
  if (args.prefill != nullptr) {
    size_t bytes = 0;
    tiles = quantized_kv_tiles(args.cache, args.step, 0, args.prefill, &bytes);
    tiles_each = std::max(tiles_each + 1, tiles.query_tiles);
    heads += static_cast<unsigned>(num_query_parts(args.cache));
  }
  const auto kernel =
      args.cache.int4_keys ? fill_tiles<kDim, kBf16, true> : fill_tiles<kDim, kBf16, false>;
  return launch(kernel, dim3(heads, static_cast<unsigned>(tiles_each), sequences), kQuantizeThreads,
                stream, args, tiles);
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
