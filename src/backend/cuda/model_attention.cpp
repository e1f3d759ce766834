#include "backend/cuda/model_attention.h"

#include <algorithm>
#include <cmath>

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

kernels::DecodeFromQuantizedKv decode_args(const AttentionShape& shape, const StepInputs& step) {
  kernels::DecodeFromQuantizedKv args;
  args.cache.num_heads = static_cast<int32_t>(shape.num_heads);
  args.cache.num_kv_heads = static_cast<int32_t>(shape.num_kv_heads);
  args.cache.head_dim = static_cast<int32_t>(shape.head_dim);
  args.step = quantized_step(step);
  args.softmax_scale = softmax_scale(shape);
  return args;
}

// Whether a step's attention over a quantized cache is the prefill kernel's: of more rows than the
// decode kernel takes.
bool prefills_from_pages(const StepInputs& step, const AttentionShape& shape, const CudaKv& cache) {
  return is_quantized(cache.type()) &&
         !kernels::quantized_kv_decode_takes(decode_args(shape, step));
}

// Rotates heads of rows in place, from column `first` on.
void rotate(const StepInputs& step, Matrix qkv, const AttentionShape& shape, int64_t first,
            int64_t heads, const float* rotations, cudaStream_t stream, int64_t layer) {
  kernels::RopeAppend args;
  args.type = element(qkv.type);
  args.qkv = static_cast<std::byte*>(qkv.data) + first * static_cast<int64_t>(dtype_size(qkv.type));
  args.row_stride = qkv.cols;
  args.rows = qkv.rows;
  args.num_heads = static_cast<int32_t>(heads);
  args.head_dim = static_cast<int32_t>(shape.head_dim);
  args.positions = step.positions;
  args.rotations = rotations;
  check(kernels::rope_append(args, stream), "the rotary embedding", layer);
}

// Of sequences of at most so many query rows and keys.
size_t workspace_for(const AttentionShape& shape, DType type, int64_t sequences, int64_t q_len,
                     int64_t kv_len) {
  StepInputs step;
  step.num_sequences = static_cast<int32_t>(sequences);
  step.max_q_len = static_cast<int32_t>(q_len);
  step.max_kv_len = static_cast<int32_t>(kv_len);
  sagelm_attention_args args = attention_args(shape, type);
  args.batch = step.num_sequences;
  args.max_q_len = step.max_q_len;
  args.max_kv_len = step.max_kv_len;
  args.causal = 0;  // nothing is known of the sequences' lengths
  size_t bytes = 0;
  if (sagelm_attention_workspace_bytes(&args, &bytes) != SAGELM_ATTENTION_OK) {
    fail("attention {}: {}", attention_variant_name(shape.spec.variant),
         sagelm_attention_last_error());
  }
  const kernels::DecodeFromQuantizedKv decode = decode_args(shape, step);
  if (kernels::quantized_kv_decode_takes(decode)) {
    bytes = std::max(bytes, kernels::quantized_kv_decode_workspace_bytes(decode));
  }
  return bytes;
}

