// What this GPU does at best (backend.h), and how its work is timed.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>

#include "backend/backend.h"

namespace sagelm::cuda {

// One copy of 1 GiB, and cuBLASLt's best algorithm for products of 8192 x 8192 x 8192: FP16 with
// float32 sums, INT8, and FP8 e4m3 with its fast sums.
Ceilings measure_ceilings(cudaStream_t stream);

// Median of `runs` measurements of one launch() on the stream, which enqueues work and returns, by
// the GPU's clock.
double median_seconds(cudaStream_t stream, const std::function<void()>& launch, int runs);

}  // namespace sagelm::cuda
