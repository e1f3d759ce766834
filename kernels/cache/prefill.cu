#include <algorithm>
#include <cstdint>

#include "kernels/attention/sage2_sm90.h"
#include "kernels/attention/sage2_work_sm90.cuh"
#include "kernels/cache/prefill_tiles.h"
#include "kernels/common/launch.h"
#include "kernels/ops/elements.cuh"
#include "kernels/ops/launch.cuh"

namespace sagelm::kernels {

SageTiles quantized_kv_tiles(const QuantizedKv& cache, const QuantizedKvStep& step,
                             int32_t sequences_at_once, void* workspace, size_t* bytes) {
  SageTiles tiles{};
  const int dim = quantized_kv_dim(cache.head_dim);
  tiles.query_tiles = (step.max_q_len + kTileTokens - 1) / kTileTokens;
  tiles.kv_tiles = (step.max_kv_len + kTileTokens - 1) / kTileTokens;
  tiles.head_query_tiles = step.rows / kTileTokens + step.num_sequences;
  tiles.keys = cache.keys;
  tiles.values = cache.values;
  tiles.scales = cache.scales;
  tiles.page_table = step.page_table;
  tiles.page_table_stride = step.page_table_stride;
  const auto tile_bytes = static_cast<size_t>(kTileTokens) * dim;
  const auto query_tiles = static_cast<size_t>(cache.num_heads) * tiles.head_query_tiles;
  const auto tails = static_cast<size_t>(step.num_sequences) * cache.num_kv_heads;
  WorkspaceLayout layout(workspace);
  layout.place(tiles.queries, query_tiles * tile_bytes);
  layout.place(tiles.query_scales, query_tiles * kTileTokens);
  layout.place(tiles.tail_keys, tails * tile_bytes);
  layout.place(tiles.tail_values, tails * tile_bytes);
  layout.place(tiles.tail_scales, tails * kTileScales);
  if (cache.int4_keys) {
    const auto pages = static_cast<size_t>(sequences_at_once) * cache.num_kv_heads * tiles.kv_tiles;
    layout.place(tiles.keys, pages * tile_bytes);
    layout.place(tiles.scales, pages * kTileScales);
    tiles.unpacked_keys = true;
  }
  *bytes = layout.bytes();
  return tiles;
}

namespace {

// Sequences first .. first + count of the step alone: their rows keep their numbers.
QuantizedKvStep sequences_of(QuantizedKvStep step, int32_t first, int32_t count) {
  step.num_sequences = count;
  step.cu_q_lens += first;
  step.kv_lens += first;
  step.page_table += int64_t{first} * step.page_table_stride;
  return step;
}
SageTiles tiles_of(SageTiles tiles, const QuantizedKv& cache, int32_t first) {
  const int64_t tile_bytes = int64_t{kTileTokens} * quantized_kv_dim(cache.head_dim);
  const int64_t tails = int64_t{first} * cache.num_kv_heads;
  tiles.queries += first * tile_bytes;
  tiles.query_scales += first * kTileTokens;
  tiles.tail_keys += tails * tile_bytes;
  tiles.tail_values += tails * tile_bytes;
  tiles.tail_scales += tails * kTileScales;
  tiles.page_table += int64_t{first} * tiles.page_table_stride;
  return tiles;
}

int query_tile(const Problem& p) {
  return quantized_kv_dim(p.head_dim) == 64 ? sage2::Groups<64>::kQueryTile
                                            : sage2::Groups<128>::kQueryTile;
}

Problem problem_of(const QuantizedKv& cache, const QuantizedKvStep& step) {
  Problem p{};
  p.num_heads = cache.num_heads;
  p.num_kv_heads = cache.num_kv_heads;
  p.head_dim = cache.head_dim;
  p.max_q_len = step.max_q_len;
  p.max_kv_len = step.max_kv_len;
  p.causal = true;
  p.bf16 = cache.type == Element::kBF16;
  // Sequences of less than max_q_len rows may be cut into more parts.
  const bool alike = int64_t{step.max_q_len} * step.num_sequences == step.rows;
  const int tile = query_tile(p);
  p.key_parts = hopper::key_parts(p.num_heads, alike ? (p.max_q_len + tile - 1) / tile : 1,
                                  (p.max_kv_len + kTileTokens - 1) / kTileTokens);
  p.part_rows = p.key_parts > 1 ? hopper::most_part_rows(p.num_heads, tile) : 0;
  return p;
}
// Behind what the tiles take of the workspace: the parts of so many sequences.
size_t place_parts(Problem& p, int32_t sequences_at_once, void* workspace, size_t used) {
  WorkspaceLayout layout(workspace != nullptr ? static_cast<char*>(workspace) + used : nullptr);
  const size_t rows = static_cast<size_t>(sequences_at_once) * p.part_rows * p.num_heads;
  uint16_t* out = nullptr;
  layout.place(out, rows * p.head_dim);
  layout.place(p.part_lse, rows);
  p.part_out = out;
  return used + layout.bytes();
}

// Adds up the parts of a query row of all heads, weighted by their sums of weights.
template <typename T>
__global__ void __launch_bounds__(256)
    merge_parts(const __grid_constant__ Problem p, int query_tile) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int row = blockIdx.x, b = blockIdx.y, q_len = p.q_len(b);
  if (row >= q_len) return;
  const int parts = hopper::key_parts(p.num_heads, (q_len + query_tile - 1) / query_tile,
                                      (p.kv_len(b) + kTileTokens - 1) / kTileTokens);
  if (parts == 1) return;
  const int chunks = p.head_dim / 8;
  const int64_t first = static_cast<int64_t>(b) * p.part_rows + row;
  for (int i = threadIdx.x; i < p.num_heads * chunks; i += blockDim.x) {
    const int head = i / chunks, channel = i % chunks * 8;
    const auto place = [&](int part) {
      return (first + static_cast<int64_t>(part) * q_len) * p.num_heads + head;
    };
    float most = -INFINITY;
    for (int part = 0; part < parts; ++part) most = fmaxf(most, p.part_lse[place(part)]);
    float sum = 0.0f, x[8] = {};
    for (int part = 0; part < parts; ++part) {
      const float lse = p.part_lse[place(part)];
      if (lse == -INFINITY) continue;  // it has none of the row's keys
      const float weight = __expf(lse - most);
      float y[8];
      load(static_cast<const T*>(p.part_out) + place(part) * p.head_dim + channel, y);
      sum += weight;
#pragma unroll
      for (int e = 0; e < 8; ++e) x[e] = fmaf(weight, y[e], x[e]);
    }
    const float inverse = 1.0f / sum;
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] *= inverse;
    store(static_cast<T*>(p.out.data) + p.q_offset(p.out, b, row, head) + channel, x);
  }
}

}  // namespace

