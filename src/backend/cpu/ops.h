// Element-wise work of the CPU backend, one set of functions per instruction set. Each function
// works on whole rows in the calling thread; the backend spreads rows over threads.
#pragma once

#include <cstdint>

namespace sagelm::cpu {

struct Ops {
  const char* isa;
  // hi + lo = x to 16 significant bits: hi = bf16(x), lo = bf16(x - hi), nearest even.
  void (*split_bf16)(const float* x, int64_t n, uint16_t* hi, uint16_t* lo);
  void (*half_from_float)(const float* x, int64_t n, uint16_t* out);
  void (*add)(const float* a, const float* b, int64_t n, float* out);         // out = a + b
  void (*accumulate)(const float* a, const float* b, int64_t n, float* out);  // out += a + b
  void (*rmsnorm)(const float* x, const float* weight, int64_t n, double eps, float* out);
  void (*swiglu)(const float* gate, const float* up, int64_t n, float* out);
  // Rotates one head in half-split order: pairs (x[i], x[i + half]).
  void (*rope)(float* x, const float* cosine, const float* sine, int64_t half);
  // Returns log(sum(exp(x))) and the position of the largest x (the first among equals); NaN if any
  // x is NaN or +-Inf.
  double (*log_sum_exp)(const float* x, int64_t n, int64_t* argmax);
  bool (*all_finite)(const float* x, int64_t n);
};

// The best set this machine runs; SAGELM_CPU_ISA=generic|avx2|avx512-vnni asks for a lower one.
const Ops& ops();

extern const Ops kOpsGeneric;
#if defined(__x86_64__)
extern const Ops kOpsAvx2;
extern const Ops kOpsAvx512;
#endif

}  // namespace sagelm::cpu
