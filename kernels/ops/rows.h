// Copies of rows: embedding look-up and gathering.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/ops/element.h"

namespace sagelm::kernels {

// out[i, :] = table[ids[i], :] in float32; table [*, cols] of type, ids [count], out [count, cols].
// Every id is inside the table, or with `drawn` a name (named_token.cuh); table and out start on
// 16-byte boundaries.
cudaError_t copy_rows(const void* table, Element type, const int32_t* ids, int64_t count,
                      int64_t cols, float* out, cudaStream_t stream,
                      const int32_t* drawn = nullptr);

}  // namespace sagelm::kernels
