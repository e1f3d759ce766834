// What the tests of kernels/cache share.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <string>

#include "gpu/gpu_attention.h"
#include "kernels/ops/probe.h"

namespace sagelm::testing {

class QuantizedKvGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    if (const std::string reason = no_device_reason(); !reason.empty()) GTEST_SKIP() << reason;
    cudaDeviceProp properties;
    ASSERT_EQ(cudaGetDeviceProperties(&properties, 0), cudaSuccess);
    if (properties.major != 9) GTEST_SKIP() << "the quantized cache is Hopper's";
    ASSERT_EQ(kernels::probe_kernels(), cudaSuccess) << "built for another device";
  }
};

}  // namespace sagelm::testing
