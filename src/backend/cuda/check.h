// Turns failed CUDA calls into errors that name what was being done.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <string_view>

#include "base/error.h"

namespace sagelm::cuda {

inline void check(cudaError_t status, std::string_view doing) {
  if (status != cudaSuccess) fail("CUDA failed at {}: {}", doing, cudaGetErrorString(status));
}

inline void check(cublasStatus_t status, std::string_view doing) {
  if (status != CUBLAS_STATUS_SUCCESS) {
    fail("cuBLAS failed at {}: {}", doing, cublasLtGetStatusString(status));
  }
}

}  // namespace sagelm::cuda
