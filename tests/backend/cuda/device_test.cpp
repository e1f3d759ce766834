// What is said of drivers and devices that cannot be used; needs neither.
#include "backend/cuda/device.h"

#include <gtest/gtest.h>

namespace sagelm::cuda {
namespace {

TEST(CudaDevice, ADriverThatIsTooOldIsNamed) {
  const std::string problem = driver_problem(12040, cudaErrorInsufficientDriver, 0, 0);
  EXPECT_EQ(problem.find("the NVIDIA driver is for CUDA 12.4, this build needs one for CUDA "), 0u)
      << problem;
}

TEST(CudaDevice, WhatIsMissingIsNamed) {
  EXPECT_EQ(driver_problem(0, cudaErrorInsufficientDriver, 0, 0), "there is no NVIDIA driver");
  EXPECT_EQ(driver_problem(13000, cudaErrorNoDevice, 0, 0), "there is no NVIDIA GPU");
  EXPECT_EQ(driver_problem(13000, cudaSuccess, 0, 0), "there is no NVIDIA GPU");
  EXPECT_EQ(driver_problem(13000, cudaSuccess, 2, 2),
            "there is no GPU 2: this machine has 2, counted from 0");
  EXPECT_FALSE(driver_problem(13000, cudaErrorInitializationError, 0, 0).empty());
  EXPECT_EQ(driver_problem(13000, cudaSuccess, 2, 1), "");
}

}  // namespace
}  // namespace sagelm::cuda
