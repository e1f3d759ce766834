#include <cstdint>

#include "kernels/attention/quantize_tile.cuh"
#include "kernels/cache/int4_keys.cuh"
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
  const bool in_place = is_query || (!is_value && args.rotate_keys);
  const int slot = is_query ? -1 : args.step.slots[row];
  if (!in_place && slot < 0) return;
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
  if (in_place) {
    store(at, a);
    store(at + half, b);
  }
  if (slot >= 0) {
    const int kv_head = head - cache.num_heads - (is_value ? cache.num_kv_heads : 0);
    at = static_cast<T*>(cache.tails) + tail_offset(cache, slot / kTileTokens, is_value, kv_head) +
         slot % kTileTokens * cache.head_dim + i;
    store(at, a);
    store(at + half, b);
  }
}

// Where the tokens of a sequence are while its pages are being filled: before the step's first row
// in the tail, then in QKV, keys as args.rotate_keys has left them. As the loads of
// quantize_tile.cuh.
template <int kDim, bool kBf16>
struct StepTokens {
  static constexpr int kLanes = kDim / 8;

  const uint16_t* tail;  // token 0 of its page, this thread's chunk
  const uint16_t* rows;  // the step's first row, likewise
  const float* angles;   // of position 0, of this chunk's pairs; null for values
  int64_t row_stride;    // elements
  int head_dim;
  int start, end;      // positions of the step's tokens
  int first_position;  // of token 0
  bool rotated;        // whether the rows' keys are already
  bool inside;         // whether the head has this chunk

  __device__ StepTokens(const AppendToQuantizedKv& args, int b, int kv_head, bool is_value)
      : head_dim(args.cache.head_dim) {
    const QuantizedKv& cache = args.cache;
    const QuantizedKvStep& step = args.step;
    const int chunk = threadIdx.x % kLanes;
    const int first_row = step.cu_q_lens[b];
    const int head = cache.num_heads + (is_value ? cache.num_kv_heads : 0) + kv_head;
    const int half_chunks = head_dim / 16;
    row_stride = static_cast<int64_t>(cache.num_heads + 2 * cache.num_kv_heads) * head_dim;
    end = step.kv_lens[b];
    start = end - (step.cu_q_lens[b + 1] - first_row);
    first_position = 0;
    rotated = args.rotate_keys;
    inside = chunk * 8 < head_dim;
    tail = static_cast<const uint16_t*>(cache.tails) +
           tail_offset(cache, step.tails[b], is_value, kv_head) + chunk * 8;
    rows = static_cast<const uint16_t*>(args.qkv) + first_row * row_stride + head * head_dim +
           chunk * 8;
    angles = is_value ? nullptr : args.rotations + chunk % half_chunks * 8;
  }

  __device__ bool is_row(int token) const {
    const int position = first_position + token;
    return inside && position >= start && position < end;
  }
  __device__ uint4 operator()(int token) const {
    const int position = first_position + token;
    if (!inside || position >= end) return make_uint4(0, 0, 0, 0);
    const uint16_t* from =
        position < start ? tail + token * head_dim : rows + (position - start) * row_stride;
    return *reinterpret_cast<const uint4*>(from);
  }
  // Rotates a key; the partners are in a lane of the same warp.
  __device__ void finish(int token, uint4& raw) const {
    if (rotated) return;
    const int chunk = threadIdx.x % kLanes, half_chunks = head_dim / 16;
    const bool second = chunk >= half_chunks;
    const int lane = threadIdx.x % 32 + (second ? -half_chunks : half_chunks);
    uint4 other;
    other.x = __shfl_sync(0xFFFFFFFFu, raw.x, lane);
    other.y = __shfl_sync(0xFFFFFFFFu, raw.y, lane);
    other.z = __shfl_sync(0xFFFFFFFFu, raw.z, lane);
    other.w = __shfl_sync(0xFFFFFFFFu, raw.w, lane);
    if (!is_row(token)) return;
    const float* angle = angles + static_cast<int64_t>(first_position + token) * head_dim;
    float x[8], partner[8], cosine[8], sine[8];
    unpack<kBf16>(raw, x);
    unpack<kBf16>(other, partner);
    load(angle, cosine);
    load(angle + head_dim / 2, sine);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      x[e] = second ? rotate_second(x[e], partner[e], cosine[e], sine[e])
                    : rotate_first(x[e], partner[e], cosine[e], sine[e]);
    }
    raw = make_uint4(ptx::to_halves<kBf16>(x[0], x[1]), ptx::to_halves<kBf16>(x[2], x[3]),
                     ptx::to_halves<kBf16>(x[4], x[5]), ptx::to_halves<kBf16>(x[6], x[7]));
  }
};

__device__ inline float* mean_of(const AppendToQuantizedKv& args, int b, int kv_head) {
  return args.cache.means +
         (static_cast<int64_t>(args.step.means[b]) * args.cache.num_kv_heads + kv_head) *
             args.cache.head_dim;
}

