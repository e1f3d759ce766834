// Smoothing and quantization of plain FP16 or BF16 tensors for the Hopper kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/attention/problem.cuh"
#include "kernels/attention/sage_tiles.cuh"

namespace sagelm::kernels {

// Lays the tiles of a call out in its workspace (null: only to learn the size, in *bytes).
// dim: head_dim padded to what the kernel takes.
SageTiles place_sage_tiles(const Problem& problem, int dim, void* workspace, size_t* bytes);

// Two launches: the mean key of every (sequence, KV head) over up to kMeanTokens tokens spread
// evenly (any constant vector leaves softmax unchanged, so a sample serves), then one pass that
// reads every element of Q, K and V once. A NaN or an infinity makes its group's scale NaN or
// infinite and so reaches the output.
cudaError_t quantize_to_sage_tiles(const Problem& problem, int dim, const SageTiles& tiles,
                                   cudaStream_t stream);

}  // namespace sagelm::kernels
