#include "eval/logits_rows.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <limits>

namespace sagelm {
namespace {

// Loops that are compiled once per instruction set, as part of what calls them.
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

SAGELM_LOOP float largest_of(const float* x, size_t n) {
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

SAGELM_LOOP double sum_of_exp(const float* x, size_t n, double shift) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (size_t i = 0; i < n; ++i) sum += exp_of(static_cast<double>(x[i]) - shift);
  return sum;
}

SAGELM_LOOP double sum_of_kl(const float* p, const float* q, size_t n, double p_log_sum_exp,
                             double shift) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (size_t i = 0; i < n; ++i) {
    const double logit = p[i];
    sum += exp_of(logit - p_log_sum_exp) * (logit - static_cast<double>(q[i]) + shift);
  }
  return sum;
}

struct Loops {
  float (*largest)(const float* x, size_t n);
  double (*exp_sum)(const float* x, size_t n, double shift);
  double (*kl_sum)(const float* p, const float* q, size_t n, double p_log_sum_exp, double shift);
};

// `TARGET` functions of the loops, as NAME.
#define SAGELM_LOOPS(NAME, TARGET)                                                   \
  TARGET float NAME##_largest(const float* x, size_t n) { return largest_of(x, n); } \
  TARGET double NAME##_exp_sum(const float* x, size_t n, double shift) {             \
    return sum_of_exp(x, n, shift);                                                  \
  }                                                                                  \
  TARGET double NAME##_kl_sum(const float* p, const float* q, size_t n, double lse,  \
                              double shift) {                                        \
    return sum_of_kl(p, q, n, lse, shift);                                           \
  }                                                                                  \
  constexpr Loops NAME = {NAME##_largest, NAME##_exp_sum, NAME##_kl_sum};

SAGELM_LOOPS(plain_loops, )
#if defined(__x86_64__)
SAGELM_LOOPS(avx2_loops, __attribute__((target("avx2,fma"))))
SAGELM_LOOPS(avx512_loops, __attribute__((target("avx2,fma,avx512f,avx512dq"))))
#endif

Loops best_loops() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512dq")) return avx512_loops;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2_loops;
#endif
  return plain_loops;
}

const Loops& loops() {
  static const Loops best = best_loops();
  return best;
}

}  // namespace

RowSummary summarize(std::span<const float> logits) {
  // The largest is looked for in the block that holds it.
  constexpr size_t kBlock = 1024;
  float largest = -std::numeric_limits<float>::infinity();
  size_t at = 0;
  for (size_t begin = 0; begin < logits.size(); begin += kBlock) {
    const size_t count = std::min(kBlock, logits.size() - begin);
    const float of_block = loops().largest(logits.data() + begin, count);
    if (of_block > largest) {
      largest = of_block;
      at = begin;
    }
  }
  while (at + 1 < logits.size() && logits[at] != largest) ++at;
  const double sum = loops().exp_sum(logits.data(), logits.size(), largest);
  return {.log_sum_exp = static_cast<double>(largest) + std::log(sum),
          .argmax = static_cast<int32_t>(at)};
}

double kl_divergence(std::span<const float> p, double p_log_sum_exp, std::span<const float> q,
                     double q_log_sum_exp) {
  const double sum =
      loops().kl_sum(p.data(), q.data(), p.size(), p_log_sum_exp, q_log_sum_exp - p_log_sum_exp);
  return sum < 0 ? 0 : sum;  // rounding may leave it just below 0
}

}  // namespace sagelm
