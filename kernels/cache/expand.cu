#include <cstdint>

#include "kernels/attention/sage_tiles.cuh"
#include "kernels/cache/int4_keys.cuh"
#include "kernels/cache/quantized_kv.h"
#include "kernels/common/ptx.cuh"
#include "kernels/ops/elements.cuh"
#include "kernels/ops/launch.cuh"

namespace sagelm::kernels {
namespace {

constexpr int kThreads = 256;

__device__ inline float e4m3_value(uint8_t code) {
  return ptx::from_halves(ptx::halves_from_e4m3(code), false).x;
}

// The INT4 keys of a page, a warp a key: rotated back, the mean added.
template <typename T, int kDim>
__device__ inline void expand_int4_keys(const QuantizedKv& cache, const uint8_t* tile,
                                        const uint32_t* words, const float* mean, T* keys,
                                        int64_t stride) {
  constexpr int kMine = kDim / 32;  // neighbouring channels of a lane
  const int channel = threadIdx.x % 32 * kMine;
  for (int key = threadIdx.x / 32; key < kTileTokens; key += kThreads / 32) {
    const float step = int4_step(words[key]), middle = int4_middle(words[key]);
    float x[kMine];
#pragma unroll
    for (int e = 0; e < kMine; ++e) {
      x[e] = fmaf(static_cast<float>(int4_key<kDim>(tile, key, channel + e)), step, middle);
    }
    rotate_registers(x);
    rotate_lanes<32>(x);
#pragma unroll
    for (int e = 0; e < kMine; ++e) {
      if (channel + e >= cache.head_dim) continue;
      const float value[1] = {fmaf(x[e], recipe::kRotatedQueryFactor<kDim>, mean[channel + e])};
      store(keys + key * stride + channel + e, value);
    }
  }
}

// One block a tile of a KV head: a page, or what the tail holds.
template <typename T, int kDim, bool kInt4>
__global__ void __launch_bounds__(kThreads)
    expand_tile(const __grid_constant__ ExpandQuantizedKv args) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const QuantizedKv& cache = args.cache;
  const int tile = blockIdx.x, kv_head = blockIdx.y, b = blockIdx.z, dim = cache.head_dim;
  const int kv_len = args.step.kv_lens[b];
  const int tokens = min(kTileTokens, kv_len - tile * kTileTokens);
  if (tokens <= 0) return;
  const int64_t first = args.cu_kv_lens[b] + static_cast<int64_t>(tile) * kTileTokens;
  T* keys = static_cast<T*>(args.keys) + (first * cache.num_kv_heads + kv_head) * dim;
  T* values = static_cast<T*>(args.values) + (first * cache.num_kv_heads + kv_head) * dim;
  const int64_t stride = static_cast<int64_t>(cache.num_kv_heads) * dim;
  if (tokens < kTileTokens) {
    const int64_t head_elements = static_cast<int64_t>(kTileTokens) * dim;
    const T* tail =
        static_cast<const T*>(cache.tails) +
        (args.step.tails[b] * 2 * int64_t{cache.num_kv_heads} + kv_head) * head_elements;
    for (int i = threadIdx.x; i < tokens * dim; i += kThreads) {
      const int token = i / dim, channel = i % dim;
      keys[token * stride + channel] = tail[i];
      values[token * stride + channel] = tail[cache.num_kv_heads * head_elements + i];
    }
    return;
  }
  const int64_t page =
      args.step.page_table[static_cast<int64_t>(b) * args.step.page_table_stride + tile];
  const int64_t place = page * cache.num_kv_heads + kv_head;
  const uint8_t* codes = cache.values + place * kTileTokens * kDim;
  const float* scales = cache.scales + place * (kInt4 ? kInt4Scales : kTileScales);
  const float* mean =
      cache.means + (static_cast<int64_t>(args.step.means[b]) * cache.num_kv_heads + kv_head) * dim;
  if constexpr (kInt4) {
    expand_int4_keys<T, kDim>(
        cache, reinterpret_cast<const uint8_t*>(cache.keys) + place * (kTileTokens * kDim / 2),
        reinterpret_cast<const uint32_t*>(scales) + kInt4Words, mean, keys, stride);
  }
  for (int i = threadIdx.x; i < kTileTokens * dim; i += kThreads) {
    const int token = i / dim, channel = i % dim;
    if constexpr (!kInt4) {
      const int row = row_of_key(token);
      const int at = row * kDim + swizzled_chunk<kDim>(row, channel / 16) * 16 + channel % 16;
      const int8_t integer = cache.keys[place * kTileTokens * kDim + at];
      const float key[1] = {fmaf(integer, scales[token / 4 % kKeyGroups], mean[channel])};
      store(keys + token * stride + channel, key);
    }
    const int value_at =
        channel * kTileTokens + swizzled_chunk<kTileTokens>(channel, token / 16) * 16 + token % 16;
    const float value[1] = {e4m3_value(codes[value_at]) * scales[kKeyGroups]};
    store(values + token * stride + channel, value);
  }
}

}  // namespace

cudaError_t expand_quantized_kv(const ExpandQuantizedKv& args, cudaStream_t stream) {
  const QuantizedKvStep& step = args.step;
  if (step.num_sequences == 0 || step.max_kv_len == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>((step.max_kv_len + kTileTokens - 1) / kTileTokens),
                  static_cast<unsigned>(args.cache.num_kv_heads),
                  static_cast<unsigned>(step.num_sequences));
  return with_half_type(args.cache.type, [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto small, auto large) {
      const bool is_small = quantized_kv_dim(args.cache.head_dim) == 64;
      return launch(is_small ? small : large, grid, kThreads, stream, args);
    };
    return args.cache.int4_keys ? run(expand_tile<T, 64, true>, expand_tile<T, 128, true>)
                                : run(expand_tile<T, 64, false>, expand_tile<T, 128, false>);
  });
}

}  // namespace sagelm::kernels
