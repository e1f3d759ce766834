// A named, typed, read-only view of a dense row-major tensor that someone else owns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/dtype.h"

namespace sagelm {

struct TensorView {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;  // outermost first; a linear layer is [out_features, in_features]
  const std::byte* data = nullptr;
  size_t bytes = 0;

  int64_t num_elements() const {
    int64_t n = 1;
    for (int64_t extent : shape) n *= extent;
    return n;
  }
};

}  // namespace sagelm
