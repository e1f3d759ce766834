#include "backend/cuda/kv_storage.h"

#include "backend/cuda/check.h"
#include "backend/cuda/element.h"
#include "base/error.h"

namespace sagelm::cuda {
namespace {

DeviceBuffer zeros(int64_t bytes, const std::string& what, cudaStream_t stream) {
  DeviceBuffer buffer(static_cast<size_t>(bytes), what);
  if (bytes == 0) return buffer;
  check(cudaMemsetAsync(buffer.get(), 0, buffer.bytes(), stream), "clearing the KV cache");
  return buffer;
}

// Bytes of a cache's parts; those that only a quantized one has are 0 in the other.
struct Sizes {
  int64_t keys = 0, values = 0, scales = 0, means = 0, tails = 0;
};

Sizes sizes_of(const KvLayout& layout, DType type) {
  const auto element = static_cast<int64_t>(dtype_size(type));
  constexpr int64_t kFloat = sizeof(float);
  const bool quantized = is_quantized(layout.type), int4_keys = layout.type == KvType::kInt4;
  const int64_t dim = quantized ? kernels::quantized_kv_dim(static_cast<int32_t>(layout.head_dim))
                                : layout.head_dim * element;
  Sizes sizes;
  sizes.values = layout.heads() * layout.num_pages * kPageTokens * dim;
  sizes.keys = int4_keys ? sizes.values / 2 : sizes.values;
  if (quantized) {
    sizes.scales =
        layout.heads() * layout.num_pages * kernels::quantized_kv_scales(int4_keys) * kFloat;
    sizes.means = layout.heads() * layout.num_tails * layout.head_dim * kFloat;
    sizes.tails = layout.heads() * layout.num_tails * 2 * kPageTokens * layout.head_dim * element;
  }
  return sizes;
}

}  // namespace

int64_t CudaKv::bytes(const KvLayout& layout, DType type) {
  const Sizes sizes = sizes_of(layout, type);
  return sizes.keys + sizes.values + sizes.scales + sizes.means + sizes.tails;
}

CudaKv::CudaKv(const KvLayout& layout, DType type, cudaStream_t stream)
    : layout_(layout), type_(type), stream_(stream) {
  if (layout.num_pages * kPageTokens > INT32_MAX) {
    fail("a KV cache of {} tokens is larger than the GPU's kernels can address",
         layout.num_pages * kPageTokens);
  }
  const Sizes sizes = sizes_of(layout, type);
  key_bytes_ = sizes.keys / layout.num_layers;
  value_bytes_ = sizes.values / layout.num_layers;
  const std::string what =
      fmt::format("a KV cache of {} pages of {} tokens ({:.2f} GiB)", layout.num_pages, kPageTokens,
                  static_cast<double>(bytes(layout, type)) / (1 << 30));
  keys_ = zeros(sizes.keys, what, stream);
  values_ = zeros(sizes.values, what, stream);
  scales_ = zeros(sizes.scales, what, stream);
  means_ = zeros(sizes.means, what, stream);
  tails_ = zeros(sizes.tails, what, stream);
}

kernels::QuantizedKv CudaKv::quantized(int64_t layer, int64_t num_heads) const {
  kernels::QuantizedKv view;
  view.type = element(type_);
  view.num_heads = static_cast<int32_t>(num_heads);
  view.num_kv_heads = static_cast<int32_t>(layout_.num_kv_heads);
  view.head_dim = static_cast<int32_t>(layout_.head_dim);
  view.int4_keys = layout_.type == KvType::kInt4;
  view.keys = keys_.get<int8_t>() + layer * key_bytes_;
  view.values = values_.get<uint8_t>() + layer * value_bytes_;
  const int64_t kv_heads = layout_.num_kv_heads;
  view.scales = scales_.get<float>() +
                layer * layout_.num_pages * kv_heads * kernels::quantized_kv_scales(view.int4_keys);
  view.means = means_.get<float>() + layer * layout_.num_tails * kv_heads * layout_.head_dim;
  view.tails =
      tails_.get<std::byte>() + layer * static_cast<int64_t>(tails_.bytes()) / layout_.num_layers;
  return view;
}

// In every layer, element `from` of `count` of `bytes` each, to element `to`.
void CudaKv::copy_part(const DeviceBuffer& buffer, int64_t bytes, int64_t count, int32_t from,
                       int32_t to) const {
  for (int64_t layer = 0; layer < layout_.num_layers; ++layer) {
    std::byte* start = buffer.get<std::byte>() + layer * count * bytes;
    check(cudaMemcpyAsync(start + to * bytes, start + from * bytes, static_cast<size_t>(bytes),
                          cudaMemcpyDeviceToDevice, stream_),
          "copying a page of the KV cache");
  }
}

void CudaKv::copy_open_page(int32_t from, int32_t to) {
  const int64_t row = layout_.num_kv_heads * layout_.head_dim;
  const auto size = static_cast<int64_t>(dtype_size(type_));
  if (layout_.type == KvType::kFp16) {
    copy_part(keys_, kPageTokens * row * size, layout_.num_pages, from, to);
    copy_part(values_, kPageTokens * row * size, layout_.num_pages, from, to);
  } else {
    copy_part(tails_, 2 * kPageTokens * row * size, layout_.num_tails, from, to);
    copy_part(means_, row * static_cast<int64_t>(sizeof(float)), layout_.num_tails, from, to);
  }
}

}  // namespace sagelm::cuda
