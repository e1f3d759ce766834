// Matrix products of the CUDA backend: cuBLASLt or our own kernel (kernels/ops/gemm.h), whichever
// is faster, for many rows, another one for few (kernels/ops/gemv.h), which reads weights faster.
#pragma once

#include <cublasLt.h>

#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <tuple>

#include "backend/cuda/memory.h"
#include "base/dtype.h"

namespace sagelm::cuda {

struct Product {
  const void* x = nullptr;       // [rows, in_features] of `type`; with a norm F32
  const void* weight = nullptr;  // [out_features, in_features] of `type`
  void* out = nullptr;           // [rows, out_features] of out_type
  int64_t rows = 0;
  int64_t in_features = 0;
  int64_t out_features = 0;
  DType type = DType::kF16;      // F16 or BF16
  DType out_type = DType::kF16;  // the same or F32
  bool accumulate = false;       // out += x W^T instead of out = x W^T; F32 only
  // out = silu(x G^T) * (x U^T) instead, weight = [G; U] [2 * out_features, in_features]
  bool swiglu = false;
  // Room for [rows, 2 * out_features] of `type`, if it is gated and has more than
  // kernels::kGemvRows rows
  void* gate_up = nullptr;
  int64_t layer = -1;  // that errors name, if it is of one
  // The weights [in_features] of a norm that x is to go through first, where normalises() is true
  const float* norm = nullptr;
  float eps = 0;
};

// The right to run chains of products on the current device (kernels/ops/gemv.h), which one engine
// of the process has at a time: the blocks of two chains on two streams could wait for each other's
// multiprocessors. None has it where processes share a device through MPS.
class ChainRight {
 public:
  ChainRight();
  ~ChainRight();
  ChainRight(const ChainRight&) = delete;
  ChainRight& operator=(const ChainRight&) = delete;
  bool given() const { return device_ >= 0; }

 private:
  int device_ = -1;
};

class LinearEngine {
 public:
  explicit LinearEngine(cudaStream_t stream);

  // Accumulates in float32. The first product of a shape measures which of cuBLASLt's algorithms
  // and our kernel is fastest among those whose result equals, bit by bit, that of the algorithm
  // that cuBLASLt recommends, so that results don't depend on timing.
  void run(const Product& product);
  // Whether run() takes such a product with a norm.
  static bool normalises(const Product& product);

  // Several products, each of which may read what those before it wrote, in one kernel; false, and
  // nothing is done, if there is none for them.
  bool run_chain(std::span<const Product> products);

  // Where results that nobody reads may go, at least as large as any result that is added to what
  // is there; until then the recommended algorithm is taken for those.
  void set_trial(void* memory, size_t bytes) {
    trial_ = memory;
    trial_bytes_ = bytes;
  }

  static int64_t memory_bytes();

 private:
  using Key = std::tuple<int64_t, int64_t, int64_t, DType, DType, bool>;
  struct Shape {
    cublasLtMatrixLayoutOpaque_t weight, x, out;
  };
  struct Plan {
    bool usable = false;  // false: cuBLASLt has nothing for this shape
    bool own = false;     // our kernel instead
    Shape shape;
    cublasLtMatmulAlgo_t algorithm;
  };
  static Shape layouts(const Product& product);
  const Plan& plan(const Product& product);
  Plan choose(const Product& product);
  cublasStatus_t execute(const Product& product, const Shape& shape,
                         const cublasLtMatmulAlgo_t& algorithm, void* out);
  // Whether the gated product in one kernel is the faster one; its result is the same.
  bool fuses(const Product& product);
  void run_apart(const Product& gated);
  void run_own(const Product& product, void* out);
  // Milliseconds of a run, the median of several; what is in the memory for trials is lost.
  float time(const std::function<void()>& work);
  uint64_t hash(const void* result, size_t bytes);
  void run_few_rows(const Product& product);

  cudaStream_t stream_;
  Owner<cublasLtHandle_t, cublasLtDestroy> handle_;
  Owner<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy> preference_;
  cublasLtMatmulDescOpaque_t operation_;
  DeviceBuffer workspace_, hash_, arrivals_;
  ChainRight chain_right_;
  void* trial_ = nullptr;
  size_t trial_bytes_ = 0;
  std::map<Key, Plan> chosen_;  // by rows rounded up
  std::map<Key, Plan> plans_;   // by rows
  std::map<Key, bool> fused_;   // gated products, by rows rounded up
};

}  // namespace sagelm::cuda
