// The attention kernels that tests compare with float64, and how exact each has to be.
#pragma once

#include <array>
#include <cstddef>

#include "gpu/gpu_attention.h"

namespace sagelm::testing {

struct GpuKernel {
  const char* name;
  sagelm_attention_variant variant;
  sagelm_attention_kernel kernel;
  // Bounds of the error against float64 of many values: the level of the published kernels on
  // normal inputs (docs/benchmarks.md), times what a few rows of short sequences spread around it.
  std::array<double, kGpuInputs> relative_l1;  // by GpuInputs
};

constexpr std::array<double, kGpuInputs> kFp16L1 = {1e-3, 1e-3, 2e-3, 1e-3, 1e-3, 1e-3};
constexpr std::array<double, kGpuInputs> kSage1L1 = {.02, .03, .08, .004, .02, .025};
constexpr std::array<double, kGpuInputs> kSage2L1 = {.045, .05, .08, .012, .045, .14};
constexpr std::array<double, kGpuInputs> kSage2Of4BitsL1 = {.3, .25, .6, .06, .3, .35};

// The first is what the others may be compared with.
constexpr GpuKernel kGpuKernels[] = {
    {"fp16_mma", SAGELM_ATTENTION_FP16, SAGELM_ATTENTION_KERNEL_MMA, kFp16L1},
    {"fp16_wgmma", SAGELM_ATTENTION_FP16, SAGELM_ATTENTION_KERNEL_WGMMA, kFp16L1},
    {"sage1_mma", SAGELM_ATTENTION_SAGE1, SAGELM_ATTENTION_KERNEL_MMA, kSage1L1},
    {"sage2_mma", SAGELM_ATTENTION_SAGE2, SAGELM_ATTENTION_KERNEL_MMA, kSage2L1},
    {"sage2_wgmma", SAGELM_ATTENTION_SAGE2, SAGELM_ATTENTION_KERNEL_WGMMA, kSage2L1},
    {"sage2_4b_mma", SAGELM_ATTENTION_SAGE2_4B, SAGELM_ATTENTION_KERNEL_MMA, kSage2Of4BitsL1},
};

// False if the library has no such kernel for the shape on this device.
inline bool run(const GpuKernel& kernel, GpuAttention& call) {
  call.args.variant = kernel.variant;
  call.args.kernel = kernel.kernel;
  size_t bytes = 0;
  if (sagelm_attention_workspace_bytes(&call.args, &bytes) == SAGELM_ATTENTION_UNSUPPORTED) {
    return false;
  }
  call.run();
  return true;
}

}  // namespace sagelm::testing