// Mean keys of the first pages that this step fills. Sums of so few FP16 numbers are exact in
// float64: the order is of no account.
template <int kDim, bool kBf16>
__global__ void __launch_bounds__(kQuantizeThreads)
    first_page_means(const __grid_constant__ AppendToQuantizedKv args) {
  constexpr int kLanes = kDim / 8;
  constexpr int kRows = kQuantizeThreads / kLanes;
  constexpr int kSteps = kTileTokens / kRows;
  allow_next_kernel();
  wait_for_previous_kernel();
  const int kv_head = blockIdx.x, b = blockIdx.y;
  const StepTokens<kDim, kBf16> tokens(args, b, kv_head, false);
  if (tokens.start >= kTileTokens || tokens.end < kTileTokens) return;
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
    mean[threadIdx.x] = static_cast<float>(total / kTileTokens);
  }
}

// blockIdx.x: of the pages that a sequence fills; blockIdx.y: heads of K, then of V. The block of a
// sequence's first one has the tail's old tokens in its page, and then puts the new ones there.
template <int kDim, bool kBf16, bool kInt4>
__global__ void __launch_bounds__(kQuantizeThreads, 3)
    close_pages(const __grid_constant__ AppendToQuantizedKv args) {
  constexpr int kLanes = kDim / 8;
  constexpr int kRows = kQuantizeThreads / kLanes;
  allow_next_kernel();
  wait_for_previous_kernel();
  const QuantizedKv& cache = args.cache;
  const QuantizedKvStep& step = args.step;
  const bool is_value = blockIdx.y >= cache.num_kv_heads;
  const int kv_head = blockIdx.y - (is_value ? cache.num_kv_heads : 0), b = blockIdx.z;
  StepTokens<kDim, kBf16> tokens(args, b, kv_head, is_value);
  const int page = tokens.start / kTileTokens + blockIdx.x, pages = tokens.end / kTileTokens;
  if (page >= pages) return;
  const int64_t place =
      static_cast<int64_t>(
          step.page_table[static_cast<int64_t>(b) * step.page_table_stride + page]) *
          cache.num_kv_heads +
      kv_head;
  tokens.first_position = page * kTileTokens;
  float* scales = cache.scales + place * (kInt4 ? kInt4Scales : kTileScales);
  if (is_value) {
    quantize_value_tile<kDim, kBf16>(tokens, cache.values + place * (kTileTokens * kDim), scales);
  } else {
    float mean[8] = {};
    if (tokens.inside) load_mean(mean_of(args, b, kv_head), threadIdx.x % kLanes, mean);
    if constexpr (kInt4) {
      quantize_int4_key_tile<kDim, kBf16>(
          tokens, mean, reinterpret_cast<uint8_t*>(cache.keys) + place * (kTileTokens * kDim / 2),
          reinterpret_cast<uint32_t*>(scales) + kInt4Words);
    } else {
      quantize_key_tile<kDim, kBf16>(tokens, kTileTokens, mean,
                                     cache.keys + place * (kTileTokens * kDim), scales);
    }
  }
  if (blockIdx.x > 0) return;
  __syncthreads();
  tokens.first_position = pages * kTileTokens;
  const int rest = tokens.end - tokens.first_position;
  uint16_t* to = static_cast<uint16_t*>(cache.tails) +
                 tail_offset(cache, step.tails[b], is_value, kv_head) + threadIdx.x % kLanes * 8;
  for (int base = 0; base < rest; base += kRows) {
    const int token = base + static_cast<int>(threadIdx.x) / kLanes;
    uint4 raw = tokens(token);
    if (!is_value) tokens.finish(token, raw);
    if (tokens.is_row(token)) *reinterpret_cast<uint4*>(to + token * cache.head_dim) = raw;
  }
}

template <int kDim, bool kBf16>
cudaError_t launch_close(const AppendToQuantizedKv& args, cudaStream_t stream) {
  const auto kv_heads = static_cast<unsigned>(args.cache.num_kv_heads);
  const auto sequences = static_cast<unsigned>(args.step.num_sequences);
  if (args.step.closes_first_page) {
    const cudaError_t error = launch(first_page_means<kDim, kBf16>, dim3(kv_heads, sequences),
                                     kQuantizeThreads, stream, args);
    if (error != cudaSuccess) return error;
  }
  const auto kernel =
      args.cache.int4_keys ? close_pages<kDim, kBf16, true> : close_pages<kDim, kBf16, false>;
  return launch(kernel,
                dim3(static_cast<unsigned>(args.step.max_closed_pages), 2 * kv_heads, sequences),
                kQuantizeThreads, stream, args);
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
    const int64_t tasks = int64_t{cache.num_heads + 2 * cache.num_kv_heads} * (cache.head_dim / 16);
    const dim3 grid(static_cast<unsigned>(args.step.rows),
                    static_cast<unsigned>((tasks + kRowThreads - 1) / kRowThreads));
    const cudaError_t error = launch(append_rows<T>, grid, kRowThreads, stream, args);
    if (error != cudaSuccess || args.step.max_closed_pages == 0) return error;
    return quantized_kv_dim(cache.head_dim) == 64 ? launch_close<64, kBf16>(args, stream)
                                                  : launch_close<128, kBf16>(args, stream);
  });
}

}  // namespace sagelm::kernels
