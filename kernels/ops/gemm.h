// Products of a weight matrix with many rows of activations (prefill) on Hopper's tensor cores,
// with what follows done to the sums while they are in registers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/ops/element.h"

namespace sagelm::kernels {

enum class GemmOutput : uint8_t {
  kHalf,    // out [rows, n] of the weights' type = x W^T
  kAdd,     // out [rows, n] float32 += x W^T
  kSwiglu,  // out [rows, n] of the weights' type = silu(x G^T) * (x U^T), W = [G; U] [2n, k], both
            // products rounded to the type first, which is what kernels/ops/swiglu.h reads
};

struct Gemm {
  Element type = Element::kF16;  // of x and the weights (16 bits)
  const void* x = nullptr;       // [rows, k]
  const void* weight = nullptr;  // [n, k] (kSwiglu: [2n, k])
  void* out = nullptr;
  int64_t rows = 0;
  int64_t n = 0;
  int64_t k = 0;
  GemmOutput output = GemmOutput::kHalf;
};

// Whether gemm() takes it: on a device of compute capability 9.0, n and k multiples of 8 and all
// starts on 16-byte boundaries.
bool gemm_takes(const Gemm& args);

// Products in float32, summed in the order of k: an output depends on its row of x and its row of
// the weights alone.
cudaError_t gemm(const Gemm& args, cudaStream_t stream);

}  // namespace sagelm::kernels
