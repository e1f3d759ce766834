#include "backend/cuda/attention_runner.h"

#include <array>

#include "backend/cuda/ceilings.h"
#include "backend/cuda/check.h"
#include "backend/cuda/memory.h"
#include "base/dtype.h"

namespace sagelm::cuda {
namespace {

class Runner : public AttentionRunner {
 public:
  Runner(const AttentionCall& call, std::span<const uint16_t> q, std::span<const uint16_t> k,
         std::span<const uint16_t> v, cudaStream_t stream)
      : call_(call), stream_(stream), out_(q.size_bytes(), "the output of attention") {
    const std::array from = {q, k, v};
    for (size_t i = 0; i < from.size(); ++i) {
      inputs_[i] = DeviceBuffer(from[i].size_bytes(), "the inputs of attention");
      check(cudaMemcpyAsync(inputs_[i].get(), from[i].data(), from[i].size_bytes(),
                            cudaMemcpyHostToDevice, stream),
            "copying the inputs of attention");
    }
    check(cudaStreamSynchronize(stream), "copying the inputs of attention");
    args_.struct_size = sizeof args_;
    args_.dtype = SAGELM_ATTENTION_F16;
    args_.batch = static_cast<int32_t>(call.batch);
    args_.num_heads = static_cast<int32_t>(call.num_heads);
    args_.num_kv_heads = static_cast<int32_t>(call.num_kv_heads);
    args_.head_dim = static_cast<int32_t>(call.head_dim);
    args_.max_q_len = args_.max_kv_len = static_cast<int32_t>(call.tokens);
    args_.causal = call.causal ? 1 : 0;
    args_.q = tensor(inputs_[0], call.num_heads);
    args_.k = tensor(inputs_[1], call.num_kv_heads);
    args_.v = tensor(inputs_[2], call.num_kv_heads);
    args_.out = tensor(out_, call.num_heads);
    args_.stream = stream;
  }

  double median_seconds(const AttentionSpec& spec, int runs) override {
    args_.variant = attention_variant(spec.variant);
    args_.no_smooth_k = spec.smooth_k ? 0 : 1;
    size_t needed = 0;
    must(sagelm_attention_workspace_bytes(&args_, &needed));
    if (needed > workspace_.bytes()) {
      workspace_ = {};
      workspace_ = DeviceBuffer(needed, "the workspace of attention");
    }
    args_.workspace = workspace_.get();
    args_.workspace_bytes = workspace_.bytes();
    const double seconds = cuda::median_seconds(
        stream_, [&] { must(sagelm_attention(&args_)); }, runs);
    check(cudaStreamSynchronize(stream_), "attention");
    return seconds;
  }

  std::vector<float> output(int64_t batch, int64_t head, int64_t token) const override {
    std::vector<uint16_t> raw(static_cast<size_t>(call_.head_dim));
    const int64_t at = ((batch * call_.num_heads + head) * call_.tokens + token) * call_.head_dim;
    check(cudaMemcpyAsync(raw.data(), out_.get<uint16_t>() + at, raw.size() * sizeof raw[0],
                          cudaMemcpyDeviceToHost, stream_),
          "reading the output of attention");
    check(cudaStreamSynchronize(stream_), "reading the output of attention");
    std::vector<float> row;
    row.reserve(raw.size());
    for (const uint16_t value : raw) row.push_back(half_to_float(value));
    return row;
  }

 private:
  sagelm_attention_tensor tensor(const DeviceBuffer& buffer, int64_t heads) const {
    return {.data = buffer.get(),
            .batch_stride = heads * call_.tokens * call_.head_dim,
            .token_stride = call_.head_dim,
            .head_stride = call_.tokens * call_.head_dim};
  }

  static void must(sagelm_attention_status status) {
    if (status != SAGELM_ATTENTION_OK) fail("attention: {}", sagelm_attention_last_error());
  }

  AttentionCall call_;
  cudaStream_t stream_;
  std::array<DeviceBuffer, 3> inputs_;
  DeviceBuffer out_, workspace_;
  sagelm_attention_args args_ = {};
};

}  // namespace

sagelm_attention_variant attention_variant(AttentionVariant variant) {
  switch (variant) {
    case AttentionVariant::kFp16:
      return SAGELM_ATTENTION_FP16;
    case AttentionVariant::kSage1:
      return SAGELM_ATTENTION_SAGE1;
    case AttentionVariant::kSage2_8b:
      return SAGELM_ATTENTION_SAGE2;
    case AttentionVariant::kSage2_4b:
      return SAGELM_ATTENTION_SAGE2_4B;
    default:
      fail_usage("--attention {} has no CUDA kernel: fp16, sage1, sage2-8b and sage2-4b have",
                 attention_variant_name(variant));
  }
}

std::unique_ptr<AttentionRunner> make_attention_runner(const AttentionCall& call,
                                                       std::span<const uint16_t> q,
                                                       std::span<const uint16_t> k,
                                                       std::span<const uint16_t> v,
                                                       cudaStream_t stream) {
  return std::make_unique<Runner>(call, q, k, v, stream);
}

}  // namespace sagelm::cuda
