#include "backend/cuda/model_attention.h"

#include <algorithm>
#include <cmath>

#include "backend/cuda/attention_runner.h"
#include "backend/cuda/check.h"
#include "backend/cuda/element.h"
#include "kernels/ops/rope_append.h"

namespace sagelm::cuda {
namespace {

// What does not change from layer to layer or batch to batch; type: of the activations.
sagelm_attention_args attention_args(const AttentionShape& shape, DType type) {
  sagelm_attention_args args = {};
  args.struct_size = sizeof args;
  args.variant = attention_variant(shape.spec.variant);
  args.dtype = type == DType::kBF16 ? SAGELM_ATTENTION_BF16 : SAGELM_ATTENTION_F16;
  args.num_heads = static_cast<int32_t>(shape.num_heads);
  args.num_kv_heads = static_cast<int32_t>(shape.num_kv_heads);
  args.head_dim = static_cast<int32_t>(shape.head_dim);
  args.causal = 1;
  args.no_smooth_k = shape.spec.smooth_k ? 0 : 1;
  return args;
}

kernels::QuantizedKvStep quantized_step(const StepInputs& inputs) {
  kernels::QuantizedKvStep step;
  step.rows = inputs.rows;
  step.num_sequences = inputs.num_sequences;
  step.max_q_len = inputs.max_q_len;
  step.max_kv_len = inputs.max_kv_len;
  step.max_closed_pages = inputs.max_closed_pages;
  step.closes_first_page = inputs.closes_first_page;
  step.begins_in_first_page = inputs.begins_in_first_page;
  step.positions = inputs.positions;
  step.slots = inputs.slots;
  step.cu_q_lens = inputs.cu_q_lens;
  step.kv_lens = inputs.kv_lens;
  step.page_table = inputs.page_table;
  step.page_table_stride = inputs.page_table_stride;
  step.tails = inputs.tails;
  step.means = inputs.tails;  // a mean is kept with its sequence's tail
  return step;
}

float softmax_scale(const AttentionShape& shape) {
  return 1.0F / std::sqrt(static_cast<float>(shape.head_dim));
}

// Whether the step's rows over a quantized cache are few enough for the decode kernel.
bool decodes(const StepInputs& step, const AttentionShape& shape) {
  return kernels::quantized_kv_decode_takes(static_cast<int32_t>(shape.num_heads),
                                            static_cast<int32_t>(shape.num_kv_heads),
                                            step.max_q_len);
}

}  // namespace

std::string ModelAttention::problem(const AttentionShape& shape, DType type) {
  sagelm_attention_args args = attention_args(shape, type);
  args.batch = 1;
  args.max_q_len = args.max_kv_len = static_cast<int32_t>(kPageTokens);
  return sagelm_attention_kernel_name(&args) == nullptr ? sagelm_attention_last_error() : "";
}

bool ModelAttention::reads_quantized_kv(const AttentionShape& shape, int capability) {
  return shape.spec.variant == AttentionVariant::kSage2_8b && capability == 90 &&
         kernels::quantized_kv_refusal(static_cast<int32_t>(shape.num_heads),
                                       static_cast<int32_t>(shape.num_kv_heads),
                                       static_cast<int32_t>(shape.head_dim)) == nullptr;
}

void ModelAttention::rope_append(const StepInputs& step, Matrix qkv, const AttentionShape& shape,
                                 std::span<const float> inverse_frequencies, int64_t layer,
                                 const CudaKv& cache) {
  grow_rotations(step.max_kv_len, inverse_frequencies);
  if (cache.type() == KvType::kInt8) {
    kernels::AppendToQuantizedKv args;
    args.cache = cache.quantized(layer, shape.num_heads);
    args.step = quantized_step(step);
    args.qkv = qkv.data;
    args.rotations = rotations_.get<float>();
    args.smooth_k = shape.spec.smooth_k;
    if (!decodes(step, shape)) {
      grow(workspace_, kernels::quantized_kv_prefill_workspace_bytes(args.cache, args.step),
           "the workspace of attention");
      args.prefill = workspace_.get();
      args.softmax_scale = softmax_scale(shape);
    }
    check(kernels::append_to_quantized_kv(args, stream_), "appending to the KV cache");
    return;
  }
  kernels::RopeAppend args;
  args.type = element(qkv.type);
  args.qkv = qkv.data;
  args.rows = qkv.rows;
  args.num_heads = static_cast<int32_t>(shape.num_heads);
  args.num_kv_heads = static_cast<int32_t>(shape.num_kv_heads);
  args.head_dim = static_cast<int32_t>(shape.head_dim);
  args.positions = step.positions;
  args.slots = step.slots;
  args.rotations = rotations_.get<float>();
  args.keys = cache.keys(layer);
  args.values = cache.values(layer);
  check(kernels::rope_append(args, stream_), "the rotary embedding");
}

void ModelAttention::attention(const StepInputs& step, Matrix qkv, const AttentionShape& shape,
                               int64_t layer, const CudaKv& cache, Matrix out) {
  const int64_t dim = shape.head_dim;
  if (cache.type() == KvType::kInt8) {
    attend_quantized(step, qkv, shape, layer, cache, out);
    return;
  }
  sagelm_attention_args args = attention_args(shape, qkv.type);
  args.batch = step.num_sequences;
  args.max_q_len = step.max_q_len;
  args.max_kv_len = step.max_kv_len;
  args.q = {.data = qkv.data, .batch_stride = 0, .token_stride = qkv.cols, .head_stride = dim};
  args.out = {.data = out.data, .batch_stride = 0, .token_stride = out.cols, .head_stride = dim};
  args.cu_q_lens = step.cu_q_lens;
  args.k.token_stride = shape.num_kv_heads * dim;
  args.k.head_stride = dim;
  args.k.batch_stride = kPageTokens * shape.num_kv_heads * dim;
  args.v = args.k;
  args.k.data = cache.keys(layer);
  args.v.data = cache.values(layer);
  args.kv_lens = step.kv_lens;
  args.page_table = step.page_table;
  args.page_table_stride = step.page_table_stride;
  args.page_tokens = static_cast<int32_t>(kPageTokens);
  args.stream = stream_;
  const auto run = [&](sagelm_attention_status status) {
    if (status != SAGELM_ATTENTION_OK) {
      fail("the attention of layer {} ({}): {}", layer, attention_variant_name(shape.spec.variant),
           sagelm_attention_last_error());
    }
  };
  size_t needed = 0;
  run(sagelm_attention_workspace_bytes(&args, &needed));
  grow(workspace_, needed, "the workspace of attention");
  args.workspace = workspace_.get();
  args.workspace_bytes = workspace_.bytes();
  run(sagelm_attention(&args));
}

int64_t ModelAttention::memory_bytes() const {
  int64_t bytes = 0;
  for (const DeviceBuffer* buffer : {&workspace_, &rotations_, &frequencies_}) {
    bytes += static_cast<int64_t>(buffer->bytes());
  }
  return bytes;
}

// From the quantized pages themselves. Prefill's queries are where rope_append has left them.
void ModelAttention::attend_quantized(const StepInputs& inputs, Matrix qkv,
                                      const AttentionShape& shape, int64_t layer,
                                      const CudaKv& cache, Matrix out) {
  const kernels::QuantizedKv view = cache.quantized(layer, shape.num_heads);
  const kernels::QuantizedKvStep step = quantized_step(inputs);
  if (!decodes(inputs, shape)) {
    check(kernels::prefill_from_quantized_kv(
              {.cache = view, .step = step, .out = out.data, .out_stride = out.cols},
              workspace_.get(), stream_),
          "attention from the quantized cache");
    return;
  }
  kernels::DecodeFromQuantizedKv args;
  args.cache = view;
  args.step = step;
  args.queries = qkv.data;
  args.query_stride = qkv.cols;
  args.out = out.data;
  args.out_stride = out.cols;
  args.softmax_scale = softmax_scale(shape);
  grow(workspace_, kernels::quantized_kv_decode_workspace_bytes(args),
       "the workspace of attention");
  check(kernels::decode_from_quantized_kv(args, workspace_.get(), stream_),
        "attention from the quantized cache");
}

// Makes buffer hold at least so many bytes; what it held is lost.
void ModelAttention::grow(DeviceBuffer& buffer, size_t bytes, std::string_view what) {
  if (bytes <= buffer.bytes()) return;
  graphs_->clear();
  buffer = {};  // waits for what still uses it
  buffer = DeviceBuffer(bytes, what);
}

// Makes rotations_ hold at least `positions` positions.
void ModelAttention::grow_rotations(int64_t positions, std::span<const float> inverse_frequencies) {
  const bool same = std::equal(inverse_frequencies.begin(), inverse_frequencies.end(),
                               rotated_by_.begin(), rotated_by_.end());
  if (same && positions <= num_rotations_) return;
  constexpr int64_t kStep = 4096;
  const int64_t count = (positions + kStep - 1) / kStep * kStep;
  const size_t half = inverse_frequencies.size();
  if (!same || frequencies_.bytes() == 0) {
    rotated_by_.assign(inverse_frequencies.begin(), inverse_frequencies.end());
    frequencies_ = DeviceBuffer(half * sizeof(float), "the rotary frequencies");
    check(cudaMemcpyAsync(frequencies_.get(), rotated_by_.data(), half * sizeof(float),
                          cudaMemcpyHostToDevice, stream_),
          "copying the rotary frequencies");
  }
  grow(rotations_, static_cast<size_t>(count) * 2 * half * sizeof(float), "the rotary embedding");
  check(kernels::fill_rotations(frequencies_.get<float>(), static_cast<int32_t>(half), count,
                                rotations_.get<float>(), stream_),
        "the rotary embedding");
  num_rotations_ = count;
}

}  // namespace sagelm::cuda
