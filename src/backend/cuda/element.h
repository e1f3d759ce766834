// The kernels' name of a storage type.
#pragma once

#include "base/dtype.h"
#include "kernels/ops/element.h"

namespace sagelm::cuda {

constexpr kernels::Element element(DType type) {
  switch (type) {
    case DType::kF32:
      return kernels::Element::kF32;
    case DType::kF16:
      return kernels::Element::kF16;
    case DType::kBF16:
      return kernels::Element::kBF16;
  }
  return kernels::Element::kF32;
}

}  // namespace sagelm::cuda
