#include "backend/cpu/cpu_backend.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "backend/cpu/attention.h"
#include "backend/cpu/attention_runner.h"
#include "backend/cpu/ceilings.h"
#include "backend/cpu/kv_storage.h"
#include "backend/cpu/linear.h"
#include "backend/cpu/ops.h"
#include "backend/cpu/token_draw.h"
#include "base/dtype.h"
#include "base/error.h"

namespace sagelm {
namespace {

std::vector<float> to_floats(const TensorView& tensor) {
  std::vector<float> out(static_cast<size_t>(tensor.num_elements()));
  for (size_t i = 0; i < out.size(); ++i) {
    if (tensor.dtype == DType::kF32) {
      std::memcpy(&out[i], tensor.data + 4 * i, sizeof(float));
    } else {
      uint16_t raw;
      std::memcpy(&raw, tensor.data + 2 * i, sizeof raw);
      out[i] = tensor.dtype == DType::kF16 ? half_to_float(raw) : bfloat16_to_float(raw);
    }
  }
  return out;
}

float* floats(const Matrix& matrix) { return static_cast<float*>(matrix.data); }

class CpuBackend : public Backend {
 public:
  explicit CpuBackend(int threads) {
    omp_set_num_threads(threads > 0 ? threads : omp_get_num_procs());
  }

  std::string device_name() const override {
    return fmt::format("cpu ({} thread{}, {} attention, {} products)", omp_get_max_threads(),
                       omp_get_max_threads() == 1 ? "" : "s", cpu::attention_isa(),
                       linear_.units());
  }

  int64_t weight_bytes() const override { return weight_bytes_; }
  int64_t activation_bytes() const override {
    int64_t bytes = 0;
    for (const auto& buffer : scratch_) {
      bytes += static_cast<int64_t>(buffer.size() * sizeof(float));
    }
    return bytes;
  }
  int64_t step_bytes(const StepLimits& limits) const override {
    int64_t bytes = 0;
    for (const ScratchSize& slot : limits.scratch) {
      bytes += (slot.rows + cpu::kRowPadding) * slot.cols * static_cast<int64_t>(sizeof(float));
    }
    return bytes;
  }

  DType product_type(DType stored) const override {
    return stored == DType::kBF16 && linear_.uses_bf16() ? DType::kBF16 : DType::kF32;
  }

  WeightHandle add_linear(std::span<const TensorView> stacked) override {
    return add(linear_.pack(stacked));
  }

  // Two weights, of handles next to each other.
  WeightHandle add_gate_up(const TensorView& gate, const TensorView& up) override {
    const auto handle = static_cast<int32_t>(linears_.size());
    for (cpu::LinearWeight& weight : linear_.pack_gate_up(gate, up)) add(std::move(weight));
    return {handle};
  }

  WeightHandle add_vector(const TensorView& tensor) override {
    vectors_.push_back(to_floats(tensor));
    weight_bytes_ += static_cast<int64_t>(vectors_.back().size() * sizeof(float));
    return {static_cast<int32_t>(vectors_.size()) - 1};
  }

  WeightHandle add_embedding(const TensorView& tensor) override {
    embeddings_.push_back({tensor.dtype, tensor.shape.at(0),
                           std::vector<std::byte>(tensor.data, tensor.data + tensor.bytes)});
    weight_bytes_ += static_cast<int64_t>(tensor.bytes);
    return {static_cast<int32_t>(embeddings_.size()) - 1};
  }

  std::unique_ptr<KvStorage> make_kv(const KvLayout& layout) override {
    return std::make_unique<cpu::CpuKv>(layout);
  }
  int64_t kv_bytes(const KvLayout& layout) const override { return cpu::CpuKv::bytes(layout); }

  // Buffers grow as steps need them: what no step touches takes no memory.
  void reserve(const StepLimits& /*limits*/) override {}

  Matrix scratch(int slot, int64_t rows, int64_t cols, Holds /*holds*/) override {
    const auto index = static_cast<size_t>(slot);
    if (index >= scratch_.size()) scratch_.resize(index + 1);
    const auto needed = static_cast<size_t>((rows + cpu::kRowPadding) * cols);
    if (scratch_[index].size() < needed) scratch_[index].resize(needed);
    return {scratch_[index].data(), DType::kF32, rows, cols};
  }

