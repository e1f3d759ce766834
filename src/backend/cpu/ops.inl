// Body of the element-wise functions: compiled once per instruction set by ops_<isa>.cpp, which
// defines SAGELM_OPS_TABLE and SAGELM_OPS_ISA. Plain loops that the compiler vectorises; everything
// is in an unnamed namespace so that no copy built for a newer CPU can be linked into an older
// path.
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "backend/cpu/ops.h"

namespace sagelm::cpu {
namespace {

inline uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }

inline uint16_t round_to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet_nan : rounded);
}

void split_bf16(const float* x, int64_t n, uint16_t* hi, uint16_t* lo) {
  for (int64_t i = 0; i < n; ++i) {
    const uint16_t top = round_to_bf16(x[i]);
    hi[i] = top;
    lo[i] = round_to_bf16(x[i] - std::bit_cast<float>(static_cast<uint32_t>(top) << 16));
  }
}

// Branch-free float_to_half of base/dtype.h.
void half_from_float(const float* x, int64_t n, uint16_t* out) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    const __m256i half =
        _mm512_maskz_cvtps_ph(0xFFFF, _mm512_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), half);
  }
#elif defined(__AVX2__) && defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), half);
  }
#endif
  for (; i < n; ++i) {
    const uint32_t bits = bits_of(x[i]);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    const uint32_t normal = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
    const uint32_t subnormal = bits_of(std::bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
    uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
    result = magnitude >= 0x477FF000u ? 0x7C00u : result;
    result = magnitude > 0x7F800000u ? 0x7E00u : result;
    out[i] = static_cast<uint16_t>(sign | result);
  }
}

void add(const float* a, const float* b, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] + b[i];
}

void accumulate(const float* a, const float* b, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] += a[i] + b[i];
}

constexpr int kLanes = 16;  // partial sums kept apart so that the loops vectorise

void rmsnorm(const float* x, const float* weight, int64_t n, double eps, float* out) {
  float partial[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) partial[lane] += x[i + lane] * x[i + lane];
  }
  double sum = 0;
  for (; i < n; ++i) sum += static_cast<double>(x[i]) * x[i];
  for (float value : partial) sum += value;
  const auto scale = static_cast<float>(1.0 / std::sqrt(sum / static_cast<double>(n) + eps));
  for (i = 0; i < n; ++i) out[i] = x[i] * scale * weight[i];
}

// exp by 2^k * p(r), |r| <= ln2/2, p of degree 6 (relative error about 1e-7). Below -87 it is 0.
inline float fast_exp(float x) {
  const float clamped = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float k = (clamped * 1.44269504f + 12582912.0f) - 12582912.0f;
  const float r = (clamped - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const auto exponent = static_cast<uint32_t>((static_cast<int32_t>(k) + 127) << 23);
  const float value = p * std::bit_cast<float>(exponent);
  return x < -87.0f ? 0.0f : value;
}

void swiglu(const float* gate, const float* up, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    // NaN passes through the division; the clamps of fast_exp would lose it.
    const float g = gate[i];
    out[i] = g / (1.0f + fast_exp(-g)) * up[i];
  }
}

void rope(float* x, const float* cosine, const float* sine, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i];
    const float b = x[i + half];
    x[i] = a * cosine[i] - b * sine[i];
    x[i + half] = b * cosine[i] + a * sine[i];
  }
}

bool all_finite(const float* x, int64_t n) {
  uint32_t worst = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = bits_of(x[i]) & 0x7FFFFFFFu;
    worst = magnitude > worst ? magnitude : worst;
  }
  return worst < 0x7F800000u;
}

double log_sum_exp(const float* x, int64_t n, int64_t* argmax) {
  *argmax = 0;
  if (!all_finite(x, n)) return std::numeric_limits<double>::quiet_NaN();
  float lane_max[kLanes];
  for (float& value : lane_max) value = -std::numeric_limits<float>::infinity();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      lane_max[lane] = x[i + lane] > lane_max[lane] ? x[i + lane] : lane_max[lane];
    }
  }
  float maximum = -std::numeric_limits<float>::infinity();
  for (; i < n; ++i) maximum = x[i] > maximum ? x[i] : maximum;
  for (float value : lane_max) maximum = value > maximum ? value : maximum;
  while (x[*argmax] != maximum) ++*argmax;

  // Blocks of 256 additions per lane keep the float sums exact enough; the total is double.
  double total = 0;
  constexpr int64_t kBlock = 256 * kLanes;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    float partial[kLanes] = {};
    for (i = begin; i + kLanes <= end; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) partial[lane] += fast_exp(x[i + lane] - maximum);
    }
    for (; i < end; ++i) total += fast_exp(x[i] - maximum);
    for (float value : partial) total += value;
  }
  return static_cast<double>(maximum) + std::log(total);
}

}  // namespace

const Ops SAGELM_OPS_TABLE = {SAGELM_OPS_ISA, split_bf16, half_from_float, add,
                              accumulate,     rmsnorm,    swiglu,          rope,
                              log_sum_exp,    all_finite};

}  // namespace sagelm::cpu
