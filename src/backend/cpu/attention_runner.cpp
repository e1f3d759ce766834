#include "backend/cpu/attention_runner.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "backend/cpu/attention.h"
#include "base/dtype.h"
#include "base/measure.h"

namespace sagelm::cpu {
namespace {

class Runner : public AttentionRunner {
 public:
  Runner(const AttentionCall& call, std::span<const uint16_t> q, std::span<const uint16_t> k,
         std::span<const uint16_t> v)
      : call_(call), q_(static_cast<size_t>(call.batch * sequence_size())), out_(q_.size()) {
    const int64_t kv_size = call.num_kv_heads * call.tokens * call.head_dim;
    for (int64_t b = 0; b < call.batch; ++b) {
      k_pages_.push_back(k.data() + b * kv_size);
      v_pages_.push_back(v.data() + b * kv_size);
    }
    // The CPU's kernels take queries of one token together, in float32.
    for (int64_t b = 0; b < call.batch; ++b) {
      for (int64_t head = 0; head < call.num_heads; ++head) {
        for (int64_t token = 0; token < call.tokens; ++token) {
          const int64_t from = ((b * call.num_heads + head) * call.tokens + token) * call.head_dim;
          std::transform(q.begin() + from, q.begin() + from + call.head_dim,
                         q_.begin() + place(b, head, token), half_to_float);
        }
      }
    }
    for (int64_t b = 0; b < call.batch; ++b) {
      const auto at = static_cast<size_t>(b);
      AttentionArgs args;
      args.q = q_.data() + b * sequence_size();
      args.out = out_.data() + b * sequence_size();
      args.q_row_stride = args.out_row_stride = call.num_heads * call.head_dim;
      args.kv = {
          .k_pages = {&k_pages_[at], 1}, .v_pages = {&v_pages_[at], 1}, .page_size = call.tokens};
      args.q_len = args.kv_len = call.tokens;
      args.num_heads = call.num_heads;
      args.num_kv_heads = call.num_kv_heads;
      args.head_dim = call.head_dim;
      args.softmax_scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(call.head_dim)));
      args.causal = call.causal;
      args_.push_back(args);
    }
  }

  double median_seconds(const AttentionSpec& spec, int runs) override {
    attention(args_, spec);
    std::vector<double> seconds;
    seconds.reserve(runs);
    for (int i = 0; i < runs; ++i) seconds.push_back(seconds_of([&] { attention(args_, spec); }));
    return spread_of(std::move(seconds)).median;
  }

  std::vector<float> output(int64_t batch, int64_t head, int64_t token) const override {
    const auto from = out_.begin() + place(batch, head, token);
    return {from, from + call_.head_dim};
  }

 private:
  int64_t sequence_size() const { return call_.tokens * call_.num_heads * call_.head_dim; }
  int64_t place(int64_t b, int64_t head, int64_t token) const {
    return b * sequence_size() + (token * call_.num_heads + head) * call_.head_dim;
  }

  AttentionCall call_;
  std::vector<float> q_, out_;  // [batch, tokens, num_heads, head_dim]
  std::vector<const uint16_t*> k_pages_, v_pages_;
  std::vector<AttentionArgs> args_;
};

}  // namespace

std::unique_ptr<AttentionRunner> make_attention_runner(const AttentionCall& call,
                                                       std::span<const uint16_t> q,
                                                       std::span<const uint16_t> k,
                                                       std::span<const uint16_t> v) {
  return std::make_unique<Runner>(call, q, k, v);
}

}  // namespace sagelm::cpu
