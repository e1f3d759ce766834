// Copies weights from a mapped file to the GPU through pinned memory: the CPU fills one buffer
// while the GPU reads the other.
#pragma once

#include <array>
#include <cstddef>

#include "backend/cuda/memory.h"
#include "base/dtype.h"
#include "base/tensor_view.h"

namespace sagelm::cuda {

class WeightUploader {
 public:
  explicit WeightUploader(cudaStream_t stream);
  ~WeightUploader();
  WeightUploader(const WeightUploader&) = delete;
  WeightUploader& operator=(const WeightUploader&) = delete;

  // Enqueues the copy of tensor to `to`, converted to type (nearest even); the tensor's bytes are
  // no longer needed when it returns. Throws Error naming the tensor if a value is NaN, infinite,
  // or beyond what type can hold.
  void upload(const TensorView& tensor, DType type, void* to);

 private:
  cudaStream_t stream_;
  std::array<PinnedBuffer, 2> buffers_;
  std::array<Event, 2> sent_;
  size_t next_ = 0;
};

}  // namespace sagelm::cuda
