#include "backend/cuda/cuda_backend.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "backend/cuda/attention_runner.h"
#include "backend/cuda/ceilings.h"
#include "backend/cuda/check.h"
#include "backend/cuda/device.h"
#include "backend/cuda/element.h"
#include "backend/cuda/graph_cache.h"
#include "backend/cuda/kv_storage.h"
#include "backend/cuda/linear.h"
#include "backend/cuda/memory.h"
#include "backend/cuda/step_inputs.h"
#include "backend/cuda/upload.h"
#include "base/error.h"
#include "kernels/cache/quantized_kv.h"
#include "kernels/ops/gemv.h"
#include "kernels/ops/rmsnorm.h"
#include "kernels/ops/rope_append.h"
#include "kernels/ops/rows.h"
#include "kernels/ops/score.h"
#include "kernels/ops/swiglu.h"
#include "sagelm/attention.h"

namespace sagelm {
namespace cuda {
namespace {

class CudaBackend : public Backend {
 public:
  explicit CudaBackend(int device)
      : device_(device),
        properties_(device_properties(device)),
        stream_(make_stream()),
        linear_(stream_.get()),
        graphs_(stream_.get()),
        scores_(kScoreRows * sizeof(kernels::RowScore), "scores"),
        flag_(sizeof(int32_t), "a flag") {}

  ~CudaBackend() override { cudaStreamSynchronize(stream_.get()); }

  std::string device_name() const override {
    std::string types;
    if (type_) {
      types = fmt::format(", {}{}", dtype_name(*type_), rounded_ ? " rounded from F32" : "");
    }
    return fmt::format("cuda:{} ({}, sm_{}, {:.0f} GiB{})", device_, properties_.name,
                       properties_.capability,
                       static_cast<double>(properties_.memory_bytes) / (1 << 30), types);
  }

  int64_t memory_bytes() const override {
    int64_t bytes = weight_bytes_ + linear_.memory_bytes();
    for (const DeviceBuffer& buffer : scratch_) bytes += static_cast<int64_t>(buffer.bytes());
    for (const DeviceBuffer* buffer :
         {&attention_workspace_, &rotations_, &frequencies_, &scores_}) {
      bytes += static_cast<int64_t>(buffer->bytes());
    }
    return bytes;
  }

  DType product_type(DType stored) const override {
    return stored == DType::kF32 ? DType::kF16 : stored;
  }

  WeightHandle add_linear(std::span<const TensorView> stacked) override {
    Weight weight;
    for (const TensorView& tensor : stacked) weight.rows += tensor.shape.at(0);
    weight.cols = stacked.front().shape.at(1);
    return add_weight(stacked, choose_type(stacked.front()), weight);
  }

  WeightHandle add_vector(const TensorView& tensor) override {
    return add_weight({&tensor, 1}, DType::kF32, {.rows = 1, .cols = tensor.num_elements()});
  }

  WeightHandle add_embedding(const TensorView& tensor) override {
    const WeightHandle handle = add_linear({&tensor, 1});
    weights_.back().embedding = tensor.data;
    return handle;
  }

  std::unique_ptr<KvStorage> make_kv(const KvLayout& layout) override {
    use_device();
    graphs_.clear();  // an earlier cache may have lain where this one will
    return std::make_unique<CudaKv>(layout, type_.value_or(DType::kF16), stream_.get());
  }

  Matrix scratch(int slot, int64_t rows, int64_t cols, Holds holds) override {
    const auto index = static_cast<size_t>(slot);
    if (index >= scratch_.size()) scratch_.resize(index + 1);
    DeviceBuffer& buffer = scratch_[index];
    const DType type = holds == Holds::kActivations ? type_.value_or(DType::kF16) : DType::kF32;
    const auto row_bytes = static_cast<size_t>(cols) * dtype_size(type);
    if (buffer.bytes() < static_cast<size_t>(rows) * row_bytes) {
      use_device();
      const int64_t step = rows <= kFewRows ? kFewRows : kRowStep;
      grow(buffer, static_cast<size_t>((rows + step - 1) / step * step) * row_bytes,
           fmt::format("the activations of {} tokens", rows));
    }
    return {buffer.get(), type, rows, cols};
  }

