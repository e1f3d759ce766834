// Time and rate of the CPU attention kernels, quantization included. Run with OMP_NUM_THREADS and
// SAGELM_CPU_ISA to choose; prints the median of several runs.
#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <chrono>
#include <vector>

#include "support/attention_inputs.h"

namespace sagelm::testing {
namespace {

constexpr AttentionVariant kVariants[] = {AttentionVariant::kFp16,     AttentionVariant::kSage1,
                                          AttentionVariant::kSage1T,   AttentionVariant::kSage1B,
                                          AttentionVariant::kSage1VT,  AttentionVariant::kSage1VB,
                                          AttentionVariant::kSage2_8b, AttentionVariant::kSage2_4b};

double median_seconds(const AttentionProblem& problem, const AttentionSpec& spec) {
  using Clock = std::chrono::steady_clock;
  AttentionResult result;
  PreparedArgs prepared = prepare_args(problem, 128, result);
  prepared.args.lse = nullptr;  // as the model calls it
  std::vector<double> seconds;
  const auto start = Clock::now();
  while (seconds.size() < 5 || Clock::now() - start < std::chrono::milliseconds(200)) {
    const auto before = Clock::now();
    cpu::attention(std::span(&prepared.args, 1), spec);
    seconds.push_back(std::chrono::duration<double>(Clock::now() - before).count());
  }
  std::nth_element(seconds.begin(), seconds.begin() + static_cast<long>(seconds.size() / 2),
                   seconds.end());
  return seconds[seconds.size() / 2];
}

void run(const AttentionShape& shape) {
  const AttentionProblem problem = make_problem(shape, Inputs::kNormal, 1);
  // Visible (query, key) pairs times two products of head_dim multiply-adds.
  const double full = static_cast<double>(shape.q_len) * static_cast<double>(shape.kv_len);
  const double hidden =
      shape.causal ? 0.5 * static_cast<double>(shape.q_len) * static_cast<double>(shape.q_len - 1)
                   : 0.0;
  const double flops = 4.0 * (full - hidden) * static_cast<double>(shape.num_heads) *
                       static_cast<double>(shape.head_dim);
  fmt::print("q {} kv {} heads {}/{} hd {}\n", shape.q_len, shape.kv_len, shape.num_heads,
             shape.num_kv_heads, shape.head_dim);
  for (const AttentionVariant variant : kVariants) {
    const double seconds = median_seconds(problem, {variant, true});
    fmt::print("  {:9} {:9.1f} us {:8.1f} GFLOPS\n", attention_variant_name(variant), 1e6 * seconds,
               1e-9 * flops / seconds);
  }
}

}  // namespace
}  // namespace sagelm::testing

int main() {
  using sagelm::testing::run;
  fmt::print("kernels: {}\n", sagelm::cpu::attention_isa());
  run({512, 512, 6, 6, 64, true});
  run({2048, 2048, 4, 4, 128, true});
  run({1, 500, 6, 6, 64, true});
  run({1, 2048, 32, 8, 128, true});
  return 0;
}
