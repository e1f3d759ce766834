// What the tests of kernels/ops share.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "gpu/gpu_ops.h"
#include "kernels/ops/probe.h"

namespace sagelm::testing {

inline constexpr double kSmallestHalf = 0x1p-24;

class OpsGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    if (const std::string reason = no_device_reason(); !reason.empty()) GTEST_SKIP() << reason;
    ASSERT_EQ(kernels::probe_kernels(), cudaSuccess) << "built for another device";
  }
};

class HalfOpsGpu : public OpsGpu, public ::testing::WithParamInterface<kernels::Element> {};
class AllOpsGpu : public OpsGpu, public ::testing::WithParamInterface<kernels::Element> {};

inline std::string element_name(const ::testing::TestParamInfo<kernels::Element>& info) {
  return info.param == kernels::Element::kF32   ? "f32"
         : info.param == kernels::Element::kF16 ? "f16"
                                                : "bf16";
}

inline double silu(double x) { return x / (1.0 + std::exp(-x)); }

// Fails for NaN too.
inline void expect_near(double actual, double expected, double bound, const std::string& where) {
  EXPECT_TRUE(std::abs(actual - expected) <= bound)
      << where << ": " << actual << ", not " << expected << " +- " << bound;
}

}  // namespace sagelm::testing
