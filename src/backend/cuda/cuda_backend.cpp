#include "backend/cuda/cuda_backend.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
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
#include "backend/cuda/model_attention.h"
#include "backend/cuda/readback.h"
#include "backend/cuda/step_inputs.h"
#include "backend/cuda/upload.h"
#include "base/error.h"
#include "kernels/ops/gemv.h"
#include "kernels/ops/rmsnorm.h"
#include "kernels/ops/rows.h"
#include "kernels/ops/swiglu.h"

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
        attention_(stream_.get(), graphs_),
        readback_(stream_.get()) {}

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
    int64_t bytes = weight_bytes_ + linear_.memory_bytes() + attention_.memory_bytes() +
                    readback_.memory_bytes();
    for (const DeviceBuffer& buffer : scratch_) bytes += static_cast<int64_t>(buffer.bytes());
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
    const std::string problem = ModelAttention::problem(shape, type_.value_or(DType::kF16));
    if (!problem.empty()) {
      fail("attention {} with heads of {} on {}: {}", attention_variant_name(shape.spec.variant),
           shape.head_dim, properties_.name, problem);
    }
  }

  std::vector<AttentionVariant> adaptive_variants() const override {
    // On Hopper sage1 has the MMA kernel only, and fp16's warp-group kernel is faster than that.
    if (properties_.capability == 90) return {AttentionVariant::kSage2_8b, AttentionVariant::kFp16};
    if (properties_.capability < 89) return {AttentionVariant::kSage1B, AttentionVariant::kFp16};
    return {AttentionVariant::kSage2_8b, AttentionVariant::kSage1B, AttentionVariant::kFp16};
  }

  bool reads_int8_kv(const AttentionShape& shape) const override {
    return ModelAttention::reads_quantized_kv(shape, properties_.capability);
  }

  void begin(const Batch& batch) override {
    use_device();
    uploader_.reset();  // the weights are there
    step_ = send_step_inputs(batch, step_arrays_, stream_.get());
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
                 cache.address(), attention, step_.max_closed_pages, step_.closes_first_page},
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
    attention_.rope_append(step_, qkv, shape, inverse_frequencies, layer,
                           static_cast<const CudaKv&>(kv));
  }

  void attention(Matrix qkv, const Batch& /*batch*/, const AttentionShape& shape, int64_t layer,
                 KvStorage& kv, Matrix out) override {
    attention_.attention(step_, qkv, shape, layer, static_cast<const CudaKv&>(kv), out);
  }

  void read_logits(Matrix logits, std::span<float> out) override {
    readback_.read_logits(logits, out);
  }
  void score(Matrix logits, std::span<const int32_t> targets, std::span<TokenScore> out) override {
    readback_.score(logits, targets, out);
  }
  bool all_finite(Matrix x) override { return readback_.all_finite(x); }

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

  // Makes buffer hold at least so many bytes; what it held is lost.
  void grow(DeviceBuffer& buffer, size_t bytes, std::string_view what) {
    if (bytes <= buffer.bytes()) return;
    graphs_.clear();
    buffer = {};  // waits for what still uses it
    buffer = DeviceBuffer(bytes, what);
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
  ModelAttention attention_;
  Readback readback_;
  DeviceIntegers step_arrays_, gathered_;
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
