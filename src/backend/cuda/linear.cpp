#include "backend/cuda/linear.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <span>
#include <utility>

#include "backend/cuda/check.h"
#include "backend/cuda/element.h"
#include "kernels/ops/gemm.h"
#include "kernels/ops/gemv.h"
#include "kernels/ops/score.h"
#include "kernels/ops/swiglu.h"

namespace sagelm::cuda {
namespace {

// What NVIDIA recommends for Hopper.
constexpr size_t kWorkspaceBytes = size_t{32} << 20;
constexpr int kCandidates = 8;
constexpr int kTimedRuns = 5;

cudaDataType_t data_type(DType type) {
  switch (type) {
    case DType::kF32:
      return CUDA_R_32F;
    case DType::kF16:
      return CUDA_R_16F;
    case DType::kBF16:
      return CUDA_R_16BF;
  }
  return CUDA_R_32F;
}

// Row counts that share an algorithm, by the largest of them.
int64_t rounded_rows(int64_t rows) {
  const int64_t step = rows <= 64 ? 16 : rows <= 256 ? 64 : rows <= 1024 ? 256 : 1024;
  return (rows + step - 1) / step * step;
}

// For all of its rows.
kernels::Gemv gemv_args(const Product& product) {
  kernels::Gemv args;
  args.type = element(product.type);
  args.x = product.x;
  args.weight = product.weight;
  args.out = product.out;
  args.rows = product.rows;
  args.n = product.out_features;
  args.k = product.in_features;
  args.output = product.swiglu                    ? kernels::GemvOutput::kSwiglu
                : product.accumulate              ? kernels::GemvOutput::kAdd
                : product.out_type == DType::kF32 ? kernels::GemvOutput::kFloat
                                                  : kernels::GemvOutput::kHalf;
  args.norm = product.norm;
  args.eps = product.eps;
  return args;
}

// By device.
std::array<std::atomic<bool>, 64> runs_chains = {};

kernels::Gemm gemm_args(const Product& product, void* out) {
  return {.type = element(product.type),
          .x = product.x,
          .weight = product.weight,
          .out = out,
          .rows = product.rows,
          .n = product.out_features,
          .k = product.in_features,
          .output = product.swiglu       ? kernels::GemmOutput::kSwiglu
                    : product.accumulate ? kernels::GemmOutput::kAdd
                                         : kernels::GemmOutput::kHalf};
}
bool has_own(const Product& product) {
  const bool writes_floats = product.out_type == DType::kF32 && !product.accumulate;
  return !writes_floats && kernels::gemm_takes(gemm_args(product, product.out));
}

}  // namespace

ChainRight::ChainRight() {
  int device = 0;
  check(cudaGetDevice(&device), "starting");
  // Where processes share the device at the same time, others' chains are in the way as well.
  int shared = 0;
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMpsEnabled, device), "starting");
  if (shared != 0) return;
  const auto index = static_cast<size_t>(device);
  if (index < runs_chains.size() && !runs_chains[index].exchange(true)) device_ = device;
}

ChainRight::~ChainRight() {
  if (given()) runs_chains[static_cast<size_t>(device_)] = false;
}

LinearEngine::LinearEngine(cudaStream_t stream)
    : stream_(stream),
      workspace_(kWorkspaceBytes, "the workspace of matrix products"),
      hash_(sizeof(uint64_t), "the workspace of matrix products"),
      arrivals_(sizeof(uint32_t), "the workspace of matrix products") {
  check(cudaMemsetAsync(arrivals_.get(), 0, arrivals_.bytes(), stream), "starting");
  cublasLtHandle_t handle = nullptr;
  check(cublasLtCreate(&handle), "starting");
  handle_ = Owner<cublasLtHandle_t, cublasLtDestroy>(handle);
  cublasLtMatmulPreference_t preference = nullptr;
  check(cublasLtMatmulPreferenceCreate(&preference), "starting");
  preference_ = Owner<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy>(preference);
  check(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                             &kWorkspaceBytes, sizeof kWorkspaceBytes),
        "starting");
  // cuBLAS counts columns first: its result is out^T = W x^T, [out_features, rows].
  const cublasOperation_t transposed = CUBLAS_OP_T;
  check(cublasLtMatmulDescInit(&operation_, CUBLAS_COMPUTE_32F, CUDA_R_32F), "starting");
  check(cublasLtMatmulDescSetAttribute(&operation_, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                       sizeof transposed),
        "starting");
}

void LinearEngine::run(const Product& product) {
  if (product.rows == 0) return;
  if (product.rows <= kernels::kGemvRows) {
    run_few_rows(product);
    return;
  }
  if (product.swiglu) {
    if (fuses(product)) {
      run_own(product, product.out);
    } else {
      run_apart(product);
    }
    return;
  }
  const Plan& chosen = plan(product);
  if (!chosen.usable) {
    run_few_rows(product);
    return;
  }
  if (chosen.own) {
    run_own(product, product.out);
    return;
  }
  check(execute(product, chosen.shape, chosen.algorithm, product.out), "a matrix product",
        product.layer);
}

