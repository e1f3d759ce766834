#include "kernels/attention/mma_kernel.cuh"

namespace sagelm::kernels {

cudaError_t mma_attend_fp16(const Problem& problem, cudaStream_t stream) {
  return problem.bf16 ? mma::attend_padded<mma::Products::kBf16>(problem, {}, stream)
                      : mma::attend_padded<mma::Products::kF16>(problem, {}, stream);
}

}  // namespace sagelm::kernels
