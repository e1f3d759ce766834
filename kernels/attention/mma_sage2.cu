#include "kernels/attention/mma_kernel.cuh"

namespace sagelm::kernels {

cudaError_t mma_attend_sage2(const Problem& problem, const MmaOperands& operands,
                             cudaStream_t stream) {
  return mma::attend_padded<mma::Products::kSage2>(problem, operands, stream);
}

}  // namespace sagelm::kernels
