#include "backend/cuda/kv_storage.h"

#include "backend/cuda/check.h"
#include "backend/cuda/element.h"
#include "base/error.h"

namespace sagelm::cuda {
namespace {

DeviceBuffer zeros(int64_t bytes, const std::string& what, cudaStream_t stream) {
  DeviceBuffer buffer(static_cast<size_t>(bytes), what);
  check(cudaMemsetAsync(buffer.get(), 0, buffer.bytes(), stream), "clearing the KV cache");
  return buffer;
}

// Bytes of a page of one layer and KV head.
struct HeadPage {
  int64_t keys, values, scales;
};

HeadPage head_page(KvType type, int64_t head_dim) {
  if (type == KvType::kFp16) {
    const int64_t bytes = kPageTokens * head_dim * static_cast<int64_t>(sizeof(uint16_t));
    return {bytes, bytes, 0};
  }
  const bool int4_keys = type == KvType::kInt4;
  const int64_t bytes = kPageTokens * kernels::quantized_kv_dim(static_cast<int32_t>(head_dim));
  return {int4_keys ? bytes / 2 : bytes, bytes,
          kernels::quantized_kv_scales(int4_keys) * static_cast<int64_t>(sizeof(float))};
}

}  // namespace

int64_t CudaKv::page_bytes(KvType type, int64_t head_dim) {
  const HeadPage page = head_page(type, head_dim);
  return page.keys + page.values + page.scales;
}

CudaKv::CudaKv(const KvLayout& layout, DType type, cudaStream_t stream)
    : layout_(layout), type_(type), stream_(stream) {
  if (layout.num_pages * kPageTokens > INT32_MAX) {
    fail("a KV cache of {} tokens is larger than the GPU's kernels can address",
         layout.num_pages * kPageTokens);
  }
  const HeadPage page = head_page(layout.type, layout.head_dim);
  key_bytes_ = layout.num_pages * layout.num_kv_heads * page.keys;
  value_bytes_ = layout.num_pages * layout.num_kv_heads * page.values;
  const std::string what =
      fmt::format("a KV cache of {} pages of {} tokens ({:.2f} GiB)", layout.num_pages, kPageTokens,
                  static_cast<double>(layout.bytes()) / (1 << 30));
  keys_ = zeros(key_bytes_ * layout.num_layers, what, stream);
  values_ = zeros(value_bytes_ * layout.num_layers, what, stream);
  if (is_quantized(layout.type)) {
    const int64_t float_bytes = sizeof(float);
    scales_ = zeros(layout.heads() * layout.num_pages * page.scales, what, stream);
    means_ = zeros(layout.heads() * layout.num_tails * layout.head_dim * float_bytes, what, stream);
    tails_ = zeros(layout.heads() * layout.num_tails * 2 * kPageTokens * layout.head_dim *
                       static_cast<int64_t>(dtype_size(type)),
                   what, stream);
  }
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