bool LinearEngine::normalises(const Product& product) {
  return product.rows <= kernels::kGemvRows && kernels::gemv_normalises(gemv_args(product));
}

bool LinearEngine::run_chain(std::span<const Product> products) {
  std::array<kernels::Gemv, kernels::kGemvLinks> chain;
  if (!chain_right_.given() || products.size() > chain.size()) return false;
  std::ranges::transform(products, chain.begin(), gemv_args);
  const auto links = std::span(chain).first(products.size());
  if (!kernels::gemv_chains(links)) return false;
  check(kernels::gemv_chain(links, arrivals_.get<uint32_t>(), stream_),
        "a layer's matrix-vector products", products.front().layer);
  return true;
}

// Passes over the weights, each for as many rows as the kernel takes.
void LinearEngine::run_few_rows(const Product& product) {
  kernels::Gemv args = gemv_args(product);
  const auto x_bytes = static_cast<int64_t>(dtype_size(product.type)) * product.in_features;
  const auto out_bytes = static_cast<int64_t>(dtype_size(product.out_type)) * product.out_features;
  for (int64_t row = 0; row < product.rows; row += kernels::kGemvRows) {
    args.rows = std::min(kernels::kGemvRows, product.rows - row);
    args.x = static_cast<const std::byte*>(product.x) + row * x_bytes;
    args.out = static_cast<std::byte*>(product.out) + row * out_bytes;
    check(kernels::gemv(args, stream_), "a matrix-vector product", product.layer);
  }
}

void LinearEngine::run_own(const Product& product, void* out) {
  check(kernels::gemm(gemm_args(product, out), stream_), "a matrix product", product.layer);
}

// Gate and up first, then what becomes of them.
void LinearEngine::run_apart(const Product& gated) {
  Product both = gated;
  both.swiglu = false;
  both.out = gated.gate_up;
  both.out_features = 2 * gated.out_features;
  run(both);
  check(kernels::swiglu(gated.gate_up, element(gated.type), gated.rows, gated.out_features,
                        gated.out, stream_),
        "the gated activation", gated.layer);
}

bool LinearEngine::fuses(const Product& product) {
  const Key key{rounded_rows(product.rows), product.in_features, product.out_features, product.type,
                product.out_type,           product.accumulate};
  if (const auto found = fused_.find(key); found != fused_.end()) return found->second;
  bool fuses = false;
  if (has_own(product)) {
    const auto bytes =
        static_cast<size_t>(product.rows * product.out_features) * dtype_size(product.out_type);
    run_apart(product);
    const uint64_t expected = hash(product.out, bytes);
    run_own(product, product.out);
    fuses = hash(product.out, bytes) == expected &&
            time([&] { run_own(product, product.out); }) < time([&] { run_apart(product); });
  }
  return fused_.emplace(key, fuses).first->second;
}

LinearEngine::Shape LinearEngine::layouts(const Product& product) {
  const auto in = static_cast<uint64_t>(product.in_features);
  const auto out = static_cast<uint64_t>(product.out_features);
  const auto rows = static_cast<uint64_t>(product.rows);
  Shape shape;
  check(cublasLtMatrixLayoutInit(&shape.weight, data_type(product.type), in, out,
                                 product.in_features),
        "a matrix product");
  check(cublasLtMatrixLayoutInit(&shape.x, data_type(product.type), in, rows, product.in_features),
        "a matrix product");
  check(cublasLtMatrixLayoutInit(&shape.out, data_type(product.out_type), out, rows,
                                 product.out_features),
        "a matrix product");
  return shape;
}

cublasStatus_t LinearEngine::execute(const Product& product, const Shape& shape,
                                     const cublasLtMatmulAlgo_t& algorithm, void* out) {
  const float one = 1, before = product.accumulate ? 1 : 0;
  auto operation = operation_;
  auto layout = shape;
  return cublasLtMatmul(handle_.get(), &operation, &one, product.weight, &layout.weight, product.x,
                        &layout.x, &before, product.out, &layout.out, out, &layout.out, &algorithm,
                        workspace_.get(), workspace_.bytes(), stream_);
}

