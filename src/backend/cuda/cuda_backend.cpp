#include "backend/cuda/cuda_backend.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "backend/cuda/arena.h"
#include "backend/cuda/attention_runner.h"
#include "backend/cuda/ceilings.h"
#include "backend/cuda/check.h"
#include "backend/cuda/device.h"
#include "backend/cuda/element.h"
#include "backend/cuda/graph_cache.h"
#include "backend/cuda/kv_storage.h"
#include "backend/cuda/linear.h"
#include "backend/cuda/memory.h"
#include "backend/cuda/model_attention.h"
#include "backend/cuda/readback.h"
#include "backend/cuda/step_inputs.h"
#include "backend/cuda/token_drawing.h"
#include "backend/cuda/upload.h"
#include "base/error.h"
#include "kernels/ops/rmsnorm.h"
#include "kernels/ops/rows.h"

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
        attention_(stream_.get()),
        readback_(stream_.get()),
        drawing_(stream_.get()) {
    restart_most();
  }

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

  DeviceMemory device_memory() const override {
    use_device();
    size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total), "asking for the free memory");
    return {.total = static_cast<int64_t>(total),
            .free = static_cast<int64_t>(free),
            .held_most = held_memory().most};
  }

  bool checks_weights() const override { return true; }  // while it copies them

  int64_t weight_bytes() const override { return weight_bytes_; }
  int64_t activation_bytes() const override {
    return fixed_bytes() +
           static_cast<int64_t>(arena_.bytes() + step_arrays_.bytes() + gathered_.bytes());
  }
  int64_t default_step_tokens() const override { return 4096; }  // 2 % faster at 32k than 2,048
  int64_t step_bytes(const StepLimits& limits) const override {
    use_device();
    const AttentionRoom attention = ModelAttention::room(limits, activation_type());
    return fixed_bytes() +
           static_cast<int64_t>(lay_out(limits, activation_type(), attention).bytes) +
           DeviceIntegers::room(most_step_integers(limits)) +
           DeviceIntegers::room(static_cast<size_t>(limits.tokens));
  }
  int64_t kv_bytes(const KvLayout& layout) const override {
    return CudaKv::bytes(layout, activation_type());
  }

  DType product_type(DType stored) const override {
    return stored == DType::kF32 ? DType::kF16 : stored;
  }
  DType embedding_type(DType stored) const override { return product_type(stored); }
  bool shares_embedding() const override { return true; }

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
    return std::make_unique<CudaKv>(layout, activation_type(), stream_.get());
  }

  void reserve(const StepLimits& limits) override {
    use_device();
    graphs_.clear();
    const AttentionRoom attention = ModelAttention::room(limits, activation_type());
    layout_ = lay_out(limits, activation_type(), attention);
    if (layout_.bytes > arena_.bytes()) {
      arena_ = {};  // waits for what still uses it
      arena_ = DeviceBuffer(layout_.bytes, "the activations of a step");
    }
    linear_.set_trial(at(layout_.trial), layout_.trial.bytes);
    attention_.set_memory(attention, at(layout_.rotations), at(layout_.workspace),
                          layout_.workspace.bytes);
    step_arrays_.reserve(most_step_integers(limits));
    gathered_.reserve(static_cast<size_t>(limits.tokens));
  }

  Matrix scratch(int slot, int64_t rows, int64_t cols, Holds holds) override {
    const auto index = static_cast<size_t>(slot);
    const DType type = holds == Holds::kActivations ? activation_type() : DType::kF32;
    if (index >= layout_.scratch.size() ||
        static_cast<size_t>(rows * cols) * dtype_size(type) > layout_.scratch[index].bytes) {
      fail("a step of {} tokens is larger than what memory was set aside for", rows);
    }
    return {at(layout_.scratch[index]), type, rows, cols};
  }

  void check_attention(const AttentionShape& shape) const override {
    const std::string problem = ModelAttention::problem(shape, activation_type());
    if (!problem.empty()) {
      fail("attention {} with heads of {} on {}: {}", attention_variant_name(shape.spec.variant),
           shape.head_dim, properties_.name, problem);
    }
  }

  std::vector<AttentionVariant> adaptive_variants() const override {
    // On Hopper sage1 has the MMA kernel only, and fp16's warp-group kernel is faster than that.
    if (properties_.capability == 90) return {AttentionVariant::kSage2_8b, AttentionVariant::kFp16};
    if (properties_.capability < 89) return {AttentionVariant::kSage1, AttentionVariant::kFp16};
    return {AttentionVariant::kSage2_8b, AttentionVariant::kSage1, AttentionVariant::kFp16};
  }

  bool reads_kv(const AttentionShape& shape, KvType type) const override {
    return type == KvType::kFp16 || ModelAttention::reads_kv(shape, type, properties_.capability);
  }

  void begin(const Batch& batch, std::span<const TokenDraw> draws) override {
    use_device();
    uploader_.reset();  // the weights are there
    layer_ = -1;
    step_ = send_step_inputs(batch, draws, drawing_.next_name(), step_arrays_, stream_.get());
  }

  void repeat(const KvStorage& kv, std::span<const AttentionSpec> layers,
              const std::function<void()>& work) override {
    const auto& cache = static_cast<const CudaKv&>(kv);
    std::string attention;
    for (const AttentionSpec& spec : layers) {
      attention += static_cast<char>(spec.variant);
      attention += spec.smooth_k ? '+' : '-';
    }
    graphs_.run({step_.num_sequences, step_.max_kv_len, step_.page_table_stride, step_.tokens,
                 cache.address(), attention, step_.max_closed_pages, step_.closes_first_page,
                 step_.num_draws},
                work);
  }

  void enter_layer(int64_t layer) override { layer_ = layer; }

  double repeated_seconds() override { return graphs_.seconds(); }

  void embed(WeightHandle table, const Batch& batch, Matrix out) override {
    const Weight& weight = weight_of(table);
    for (const int32_t token : batch.tokens) {
      if (!is_token_name(token) && (token < 0 || token >= weight.rows)) {
        fail("token id {} is outside the model's vocabulary of {}", token, weight.rows);
      }
    }
    check(kernels::copy_rows(weight.data(), element(weight.type), step_.tokens, out.rows, out.cols,
                             static_cast<float*>(out.data), stream_.get(), drawing_.drawn()),
          "the embedding");
  }

  void rmsnorm(Matrix x, WeightHandle weight, double eps, Matrix out) override {
    check(kernels::rmsnorm(static_cast<const float*>(x.data),
                           static_cast<const float*>(weight_of(weight).data()), x.rows, x.cols,
                           static_cast<float>(eps), element(out.type), out.data, stream_.get()),
          "a normalisation", layer_);
  }

  void linear(Matrix x, WeightHandle weight, Matrix out) override {
    linear_.run(product(x, weight, out));
  }
  void linear_add(Matrix x, WeightHandle weight, Matrix out) override {
    linear_.run(sum_product(x, weight, out));
  }

  void linear_swiglu(Matrix x, WeightHandle weight, Matrix gate_up, Matrix out) override {
    Product gated = gated_product(x, weight, out);
    gated.gate_up = gate_up.data;
    linear_.run(gated);
  }

  void norm_linear(Matrix x, WeightHandle norm, double eps, WeightHandle weight, Matrix normed,
                   Matrix out) override {
    const Product both = normed_product(product(x, weight, out), norm, eps, normed.type);
    if (LinearEngine::normalises(both)) {
      linear_.run(both);
    } else {
      Backend::norm_linear(x, norm, eps, weight, normed, out);
    }
  }
  void norm_linear_swiglu(Matrix x, WeightHandle norm, double eps, WeightHandle weight,
                          Matrix normed, Matrix gate_up, Matrix out) override {
    const Product both = normed_product(gated_product(x, weight, out), norm, eps, normed.type);
    if (LinearEngine::normalises(both)) {
      linear_.run(both);
    } else {
      Backend::norm_linear_swiglu(x, norm, eps, weight, normed, gate_up, out);
    }
  }

  void layer_tail(const LayerTail& t) override {
    std::vector<Product> chain;
    chain.push_back(sum_product(t.attended, t.o, t.x));
    chain.push_back(
        normed_product(gated_product(t.x, t.gate_up, t.activated), t.norm, t.eps, t.normed.type));
    chain.push_back(sum_product(t.activated, t.down, t.x));
    if (t.next.index >= 0) {
      chain.push_back(
          normed_product(product(t.x, t.next, t.next_out), t.next_norm, t.eps, t.normed.type));
    }
    if (!linear_.run_chain(chain)) Backend::layer_tail(t);
  }

  void gather_rows(std::span<const int32_t> rows, std::initializer_list<RowsCopy> copies) override {
    for (const RowsCopy& copy : copies) {
      for (const int32_t row : rows) {
        if (row < 0 || row >= copy.from.rows) {
          fail("row {} is outside a matrix of {}", row, copy.from.rows);
        }
      }
    }
    const int32_t* ids = gathered_.send(rows, stream_.get());
    for (const auto& [from, to] : copies) {
      // Rows of 16-bit numbers, whose length is even, are copied as rows of half as many words.
      const int64_t words = to.cols * static_cast<int64_t>(dtype_size(to.type)) / 4;
      check(kernels::copy_rows(from.data, element(DType::kF32), ids, to.rows, words,
                               static_cast<float*>(to.data), stream_.get()),
            "gathering rows", layer_);
    }
  }

  void rope_append(Matrix qkv, const Batch& /*batch*/, const AttentionShape& shape,
                   std::span<const float> inverse_frequencies, int64_t layer,
                   KvStorage& kv) override {
    attention_.rope_append(step_, qkv, shape, inverse_frequencies, layer,
                           static_cast<const CudaKv&>(kv));
  }

  void attention(Matrix qkv, const Batch& /*batch*/, const AttentionShape& shape, int64_t layer,
                 KvStorage& kv, Matrix out) override {
    attention_.attention(step_, qkv, shape, layer, static_cast<const CudaKv&>(kv), out);
  }

  void append_and_attend(Matrix qkv, const Batch& /*batch*/, const AttentionShape& shape,
                         std::span<const float> inverse_frequencies, int64_t layer, KvStorage& kv,
                         Matrix out) override {
    attention_.append_and_attend(step_, qkv, shape, inverse_frequencies, layer,
                                 static_cast<const CudaKv&>(kv), out);
  }

  void read_logits(Matrix logits, std::span<float> out) override {
    readback_.read_logits(logits, out);
  }
  void score(Matrix logits, std::span<const int32_t> targets, std::span<TokenScore> out) override {
    readback_.score(logits, targets, out);
  }
  bool all_finite(Matrix x) override { return readback_.all_finite(x); }

  void draw(Matrix logits) override { drawing_.draw(logits, step_); }
  int32_t drawn_name() override { return drawing_.drawn_name(); }
  void read_drawn(int32_t name, std::span<int32_t> tokens) override {
    drawing_.read_drawn(name, tokens);
  }
  bool runs_ahead() const override { return !launches_block(); }

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
            .out_type = out.type,
            .layer = layer_};
  }
  Product gated_product(Matrix x, WeightHandle handle, Matrix out) const {
    Product gated = product(x, handle, out);
    gated.swiglu = true;
    gated.out_features = out.cols;
    return gated;
  }
  // out += x W^T.
  Product sum_product(Matrix x, WeightHandle handle, Matrix out) const {
    Product sum = product(x, handle, out);
    sum.accumulate = true;
    return sum;
  }
  // A product of the residual, normalised and rounded to `type`.
  Product normed_product(Product of, WeightHandle norm, double eps, DType type) const {
    of.type = type;
    of.norm = static_cast<const float*>(weight_of(norm).data());
    of.eps = static_cast<float>(eps);
    return of;
  }

  DType activation_type() const { return type_.value_or(DType::kF16); }

  void* at(const Part& part) const { return arena_.get<std::byte>() + part.at; }

  // What steps take whatever they are.
  static int64_t fixed_bytes() {
    return LinearEngine::memory_bytes() + Readback::memory_bytes() + TokenDrawing::memory_bytes();
  }

  static size_t most_step_integers(const StepLimits& limits) {
    return step_integers(limits.tokens, limits.sequences,
                         decode_length(limits.context) / kPageTokens) +
           usual_draw_integers();
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
  DeviceBuffer arena_;
  ArenaLayout layout_;
  ModelAttention attention_;
  Readback readback_;
  TokenDrawing drawing_;
  DeviceIntegers step_arrays_, gathered_;
  StepInputs step_;
  int64_t layer_ = -1;  // of the operations being enqueued
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