  size_t element_size(Holds holds) const override {
    return holds == Holds::kActivations ? sizeof(uint16_t) : sizeof(float);
  }

  void check_attention(const AttentionShape& shape) const override {
    sagelm_attention_args args = attention_args(shape);
    args.batch = 1;
    args.max_q_len = args.max_kv_len = static_cast<int32_t>(kPageTokens);
    if (sagelm_attention_kernel_name(&args) == nullptr) {
      fail("attention {} with heads of {} on {}: {}", attention_variant_name(shape.spec.variant),
           shape.head_dim, properties_.name, sagelm_attention_last_error());
    }
  }

  bool reads_int8_kv(const AttentionShape& shape) const override {
    return shape.spec.variant == AttentionVariant::kSage2_8b && properties_.capability == 90 &&
           kernels::quantized_kv_refusal(static_cast<int32_t>(shape.num_heads),
                                         static_cast<int32_t>(shape.num_kv_heads),
                                         static_cast<int32_t>(shape.head_dim)) == nullptr;
  }

  void begin(const Batch& batch) override {
    use_device();
    uploader_.reset();  // the weights are there
    step_ = send_step_inputs(batch, step_arrays_, stream_.get());
  }

  void repeat(const KvStorage& kv, const AttentionSpec& spec,
              const std::function<void()>& work) override {
    const auto& cache = static_cast<const CudaKv&>(kv);
    graphs_.run({step_.num_sequences, step_.max_kv_len, step_.page_table_stride, step_.tokens,
                 cache.address(), static_cast<int32_t>(spec.variant), spec.smooth_k,
                 step_.max_closed_pages, step_.closes_first_page},
                work);
  }

  void embed(WeightHandle table, const Batch& batch, Matrix out) override {
    const Weight& weight = weight_of(table);
    for (const int32_t token : batch.tokens) {
      if (token < 0 || token >= weight.rows) {
        fail("token id {} is outside the model's vocabulary of {}", token, weight.rows);
      }
    }
    check(kernels::copy_rows(weight.data(), element(weight.type), step_.tokens, out.rows, out.cols,
                             static_cast<float*>(out.data), stream_.get()),
          "the embedding");
  }

  void rmsnorm(Matrix x, WeightHandle weight, double eps, Matrix out) override {
    check(kernels::rmsnorm(static_cast<const float*>(x.data),
                           static_cast<const float*>(weight_of(weight).data()), x.rows, x.cols,
                           static_cast<float>(eps), element(out.type), out.data, stream_.get()),
          "a normalisation");
  }

  void linear(Matrix x, WeightHandle weight, Matrix out) override {
    linear_.run(product(x, weight, out));
  }
  void linear_add(Matrix x, WeightHandle weight, Matrix out) override {
    Product sum = product(x, weight, out);
    sum.accumulate = true;
    linear_.run(sum);
  }

  void linear_swiglu(Matrix x, WeightHandle weight, Matrix gate_up, Matrix out) override {
    if (x.rows <= kernels::kGemvRows) {
      Product fused = product(x, weight, out);
      fused.swiglu = true;
      fused.out_features = out.cols;
      linear_.run(fused);
      return;
    }
    linear(x, weight, gate_up);
    check(kernels::swiglu(gate_up.data, element(out.type), out.rows, out.cols, out.data,
                          stream_.get()),
          "the gated activation");
  }

