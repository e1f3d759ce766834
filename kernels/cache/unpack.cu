#include <cstdint>

#include "kernels/attention/quantize_tile.cuh"
#include "kernels/cache/int4_keys.cuh"
#include "kernels/cache/prefill_tiles.h"
#include "kernels/ops/launch.cuh"

namespace sagelm::kernels {
namespace {

// What 4 nibbles of a page's key, shifted to the low end of their bytes, mean.
__device__ __forceinline__ void key_values(uint32_t nibbles, float step, float middle, float* x) {
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    // Exact: 2^23 plus the integer plus 8 is in the low bits.
    const uint32_t bits = (nibbles >> (8 * e) & 0xFu) ^ 0x4B000008u;
    x[e] = fmaf(__uint_as_float(bits) - 8388616.0f, step, middle);
  }
}

// One block a page of a KV head of a sequence. The 32 keys of a group get one scale; the largest
// magnitude of a key is at an end of its range.
template <int kDim>
__global__ void __launch_bounds__(kQuantizeThreads)
    unpack_page(const __grid_constant__ QuantizedKv cache,
                const __grid_constant__ QuantizedKvStep step,
                const __grid_constant__ SageTiles tiles) {
  constexpr int kLanes = kDim / 16;  // two words, which are 16 channels, each
  constexpr int kRows = kQuantizeThreads / kLanes;
  constexpr int kSteps = kTileTokens / kRows;
  allow_next_kernel();
  wait_for_previous_kernel();
  const int tile = blockIdx.x, kv_head = blockIdx.y, b = blockIdx.z;
  if ((tile + 1) * kTileTokens > step.kv_lens[b]) return;
  const int64_t page = step.page_table[static_cast<int64_t>(b) * step.page_table_stride + tile];
  const int64_t from = page * cache.num_kv_heads + kv_head;
  const int64_t to =
      (static_cast<int64_t>(b) * cache.num_kv_heads + kv_head) * tiles.kv_tiles + tile;
  const auto* keys = reinterpret_cast<const uint8_t*>(cache.keys) + from * (kTileTokens * kDim / 2);
  const float* scales = cache.scales + from * kInt4Scales;
  const int lane = threadIdx.x % kLanes, first = threadIdx.x / kLanes;
  uint2 words[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int row = row_of_key(i * kRows + first);
    words[i] = *reinterpret_cast<const uint2*>(keys + int4_chunk_offset<kDim>(row, lane / 2) +
                                               lane % 2 * 8);
  }
  __shared__ uint32_t meanings[kTileTokens];
  __shared__ uint32_t group_largest[kKeyGroups];
  if (threadIdx.x < kKeyGroups) {
    group_largest[threadIdx.x] = __float_as_uint(recipe::kAmaxFloor);
  }
  __syncthreads();
  if (threadIdx.x < kTileTokens) {
    const uint32_t word = reinterpret_cast<const uint32_t*>(scales)[kInt4Words + threadIdx.x];
    meanings[threadIdx.x] = word;
    const float size = int4_step(word), middle = int4_middle(word);
    const float low = fmaf(-8.0f, size, middle), top = fmaf(7.0f, size, middle);
    atomicMax(&group_largest[threadIdx.x / 4 % kKeyGroups], max(magnitude(low), magnitude(top)));
  }
  __syncthreads();
  float* to_scales = tiles.scales + to * kTileScales;
  if (threadIdx.x < kTileScales) {
    to_scales[threadIdx.x] =
        threadIdx.x < kKeyGroups
            ? __uint_as_float(group_largest[threadIdx.x]) * (1.0f / recipe::kInt8Max)
            : scales[threadIdx.x];
  }
  int8_t* to_keys = tiles.keys + to * kTileTokens * kDim;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int key = i * kRows + first, row = row_of_key(key);
    const float inverse = recipe::kInt8Max / __uint_as_float(group_largest[key / 4 % kKeyGroups]);
    const float size = int4_step(meanings[key]), middle = int4_middle(meanings[key]);
    uint2 bytes[2];
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const uint32_t word = w == 0 ? words[i].x : words[i].y;
      float x[8];
      key_values(word, size, middle, x);
      key_values(word >> 4, size, middle, x + 4);
      bytes[w] = to_int8(x, inverse);
    }
    *reinterpret_cast<uint4*>(to_keys + row * kDim + swizzled_chunk<kDim>(row, lane) * 16) =
        make_uint4(bytes[0].x, bytes[0].y, bytes[1].x, bytes[1].y);
  }
}

}  // namespace

cudaError_t unpack_int4_pages(const QuantizedKv& cache, const QuantizedKvStep& step,
                              const SageTiles& tiles, cudaStream_t stream) {
  const int pages = step.max_kv_len / kTileTokens;
  if (pages == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(pages), static_cast<unsigned>(cache.num_kv_heads),
                  static_cast<unsigned>(step.num_sequences));
  const auto kernel = quantized_kv_dim(cache.head_dim) == 64 ? unpack_page<64> : unpack_page<128>;
  return launch(kernel, grid, kQuantizeThreads, stream, cache, step, tiles);
}

}  // namespace sagelm::kernels
