// What can be said of a device before it is used.
#pragma once

#include <driver_types.h>

#include <cstdint>
#include <string>

namespace sagelm::cuda {

struct DeviceProperties {
  std::string name;
  int capability = 0;  // 90 for 9.0
  int64_t memory_bytes = 0;
};

DeviceProperties device_properties(int device);

// One sentence that says why no device, or not this one, can be used with the driver; empty if it
// seems fine. driver: its version as cudaDriverGetVersion gives it, 0 if there is none; status and
// count: what cudaGetDeviceCount says.
std::string driver_problem(int driver, cudaError_t status, int count, int device);

}  // namespace sagelm::cuda