  void gather_rows(Matrix x, std::span<const int32_t> rows, Matrix out) override {
    for (const int32_t row : rows) {
      if (row < 0 || row >= x.rows) fail("row {} is outside a matrix of {}", row, x.rows);
    }
    check(kernels::copy_rows(x.data, element(x.type), gathered_.send(rows, stream_.get()), out.rows,
                             out.cols, static_cast<float*>(out.data), stream_.get()),
          "gathering rows");
  }

  void rope_append(Matrix qkv, const Batch& /*batch*/, const AttentionShape& shape,
                   std::span<const float> inverse_frequencies, int64_t layer,
                   KvStorage& kv) override {
    auto& cache = static_cast<CudaKv&>(kv);
    grow_rotations(step_.max_kv_len, inverse_frequencies);
    if (cache.type() == KvType::kInt8) {
      kernels::AppendToQuantizedKv args;
      args.cache = cache.quantized(layer, shape.num_heads);
      args.step = quantized_step();
      args.qkv = qkv.data;
      args.rotations = rotations_.get<float>();
      args.smooth_k = shape.spec.smooth_k;
      if (!decodes(shape)) {
        grow(attention_workspace_,
             kernels::quantized_kv_prefill_workspace_bytes(args.cache, args.step),
             "the workspace of attention");
        args.prefill = attention_workspace_.get();
        args.softmax_scale = softmax_scale(shape);
      }
      check(kernels::append_to_quantized_kv(args, stream_.get()), "appending to the KV cache");
      return;
    }
    kernels::RopeAppend args;
    args.type = element(qkv.type);
    args.qkv = qkv.data;
    args.rows = qkv.rows;
    args.num_heads = static_cast<int32_t>(shape.num_heads);
    args.num_kv_heads = static_cast<int32_t>(shape.num_kv_heads);
    args.head_dim = static_cast<int32_t>(shape.head_dim);
    args.positions = step_.positions;
    args.slots = step_.slots;
    args.rotations = rotations_.get<float>();
    args.keys = cache.keys(layer);
    args.values = cache.values(layer);
    check(kernels::rope_append(args, stream_.get()), "the rotary embedding");
  }

  void attention(Matrix qkv, const Batch& /*batch*/, const AttentionShape& shape, int64_t layer,
                 KvStorage& kv, Matrix out) override {
    const auto& cache = static_cast<const CudaKv&>(kv);
    if (cache.type() == KvType::kInt8) {
      attend_quantized(qkv, shape, layer, cache, out);
      return;
    }
    const int64_t dim = shape.head_dim;
    sagelm_attention_args args = attention_args(shape);
    args.batch = step_.num_sequences;
    args.max_q_len = step_.max_q_len;
    args.max_kv_len = step_.max_kv_len;
    args.q = {.data = qkv.data, .batch_stride = 0, .token_stride = qkv.cols, .head_stride = dim};
    args.out = {.data = out.data, .batch_stride = 0, .token_stride = out.cols, .head_stride = dim};
    args.cu_q_lens = step_.cu_q_lens;
    args.k.token_stride = shape.num_kv_heads * dim;
    args.k.head_stride = dim;
    args.k.batch_stride = kPageTokens * shape.num_kv_heads * dim;
    args.v = args.k;
    args.k.data = cache.keys(layer);
    args.v.data = cache.values(layer);
    args.kv_lens = step_.kv_lens;
    args.page_table = step_.page_table;
    args.page_table_stride = step_.page_table_stride;
    args.page_tokens = static_cast<int32_t>(kPageTokens);
    args.stream = stream_.get();
    const auto run = [&](sagelm_attention_status status) {
      if (status != SAGELM_ATTENTION_OK) {
        fail("the attention of layer {} ({}): {}", layer,
             attention_variant_name(shape.spec.variant), sagelm_attention_last_error());
      }
    };
    size_t needed = 0;
    run(sagelm_attention_workspace_bytes(&args, &needed));
    grow(attention_workspace_, needed, "the workspace of attention");
    args.workspace = attention_workspace_.get();
    args.workspace_bytes = attention_workspace_.bytes();
    run(sagelm_attention(&args));
  }

