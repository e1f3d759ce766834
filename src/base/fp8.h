// FP8 e4m3 ("e4m3fn": no infinities, one NaN pattern, largest value 448) <-> float.
#pragma once

#include <bit>
#include <cstdint>

namespace sagelm {

inline constexpr float kE4m3Max = 448.0f;
inline constexpr uint8_t kE4m3NaN = 0x7F;

// Exact: 1 sign, 4 exponent bits (bias 7), 3 mantissa bits; 0x7F and 0xFF are NaN.
constexpr float e4m3_to_float(uint8_t code) {
  const uint32_t sign = static_cast<uint32_t>(code & 0x80u) << 24;
  const uint32_t magnitude = code & 0x7Fu;
  if (magnitude == kE4m3NaN) return std::bit_cast<float>(sign | 0x7FC00000u);
  if (magnitude >= 8) return std::bit_cast<float>(sign | ((magnitude << 20) + (120u << 23)));
  // Subnormal: magnitude * 2^-9.
  const float value = static_cast<float>(magnitude) * 0x1p-9f;
  return sign != 0 ? -value : value;
}

// Rounds to nearest even and saturates to +-448 (also infinities), as cvt.rn.satfinite does; NaN
// stays NaN.
constexpr uint8_t float_to_e4m3(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f);
  const uint8_t sign = static_cast<uint8_t>((bits >> 24) & 0x80u);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return sign | kE4m3NaN;
  if (magnitude >= std::bit_cast<uint32_t>(kE4m3Max)) return sign | 0x7Eu;
  if (magnitude < std::bit_cast<uint32_t>(0x1p-6f)) {
    // Adding 2^14 aligns the mantissa so that the FPU rounds to multiples of 2^-9.
    const float aligned = std::bit_cast<float>(magnitude) + 0x1p14f;
    return static_cast<uint8_t>(sign | (std::bit_cast<uint32_t>(aligned) & 0xFFu));
  }
  const uint32_t rounded = magnitude + 0x7FFFFu + ((magnitude >> 20) & 1u) - (120u << 23);
  return static_cast<uint8_t>(sign | (rounded >> 20));
}

}  // namespace sagelm