const LinearEngine::Plan& LinearEngine::plan(const Product& product) {
  const auto key = [&product](int64_t rows) {
    return Key{rows,         product.in_features, product.out_features,
               product.type, product.out_type,    product.accumulate};
  };
  if (const auto found = plans_.find(key(product.rows)); found != plans_.end()) {
    return found->second;
  }
  const Key rounded = key(rounded_rows(product.rows));
  auto chosen = chosen_.find(rounded);
  if (chosen == chosen_.end()) chosen = chosen_.emplace(rounded, choose(product)).first;
  Plan plan = chosen->second;
  if (plan.own) return plans_.emplace(key(product.rows), plan).first->second;
  plan.shape = layouts(product);
  cublasLtMatmulHeuristicResult_t result = {};
  if (plan.usable &&
      cublasLtMatmulAlgoCheck(handle_.get(), &operation_, &plan.shape.weight, &plan.shape.x,
                              &plan.shape.out, &plan.shape.out, &plan.algorithm,
                              &result) == CUBLAS_STATUS_SUCCESS &&
      result.workspaceSize <= workspace_.bytes()) {
    return plans_.emplace(key(product.rows), plan).first->second;
  }
  // What suits its neighbours does not take this very count.
  int found = 0;
  plan.usable =
      cublasLtMatmulAlgoGetHeuristic(handle_.get(), &operation_, &plan.shape.weight, &plan.shape.x,
                                     &plan.shape.out, &plan.shape.out, preference_.get(), 1,
                                     &result, &found) == CUBLAS_STATUS_SUCCESS &&
      found > 0 && result.state == CUBLAS_STATUS_SUCCESS;
  plan.algorithm = result.algo;
  return plans_.emplace(key(product.rows), plan).first->second;
}

LinearEngine::Plan LinearEngine::choose(const Product& product) {
  // cuBLASLt is asked about the rounded count, so that its answer doesn't depend on which count of
  // those that share it came first.
  Product typical = product;
  typical.rows = rounded_rows(product.rows);
  Shape shape = layouts(typical);
  std::array<cublasLtMatmulHeuristicResult_t, kCandidates> results = {};
  int found = 0;
  Plan plan = {};
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
      handle_.get(), &operation_, &shape.weight, &shape.x, &shape.out, &shape.out,
      preference_.get(), kCandidates, results.data(), &found);
  if (status != CUBLAS_STATUS_SUCCESS) return plan;

  // What is about to be overwritten may hold the results of trials, what is added to may not.
  const auto bytes =
      static_cast<size_t>(product.rows * product.out_features) * dtype_size(product.out_type);
  const bool has_room = !product.accumulate || bytes <= trial_bytes_;
  void* out = product.accumulate ? trial_ : product.out;
  uint64_t expected = 0;
  shape = layouts(product);
  float best = 0;
  for (const auto& candidate : std::span(results).first(static_cast<size_t>(found))) {
    if (candidate.state != CUBLAS_STATUS_SUCCESS) continue;
    if (!has_room) {
      plan.algorithm = candidate.algo;
      plan.usable = true;
      return plan;
    }
    if (execute(product, shape, candidate.algo, out) != CUBLAS_STATUS_SUCCESS) continue;
    const uint64_t actual = hash(out, bytes);
    if (plan.usable && actual != expected) continue;
    expected = actual;
    const float taken =
        time([&] { check(execute(product, shape, candidate.algo, out), "measuring a product"); });
    if (!plan.usable || taken < best) {
      best = taken;
      plan.algorithm = candidate.algo;
    }
    plan.usable = true;
  }
  if (plan.usable && has_own(product)) {
    if (product.accumulate) {
      check(cudaMemcpyAsync(out, product.out, bytes, cudaMemcpyDeviceToDevice, stream_),
            "measuring a product");
    }
    run_own(product, out);
    plan.own = hash(out, bytes) == expected && time([&] { run_own(product, out); }) < best;
  }
  return plan;
}

float LinearEngine::time(const std::function<void()>& work) {
  const Event begin = make_timing_event(), end = make_timing_event();
  std::array<float, kTimedRuns> times;
  for (float& taken : times) {
    // A layer of a model does not find its weights in the L2 cache either, nor what it adds to.
    // This also keeps the GPU busy while the work is enqueued.
    for (const auto& [memory, bytes] :
         {std::pair{workspace_.get(), workspace_.bytes()}, std::pair{trial_, trial_bytes_}}) {
      if (bytes > 0) check(cudaMemsetAsync(memory, 0, bytes, stream_), "measuring a product");
    }
    check(cudaEventRecord(begin.get(), stream_), "measuring a product");
    work();
    check(cudaEventRecord(end.get(), stream_), "measuring a product");
    taken = milliseconds(begin.get(), end.get());
  }
  std::ranges::sort(times);
  return times[kTimedRuns / 2];
}

uint64_t LinearEngine::hash(const void* result, size_t bytes) {
  uint64_t value = 0;
  check(kernels::hash_words(static_cast<const uint32_t*>(result),
                            static_cast<int64_t>(bytes / sizeof(uint32_t)), hash_.get<uint64_t>(),
                            stream_),
        "comparing products");
  check(cudaMemcpyAsync(&value, hash_.get(), sizeof value, cudaMemcpyDeviceToHost, stream_),
        "comparing products");
  check(cudaStreamSynchronize(stream_), "comparing products");
  return value;
}

int64_t LinearEngine::memory_bytes() {
  return kWorkspaceBytes + sizeof(uint64_t) + sizeof(uint32_t);
}

}  // namespace sagelm::cuda
