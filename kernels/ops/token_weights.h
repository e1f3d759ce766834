// The numbers that tokens are drawn by, once for the CPU and the GPU. They are integers, so that
// sums do not depend on their order and both draw the same token. Host and device; no CUDA header.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define SAGELM_HOST_DEVICE __host__ __device__
#else
#define SAGELM_HOST_DEVICE
#endif

namespace sagelm::weights {

// A token's distance from the most probable one: how many times less probable it is, as a power of
// two, in units of 2^-26. Tokens of kFar or more are never drawn.
inline constexpr int kFractionBits = 26;
inline constexpr uint32_t kFar = uint32_t{31} << kFractionBits;
// The weight of a token at distance 0.
inline constexpr uint32_t kOne = uint32_t{1} << 30;

// x * y + z, rounded twice wherever it is compiled (on the CPU without contraction).
SAGELM_HOST_DEVICE inline float multiply_add(float x, float y, float z) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(__fmul_rn(x, y), z);
#else
  return x * y + z;
#endif
}

SAGELM_HOST_DEVICE inline float float_of_bits(int32_t bits) {
#ifdef __CUDA_ARCH__
  return __int_as_float(bits);
#else
  return std::bit_cast<float>(bits);
#endif
}

// octaves: log2(e) / temperature. A logit of minus infinity is far.
SAGELM_HOST_DEVICE inline uint32_t distance(float largest, float logit, float octaves) {
  const float power = (largest - logit) * octaves;
  const float near = power < 31.0F ? power : 31.0F;  // NaN is far
  return static_cast<uint32_t>(static_cast<int32_t>(near * static_cast<float>(1 << kFractionBits)));
}

// What the options of a draw are here. Bounded, so that equals stay at distance 0.
inline float octaves_of(double temperature) {
  return static_cast<float>(std::min(1.4426950408889634 / temperature, 1e30));
}
// The distance of a token that is `share` times as probable as the most probable one.
inline uint32_t distance_of(double share) {
  const double distance = -std::log2(share) * (1 << kFractionBits);  // infinite for 0
  return distance < kFar ? static_cast<uint32_t>(distance) : kFar;
}

// kOne * 2^-distance for a distance up to kFar, within 2e-7 of its value and rounded to an integer.
SAGELM_HOST_DEVICE inline uint32_t weight(uint32_t distance) {
  constexpr int32_t kFraction = (1 << kFractionBits) - 1;
  constexpr float kUnit = 1.0F / static_cast<float>(1 << kFractionBits);
  const auto whole = static_cast<int32_t>(distance);
  const float g = 0.5F - static_cast<float>(whole & kFraction) * kUnit;
  // 2^(g - 1/2) by the Taylor polynomial of 2^g, |g| <= 1/2.
  float p = multiply_add(g, 0.000108919408F, 0.000942824938F);
  p = multiply_add(g, p, 0.00680104431F);
  p = multiply_add(g, p, 0.0392473316F);
  p = multiply_add(g, p, 0.169865792F);
  p = multiply_add(g, p, 0.490129072F);
  p = multiply_add(g, p, 0.707106781F);
  // Times kOne * 2^-octaves.
  const float scale = float_of_bits((127 + 30 - (whole >> kFractionBits)) << 23);
  return static_cast<uint32_t>(static_cast<int32_t>(multiply_add(p, scale, 0.5F)));
}

// What the repeat penalty makes of a logit; stays finite.
SAGELM_HOST_DEVICE inline float penalized(float logit, float penalty) {
  const float scaled = logit > 0 ? logit / penalty : logit * penalty;
  constexpr float kMost = 3.4028234e38F;
  return scaled < kMost ? (scaled > -kMost ? scaled : -kMost) : kMost;
}

}  // namespace sagelm::weights
