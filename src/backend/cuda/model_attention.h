// The attention of a model's steps: rotary embedding, appending to the KV cache, and attention over
// it, for either type of cache.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda/arena.h"
#include "backend/cuda/kv_storage.h"
#include "backend/cuda/step_inputs.h"
#include "base/dtype.h"
#include "kernels/cache/quantized_kv.h"
#include "sagelm/attention.h"

namespace sagelm::cuda {

// Calls for the same layers as Backend has them; step is that of the batch.
class ModelAttention {
 public:
  explicit ModelAttention(cudaStream_t stream) : stream_(stream) {}

  // Why there is no kernel for the shape, with activations of that type; empty if there is one.
  static std::string problem(const AttentionShape& shape, DType type);
  // Whether such a device has kernels that read such a quantized cache for the shape.
  static bool reads_kv(const AttentionShape& shape, KvType type, int capability);

  // What steps take, on the current device.
  static AttentionRoom room(const StepLimits& limits, DType type);
  // Where that is; workspace_bytes may be more. What rotations holds is written when it is needed.
  void set_memory(const AttentionRoom& room, void* rotations, void* workspace,
                  size_t workspace_bytes);

  void rope_append(const StepInputs& step, Matrix qkv, const AttentionShape& shape,
                   std::span<const float> inverse_frequencies, int64_t layer, const CudaKv& cache);
  void attention(const StepInputs& step, Matrix qkv, const AttentionShape& shape, int64_t layer,
                 const CudaKv& cache, Matrix out);
  void append_and_attend(const StepInputs& step, Matrix qkv, const AttentionShape& shape,
                         std::span<const float> inverse_frequencies, int64_t layer,
                         const CudaKv& cache, Matrix out);

 private:
  bool append_in_decode(const StepInputs& step, Matrix qkv, const AttentionShape& shape,
                        int64_t layer, const CudaKv& cache, Matrix out);
  void append(const StepInputs& step, Matrix qkv, const AttentionShape& shape,
              std::span<const float> inverse_frequencies, int64_t layer, const CudaKv& cache);
  void decode_quantized(const StepInputs& step, Matrix qkv, const AttentionShape& shape,
                        int64_t layer, const CudaKv& cache, Matrix out);
  void prepare_rotations(int64_t positions, std::span<const float> inverse_frequencies);
  // Calls run with the step's sequences, as many at a time as the workspace has room for;
  // bytes(count) is what so many take.
  template <typename Bytes, typename Run>
  void in_groups(const StepInputs& step, const Bytes& bytes, const Run& run) const;

  cudaStream_t stream_;
  void* workspace_ = nullptr;
  size_t workspace_bytes_ = 0;
  float* rotations_ = nullptr;  // [num_rotations_][2][half], then the inverse frequencies and
                                // arrivals_
  int64_t num_rotations_ = 0, num_arrivals_ = 0;
  uint32_t* arrivals_ = nullptr;   // zeros between kernels
  std::vector<float> rotated_by_;  // the inverse frequencies in rotations_
};

}  // namespace sagelm::cuda
