// Rotary position embedding (arXiv:2104.09864) of queries and keys, and the append of keys and
// values to a paged cache.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/ops/element.h"

namespace sagelm::kernels {

struct RopeAppend {
  Element type = Element::kF16;  // 16 bits; of qkv, keys and values
  void* qkv = nullptr;           // [rows, (num_heads + 2 * num_kv_heads) * head_dim]
  int64_t row_stride = 0;        // elements; 0: that many
  int64_t rows = 0;
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;                // even
  const int32_t* positions = nullptr;  // [rows]
  const int32_t* slots = nullptr;      // [rows]: the row's token of the cache, counted over pages
  const float* rotations = nullptr;    // [positions][2][head_dim / 2], as fill_rotations makes them
  void* keys = nullptr;                // of one layer: [slots, num_kv_heads, head_dim]
  void* values = nullptr;
  bool rotate_keys = true;  // in place too; else their columns stay as they are
};

// Rotates the query columns in place, pairs (x[i], x[i + head_dim / 2]) in float32, and stores
// rotated keys and values at each row's slot. All starts on 16-byte boundaries. With no KV heads it
// only rotates.
cudaError_t rope_append(const RopeAppend& args, cudaStream_t stream);

// Cosine, then sine of the float32 product position * inverse_frequencies[i] (rounded before the
// functions, which are computed in float64, as transformers does) for positions 0 .. count - 1.
cudaError_t fill_rotations(const float* inverse_frequencies, int32_t half, int64_t count,
                           float* rotations, cudaStream_t stream);

}  // namespace sagelm::kernels