  void read_logits(Matrix logits, std::span<float> out) override {
    const auto count = static_cast<size_t>(logits.rows * logits.cols);
    const std::byte* host = read(logits.data, count * dtype_size(logits.type), "reading logits");
    const auto cols = static_cast<size_t>(logits.cols);
    for (size_t row = 0; row < static_cast<size_t>(logits.rows); ++row) {
      const std::span<float> values = out.subspan(row * cols, cols);
      copy_to_floats(host + row * cols * dtype_size(logits.type), logits.type, values);
      check_finite(is_finite(values), row);
    }
  }

  void score(Matrix logits, std::span<const int32_t> targets, std::span<TokenScore> out) override {
    for (int64_t first = 0; first < logits.rows; first += kScoreRows) {
      const int64_t rows = std::min(kScoreRows, logits.rows - first);
      const auto at = static_cast<size_t>(first);
      const auto count = static_cast<size_t>(rows);
      const int32_t* wanted = targets_.send(targets.subspan(at, count), stream_.get());
      check(
          kernels::score_rows(static_cast<const float*>(logits.data) + first * logits.cols, wanted,
                              rows, logits.cols, scores_.get<kernels::RowScore>(), stream_.get()),
          "scoring");
      const auto* scores = reinterpret_cast<const kernels::RowScore*>(
          read(scores_.get(), count * sizeof(kernels::RowScore), "scoring"));
      for (size_t i = 0; i < count; ++i) {
        check_finite(!std::isnan(scores[i].logprob), at + i);
        out[at + i] = {scores[i].logprob, scores[i].argmax};
      }
    }
  }

  bool all_finite(Matrix x) override {
    check(kernels::find_non_finite(x.data, element(x.type), x.rows * x.cols, flag_.get<int32_t>(),
                                   stream_.get()),
          "looking for NaN");
    const std::byte* host = read(flag_.get(), sizeof(int32_t), "looking for NaN");
    return *reinterpret_cast<const int32_t*>(host) == 0;
  }

  std::unique_ptr<AttentionRunner> make_attention_runner(const AttentionCall& call,
                                                         std::span<const uint16_t> q,
                                                         std::span<const uint16_t> k,
                                                         std::span<const uint16_t> v) override {
    use_device();
    return cuda::make_attention_runner(call, q, k, v, stream_.get());
  }

  Ceilings measure_ceilings() override {
    use_device();
    return cuda::measure_ceilings(stream_.get());
  }

 private:
  // Rows scored by one kernel.
  static constexpr int64_t kScoreRows = 1024;
  // Scratch is made for a multiple of so many rows, so that it does not grow with every prompt.
  static constexpr int64_t kFewRows = 8;
  static constexpr int64_t kRowStep = 128;

  struct Weight {
    DType type = DType::kF32;
    int64_t rows = 0;
    int64_t cols = 0;
    const std::byte* embedding = nullptr;  // the tensor that it was uploaded from, if it is one
    std::shared_ptr<DeviceBuffer> memory = nullptr;

    void* data() const { return memory->get(); }
  };

  // The current device belongs to the calling thread.
  void use_device() const { check(cudaSetDevice(device_), "choosing the device"); }

  // The first matrix, the embedding, decides for all.
  DType choose_type(const TensorView& tensor) {
    if (!type_) {
      rounded_ = tensor.dtype == DType::kF32;
      type_ = product_type(tensor.dtype);
    }
    return *type_;
  }

