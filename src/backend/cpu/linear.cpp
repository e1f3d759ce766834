#include "backend/cpu/linear.h"

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <unordered_map>
#include <utility>

#include "backend/cpu/ops.h"
#include "base/dtype.h"
#include "base/error.h"

namespace sagelm::cpu {
namespace {

using dnnl::memory;

// Up to this many rows (one decode step) high and low halves go through one product, so that the
// weights are read once; beyond it two products of rounded row counts move fewer bytes.
constexpr int64_t kStackedRows = 16;

// Larger products are computed this many rows at a time for every two threads: what a block of rows
// writes then stays in the caches until its low halves are added, and reading the weights again for
// every block takes less than computing with them.
constexpr int64_t kBlockRows = 64;
static_assert(kBlockRows % kRowPadding == 0);

int64_t block_rows() { return kBlockRows * ((omp_get_max_threads() + 1) / 2); }

int64_t rounded_rows(int64_t rows) {
  return rows <= kStackedRows ? rows : (rows + kRowPadding - 1) / kRowPadding * kRowPadding;
}

bool is_bf16(const TensorView& tensor) { return tensor.dtype == DType::kBF16; }

void widen(const TensorView& tensor, float* out) {
  const int64_t count = tensor.num_elements();
  if (tensor.dtype == DType::kF32) {
    std::memcpy(out, tensor.data, tensor.bytes);
    return;
  }
  const bool is_half = tensor.dtype == DType::kF16;
#pragma omp parallel for
  for (int64_t i = 0; i < count; ++i) {
    uint16_t raw;
    std::memcpy(&raw, tensor.data + 2 * i, sizeof raw);
    out[i] = is_half ? half_to_float(raw) : bfloat16_to_float(raw);
  }
}

}  // namespace

bool cpu_has_bf16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16") != 0;
#else
  return false;
#endif
}

int64_t LinearWeight::bytes() const {
  if (amx) return amx->bytes;
  return packed ? static_cast<int64_t>(packed.get_desc().get_size()) : 0;
}

LinearEngine::LinearEngine(bool use_amx)
    : engine_(dnnl::engine::kind::cpu, 0),
      stream_(engine_),
      uses_bf16_(cpu_has_bf16()),
      use_amx_(use_amx) {}

LinearWeight LinearEngine::pack(std::span<const TensorView> stacked) {
  return pack_as(stacked, uses_bf16_ && std::ranges::all_of(stacked, is_bf16));
}

LinearWeight LinearEngine::pack_as(std::span<const TensorView> stacked, bool bf16) {
  LinearWeight weight;
  weight.in_features = stacked.front().shape.at(1);
  weight.bf16 = bf16;
  for (const TensorView& tensor : stacked) weight.out_features += tensor.shape.at(0);
  if (weight.bf16 && use_amx_) {
    weight.amx = AmxEngine::pack(stacked);
    return weight;
  }
  const auto type = weight.bf16 ? memory::data_type::bf16 : memory::data_type::f32;
  const size_t item = weight.bf16 ? 2 : 4;
  const memory::dims shape = {weight.in_features, weight.out_features};
  const memory::desc plain(shape, type, memory::format_tag::ba);
  const auto staging = std::make_unique<std::byte[]>(plain.get_size());
  std::byte* cursor = staging.get();
  for (const TensorView& tensor : stacked) {
    if (weight.bf16) {
      std::memcpy(cursor, tensor.data, tensor.bytes);
    } else {
      widen(tensor, reinterpret_cast<float*>(cursor));
    }
    cursor += static_cast<size_t>(tensor.num_elements()) * item;
  }
  // One layout serves every row count: the one oneDNN prefers for a large product.
  constexpr int64_t kTypicalRows = 256;
  const memory::desc x({kTypicalRows, weight.in_features}, type, memory::format_tag::ab);
  const memory::desc y({kTypicalRows, weight.out_features}, memory::data_type::f32,
                       memory::format_tag::ab);
  const memory::desc any(shape, type, memory::format_tag::any);
  const dnnl::matmul::primitive_desc chosen(dnnl::matmul::desc(x, any, y), engine_);
  weight.packed = memory(chosen.weights_desc(), engine_);
  memory source(plain, engine_, staging.get());
  dnnl::reorder(source, weight.packed).execute(stream_, source, weight.packed);
  stream_.wait();
  return weight;
}

std::array<LinearWeight, 2> LinearEngine::pack_gate_up(const TensorView& gate,
                                                       const TensorView& up) {
  const bool bf16 = uses_bf16_ && is_bf16(gate) && is_bf16(up);
  if (!bf16 || !use_amx_) return {pack_as({&gate, 1}, bf16), pack_as({&up, 1}, bf16)};
  LinearWeight both;
  both.in_features = gate.shape.at(1);
  both.out_features = gate.shape.at(0);
  both.bf16 = true;
  both.amx = AmxEngine::pack_gate_up(gate, up);
  return {std::move(both), LinearWeight()};
}

