// Decode with an FP16 or BF16 cache, split over the keys.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "kernels/attention/problem.cuh"

namespace sagelm::kernels {

// Whether it takes the call, and the bytes of its partial results.
bool mma_decode_takes(const Problem& problem);
size_t mma_decode_workspace_bytes(const Problem& problem);
// Whether it also takes it with Problem::rotations and arrivals (decode_parts.cuh).
bool mma_decode_appends(const Problem& problem);
cudaError_t mma_decode(const Problem& problem, void* workspace, cudaStream_t stream);

}  // namespace sagelm::kernels
