// What is read off logits, and checks of results.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/ops/element.h"

namespace sagelm::kernels {

struct RowScore {
  float logprob;   // log-softmax at the target; NaN if the row holds NaN or infinity
  int32_t argmax;  // the largest logit (the lowest id among equals)
};

// out[r] of logits [rows, cols] and targets [rows], each inside 0 .. cols - 1. Exponentials in
// float32, their sum and its logarithm in float64. logits start on a 16-byte boundary.
cudaError_t score_rows(const float* logits, const int32_t* targets, int64_t rows, int64_t cols,
                       RowScore* out, cudaStream_t stream);

// *flag = 1 if any of count elements is NaN or infinite, else 0.
cudaError_t find_non_finite(const void* x, Element type, int64_t count, int32_t* flag,
                            cudaStream_t stream);

// *hash = a number that depends on each of count 32-bit words and on its place: two arrays with the
// same hash are taken to be the same.
cudaError_t hash_words(const uint32_t* words, int64_t count, uint64_t* hash, cudaStream_t stream);

}  // namespace sagelm::kernels
