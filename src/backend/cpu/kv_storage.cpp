#include "backend/cpu/kv_storage.h"

#include <algorithm>

#include "backend/cpu/ops.h"
#include "base/dtype.h"
#include "base/error.h"
#include "kernels/attention/recipe.h"

namespace sagelm::cpu {
namespace {

// The mean of a page's keys, [kPageTokens][head_dim] FP16, summed in the order of recipe.h.
void mean_key(const uint16_t* keys, int64_t head_dim, float* mean) {
  const int64_t rows = recipe::mean_rows(static_cast<int>(head_dim));
  for (int64_t c = 0; c < head_dim; ++c) {
    float sums[kPageTokens];
    for (int64_t key = 0; key < kPageTokens; ++key) {
      sums[key] = half_to_float(keys[key * head_dim + c]);
    }
    for (int64_t apart = kPageTokens / 2; apart >= rows; apart /= 2) {
      for (int64_t i = 0; i < apart; ++i) sums[i] += sums[i + apart];
    }
    for (int64_t apart = 1; apart < rows; apart *= 2) {
      for (int64_t i = 0; i < rows; i += 2 * apart) sums[i] += sums[i + apart];
    }
    mean[c] = half_to_float(float_to_half(sums[0] / static_cast<float>(kPageTokens)));
  }
}

}  // namespace

CpuKv::CpuKv(const KvLayout& layout)
    : layout_(layout),
      page_(page_shape(layout.type, layout.head_dim)),
      num_open_(is_quantized(layout.type) ? layout.num_tails : layout.num_pages),
      open_elements_(layout.num_kv_heads * kPageTokens * layout.head_dim) {
  const int64_t open = layout.num_layers * num_open_ * open_elements_;
  allocate(open, keys_);
  allocate(open, values_);
  if (layout.type == KvType::kFp16) return;
  const int64_t heads = layout.heads() * layout.num_pages;
  allocate(heads * page_.operand_bytes(), operands_);
  allocate(heads * page_.scales, scales_);
  allocate(layout.heads() * layout.num_tails * layout.head_dim, means_);
}

int64_t CpuKv::bytes(const KvLayout& layout) {
  constexpr int64_t kFloat = sizeof(float);
  const int64_t open = kPageTokens * layout.head_dim * 2 * static_cast<int64_t>(sizeof(uint16_t));
  if (!is_quantized(layout.type)) return layout.heads() * layout.num_pages * open;
  const PageShape page = page_shape(layout.type, layout.head_dim);
  return layout.heads() * (layout.num_pages * (page.operand_bytes() + page.scales * kFloat) +
                           layout.num_tails * (open + layout.head_dim * kFloat));
}

template <typename T>
void CpuKv::allocate(int64_t count, Buffer<T>& buffer) {
  if (count == 0) return;
  buffer.reset(static_cast<T*>(std::calloc(static_cast<size_t>(count), sizeof(T))));
  if (buffer == nullptr) {
    fail("no memory for a KV cache of {:.1f} GiB ({} pages of {} tokens); use a smaller --ctx",
         static_cast<double>(bytes(layout_)) / (1 << 30), layout_.num_pages, kPageTokens);
  }
}

void CpuKv::copy_open_page(int32_t from, int32_t to) {
  for (int64_t layer = 0; layer < layout_.num_layers; ++layer) {
    for (uint16_t* buffer : {keys_.get(), values_.get()}) {
      std::copy_n(buffer + open_page_at(layer, from), open_elements_,
                  buffer + open_page_at(layer, to));
    }
    if (means_ == nullptr) continue;
    std::copy_n(means_.get() + mean_at(layer, from), layout_.num_kv_heads * layout_.head_dim,
                means_.get() + mean_at(layer, to));
  }
}

void CpuKv::append(int64_t layer, const SequenceChunk& chunk, int64_t head, const float* keys,
                   const float* values, int64_t row_stride, bool smooth_k) {
  const bool quantized = is_quantized(layout_.type);
  const int64_t dim = layout_.head_dim;
  for (int64_t i = 0; i < chunk.q_len; ++i) {
    const int64_t position = chunk.q_start() + i;
    const int64_t index = position / kPageTokens;
    const int64_t page = quantized ? chunk.tail : chunk.pages[static_cast<size_t>(index)];
    const int64_t to =
        open_page_at(layer, page) + (head * kPageTokens + position % kPageTokens) * dim;
    ops().half_from_float(keys + i * row_stride, dim, keys_.get() + to);
    ops().half_from_float(values + i * row_stride, dim, values_.get() + to);
    if (quantized && (position + 1) % kPageTokens == 0) {
      close_page(layer, chunk, index, head, smooth_k);
    }
  }
}

void CpuKv::close_page(int64_t layer, const SequenceChunk& chunk, int64_t index, int64_t head,
                       bool smooth_k) {
  const int64_t dim = layout_.head_dim;
  const int64_t from = open_page_at(layer, chunk.tail) + head * kPageTokens * dim;
  float* mean = means_.get() + mean_at(layer, chunk.tail) + head * dim;
  if (index == 0) {
    if (smooth_k) {
      mean_key(keys_.get() + from, dim, mean);
    } else {
      std::fill_n(mean, dim, 0.0f);
    }
  }
  const int64_t page = chunk.pages[static_cast<size_t>(index)];
  const int64_t to = (layer * layout_.num_pages + page) * layout_.num_kv_heads + head;
  quantize_page(layout_.type, keys_.get() + from, values_.get() + from, mean, dim,
                operands_.get() + to * page_.operand_bytes(), scales_.get() + to * page_.scales);
}

void CpuKv::locate(int64_t layer, const SequenceChunk& chunk, std::vector<const uint16_t*>& k_pages,
                   std::vector<const uint16_t*>& v_pages, AttentionArgs& args) const {
  if (is_quantized(layout_.type)) {
    const int64_t page = layer * layout_.num_pages * layout_.num_kv_heads;
    const int64_t tail = open_page_at(layer, chunk.tail);
    args.quantized = {.operands = operands_.get() + page * page_.operand_bytes(),
                      .scales = scales_.get() + page * page_.scales,
                      .pages = chunk.pages,
                      .tail_k = keys_.get() + tail,
                      .tail_v = values_.get() + tail,
                      .mean = means_.get() + mean_at(layer, chunk.tail)};
    if (chunk.kv_len < kPageTokens) args.quantized.mean = nullptr;
    return;
  }
  const size_t first = k_pages.size();
  for (const int32_t page : chunk.pages) {
    k_pages.push_back(keys_.get() + open_page_at(layer, page));
    v_pages.push_back(values_.get() + open_page_at(layer, page));
  }
  args.kv = {.k_pages = std::span(k_pages).subspan(first),
             .v_pages = std::span(v_pages).subspan(first),
             .page_size = kPageTokens};
}

}  // namespace sagelm::cpu
