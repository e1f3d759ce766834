// Attention outside a model, on tensors of its own: what benchmarks measure.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/attention_variant.h"

namespace sagelm {

// Q and the output are [batch, num_heads, tokens, head_dim], K and V [batch, num_kv_heads, tokens,
// head_dim], all in FP16.
struct AttentionCall {
  int64_t batch = 1;
  int64_t tokens = 0;
  int64_t num_heads = 1;
  int64_t num_kv_heads = 1;
  int64_t head_dim = 64;
  bool causal = true;
};

class AttentionRunner {
 public:
  virtual ~AttentionRunner() = default;
  // Median of `runs` whole calls, from FP16 tensors, with all smoothing and quantization. Throws
  // Error for a variant that the device has no kernel for.
  virtual double median_seconds(const AttentionSpec& spec, int runs) = 0;
  // One row of the last call's output, [head_dim].
  virtual std::vector<float> output(int64_t batch, int64_t head, int64_t token) const = 0;
};

}  // namespace sagelm