  void check_attention(const AttentionShape& /*shape*/) const override {}  // every variant is here
  std::vector<AttentionVariant> adaptive_variants() const override {
    return {AttentionVariant::kSage2_8b, AttentionVariant::kSage1, AttentionVariant::kFp16};
  }
  bool reads_kv(const AttentionShape& shape, KvType type) const override {
    return type == KvType::kFp16 || reads_quantized_kv(shape.spec.variant, type);
  }
  void begin(const Batch& batch, std::span<const TokenDraw> draws) override {
    draws_ = draws;
    positions_.resize(static_cast<size_t>(batch.rows()));
    for (const SequenceChunk& sequence : batch.sequences) {
      std::iota(positions_.begin() + sequence.first_row,
                positions_.begin() + sequence.first_row + sequence.q_len, sequence.q_start());
    }
  }

  void embed(WeightHandle table, const Batch& batch, Matrix out) override {
    const Embedding& embedding = embeddings_[static_cast<size_t>(table.index)];
    const size_t row_bytes = dtype_size(embedding.dtype) * static_cast<size_t>(out.cols);
    for (int64_t row = 0; row < out.rows; ++row) {
      const int32_t token = known_token(batch.tokens[static_cast<size_t>(row)]);
      if (token < 0 || token >= embedding.rows) {
        fail("token id {} is outside the model's vocabulary of {}", token, embedding.rows);
      }
      TensorView view;
      view.dtype = embedding.dtype;
      view.shape = {out.cols};
      view.data = embedding.bytes.data() + static_cast<size_t>(token) * row_bytes;
      view.bytes = row_bytes;
      const std::vector<float> values = to_floats(view);
      std::copy(values.begin(), values.end(), floats(out) + row * out.cols);
    }
  }

  void rmsnorm(Matrix x, WeightHandle weight, double eps, Matrix out) override {
    const float* scale = vector_of(weight);
    for_rows(x.rows, [&](int64_t row) {
      cpu::ops().rmsnorm(floats(x) + row * x.cols, scale, x.cols, eps, floats(out) + row * x.cols);
    });
  }

  void linear(Matrix x, WeightHandle weight, Matrix out) override {
    linear_.run(floats(x), x.rows, nullptr, linear_of(weight), floats(out), false);
  }

  void linear_add(Matrix x, WeightHandle weight, Matrix out) override {
    linear_.run(floats(x), x.rows, nullptr, linear_of(weight), floats(out), true);
  }

  void linear_swiglu(Matrix x, WeightHandle weight, Matrix gate_up, Matrix out) override {
    run_swiglu(x, nullptr, weight, gate_up, out);
  }

  void norm_linear(Matrix x, WeightHandle norm, double eps, WeightHandle weight, Matrix /*normed*/,
                   Matrix out) override {
    const cpu::RowNorm row_norm{vector_of(norm), eps};
    linear_.run(floats(x), x.rows, &row_norm, linear_of(weight), floats(out), false);
  }

  void norm_linear_swiglu(Matrix x, WeightHandle norm, double eps, WeightHandle weight,
                          Matrix /*normed*/, Matrix gate_up, Matrix out) override {
    const cpu::RowNorm row_norm{vector_of(norm), eps};
    run_swiglu(x, &row_norm, weight, gate_up, out);
  }

  void gather_rows(std::span<const int32_t> rows, std::initializer_list<RowsCopy> copies) override {
    for (const auto& [from, to] : copies) {
      for (size_t i = 0; i < rows.size(); ++i) {
        std::copy_n(floats(from) + rows[i] * from.cols, from.cols,
                    floats(to) + static_cast<int64_t>(i) * from.cols);
      }
    }
  }

