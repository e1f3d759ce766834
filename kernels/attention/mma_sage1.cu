#include "kernels/attention/mma_kernel.cuh"

namespace sagelm::kernels {

cudaError_t mma_attend_sage1(const Problem& problem, const MmaOperands& operands,
                             cudaStream_t stream) {
  return problem.bf16 ? mma::attend_padded<mma::Products::kSage1Bf16>(problem, operands, stream)
                      : mma::attend_padded<mma::Products::kSage1F16>(problem, operands, stream);
}

}  // namespace sagelm::kernels
