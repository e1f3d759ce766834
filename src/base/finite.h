// Looks for NaN and infinity in stored numbers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/dtype.h"

namespace sagelm {

// The first of count elements that is NaN or infinite; -1 if none is. data need not be aligned.
int64_t first_non_finite(const std::byte* data, DType type, int64_t count);

}  // namespace sagelm
