// An attention variant as the numbers that the CPU kernels read.
#pragma once

#include "backend/attention_variant.h"
#include "backend/cpu/attention_kernels.h"

namespace sagelm::cpu {

Plan make_plan(const AttentionSpec& spec);

}  // namespace sagelm::cpu
