#include "kernels/attention/mma_kernel.cuh"

namespace sagelm::kernels {

cudaError_t mma_attend_sage2_4b(const Problem& problem, const MmaOperands& operands,
                                cudaStream_t stream) {
  return mma::attend_padded<mma::Products::kSage2_4b>(problem, operands, stream);
}

}  // namespace sagelm::kernels