// Of a token of every sequence, by the FP16 kernel over a cache of the activations' type; without
// what differs between groups of sequences.
kernels::Problem half_decode(const StepInputs& step, Matrix qkv, const AttentionShape& shape,
                             int64_t layer, const CudaKv& cache) {
  const int64_t dim = shape.head_dim, token = shape.num_kv_heads * dim;
  kernels::Problem p = {};
  p.k = {cache.keys(layer), kPageTokens * token, token, dim};
  p.v = {cache.values(layer), kPageTokens * token, token, dim};
  p.page_table_stride = step.page_table_stride;
  p.page_tokens = static_cast<int32_t>(kPageTokens);
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

AttentionRoom ModelAttention::room(const StepLimits& limits, DType type) {
  // Kernels for few rows take up to so many of a sequence.
  constexpr int64_t kDecodeRows = 16;
  const int64_t context = decode_length(limits.context);
  AttentionRoom room;
  for (const AttentionShape& shape : limits.attention) {
    const auto allow = [&](int64_t sequences, int64_t q_len, int64_t kv_len) {
      room.workspace =
          std::max(room.workspace, workspace_for(shape, type, sequences, q_len, kv_len));
    };
    // The longest sequence by itself, and as many short ones as a step has: other steps are done in
    // groups of sequences where that is not enough.
    for (int64_t rows = 1; rows <= std::min(kDecodeRows, limits.tokens); ++rows) {
      allow(1, rows, context);
    }
    allow(1, limits.tokens, context);
    allow(limits.sequences, kPageTokens, kPageTokens);
    StepInputs prefill;
    prefill.rows = static_cast<int32_t>(limits.tokens);
    prefill.num_sequences = static_cast<int32_t>(limits.sequences);
    kernels::DecodeFromQuantizedKv args = decode_args(shape, prefill);
    args.cache.int4_keys = true;  // takes the most
    const auto allow_prefill = [&](int64_t sequences_at_once, int64_t kv_len) {
      args.step.max_kv_len = static_cast<int32_t>(kv_len);
      room.workspace = std::max(
          room.workspace, kernels::quantized_kv_prefill_workspace_bytes(
                              args.cache, args.step, static_cast<int32_t>(sequences_at_once)));
    };
    if (reads_quantized_kv(shape.spec.variant, KvType::kInt4)) {
      allow_prefill(1, context);
      allow_prefill(limits.sequences, kPageTokens);
    }
    room.rotations = context;
    room.arrivals = std::max(room.arrivals, limits.sequences * shape.num_kv_heads);
    room.rotation_bytes =
        static_cast<size_t>((2 * context + 1) * (shape.head_dim / 2)) * sizeof(float) +
        static_cast<size_t>(room.arrivals) * sizeof(uint32_t);
  }
  return room;
}

void ModelAttention::set_memory(const AttentionRoom& room, void* rotations, void* workspace,
                                size_t workspace_bytes) {
  workspace_ = workspace;
  workspace_bytes_ = workspace_bytes;
  if (rotations_ == rotations && num_rotations_ == room.rotations &&
      num_arrivals_ == room.arrivals) {
    return;
  }
  rotations_ = static_cast<float*>(rotations);
  num_rotations_ = room.rotations;
  num_arrivals_ = room.arrivals;
  rotated_by_.clear();
}

std::string ModelAttention::problem(const AttentionShape& shape, DType type) {
  sagelm_attention_args args = attention_args(shape, type);
  args.batch = 1;
  args.max_q_len = args.max_kv_len = static_cast<int32_t>(kPageTokens);
  return sagelm_attention_kernel_name(&args) == nullptr ? sagelm_attention_last_error() : "";
}

bool ModelAttention::reads_kv(const AttentionShape& shape, KvType type, int capability) {
  return reads_quantized_kv(shape.spec.variant, type) && capability == 90 &&
         kernels::quantized_kv_refusal(static_cast<int32_t>(shape.num_heads),
                                       static_cast<int32_t>(shape.num_kv_heads),
                                       static_cast<int32_t>(shape.head_dim)) == nullptr;
}

void ModelAttention::rope_append(const StepInputs& step, Matrix qkv, const AttentionShape& shape,
                                 std::span<const float> inverse_frequencies, int64_t layer,
                                 const CudaKv& cache) {
  append(step, qkv, shape, inverse_frequencies, layer, cache);
  // What the append leaves as it was.
  const int64_t done = prefills_from_pages(step, shape, cache) ? 0 : shape.num_heads;
  rotate(step, qkv, shape, done * shape.head_dim, shape.num_heads + shape.num_kv_heads - done,
         rotations_, stream_, layer);
}

void ModelAttention::append(const StepInputs& step, Matrix qkv, const AttentionShape& shape,
                            std::span<const float> inverse_frequencies, int64_t layer,
                            const CudaKv& cache) {
  prepare_rotations(step.max_kv_len, inverse_frequencies);
  if (is_quantized(cache.type())) {
    kernels::AppendToQuantizedKv args;
    args.cache = cache.quantized(layer, shape.num_heads);
    args.step = quantized_step(step);
    args.qkv = qkv.data;
    args.rotations = rotations_;
    args.smooth_k = shape.spec.smooth_k;
    if (step.num_sequences * shape.num_kv_heads <= num_arrivals_) args.arrivals = arrivals_;
    if (prefills_from_pages(step, shape, cache)) {
      if (kernels::quantized_kv_prefill_workspace_bytes(args.cache, args.step) > workspace_bytes_) {
        fail("the attention of layer {} takes more workspace than was set aside", layer);
      }
      args.prefill = workspace_;
      args.softmax_scale = softmax_scale(shape);
    }
    check(kernels::append_to_quantized_kv(args, stream_), "appending to the KV cache", layer);
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
  args.rotations = rotations_;
  args.keys = cache.keys(layer);
  args.values = cache.values(layer);
  args.rotate_keys = false;
  check(kernels::rope_append(args, stream_), "the rotary embedding", layer);
}

void ModelAttention::attention(const StepInputs& step, Matrix qkv, const AttentionShape& shape,
                               int64_t layer, const CudaKv& cache, Matrix out) {
  const int64_t dim = shape.head_dim;
  if (prefills_from_pages(step, shape, cache)) {
    // The queries are where the append has left them.
    check(kernels::prefill_from_quantized_kv({.cache = cache.quantized(layer, shape.num_heads),
                                              .step = quantized_step(step),
                                              .out = out.data,
                                              .out_stride = out.cols},
                                             workspace_, workspace_bytes_, stream_),
          "the attention from the quantized cache", layer);
    return;
  }
  if (is_quantized(cache.type())) return decode_quantized(step, qkv, shape, layer, cache, out);
  sagelm_attention_args args = attention_args(shape, qkv.type);
  args.batch = step.num_sequences;
  args.max_q_len = step.max_q_len;
  args.max_kv_len = step.max_kv_len;
  args.q = {.data = qkv.data, .batch_stride = 0, .token_stride = qkv.cols, .head_stride = dim};
  args.out = {.data = out.data, .batch_stride = 0, .token_stride = out.cols, .head_stride = dim};
  args.cu_q_lens = step.cu_q_lens;
  args.k = {.data = cache.keys(layer),
            .batch_stride = kPageTokens * shape.num_kv_heads * dim,
            .token_stride = shape.num_kv_heads * dim,
            .head_stride = dim};
  args.v = args.k;
  args.v.data = cache.values(layer);
  args.page_table_stride = step.page_table_stride;
  args.page_tokens = static_cast<int32_t>(kPageTokens);
  args.stream = stream_;
  const auto run = [&](sagelm_attention_status status) {
    if (status != SAGELM_ATTENTION_OK) {
      fail("the attention of layer {} ({}): {}", layer, attention_variant_name(shape.spec.variant),
           sagelm_attention_last_error());
    }
  };
  args.workspace = workspace_;
  args.workspace_bytes = workspace_bytes_;
  const auto bytes = [&](int32_t count) {
    args.batch = count;
    size_t needed = 0;
    run(sagelm_attention_workspace_bytes(&args, &needed));
    return needed;
  };
  in_groups(step, bytes, [&](const StepInputs& part) {
    args.batch = part.num_sequences;
    args.cu_q_lens = part.cu_q_lens;
    args.kv_lens = part.kv_lens;
    args.page_table = part.page_table;
    run(sagelm_attention(&args));
  });
}

template <typename Bytes, typename Run>
void ModelAttention::in_groups(const StepInputs& step, const Bytes& bytes, const Run& run) const {
  int32_t count = step.num_sequences;
  while (count > 1 && bytes(count) > workspace_bytes_) count = (count + 1) / 2;
  if (bytes(count) > workspace_bytes_) fail("attention takes more workspace than was set aside");
  for (int32_t first = 0; first < step.num_sequences; first += count) {
    run(sequences_of(step, first, std::min(count, step.num_sequences - first)));
  }
}

void ModelAttention::append_and_attend(const StepInputs& step, Matrix qkv,
                                       const AttentionShape& shape,
                                       std::span<const float> inverse_frequencies, int64_t layer,
                                       const CudaKv& cache, Matrix out) {
  prepare_rotations(step.max_kv_len, inverse_frequencies);
  if (append_in_decode(step, qkv, shape, layer, cache, out)) return;
  append(step, qkv, shape, inverse_frequencies, layer, cache);
  attention(step, qkv, shape, layer, cache, out);
}

// One token of every sequence, by one kernel that appends it too; false if there is none for it.
bool ModelAttention::append_in_decode(const StepInputs& step, Matrix qkv,
                                      const AttentionShape& shape, int64_t layer,
                                      const CudaKv& cache, Matrix out) {
  if (step.max_q_len != 1 || step.rows != step.num_sequences ||
      step.num_sequences * shape.num_kv_heads > num_arrivals_) {
    return false;
  }
  const auto row_of = [&](const StepInputs& part, Matrix x) {
    const int64_t first = part.kv_lens - step.kv_lens;
    return static_cast<std::byte*>(x.data) +
           first * x.cols * static_cast<int64_t>(dtype_size(x.type));
  };
  if (is_quantized(cache.type())) {
    kernels::DecodeFromQuantizedKv args = decode_args(shape, step);
    args.cache = cache.quantized(layer, shape.num_heads);
    if (!kernels::quantized_kv_decode_takes(args) ||
        !kernels::quantized_kv_decode_appends(args.cache, args.step)) {
      return false;
    }
    args.query_stride = qkv.cols;
    args.out_stride = out.cols;
    args.rotations = rotations_;
    args.arrivals = arrivals_;
    const auto bytes = [&](int32_t count) {
      args.step.num_sequences = count;
      return kernels::quantized_kv_decode_workspace_bytes(args);
    };
    in_groups(step, bytes, [&](const StepInputs& part) {
      args.step = quantized_step(part);
      args.step.rows = part.num_sequences;
      args.queries = row_of(part, qkv);
      args.out = row_of(part, out);
      check(kernels::decode_from_quantized_kv(args, workspace_, stream_),
            fmt::format("attention from the quantized cache in layer {}", layer));
    });
    return true;
  }
  kernels::Problem p = half_decode(step, qkv, shape, layer, cache);
  if (shape.spec.variant != AttentionVariant::kFp16 || !kernels::mma_decode_appends(p)) {
    return false;
  }
  p.rotations = rotations_;
  p.arrivals = arrivals_;
  const auto bytes = [&](int32_t count) {
    p.batch = count;
    return kernels::mma_decode_workspace_bytes(p);
  };
  in_groups(step, bytes, [&](const StepInputs& part) {
    p.batch = part.num_sequences;
    p.kv_lens = part.kv_lens;
    p.page_table = part.page_table;
    p.q = {row_of(part, qkv), qkv.cols, qkv.cols, shape.head_dim};
    p.out = {row_of(part, out), out.cols, out.cols, shape.head_dim};
    check(kernels::mma_decode(p, workspace_, stream_), fmt::format("attention in layer {}", layer));
  });
  return true;
}

// The attention of few rows, from the quantized pages themselves.
void ModelAttention::decode_quantized(const StepInputs& step, Matrix qkv,
                                      const AttentionShape& shape, int64_t layer,
                                      const CudaKv& cache, Matrix out) {
  kernels::DecodeFromQuantizedKv args = decode_args(shape, step);
  args.cache = cache.quantized(layer, shape.num_heads);
  args.queries = qkv.data;
  args.query_stride = qkv.cols;
  args.out = out.data;
  args.out_stride = out.cols;
  const auto bytes = [&](int32_t count) {
    args.step.num_sequences = count;
    return kernels::quantized_kv_decode_workspace_bytes(args);
  };
  in_groups(step, bytes, [&](const StepInputs& part) {
    args.step = quantized_step(part);
    check(kernels::decode_from_quantized_kv(args, workspace_, stream_),
          "the attention from the quantized cache", layer);
  });
}

// Fills rotations_, which must have room for so many positions.
void ModelAttention::prepare_rotations(int64_t positions,
                                       std::span<const float> inverse_frequencies) {
  if (positions > num_rotations_) {
    fail("a sequence of {} tokens is longer than the {} that memory was set aside for", positions,
         num_rotations_);
  }
  if (std::equal(inverse_frequencies.begin(), inverse_frequencies.end(), rotated_by_.begin(),
                 rotated_by_.end())) {
    return;
  }
  rotated_by_.assign(inverse_frequencies.begin(), inverse_frequencies.end());
  const auto half = static_cast<int64_t>(rotated_by_.size());
  float* frequencies = rotations_ + 2 * num_rotations_ * half;
  check(cudaMemcpyAsync(frequencies, rotated_by_.data(), rotated_by_.size() * sizeof(float),
                        cudaMemcpyHostToDevice, stream_),
        "copying the rotary frequencies");
  check(kernels::fill_rotations(frequencies, static_cast<int32_t>(half), num_rotations_, rotations_,
                                stream_),
        "the rotary embedding");
  arrivals_ = reinterpret_cast<uint32_t*>(frequencies + half);
  check(
      cudaMemsetAsync(arrivals_, 0, static_cast<size_t>(num_arrivals_) * sizeof(uint32_t), stream_),
      "clearing counters");
}

}  // namespace sagelm::cuda