  WeightHandle add_weight(std::span<const TensorView> stacked, DType type, Weight weight) {
    use_device();
    weight.type = type;
    for (const Weight& other : weights_) {
      // A tied output matrix.
      if (stacked.size() == 1 && other.embedding == stacked.front().data && other.type == type &&
          other.rows == weight.rows && other.cols == weight.cols) {
        weight.memory = other.memory;
      }
    }
    if (weight.memory == nullptr) {
      const auto bytes = static_cast<size_t>(weight.rows * weight.cols) * dtype_size(type);
      weight.memory = std::make_shared<DeviceBuffer>(bytes, "the weights");
      weight_bytes_ += static_cast<int64_t>(bytes);
      if (uploader_ == nullptr) uploader_ = std::make_unique<WeightUploader>(stream_.get());
      std::byte* to = weight.memory->get<std::byte>();
      for (const TensorView& tensor : stacked) {
        uploader_->upload(tensor, type, to);
        to += static_cast<size_t>(tensor.num_elements()) * dtype_size(type);
      }
    }
    weights_.push_back(std::move(weight));
    return {static_cast<int32_t>(weights_.size()) - 1};
  }

  const Weight& weight_of(WeightHandle handle) const {
    return weights_[static_cast<size_t>(handle.index)];
  }

  // out = x W^T.
  Product product(Matrix x, WeightHandle handle, Matrix out) const {
    const Weight& weight = weight_of(handle);
    return {.x = x.data,
            .weight = weight.data(),
            .out = out.data,
            .rows = x.rows,
            .in_features = weight.cols,
            .out_features = weight.rows,
            .type = x.type,
            .out_type = out.type};
  }

  kernels::QuantizedKvStep quantized_step() const {
    kernels::QuantizedKvStep step;
    step.rows = step_.rows;
    step.num_sequences = step_.num_sequences;
    step.max_q_len = step_.max_q_len;
    step.max_kv_len = step_.max_kv_len;
    step.max_closed_pages = step_.max_closed_pages;
    step.closes_first_page = step_.closes_first_page;
    step.begins_in_first_page = step_.begins_in_first_page;
    step.positions = step_.positions;
    step.slots = step_.slots;
    step.cu_q_lens = step_.cu_q_lens;
    step.kv_lens = step_.kv_lens;
    step.page_table = step_.page_table;
    step.page_table_stride = step_.page_table_stride;
    step.tails = step_.tails;
    step.means = step_.tails;  // a mean is kept with its sequence's tail
    return step;
  }

  static float softmax_scale(const AttentionShape& shape) {
    return 1.0F / std::sqrt(static_cast<float>(shape.head_dim));
  }

  // Whether the step's rows over a quantized cache are few enough for the decode kernel.
  bool decodes(const AttentionShape& shape) const {
    return kernels::quantized_kv_decode_takes(static_cast<int32_t>(shape.num_heads),
                                              static_cast<int32_t>(shape.num_kv_heads),
                                              step_.max_q_len);
  }

