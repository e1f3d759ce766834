// Turns failed CUDA calls into errors that name what was being done.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <string_view>

#include "base/error.h"

namespace sagelm::cuda {

inline void check(cudaError_t status, std::string_view doing) {
  if (status != cudaSuccess) fail("CUDA failed at {}: {}", doing, cudaGetErrorString(status));
}

// Of a call that waits for work, which is where errors inside kernels show.
inline void check_work(cudaError_t status, std::string_view doing) {
  if (status == cudaSuccess) return;
  fail(
      "CUDA failed before {} was done: {}, in one of the step's kernels (with "
      "CUDA_LAUNCH_BLOCKING=1 in the environment the message names it)",
      doing, cudaGetErrorString(status));
}

inline void check(cublasStatus_t status, std::string_view doing) {
  if (status != CUBLAS_STATUS_SUCCESS) {
    fail("cuBLAS failed at {}: {}", doing, cublasLtGetStatusString(status));
  }
}

// For operations of a model; layer: -1 if it is of none.
template <typename Status>
void check(Status status, std::string_view doing, int64_t layer) {
  if (status == Status{}) return;
  check(status, layer < 0 ? std::string(doing) : fmt::format("{} of layer {}", doing, layer));
}

}  // namespace sagelm::cuda
