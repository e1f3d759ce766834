// FP16 and BF16 attention on Hopper's warp-group products, after FlashAttention-3
// (arXiv:2407.08608): P and V in the inputs' type, FP32 softmax and accumulation.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/attention/problem.cuh"

namespace sagelm::kernels {

// Null if the problem can be computed, else one sentence why not. head_dim up to 128.
const char* fp16_sm90_refusal(const Problem& problem);
// Needs no workspace.
cudaError_t fp16_sm90(const Problem& problem, cudaStream_t stream);

}  // namespace sagelm::kernels
