#include "eval/logits_rows.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <limits>

namespace sagelm {
namespace {

// Part of what calls it: compiled once per instruction set.
#define SAGELM_LOOP __attribute__((always_inline)) inline

// exp(x) for x <= 700 to 1e-15 of its size: 2^k e^r with |r| <= ln(2) / 2, e^r by its Taylor series
// up to r^12 / 12!. Below -708 it is exp(-708), 3e-308.
SAGELM_LOOP double exp_of(double x) {
  x = x < -708.0 ? -708.0 : x;
  constexpr double kRound = 0x1.8p52;  // the last bits of a sum with it are the nearest integer
  const double shifted = x * 0x1.71547652b82fep0 + kRound;
  const double k = shifted - kRound;
  const double r = (x - k * 0x1.62e42fefap-1) - k * 0x1.cf79abc9e3b3ap-40;  // ln(2) in two parts
  double sum = 1.0 / 479001600;
  sum = sum * r + 1.0 / 39916800;
  sum = sum * r + 1.0 / 3628800;
  sum = sum * r + 1.0 / 362880;
  sum = sum * r + 1.0 / 40320;
  sum = sum * r + 1.0 / 5040;
  sum = sum * r + 1.0 / 720;
  sum = sum * r + 1.0 / 120;
  sum = sum * r + 1.0 / 24;
  sum = sum * r + 1.0 / 6;
  sum = sum * r + 0.5;
  sum = sum * r + 1.0;
  sum = sum * r + 1.0;
  return sum * std::bit_cast<double>((std::bit_cast<uint64_t>(shifted) + 1023) << 52);
}

// Of exp(p - shift), or where q is given of exp(p - shift) (p - q + added).
SAGELM_LOOP double sum_over(const float* p, const float* q, size_t n, double shift, double added) {
  double sum = 0;
  if (q == nullptr) {
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < n; ++i) sum += exp_of(static_cast<double>(p[i]) - shift);
  } else {
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < n; ++i) {
      const double logit = p[i];
      sum += exp_of(logit - shift) * (logit - static_cast<double>(q[i]) + added);
    }
  }
  return sum;
}

using Sum = double (*)(const float* p, const float* q, size_t n, double shift, double added);

double plain_sum(const float* p, const float* q, size_t n, double shift, double added) {
  return sum_over(p, q, n, shift, added);
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) double avx2_sum(const float* p, const float* q, size_t n,
                                                    double shift, double added) {
  return sum_over(p, q, n, shift, added);
}

__attribute__((target("avx2,fma,avx512f,avx512dq"))) double avx512_sum(const float* p,
                                                                       const float* q, size_t n,
                                                                       double shift, double added) {
  return sum_over(p, q, n, shift, added);
}
#endif

Sum best_sum() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512dq")) return avx512_sum;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2_sum;
#endif
  return plain_sum;
}

double sum_of(std::span<const float> p, const float* q, double shift, double added) {
  static const Sum best = best_sum();
  return best(p.data(), q, p.size(), shift, added);
}

float largest_of(const float* x, size_t n) {
  constexpr size_t kLanes = 16;
  float lanes[kLanes];
  std::fill_n(lanes, kLanes, -std::numeric_limits<float>::infinity());
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = x[i + lane] > lanes[lane] ? x[i + lane] : lanes[lane];
    }
  }
  float largest = *std::max_element(lanes, lanes + kLanes);
  for (; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

}  // namespace

RowSummary summarize(std::span<const float> logits) {
  // The largest is looked for in the block that holds it.
  constexpr size_t kBlock = 1024;
  float largest = -std::numeric_limits<float>::infinity();
  size_t at = 0;
  for (size_t begin = 0; begin < logits.size(); begin += kBlock) {
    const size_t count = std::min(kBlock, logits.size() - begin);
    const float of_block = largest_of(logits.data() + begin, count);
    if (of_block > largest) {
      largest = of_block;
      at = begin;
    }
  }
  while (at + 1 < logits.size() && logits[at] != largest) ++at;
  const double sum = sum_of(logits, nullptr, largest, 0);
  return {.log_sum_exp = static_cast<double>(largest) + std::log(sum),
          .argmax = static_cast<int32_t>(at)};
}

double kl_divergence(std::span<const float> p, double p_log_sum_exp, std::span<const float> q,
                     double q_log_sum_exp) {
  const double sum = sum_of(p, q.data(), p_log_sum_exp, q_log_sum_exp - p_log_sum_exp);
  return sum < 0 ? 0 : sum;  // rounding may leave it just below 0
}

}  // namespace sagelm
