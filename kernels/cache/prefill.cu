#include <cstdint>

#include "kernels/attention/sage2_sm90.h"
#include "kernels/cache/prefill_tiles.h"
#include "kernels/common/launch.h"

namespace sagelm::kernels {

SageTiles quantized_kv_tiles(const QuantizedKv& cache, const QuantizedKvStep& step, void* workspace,
                             size_t* bytes) {
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
  *bytes = layout.bytes();
  return tiles;
}

size_t quantized_kv_prefill_workspace_bytes(const QuantizedKv& cache, const QuantizedKvStep& step) {
  size_t bytes = 0;
  quantized_kv_tiles(cache, step, nullptr, &bytes);
  return bytes;
}

cudaError_t prefill_from_quantized_kv(const PrefillFromQuantizedKv& args, void* workspace,
                                      cudaStream_t stream) {
  const QuantizedKv& cache = args.cache;
  const QuantizedKvStep& step = args.step;
  if (step.num_sequences == 0 || step.max_q_len == 0) return cudaSuccess;
  Problem p{};
  p.out = {args.out, 0, args.out_stride, cache.head_dim};
  p.cu_q_lens = step.cu_q_lens;
  p.kv_lens = step.kv_lens;
  p.batch = step.num_sequences;
  p.num_heads = cache.num_heads;
  p.num_kv_heads = cache.num_kv_heads;
  p.head_dim = cache.head_dim;
  p.max_q_len = step.max_q_len;
  p.max_kv_len = step.max_kv_len;
  p.causal = true;
  p.bf16 = cache.type == Element::kBF16;
  if (cache.int4_keys ||
      quantized_kv_refusal(cache.num_heads, cache.num_kv_heads, cache.head_dim) != nullptr ||
      sage2_sm90_refusal(p) != nullptr) {
    return cudaErrorInvalidValue;
  }
  size_t bytes = 0;
  return sage2_sm90_attend(p, quantized_kv_tiles(cache, step, workspace, &bytes), stream);
}

}  // namespace sagelm::kernels
