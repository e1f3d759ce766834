// Products with BF16 weights on the tile units of a CPU that has them (AMX): several times as fast
// as oneDNN 2.6's at the shapes of small models, above all because weights are loaded once for both
// halves of the activations.
//
// x [rows, in] is split into high + low, two BF16 numbers to a float32 number, and
//   out [rows, out] = x W^T = sum over k, 32 at a time, of high W^T, then low W^T, in float32.
// A result depends on its row of x and its row of W alone: not on the other rows, nor on threads.
#pragma once

#include <cstdint>
#include <span>

#include "backend/cpu/aligned_buffer.h"
#include "base/tensor_view.h"

namespace sagelm::cpu {

// Whether this CPU has BF16 tile units and the system lets this process use them. Not if
// SAGELM_CPU_ISA asks for a lower instruction set.
bool has_amx();

struct AmxWeight {
  int64_t in_features = 0;
  int64_t out_features = 0;  // of the product: gate and up together count once
  bool gate_up = false;
  int64_t bytes = 0;
  AlignedBuffer<uint16_t> tiles;
};

// RMSNorm of a row before it is multiplied.
struct RowNorm {
  const float* weight;
  double eps;
};

class AmxEngine {
 public:
  // Stacks BF16 tensors [out_i, in] by rows.
  static AmxWeight pack(std::span<const TensorView> stacked);
  static AmxWeight pack_gate_up(const TensorView& gate, const TensorView& up);

  // out = (accumulate ? out : 0) + norm(x) W^T; without a norm, norm(x) is x. With a weight of
  // pack_gate_up, out = silu(norm(x) G^T) * (norm(x) U^T), and accumulate is not looked at.
  void run(const float* x, int64_t rows, const RowNorm* norm, const AmxWeight& weight, float* out,
           bool accumulate);

 private:
  AlignedBuffer<uint16_t> halves_;  // split activations, each thread's own
  AlignedBuffer<float> normed_;     // a row, each thread's own
};

}  // namespace sagelm::cpu
