// Products of a weight matrix with a few rows of activations (decode): bound by reading the
// weights once.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>

#include "kernels/ops/element.h"

namespace sagelm::kernels {

// The most rows that one pass over the weights serves.
inline constexpr int64_t kGemvRows = 8;

enum class GemvOutput : uint8_t {
  kHalf,    // out [rows, n] of the weights' type = x W^T
  kFloat,   // out [rows, n] float32 = x W^T
  kAdd,     // out [rows, n] float32 += x W^T
  kSwiglu,  // out [rows, n] of the weights' type = silu(x G^T) * (x U^T), W = [G; U] [2n, k]
};

struct Gemv {
  Element type = Element::kF16;  // of x and the weights (16 bits)
  const void* x = nullptr;       // [rows, k]; with a norm float32
  const void* weight = nullptr;  // [n, k] (kSwiglu: [2n, k])
  void* out = nullptr;
  int64_t rows = 0;  // 1 to kGemvRows
  int64_t n = 0;
  int64_t k = 0;
  GemvOutput output = GemvOutput::kHalf;
  // The norm's weights [k], if each row of x is first to become rmsnorm(x) (kernels/ops/rmsnorm.h)
  // rounded to `type`; then gemv_normalises must hold.
  const float* norm = nullptr;
  float eps = 0;
};

// Whether gemv() takes a norm for such a product: few and short rows on a device where kernels
// overlap, for every block normalises all of x.
bool gemv_normalises(const Gemv& args);

// Products in float32, summed in an order that depends on n and k alone: a row's result is the same
// whatever rows are beside it. All starts on 16-byte boundaries; fast if k is a multiple of 8.
cudaError_t gemv(const Gemv& args, cudaStream_t stream);

// The most products of a chain.
inline constexpr int kGemvLinks = 4;

// The same products one after the other, each of which may read what those before it wrote, in one
// kernel: weights go on coming in between. All have the same rows, type and eps; gemv_chains must
// hold. arrivals: a word that is 0 at first and that nothing else uses meanwhile. The blocks wait
// for each other, so a chain has to get the whole device in the end: on a device, one stream of a
// process may run chains.
cudaError_t gemv_chain(std::span<const Gemv> products, uint32_t* arrivals, cudaStream_t stream);
bool gemv_chains(std::span<const Gemv> products);

}  // namespace sagelm::kernels
