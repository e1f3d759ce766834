#include "base/dtype.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "base/fp8.h"

namespace sagelm {
namespace {

// Value of a small float format read from its definition.
double decode(uint32_t code, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const auto mantissa = static_cast<double>(code & ((1u << mantissa_bits) - 1));
  const int exponent = static_cast<int>(code >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const double sign = (code >> (mantissa_bits + exponent_bits)) != 0 ? -1.0 : 1.0;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

// Nearest, ties to even, by comparing with both neighbours: codes lower and lower + 1 of the
// positive half, values in increasing order.
uint32_t nearest(double x, uint32_t lower, int exponent_bits, int mantissa_bits) {
  const double below = x - decode(lower, exponent_bits, mantissa_bits);
  const double above = decode(lower + 1, exponent_bits, mantissa_bits) - x;
  if (below != above) return below < above ? lower : lower + 1;
  return lower % 2 == 0 ? lower : lower + 1;
}

// Points between two neighbours that decide a rounding: near both ends and around the middle.
template <typename Check>
void check_between(float low, float high, Check check) {
  const float middle = static_cast<float>((static_cast<double>(low) + high) / 2);
  for (const float x : {low, std::nextafter(low, high), std::nextafter(middle, low), middle,
                        std::nextafter(middle, high), std::nextafter(high, low)}) {
    check(x);
  }
}

TEST(Half, EveryPatternDecodesToItsDefinitionAndBack) {
  for (uint32_t code = 0; code < 0x10000; ++code) {
    const auto half = static_cast<uint16_t>(code);
    const float value = half_to_float(half);
    if ((code & 0x7C00) == 0x7C00) {
      EXPECT_EQ(std::isinf(value), (code & 0x3FF) == 0);
      EXPECT_EQ(std::isnan(value), (code & 0x3FF) != 0);
      EXPECT_EQ(std::isnan(half_to_float(float_to_half(value))), std::isnan(value));
      continue;
    }
    ASSERT_EQ(static_cast<double>(value), decode(code, 5, 10)) << code;
    ASSERT_EQ(float_to_half(value), half);
    ASSERT_EQ(std::signbit(value), (code & 0x8000) != 0);
  }
}

TEST(Half, RoundsToNearestEvenBetweenAllNeighbours) {
  for (uint32_t code = 0; code < 0x7BFF; ++code) {
    const float low = half_to_float(static_cast<uint16_t>(code));
    const float high = half_to_float(static_cast<uint16_t>(code + 1));
    check_between(low, high, [&](float x) {
      const uint32_t expected = nearest(x, code, 5, 10);
      ASSERT_EQ(float_to_half(x), expected) << x;
      ASSERT_EQ(float_to_half(-x), expected | 0x8000) << x;
    });
  }
}

TEST(Half, OverflowsToInfinityAndUnderflowsToZero) {
  EXPECT_EQ(float_to_half(65519.996f), 0x7BFF);
  EXPECT_EQ(float_to_half(65520.0f), 0x7C00);
  EXPECT_EQ(float_to_half(-1e30f), 0xFC00);
  EXPECT_EQ(float_to_half(std::numeric_limits<float>::infinity()), 0x7C00);
  EXPECT_EQ(float_to_half(0x1p-25f), 0);
  EXPECT_EQ(float_to_half(-0.0f), 0x8000);
  EXPECT_TRUE(std::isnan(half_to_float(float_to_half(NAN))));
}

TEST(BFloat16, EveryPatternSurvivesAndTiesGoToEven) {
  for (uint32_t code = 0; code < 0x10000; ++code) {
    const auto value = static_cast<uint16_t>(code);
    const float f = bfloat16_to_float(value);
    if (std::isnan(f)) {
      EXPECT_TRUE(std::isnan(bfloat16_to_float(float_to_bfloat16(f))));
      continue;
    }
    ASSERT_EQ(float_to_bfloat16(f), value);
    if ((code & 0x7FFF) >= 0x7F7F) continue;
    const auto up = static_cast<uint16_t>(code + 1);
    const float middle = std::bit_cast<float>((code << 16) | 0x8000u);
    ASSERT_EQ(float_to_bfloat16(middle), code % 2 == 0 ? value : up);
    ASSERT_EQ(float_to_bfloat16(std::bit_cast<float>((code << 16) | 0x8001u)), up);
    ASSERT_EQ(float_to_bfloat16(std::bit_cast<float>((code << 16) | 0x7FFFu)), value);
  }
}

TEST(E4m3, EveryCodeDecodesToItsDefinitionAndBack) {
  for (uint32_t code = 0; code < 0x100; ++code) {
    const float value = e4m3_to_float(static_cast<uint8_t>(code));
    if ((code & 0x7F) == 0x7F) {
      EXPECT_TRUE(std::isnan(value));
      continue;
    }
    EXPECT_EQ(static_cast<double>(value), decode(code, 4, 3)) << code;
    EXPECT_EQ(float_to_e4m3(value), code);
  }
  EXPECT_EQ(e4m3_to_float(0x7E), kE4m3Max);
}

TEST(E4m3, RoundsToNearestEvenBetweenAllNeighbours) {
  for (uint32_t code = 0; code < 0x7E; ++code) {
    const float low = e4m3_to_float(static_cast<uint8_t>(code));
    const float high = e4m3_to_float(static_cast<uint8_t>(code + 1));
    check_between(low, high, [&](float x) {
      const uint32_t expected = nearest(x, code, 4, 3);
      ASSERT_EQ(float_to_e4m3(x), expected) << x;
      ASSERT_EQ(float_to_e4m3(-x), expected | 0x80) << x;
    });
  }
}

// Every half value, and random floats of every exponent, against the definition by search.
TEST(E4m3, AgreesWithASearchOverAllCodes) {
  std::mt19937 random(7);
  const auto check = [](float x) {
    if (std::isnan(x)) return;
    const double magnitude = std::fabs(static_cast<double>(x));
    uint32_t code = 0x7E;
    if (magnitude < 448.0) {
      code = 0;
      while (decode(code + 1, 4, 3) <= magnitude) ++code;
      code = nearest(magnitude, code, 4, 3);
    }
    ASSERT_EQ(float_to_e4m3(x), code | (std::signbit(x) ? 0x80u : 0u)) << x;
  };
  for (uint32_t code = 0; code < 0x10000; ++code) check(half_to_float(static_cast<uint16_t>(code)));
  for (int i = 0; i < 200000; ++i) check(std::bit_cast<float>(static_cast<uint32_t>(random())));
}

TEST(E4m3, SaturatesAndKeepsNaN) {
  EXPECT_EQ(float_to_e4m3(1e9f), 0x7E);
  EXPECT_EQ(float_to_e4m3(-std::numeric_limits<float>::infinity()), 0xFE);
  EXPECT_TRUE(std::isnan(e4m3_to_float(float_to_e4m3(NAN))));
  EXPECT_TRUE(std::isnan(e4m3_to_float(float_to_e4m3(-NAN))));
}

TEST(DTypes, SizesAndNames) {
  EXPECT_EQ(dtype_size(DType::kF32), 4U);
  EXPECT_EQ(dtype_size(DType::kF16), 2U);
  EXPECT_EQ(dtype_size(DType::kBF16), 2U);
  EXPECT_EQ(dtype_name(DType::kBF16), "BF16");
}

}  // namespace
}  // namespace sagelm
