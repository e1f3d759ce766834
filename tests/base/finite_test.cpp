#include "base/finite.h"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <vector>

namespace sagelm {
namespace {

// count ones stored as type, at an odd address, with `value` at the places.
int64_t found(DType type, int64_t count, const std::vector<int64_t>& places, float value) {
  std::vector<std::byte> bytes(1 + static_cast<size_t>(count) * dtype_size(type));
  for (int64_t i = 0; i < count; ++i) {
    bool here = false;
    for (const int64_t place : places) here = here || place == i;
    const float x = here ? value : 1.0f;
    std::byte* to = bytes.data() + 1 + static_cast<size_t>(i) * dtype_size(type);
    if (type == DType::kF32) {
      std::memcpy(to, &x, sizeof x);
    } else {
      const uint16_t raw = type == DType::kF16 ? float_to_half(x) : float_to_bfloat16(x);
      std::memcpy(to, &raw, sizeof raw);
    }
  }
  return first_non_finite(bytes.data() + 1, type, count);
}

TEST(Finite, FindsTheFirstNanOrInfinity) {
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const DType type : {DType::kF32, DType::kF16, DType::kBF16}) {
    EXPECT_EQ(found(type, 0, {}, 0), -1);
    EXPECT_EQ(found(type, 10000, {3}, 65504.0f), -1) << dtype_name(type);
    EXPECT_EQ(found(type, 10000, {9999}, -inf), 9999) << dtype_name(type);
    EXPECT_EQ(found(type, 10000, {5000, 4096, 9000}, nan), 4096) << dtype_name(type);
    EXPECT_EQ(found(type, 1, {0}, inf), 0) << dtype_name(type);
  }
}

}  // namespace
}  // namespace sagelm
