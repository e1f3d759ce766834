// The bytes of a KV cache on the GPU, of any type.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "backend/backend.h"
#include "backend/cuda/memory.h"
#include "base/dtype.h"
#include "kernels/cache/quantized_kv.h"

namespace sagelm::cuda {

// FP16 or BF16 pages (kFp16): [layer][page][kPageTokens][kv_head][head_dim], keys and values apart.
// Quantized pages and their tails as kernels::QuantizedKv has them, layer after layer.
class CudaKv : public KvStorage {
 public:
  // type: of the activations, 16 bits.
  CudaKv(const KvLayout& layout, DType type, cudaStream_t stream);

  // What such a cache takes.
  static int64_t bytes(const KvLayout& layout, DType type);

  KvType type() const { return layout_.type; }
  void copy_open_page(int32_t from, int32_t to) override;

  // kFp16.
  std::byte* keys(int64_t layer) const { return keys_.get<std::byte>() + layer * key_bytes_; }
  std::byte* values(int64_t layer) const { return values_.get<std::byte>() + layer * value_bytes_; }
  // The others.
  kernels::QuantizedKv quantized(int64_t layer, int64_t num_heads) const;
  // Where the cache lies: tells it from others.
  const void* address() const { return keys_.get(); }

 private:
  void copy_part(const DeviceBuffer& buffer, int64_t bytes, int64_t count, int32_t from,
                 int32_t to) const;

  KvLayout layout_;
  DType type_;
  cudaStream_t stream_;
  int64_t key_bytes_, value_bytes_;  // of a layer
  DeviceBuffer keys_, values_;
  DeviceBuffer scales_, means_, tails_;  // of a quantized cache
};

}  // namespace sagelm::cuda
