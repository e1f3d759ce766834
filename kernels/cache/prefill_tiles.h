// Operands of attention over a quantized cache by the prefill kernel.
#pragma once

#include <cstddef>

#include "kernels/attention/sage_tiles.cuh"
#include "kernels/cache/quantized_kv.h"

namespace sagelm::kernels {

// The cache's pages, and in `workspace` (null: only to learn the size, in *bytes) the step's
// queries and a tile of every tail; with INT4 keys then room for those of so many sequences at a
// time as INT8.
SageTiles quantized_kv_tiles(const QuantizedKv& cache, const QuantizedKvStep& step,
                             int32_t sequences_at_once, void* workspace, size_t* bytes);

// The full pages' INT4 keys of the step's sequences to tiles.keys, with the tiles' scales.
cudaError_t unpack_int4_pages(const QuantizedKv& cache, const QuantizedKvStep& step,
                              const SageTiles& tiles, cudaStream_t stream);

}  // namespace sagelm::kernels
