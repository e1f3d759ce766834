// Operands of attention over a quantized cache by the prefill kernel.
#pragma once

#include <cstddef>

#include "kernels/attention/sage_tiles.cuh"
#include "kernels/cache/quantized_kv.h"

namespace sagelm::kernels {

// The cache's pages, and in `workspace` (null: only to learn the size, in *bytes) the step's
// queries and a tile of every tail.
SageTiles quantized_kv_tiles(const QuantizedKv& cache, const QuantizedKvStep& step, void* workspace,
                             size_t* bytes);

}  // namespace sagelm::kernels
