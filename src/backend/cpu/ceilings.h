// What this machine does at best (backend.h).
#pragma once

#include "backend/backend.h"
#include "backend/cpu/linear.h"

namespace sagelm::cpu {

// The product has BF16 weights where the CPU multiplies BF16, else F32; the two products of a split
// activation count once.
Ceilings measure_ceilings(LinearEngine& linear);

}  // namespace sagelm::cpu
