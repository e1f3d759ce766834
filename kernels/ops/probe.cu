#include "kernels/ops/probe.h"

namespace sagelm::kernels {
namespace {

__global__ void probe_kernel() {}

}  // namespace

cudaError_t probe_kernels() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&probe_kernel));
}

}  // namespace sagelm::kernels
