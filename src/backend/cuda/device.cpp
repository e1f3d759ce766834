#include "backend/cuda/device.h"

#include "backend/cuda/check.h"
#include "backend/cuda/cublas_lt.h"
#include "backend/cuda/cuda_backend.h"
#include "kernels/ops/probe.h"

namespace sagelm {
namespace {

constexpr int kLeastCapability = 80;

std::string version(int number) { return fmt::format("{}.{}", number / 1000, number % 1000 / 10); }

}  // namespace

namespace cuda {

DeviceProperties device_properties(int device) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "asking for the device's properties");
  return {properties.name, 10 * properties.major + properties.minor,
          static_cast<int64_t>(properties.totalGlobalMem)};
}

std::string driver_problem(int driver, cudaError_t status, int count, int device) {
  if (driver == 0) return "there is no NVIDIA driver";
  if (status == cudaErrorInsufficientDriver) {
    return fmt::format(
        "the NVIDIA driver is for CUDA {}, this build needs one for CUDA {} or later",
        version(driver), version(CUDART_VERSION));
  }
  if (status == cudaErrorNoDevice || (status == cudaSuccess && count == 0)) {
    return "there is no NVIDIA GPU";
  }
  if (status != cudaSuccess) return cudaGetErrorString(status);
  if (device < 0 || device >= count) {
    return fmt::format("there is no GPU {}: this machine has {}, counted from 0", device, count);
  }
  return {};
}

}  // namespace cuda

std::string cuda_problem(int device) {
  int driver = 0, count = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (std::string problem = cuda::driver_problem(driver, status, count, device); !problem.empty()) {
    return problem;
  }
  cudaDeviceProp properties;
  if (const cudaError_t error = cudaGetDeviceProperties(&properties, device);
      error != cudaSuccess) {
    return cudaGetErrorString(error);
  }
  if (10 * properties.major + properties.minor < kLeastCapability) {
    return fmt::format("{} has compute capability {}.{}, 8.0 or later is needed", properties.name,
                       properties.major, properties.minor);
  }
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = kernels::probe_kernels();
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    cudaGetLastError();
    return fmt::format(
        "this build has no kernels for {} (compute capability {}.{}): build with "
        "-DSAGELM_CUDA_ARCHITECTURES={}{}",
        properties.name, properties.major, properties.minor, properties.major, properties.minor);
  }
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return cuda::cublas_lt_problem();
}

}  // namespace sagelm
