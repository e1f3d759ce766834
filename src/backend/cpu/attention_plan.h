// An attention variant as the numbers that the CPU kernels read.
#pragma once

#include "backend/attention_variant.h"
#include "backend/cpu/attention_kernels.h"
#include "backend/kv_layout.h"

namespace sagelm::cpu {

// Throws Error where the variant cannot read the cache.
Plan make_plan(const AttentionSpec& spec, KvType cache);

}  // namespace sagelm::cpu