  void rope_append(Matrix qkv, const Batch& batch, const AttentionShape& shape,
                   std::span<const float> inverse_frequencies, int64_t layer,
                   KvStorage& kv) override {
    auto& cache = static_cast<cpu::CpuKv&>(kv);
    const int64_t dim = shape.head_dim;
    const int64_t half = dim / 2;
    const int64_t num_rotated = shape.num_heads + shape.num_kv_heads;
    for (const SequenceChunk& sequence : batch.sequences) {
      grow_rotations(sequence.kv_len, inverse_frequencies);
    }
    for_rows(qkv.rows, [&](int64_t index) {
      const float* cosine = rotations_.data() + positions_[static_cast<size_t>(index)] * dim;
      float* row = floats(qkv) + index * qkv.cols;
      for (int64_t head = 0; head < num_rotated; ++head) {
        cpu::ops().rope(row + head * dim, cosine, cosine + half, half);
      }
    });
    const auto count = static_cast<int64_t>(batch.sequences.size());
#pragma omp parallel for schedule(dynamic, 1) if (qkv.rows >= kWorthThreads)
    for (int64_t task = 0; task < count * shape.num_kv_heads; ++task) {
      const SequenceChunk& sequence =
          batch.sequences[static_cast<size_t>(task / shape.num_kv_heads)];
      const int64_t head = task % shape.num_kv_heads;
      const float* row = floats(qkv) + sequence.first_row * qkv.cols;
      cache.append(layer, sequence, head, row + (shape.num_heads + head) * dim,
                   row + (num_rotated + head) * dim, qkv.cols, shape.spec.smooth_k);
    }
  }

  void attention(Matrix qkv, const Batch& batch, const AttentionShape& shape, int64_t layer,
                 KvStorage& kv, Matrix out) override {
    auto& cache = static_cast<cpu::CpuKv&>(kv);
    std::vector<cpu::AttentionArgs> arguments;
    arguments.reserve(batch.sequences.size());
    size_t num_pages = 0;
    for (const SequenceChunk& sequence : batch.sequences) num_pages += sequence.pages.size();
    std::vector<const uint16_t*> key_pages, value_pages;
    key_pages.reserve(num_pages);
    value_pages.reserve(num_pages);
    for (const SequenceChunk& sequence : batch.sequences) {
      cpu::AttentionArgs args;
      args.q = floats(qkv) + sequence.first_row * qkv.cols;
      args.q_row_stride = qkv.cols;
      args.out = floats(out) + sequence.first_row * out.cols;
      args.out_row_stride = out.cols;
      cache.locate(layer, sequence, key_pages, value_pages, args);
      args.q_len = sequence.q_len;
      args.kv_len = sequence.kv_len;
      args.num_heads = shape.num_heads;
      args.num_kv_heads = shape.num_kv_heads;
      args.head_dim = shape.head_dim;
      args.softmax_scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(shape.head_dim)));
      args.causal = true;
      arguments.push_back(args);
    }
    cpu::attention(arguments, shape.spec, cache.type());
  }

  void read_logits(Matrix logits, std::span<float> out) override {
    for (int64_t row = 0; row < logits.rows; ++row) {
      if (!cpu::ops().all_finite(floats(logits) + row * logits.cols, logits.cols)) {
        fail("the logits of row {} hold NaN or Inf", row);
      }
    }
    std::copy_n(floats(logits), logits.rows * logits.cols, out.begin());
  }

  void draw(Matrix logits) override {
    ++draw_step_;
    for (size_t i = 0; i < draws_.size(); ++i) {
      TokenDraw draw = draws_[i];
      std::vector<int32_t> penalized;
      for (const int32_t token : draw.penalized) penalized.push_back(known_token(token));
      draw.penalized = penalized;
      const std::span<const float> row(floats(logits) + draw.row * logits.cols,
                                       static_cast<size_t>(logits.cols));
      const int32_t name = token_name(draw_step_, static_cast<int64_t>(i));
      drawn_[static_cast<size_t>(name_place(name))] =
          cpu::ops().all_finite(row.data(), logits.cols) ? drawer_.draw(row, draw) : -1;
    }
  }
  int32_t drawn_name() override { return token_name(draw_step_, 0); }
  void read_drawn(int32_t name, std::span<int32_t> tokens) override {
    std::copy_n(drawn_.begin() + name_place(name), tokens.size(), tokens.begin());
  }

