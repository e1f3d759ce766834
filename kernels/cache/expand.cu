#include <cstdint>

#include "kernels/attention/sage_tiles.cuh"
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

// One block a tile of a KV head: a page, or what the tail holds.
template <typename T, int kDim>
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
  const int8_t* integers = cache.keys + place * kTileTokens * kDim;
  const uint8_t* codes = cache.values + place * kTileTokens * kDim;
  const float* scales = cache.scales + place * kTileScales;
  const float* mean =
      cache.means + (static_cast<int64_t>(args.step.means[b]) * cache.num_kv_heads + kv_head) * dim;
  for (int i = threadIdx.x; i < kTileTokens * dim; i += kThreads) {
    const int token = i / dim, channel = i % dim, row = row_of_key(token);
    const int key_at = row * kDim + swizzled_chunk<kDim>(row, channel / 16) * 16 + channel % 16;
    const int value_at =
        channel * kTileTokens + swizzled_chunk<kTileTokens>(channel, token / 16) * 16 + token % 16;
    const float key[1] = {fmaf(integers[key_at], scales[token / 4 % kKeyGroups], mean[channel])};
    const float value[1] = {e4m3_value(codes[value_at]) * scales[kKeyGroups]};
    store(keys + token * stride + channel, key);
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
    const auto kernel =
        quantized_kv_dim(args.cache.head_dim) == 64 ? expand_tile<T, 64> : expand_tile<T, 128>;
    return launch(kernel, grid, kThreads, stream, args);
  });
}

}  // namespace sagelm::kernels
