// Root mean square normalisation (arXiv:1910.07467).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/ops/element.h"

namespace sagelm::kernels {

// out[r, c] = x[r, c] / sqrt(mean_c(x[r, c]^2) + eps) * weight[c], computed in float32 and rounded
// once. x [rows, cols], weight [cols], out [rows, cols] of type (16 bits); all start on 16-byte
// boundaries.
cudaError_t rmsnorm(const float* x, const float* weight, int64_t rows, int64_t cols, float eps,
                    Element type, void* out, cudaStream_t stream);

}  // namespace sagelm::kernels
