#include "backend/cuda/model_attention.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "backend/cuda/attention_runner.h"
#include "backend/cuda/check.h"
#include "backend/cuda/element.h"
#include "kernels/attention/mma_decode.h"
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

kernels::DecodeFromQuantizedKv quantized_decode(const StepInputs& step, Matrix qkv,
                                                const AttentionShape& shape, int64_t layer,
                                                const CudaKv& cache, Matrix out) {
  kernels::DecodeFromQuantizedKv args;
  args.cache = cache.quantized(layer, shape.num_heads);
  args.step = quantized_step(step);
  args.queries = qkv.data;
  args.query_stride = qkv.cols;
  args.out = out.data;
  args.out_stride = out.cols;
  args.softmax_scale = softmax_scale(shape);
  return args;
}

// Of a token of every sequence, by the FP16 kernel over a cache of the activations' type.
kernels::Problem half_decode(const StepInputs& step, Matrix qkv, const AttentionShape& shape,
                             int64_t layer, const CudaKv& cache, Matrix out) {
  const int64_t dim = shape.head_dim, token = shape.num_kv_heads * dim;
  kernels::Problem p = {};
  p.q = {qkv.data, qkv.cols, qkv.cols, dim};
  p.out = {out.data, out.cols, out.cols, dim};
  p.k = {cache.keys(layer), kPageTokens * token, token, dim};
  p.v = {cache.values(layer), kPageTokens * token, token, dim};
  p.kv_lens = step.kv_lens;
  p.page_table = step.page_table;
  p.page_table_stride = step.page_table_stride;
  p.page_tokens = static_cast<int32_t>(kPageTokens);
  p.batch = step.num_sequences;
  p.num_heads = static_cast<int32_t>(shape.num_heads);
  p.num_kv_heads = static_cast<int32_t>(shape.num_kv_heads);
  p.head_dim = static_cast<int32_t>(dim);
  p.max_q_len = step.max_q_len;
  p.max_kv_len = step.max_kv_len;
  p.softmax_scale = softmax_scale(shape);
  p.causal = true;
  p.bf16 = qkv.type == DType::kBF16;
  return p;
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
    args.rotate_keys = true;  // attention reads them where sequences begin
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
  if (cache.type() == KvType::kInt8 && decode_quantized(step, qkv, shape, layer, cache, out)) {
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
  if (cache.type() == KvType::kFp16) {
    args.k.batch_stride = kPageTokens * shape.num_kv_heads * dim;
    args.v = args.k;
    args.k.data = cache.keys(layer);
    args.v.data = cache.values(layer);
    args.kv_lens = step.kv_lens;
    args.page_table = step.page_table;
    args.page_table_stride = step.page_table_stride;
    args.page_tokens = static_cast<int32_t>(kPageTokens);
  } else if (step.begins_all) {
    // All keys and values are in this step's rows.
    auto* rows = static_cast<std::byte*>(qkv.data);
    const auto size = static_cast<int64_t>(dtype_size(qkv.type));
    args.k.token_stride = qkv.cols;
    args.v = args.k;
    args.k.data = rows + shape.num_heads * dim * size;
    args.v.data = rows + (shape.num_heads + shape.num_kv_heads) * dim * size;
    args.cu_kv_lens = step.cu_kv_lens;
  } else {
    args.v = args.k;
    std::tie(args.k.data, args.v.data) = expand(step, cache, qkv, shape, layer);
    args.cu_kv_lens = step.cu_kv_lens;
  }
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

void ModelAttention::append_and_attend(const StepInputs& step, Matrix qkv,
                                       const AttentionShape& shape,
                                       std::span<const float> inverse_frequencies, int64_t layer,
                                       const CudaKv& cache, Matrix out) {
  grow_rotations(step.max_kv_len, inverse_frequencies);
  if (decode_step(step, qkv, shape, layer, cache, out)) return;
  rope_append(step, qkv, shape, inverse_frequencies, layer, cache);
  attention(step, qkv, shape, layer, cache, out);
}

// One token of every sequence, by one kernel that appends it too; false if there is none for it.
bool ModelAttention::decode_step(const StepInputs& step, Matrix qkv, const AttentionShape& shape,
                                 int64_t layer, const CudaKv& cache, Matrix out) {
  if (step.max_q_len != 1 || step.rows != step.num_sequences) return false;
  const auto prepare = [&](size_t workspace_bytes) {
    grow(workspace_, workspace_bytes, "the workspace of attention");
    const auto bytes =
        static_cast<size_t>(step.num_sequences * shape.num_kv_heads) * sizeof(uint32_t);
    if (bytes <= arrivals_.bytes()) return;
    grow(arrivals_, bytes, "the workspace of attention");
    check(cudaMemsetAsync(arrivals_.get(), 0, bytes, stream_), "attention");
  };
  if (cache.type() == KvType::kInt8) {
    kernels::DecodeFromQuantizedKv args = quantized_decode(step, qkv, shape, layer, cache, out);
    if (!kernels::quantized_kv_decode_takes(args) ||
        !kernels::quantized_kv_decode_appends(args.cache, args.step)) {
      return false;
    }
    prepare(kernels::quantized_kv_decode_workspace_bytes(args));
    args.rotations = rotations_.get<float>();
    args.arrivals = arrivals_.get<uint32_t>();
    check(kernels::decode_from_quantized_kv(args, workspace_.get(), stream_),
          "attention from the quantized cache");
    return true;
  }
  kernels::Problem p = half_decode(step, qkv, shape, layer, cache, out);
  if (shape.spec.variant != AttentionVariant::kFp16 || !kernels::mma_decode_appends(p)) {
    return false;
  }
  prepare(kernels::mma_decode_workspace_bytes(p));
  p.rotations = rotations_.get<float>();
  p.arrivals = arrivals_.get<uint32_t>();
  check(kernels::mma_decode(p, workspace_.get(), stream_), "attention");
  return true;
}

int64_t ModelAttention::memory_bytes() const {
  int64_t bytes = static_cast<int64_t>(arrivals_.bytes());
  for (const DeviceBuffer* buffer :
       {&workspace_, &expanded_keys_, &expanded_values_, &rotations_, &frequencies_}) {
    bytes += static_cast<int64_t>(buffer->bytes());
  }
  return bytes;
}

// The attention of few rows, from the quantized pages themselves; false if there are too many.
bool ModelAttention::decode_quantized(const StepInputs& step, Matrix qkv,
                                      const AttentionShape& shape, int64_t layer,
                                      const CudaKv& cache, Matrix out) {
  const kernels::DecodeFromQuantizedKv args = quantized_decode(step, qkv, shape, layer, cache, out);
  if (!kernels::quantized_kv_decode_takes(args)) return false;
  grow(workspace_, kernels::quantized_kv_decode_workspace_bytes(args),
       "the workspace of attention");
  check(kernels::decode_from_quantized_kv(args, workspace_.get(), stream_),
        "attention from the quantized cache");
  return true;
}

// Keys and values of a layer of the quantized cache as plain tensors.
std::pair<void*, void*> ModelAttention::expand(const StepInputs& step, const CudaKv& cache,
                                               Matrix qkv, const AttentionShape& shape,
                                               int64_t layer) {
  const auto bytes = static_cast<size_t>(step.kv_tokens * shape.num_kv_heads * shape.head_dim) *
                     dtype_size(qkv.type);
  grow(expanded_keys_, bytes, "the keys of a quantized cache");
  grow(expanded_values_, bytes, "the values of a quantized cache");
  kernels::ExpandQuantizedKv args;
  args.cache = cache.quantized(layer, shape.num_heads);
  args.step = quantized_step(step);
  args.cu_kv_lens = step.cu_kv_lens;
  args.keys = expanded_keys_.get();
  args.values = expanded_values_.get();
  check(kernels::expand_quantized_kv(args, stream_), "reading the quantized cache");
  return {expanded_keys_.get(), expanded_values_.get()};
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
