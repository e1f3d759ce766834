// What the host gets to see of a step: logits, scores of tokens, and whether all is finite.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>
#include <string_view>

#include "backend/backend.h"
#include "backend/cuda/memory.h"

namespace sagelm::cuda {

// Functions of the same names and meanings as Backend's.
class Readback {
 public:
  explicit Readback(cudaStream_t stream);

  void read_logits(Matrix logits, std::span<float> out);
  void score(Matrix logits, std::span<const int32_t> targets, std::span<TokenScore> out);
  bool all_finite(Matrix x);

  static int64_t memory_bytes();

 private:
  // Copies to the host and waits for it, and with it for all errors of the step.
  const std::byte* read(const void* from, size_t bytes, std::string_view doing);

  cudaStream_t stream_;
  DeviceBuffer scores_, flag_;
  DeviceIntegers targets_;
  PinnedBuffer buffer_;
};

}  // namespace sagelm::cuda
