// cuBLASLt, found when a GPU is first used. A program linked with it would not start where the CUDA
// libraries are missing, though the CPU computes there all the same, and would map its hundreds of
// megabytes at every start.
#pragma once

#include <string>

namespace sagelm::cuda {

// Why cuBLASLt cannot be used, or nothing if it can.
std::string cublas_lt_problem();

}  // namespace sagelm::cuda
