// Tokens that a kernel is told of before they are drawn.
#pragma once

#include <cstdint>

namespace sagelm::kernels {

// Numbers below 0 are names: of the token at that place of drawn, behind the sign bit.
__device__ inline int32_t known_token(int32_t id, const int32_t* drawn) {
  return id < 0 ? drawn[id & 0x7FFFFFFF] : id;
}

}  // namespace sagelm::kernels
