// Attention problems for tests and benchmarks: shapes, the input distributions, and the glue to
// the CPU kernels' arguments.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/cpu/attention.h"

namespace sagelm::testing {

enum class Inputs : uint8_t {
  kNormal,       // Q, K, V standard normal
  kOffsetK,      // plus +-8 on every 16th channel of K and +-2 there on Q
  kHeavyTailed,  // the same offsets, and log-normal channel scales on Q, K and V
};
inline constexpr Inputs kAllInputs[] = {Inputs::kNormal, Inputs::kOffsetK, Inputs::kHeavyTailed};
const char* inputs_name(Inputs inputs);

struct AttentionShape {
  int64_t q_len = 0;
  int64_t kv_len = 0;
  int64_t num_heads = 1;
  int64_t num_kv_heads = 1;
  int64_t head_dim = 64;
  bool causal = true;
};

// Contiguous tensors; K and V are FP16 as in the cache, Q already holds FP16 values.
struct AttentionProblem {
  AttentionShape shape;
  float softmax_scale = 0;
  std::vector<float> q;     // [q_len][num_heads][head_dim]
  std::vector<uint16_t> k;  // [num_kv_heads][kv_len][head_dim]
  std::vector<uint16_t> v;
};

AttentionProblem make_problem(const AttentionShape& shape, Inputs inputs, uint32_t seed);

// The same sequence when only its first kv_len tokens exist and the last q_len of those are asked.
// Only for problems whose q_len equals kv_len.
AttentionProblem prefix_of(const AttentionProblem& problem, int64_t kv_len, int64_t q_len);

struct AttentionResult {
  std::vector<float> out;  // [q_len][num_heads][head_dim]
  std::vector<float> lse;  // [num_heads][q_len]
};

// Arguments that point into problem, pages and result; all must outlive the call.
struct PreparedArgs {
  std::vector<std::vector<uint16_t>> page_storage;
  std::vector<const uint16_t*> k_pages;
  std::vector<const uint16_t*> v_pages;
  cpu::AttentionArgs args;
};

// page_size 0: one contiguous page that is problem.k itself. Otherwise pages whose unused rows hold
// NaN.
PreparedArgs prepare_args(const AttentionProblem& problem, int64_t page_size,
                          AttentionResult& result);

AttentionResult run_attention(const AttentionProblem& problem, const AttentionSpec& spec);

}  // namespace sagelm::testing
