// What can be said of a device before it is used.
#pragma once

#include <cstdint>
#include <string>

namespace sagelm::cuda {

struct DeviceProperties {
  std::string name;
  int capability = 0;  // 90 for 9.0
  int64_t memory_bytes = 0;
};

DeviceProperties device_properties(int device);

}  // namespace sagelm::cuda