const LinearEngine::Plan& LinearEngine::plan(const LinearWeight& weight, int64_t rows,
                                             bool accumulate) {
  const PlanKey key{weight.in_features, weight.out_features, rows, weight.bf16, accumulate};
  if (const auto found = plans_.find(key); found != plans_.end()) return found->second;
  Plan plan;
  const auto type = weight.bf16 ? memory::data_type::bf16 : memory::data_type::f32;
  plan.x = memory::desc({rows, weight.in_features}, type, memory::format_tag::ab);
  plan.y =
      memory::desc({rows, weight.out_features}, memory::data_type::f32, memory::format_tag::ab);
  dnnl::primitive_attr attributes;
  if (accumulate) {
    dnnl::post_ops sum;
    sum.append_sum(1.0f);
    attributes.set_post_ops(sum);
  }
  plan.product = dnnl::matmul(dnnl::matmul::primitive_desc(
      dnnl::matmul::desc(plan.x, weight.packed.get_desc(), plan.y), attributes, engine_));
  return plans_.emplace(key, std::move(plan)).first->second;
}

void LinearEngine::execute(const LinearWeight& weight, int64_t rows, const void* x, float* y,
                           bool accumulate) {
  const Plan& chosen = plan(weight, rows, accumulate);
  const memory source(chosen.x, engine_, const_cast<void*>(x));
  const memory result(chosen.y, engine_, y);
  chosen.product.execute(
      stream_, {{DNNL_ARG_SRC, source}, {DNNL_ARG_WEIGHTS, weight.packed}, {DNNL_ARG_DST, result}});
  stream_.wait();
}

const void* LinearEngine::prepare(const float* x, int64_t rows, int64_t padded, const RowNorm* norm,
                                  const LinearWeight& weight) {
  const int64_t in = weight.in_features;
  const Ops& op = ops();
  if (!weight.bf16) {
    if (norm == nullptr && padded == rows) return x;
    padded_.resize(static_cast<size_t>(padded * in));
    if (norm == nullptr) {
      std::copy_n(x, rows * in, padded_.begin());
      return padded_.data();
    }
#pragma omp parallel for if (rows > kStackedRows)
    for (int64_t row = 0; row < rows; ++row) {
      op.rmsnorm(x + row * in, norm->weight, in, norm->eps, padded_.data() + row * in);
    }
    return padded_.data();
  }
  split_.resize(static_cast<size_t>(2 * padded * in));
  normed_.resize(static_cast<size_t>(in * omp_get_max_threads()));
  uint16_t* high = split_.data();
  uint16_t* low = high + padded * in;
#pragma omp parallel for if (rows > kStackedRows)
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = x + row * in;
    if (norm != nullptr) {
      float* normed = normed_.data() + omp_get_thread_num() * in;
      op.rmsnorm(from, norm->weight, in, norm->eps, normed);
      from = normed;
    }
    op.split_bf16(from, in, high + row * in, low + row * in);
  }
  return high;
}

void LinearEngine::multiply(const void* x, int64_t rows, int64_t padded, const LinearWeight& weight,
                            float* out, bool accumulate) {
  const int64_t in = weight.in_features;
  const int64_t block = block_rows();
  if (weight.bf16 && rows <= kStackedRows) {
    const Ops& op = ops();
    const int64_t count = rows * weight.out_features;
    stacked_.resize(static_cast<size_t>(2 * count));
    execute(weight, 2 * rows, x, stacked_.data(), false);
    (accumulate ? op.accumulate : op.add)(stacked_.data(), stacked_.data() + count, count, out);
    return;
  }
  for (int64_t row = 0; row < padded; row += block) {
    const int64_t count = std::min(block, padded - row);
    float* to = out + row * weight.out_features;
    if (weight.bf16) {
      const uint16_t* high = static_cast<const uint16_t*>(x) + row * in;
      execute(weight, count, high, to, accumulate);
      execute(weight, count, high + padded * in, to, true);
    } else {
      execute(weight, count, static_cast<const float*>(x) + row * in, to, accumulate);
    }
  }
}

void LinearEngine::run(const float* x, int64_t rows, const RowNorm* norm,
                       const LinearWeight& weight, float* out, bool accumulate) {
  if (weight.amx) {
    amx_.run(x, rows, norm, *weight.amx, out, accumulate);
    return;
  }
  const int64_t padded = rounded_rows(rows);
  multiply(prepare(x, rows, padded, norm, weight), rows, padded, weight, out, accumulate);
}

void LinearEngine::run_swiglu(const float* x, int64_t rows, const RowNorm* norm,
                              const LinearWeight& gate, const LinearWeight& up, float* gate_up,
                              float* out) {
  if (gate.amx) {
    amx_.run(x, rows, norm, *gate.amx, out, false);
    return;
  }
  const int64_t padded = rounded_rows(rows);
  const int64_t cols = gate.out_features;
  float* gated = gate_up;
  float* plain = gate_up + padded * cols;
  const void* prepared = prepare(x, rows, padded, norm, gate);
  multiply(prepared, rows, padded, gate, gated, false);
  multiply(prepared, rows, padded, up, plain, false);
  const Ops& op = ops();
#pragma omp parallel for if (rows > kStackedRows)
  for (int64_t row = 0; row < rows; ++row) {
    op.swiglu(gated + row * cols, plain + row * cols, cols, out + row * cols);
  }
}

}  // namespace sagelm::cpu