  // From the quantized pages themselves. Prefill's queries are where rope_append has left them.
  void attend_quantized(Matrix qkv, const AttentionShape& shape, int64_t layer, const CudaKv& cache,
                        Matrix out) {
    const kernels::QuantizedKv view = cache.quantized(layer, shape.num_heads);
    const kernels::QuantizedKvStep step = quantized_step();
    if (!decodes(shape)) {
      check(kernels::prefill_from_quantized_kv(
                {.cache = view, .step = step, .out = out.data, .out_stride = out.cols},
                attention_workspace_.get(), stream_.get()),
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
    grow(attention_workspace_, kernels::quantized_kv_decode_workspace_bytes(args),
         "the workspace of attention");
    check(kernels::decode_from_quantized_kv(args, attention_workspace_.get(), stream_.get()),
          "attention from the quantized cache");
  }

  // Makes buffer hold at least so many bytes; what it held is lost.
  void grow(DeviceBuffer& buffer, size_t bytes, std::string_view what) {
    if (bytes <= buffer.bytes()) return;
    graphs_.clear();
    buffer = {};  // waits for what still uses it
    buffer = DeviceBuffer(bytes, what);
  }

  // What does not change from layer to layer or batch to batch.
  sagelm_attention_args attention_args(const AttentionShape& shape) const {
    sagelm_attention_args args = {};
    args.struct_size = sizeof args;
    args.variant = attention_variant(shape.spec.variant);
    args.dtype = type_ == DType::kBF16 ? SAGELM_ATTENTION_BF16 : SAGELM_ATTENTION_F16;
    args.num_heads = static_cast<int32_t>(shape.num_heads);
    args.num_kv_heads = static_cast<int32_t>(shape.num_kv_heads);
    args.head_dim = static_cast<int32_t>(shape.head_dim);
    args.causal = 1;
    args.no_smooth_k = shape.spec.smooth_k ? 0 : 1;
    return args;
  }

  // Makes rotations_ hold at least `positions` positions.
  void grow_rotations(int64_t positions, std::span<const float> inverse_frequencies) {
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
                            cudaMemcpyHostToDevice, stream_.get()),
            "copying the rotary frequencies");
    }
    grow(rotations_, static_cast<size_t>(count) * 2 * half * sizeof(float), "the rotary embedding");
    check(kernels::fill_rotations(frequencies_.get<float>(), static_cast<int32_t>(half), count,
                                  rotations_.get<float>(), stream_.get()),
          "the rotary embedding");
    num_rotations_ = count;
  }

  // Copies to the host and waits for it, and with it for all errors of the step.
  const std::byte* read(const void* from, size_t bytes, std::string_view doing) {
    if (bytes > readback_.bytes()) readback_ = PinnedBuffer(bytes);
    check(cudaMemcpyAsync(readback_.get(), from, bytes, cudaMemcpyDeviceToHost, stream_.get()),
          doing);
    check(cudaStreamSynchronize(stream_.get()), doing);
    return readback_.get<std::byte>();
  }

  static void copy_to_floats(const std::byte* from, DType type, std::span<float> out) {
    if (type == DType::kF32) {
      std::copy_n(reinterpret_cast<const float*>(from), out.size(), out.begin());
      return;
    }
    const auto* raw = reinterpret_cast<const uint16_t*>(from);
    for (size_t i = 0; i < out.size(); ++i) {
      out[i] = type == DType::kF16 ? half_to_float(raw[i]) : bfloat16_to_float(raw[i]);
    }
  }

  static bool is_finite(std::span<const float> values) {
    uint32_t worst = 0;  // infinities and NaN have the largest magnitudes
    for (const float value : values) {
      worst = std::max(worst, std::bit_cast<uint32_t>(value) & 0x7FFFFFFFu);
    }
    return worst < 0x7F800000u;
  }

  static void check_finite(bool finite, size_t row) {
    if (!finite) fail("the logits of row {} hold NaN or Inf", row);
  }

  int device_;
  DeviceProperties properties_;
  Stream stream_;  // everything runs on it, in order
  LinearEngine linear_;
  GraphCache graphs_;
  std::optional<DType> type_;  // of weight matrices and activations
  bool rounded_ = false;       // the checkpoint is F32
  std::unique_ptr<WeightUploader> uploader_;
  std::vector<Weight> weights_;
  int64_t weight_bytes_ = 0;
  std::vector<DeviceBuffer> scratch_;
  DeviceBuffer attention_workspace_, rotations_, frequencies_, scores_, flag_;
  std::vector<float> rotated_by_;  // the inverse frequencies in rotations_
  int64_t num_rotations_ = 0;
  PinnedBuffer readback_;
  DeviceIntegers step_arrays_, gathered_, targets_;
  StepInputs step_;
};

}  // namespace
}  // namespace cuda

std::unique_ptr<Backend> make_cuda_backend(int device) {
  if (const std::string problem = cuda_problem(device); !problem.empty()) {
    fail("device cuda:{} cannot be used: {}", device, problem);
  }
  return std::make_unique<cuda::CudaBackend>(device);
}

}  // namespace sagelm
