// SageAttention2 (arXiv:2411.10958) on Hopper's warp-group products: INT8 QK^T with one scale per
// query row and four per 128 keys, FP8 e4m3 PV summed in FP16 on two levels: by the matrix unit
// over 128 keys, and in registers.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/attention/problem.cuh"
#include "kernels/attention/sage_tiles.cuh"

namespace sagelm::kernels {

// Null if the problem can be computed, else one sentence why not. head_dim up to 128.
const char* sage2_sm90_refusal(const Problem& problem);
size_t sage2_sm90_workspace_bytes(const Problem& problem);
// Quantizes Q, K and V into the workspace, then attends.
cudaError_t sage2_sm90(const Problem& problem, void* workspace, cudaStream_t stream);

// The two halves, for benchmarks: the tiles of a workspace, and attention over tiles made before.
SageTiles sage2_sm90_tiles(const Problem& problem, void* workspace);
cudaError_t sage2_sm90_attend(const Problem& problem, const SageTiles& tiles, cudaStream_t stream);

}  // namespace sagelm::kernels