size_t quantized_kv_prefill_workspace_bytes(const QuantizedKv& cache, const QuantizedKvStep& step,
                                            int32_t sequences_at_once) {
  size_t bytes = 0;
  quantized_kv_tiles(cache, step, sequences_at_once, nullptr, &bytes);
  Problem p = problem_of(cache, step);
  return place_parts(p, sequences_at_once, nullptr, bytes);
}

cudaError_t prefill_from_quantized_kv(const PrefillFromQuantizedKv& args, void* workspace,
                                      size_t workspace_bytes, cudaStream_t stream) {
  const QuantizedKv& cache = args.cache;
  const QuantizedKvStep& step = args.step;
  if (step.num_sequences == 0 || step.max_q_len == 0) return cudaSuccess;
  Problem p = problem_of(cache, step);
  p.out = {args.out, 0, args.out_stride, cache.head_dim};
  int32_t at_once = step.num_sequences;
  const auto bytes = [&] { return quantized_kv_prefill_workspace_bytes(cache, step, at_once); };
  while (at_once > 1 && bytes() > workspace_bytes) at_once = (at_once + 1) / 2;
  size_t used = 0;
  const SageTiles tiles = quantized_kv_tiles(cache, step, at_once, workspace, &used);
  if (place_parts(p, at_once, workspace, used) > workspace_bytes ||
      quantized_kv_refusal(cache.num_heads, cache.num_kv_heads, cache.head_dim) != nullptr) {
    return cudaErrorInvalidValue;
  }
  for (int32_t first = 0; first < step.num_sequences; first += at_once) {
    const QuantizedKvStep part =
        sequences_of(step, first, std::min(at_once, step.num_sequences - first));
    p.cu_q_lens = part.cu_q_lens;
    p.kv_lens = part.kv_lens;
    p.batch = part.num_sequences;
    if (sage2_sm90_refusal(p) != nullptr) return cudaErrorInvalidValue;
    const SageTiles part_tiles = tiles_of(tiles, cache, first);
    cudaError_t error = cudaSuccess;
    if (cache.int4_keys) error = unpack_int4_pages(cache, part, part_tiles, stream);
    if (error == cudaSuccess) error = sage2_sm90_attend(p, part_tiles, stream);
    if (error == cudaSuccess && p.key_parts > 1) {
      const auto rows = static_cast<unsigned>(std::min(p.max_q_len, p.part_rows / 2));
      const auto kernel = p.bf16 ? merge_parts<__nv_bfloat16> : merge_parts<__half>;
      error =
          launch(kernel, dim3(rows, static_cast<unsigned>(p.batch)), 256, stream, p, query_tile(p));
    }
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace sagelm::kernels
