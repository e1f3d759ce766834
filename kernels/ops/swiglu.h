// The gated activation of Llama's feed-forward layers (arXiv:2002.05202).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/ops/element.h"

namespace sagelm::kernels {

// out[r, c] = silu(gate_up[r, c]) * gate_up[r, cols + c] in float32, rounded once. gate_up
// [rows, 2 * cols], out [rows, cols], both of type (16 bits), starting on 16-byte boundaries.
cudaError_t swiglu(const void* gate_up, Element type, int64_t rows, int64_t cols, void* out,
                   cudaStream_t stream);

}  // namespace sagelm::kernels
