// Whether the kernels of this build run on the current device.
#pragma once

#include <cuda_runtime_api.h>

namespace sagelm::kernels {

// cudaErrorNoKernelImageForDevice if they were built for others.
cudaError_t probe_kernels();

}  // namespace sagelm::kernels
