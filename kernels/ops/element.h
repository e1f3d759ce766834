// Types of matrix elements in the operations' launch functions.
#pragma once

#include <cstdint>

namespace sagelm::kernels {

enum class Element : uint8_t { kF32, kF16, kBF16 };

}  // namespace sagelm::kernels