  void score(Matrix logits, std::span<const int32_t> targets, std::span<TokenScore> out) override {
    std::atomic<int64_t> bad_row = -1;
    for_rows(logits.rows, [&](int64_t row) {
      const float* x = floats(logits) + row * logits.cols;
      int64_t argmax = 0;
      const double total = cpu::ops().log_sum_exp(x, logits.cols, &argmax);
      if (std::isnan(total)) bad_row = row;
      const auto index = static_cast<size_t>(row);
      out[index] = {static_cast<float>(static_cast<double>(x[targets[index]]) - total),
                    static_cast<int32_t>(argmax)};
    });
    if (bad_row >= 0) fail("the logits of row {} hold NaN or Inf", bad_row.load());
  }

  bool all_finite(Matrix x) override { return cpu::ops().all_finite(floats(x), x.rows * x.cols); }
  std::unique_ptr<AttentionRunner> make_attention_runner(const AttentionCall& call,
                                                         std::span<const uint16_t> q,
                                                         std::span<const uint16_t> k,
                                                         std::span<const uint16_t> v) override {
    return cpu::make_attention_runner(call, q, k, v);
  }
  Ceilings measure_ceilings() override { return cpu::measure_ceilings(linear_); }

 private:
  struct Embedding {
    DType dtype;
    int64_t rows;
    std::vector<std::byte> bytes;
  };

  // Rows of work that are worth a barrier.
  static constexpr int64_t kWorthThreads = 16;

  WeightHandle add(cpu::LinearWeight weight) {
    weight_bytes_ += weight.bytes();
    linears_.push_back(std::move(weight));
    return {static_cast<int32_t>(linears_.size()) - 1};
  }

  void run_swiglu(Matrix x, const cpu::RowNorm* norm, WeightHandle weight, Matrix gate_up,
                  Matrix out) {
    const auto index = static_cast<size_t>(weight.index);
    linear_.run_swiglu(floats(x), x.rows, norm, linears_[index], linears_[index + 1],
                       floats(gate_up), floats(out));
  }

  const float* vector_of(WeightHandle handle) const {
    return vectors_[static_cast<size_t>(handle.index)].data();
  }
  const cpu::LinearWeight& linear_of(WeightHandle handle) const {
    return linears_[static_cast<size_t>(handle.index)];
  }

  template <typename Function>
  static void for_rows(int64_t rows, const Function& function) {
#pragma omp parallel for if (rows >= kWorthThreads)
    for (int64_t row = 0; row < rows; ++row) function(row);
  }

  int32_t known_token(int32_t token) const {
    if (!is_token_name(token)) return token;
    return std::max(0, drawn_[static_cast<size_t>(name_place(token))]);  // any, if none was drawn
  }

  // cos and sin of every position below `positions`, [position][2][head_dim / 2]. The angle is
  // rounded to float32 first, as transformers computes it.
  void grow_rotations(int64_t positions, std::span<const float> inverse_frequencies) {
    const size_t half = inverse_frequencies.size();
    auto position = static_cast<int64_t>(rotations_.size() / (2 * half));
    if (position >= positions) return;
    rotations_.resize(static_cast<size_t>(positions) * 2 * half);
    for (; position < positions; ++position) {
      float* row = rotations_.data() + static_cast<size_t>(position) * 2 * half;
      for (size_t i = 0; i < half; ++i) {
        const float angle = static_cast<float>(position) * inverse_frequencies[i];
        row[i] = static_cast<float>(std::cos(static_cast<double>(angle)));
        row[half + i] = static_cast<float>(std::sin(static_cast<double>(angle)));
      }
    }
  }

  cpu::LinearEngine linear_;
  std::vector<cpu::LinearWeight> linears_;
  std::vector<std::vector<float>> vectors_;
  std::vector<Embedding> embeddings_;
  std::vector<std::vector<float>> scratch_;
  std::vector<int64_t> positions_;  // of the step's rows
  std::vector<float> rotations_;
  cpu::TokenDrawer drawer_;
  std::span<const TokenDraw> draws_;  // of the step
  int64_t draw_step_ = 0;
  std::vector<int32_t> drawn_ = std::vector<int32_t>(kNamePlaces);
  int64_t weight_bytes_ = 0;
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(int threads) {
  return std::make_unique<CpuBackend>(threads);
}

}  // namespace sagelm
