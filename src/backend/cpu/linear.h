// Matrix products of the CPU backend: our own on AMX, otherwise oneDNN's.
//
// BF16 weights on a CPU with BF16 units: each activation is split into two BF16 numbers that
// together hold 16 significant bits, and both are multiplied with the weights as stored,
// accumulating in float32. That costs two products, runs several times faster than one float32
// product on AMX, and keeps log-probabilities within 1e-3 of float32 arithmetic. Everything else
// runs in float32.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <oneapi/dnnl/dnnl.hpp>
#include <optional>
#include <span>
#include <tuple>
#include <vector>

#include "backend/cpu/amx.h"
#include "base/tensor_view.h"

namespace sagelm::cpu {

// Output buffers must have room for this many rows beyond their own: products of more than a few
// rows are rounded up so that few different kernels are generated.
inline constexpr int64_t kRowPadding = 64;

struct LinearWeight {
  int64_t in_features = 0;
  int64_t out_features = 0;
  bool bf16 = false;
  dnnl::memory packed;
  std::optional<AmxWeight> amx;  // instead of packed

  int64_t bytes() const;
};

class LinearEngine {
 public:
  explicit LinearEngine(bool use_amx = has_amx());

  // Stacks [out_i, in] tensors by rows and packs them.
  LinearWeight pack(std::span<const TensorView> stacked);
  // Of a SwiGLU, [intermediate, in] each, computed in one type. The second is empty where the first
  // is AMX's and holds both.
  std::array<LinearWeight, 2> pack_gate_up(const TensorView& gate, const TensorView& up);
  // out [rows, out_features] = (accumulate ? out : 0) + norm(x) W^T, x being [rows, in_features];
  // without a norm, norm(x) is x.
  void run(const float* x, int64_t rows, const RowNorm* norm, const LinearWeight& weight,
           float* out, bool accumulate);
  // out [rows, intermediate] = silu(norm(x) G^T) * (norm(x) U^T). gate_up has room for twice as
  // much as out; what it holds afterwards is not defined.
  void run_swiglu(const float* x, int64_t rows, const RowNorm* norm, const LinearWeight& gate,
                  const LinearWeight& up, float* gate_up, float* out);

  // What BF16 weights are multiplied with.
  const char* units() const { return use_amx_ ? "AMX" : uses_bf16_ ? "BF16" : "F32"; }
  bool uses_bf16() const { return uses_bf16_; }

 private:
  struct Plan {
    dnnl::matmul product;
    dnnl::memory::desc x, y;
  };
  using PlanKey = std::tuple<int64_t, int64_t, int64_t, bool, bool>;

  // bf16: all of stacked are BF16 and are multiplied so.
  LinearWeight pack_as(std::span<const TensorView> stacked, bool bf16);
  const Plan& plan(const LinearWeight& weight, int64_t rows, bool accumulate);
  // norm(x) as oneDNN's products of weight read it, rounded up to `padded` rows: as it is, copied,
  // or split.
  const void* prepare(const float* x, int64_t rows, int64_t padded, const RowNorm* norm,
                      const LinearWeight& weight);
  void multiply(const void* x, int64_t rows, int64_t padded, const LinearWeight& weight, float* out,
                bool accumulate);
  void execute(const LinearWeight& weight, int64_t rows, const void* x, float* y, bool accumulate);

  dnnl::engine engine_;
  dnnl::stream stream_;
  bool uses_bf16_;
  bool use_amx_;
  AmxEngine amx_;
  std::map<PlanKey, Plan> plans_;
  std::vector<uint16_t> split_;  // high halves of all rows, then the low ones
  std::vector<float> normed_;    // rows, each thread's own
  std::vector<float> padded_;    // float32 activations when rows are padded or normalised
  std::vector<float> stacked_;   // results of high and low halves in one small product
};

// Whether the CPU multiplies BF16 natively.
bool cpu_has_bf16();

}  // namespace sagelm::cpu
