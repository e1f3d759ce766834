// The attention of a model's steps: rotary embedding, appending to the KV cache, and attention over
// it, for either type of cache.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda/graph_cache.h"
#include "backend/cuda/kv_storage.h"
#include "backend/cuda/memory.h"
#include "backend/cuda/step_inputs.h"
#include "base/dtype.h"
#include "kernels/cache/quantized_kv.h"
#include "sagelm/attention.h"

namespace sagelm::cuda {

// Calls for the same layers as Backend has them; step is that of the batch.
class ModelAttention {
 public:
  // graphs are forgotten when memory that they use moves.
  ModelAttention(cudaStream_t stream, GraphCache& graphs) : stream_(stream), graphs_(&graphs) {}

  // Why there is no kernel for the shape, with activations of that type; empty if there is one.
  static std::string problem(const AttentionShape& shape, DType type);
  // Whether such a device has kernels that read the quantized cache for the shape.
  static bool reads_quantized_kv(const AttentionShape& shape, int capability);

  void rope_append(const StepInputs& step, Matrix qkv, const AttentionShape& shape,
                   std::span<const float> inverse_frequencies, int64_t layer, const CudaKv& cache);
  void attention(const StepInputs& step, Matrix qkv, const AttentionShape& shape, int64_t layer,
                 const CudaKv& cache, Matrix out);

  int64_t memory_bytes() const;

 private:
  void attend_quantized(const StepInputs& inputs, Matrix qkv, const AttentionShape& shape,
                        int64_t layer, const CudaKv& cache, Matrix out);
  void grow(DeviceBuffer& buffer, size_t bytes, std::string_view what);
  void grow_rotations(int64_t positions, std::span<const float> inverse_frequencies);

  cudaStream_t stream_;
  GraphCache* graphs_;
  DeviceBuffer workspace_, rotations_, frequencies_;
  std::vector<float> rotated_by_;  // the inverse frequencies in rotations_
  int64_t num_rotations_ = 0;
};

}  // namespace sagelm::cuda
