// The bytes of a KV cache on the CPU, of either type.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/attention.h"

namespace sagelm::cpu {

// FP16 pages (kFp16) or tails are [layer][page][kv_head][kPageTokens][head_dim], keys and
// values apart; quantized pages as QuantizedKv has them, layer after layer. Memory is committed by
// the system when it is first written.
class CpuKv : public KvStorage {
 public:
  explicit CpuKv(const KvLayout& layout);

  // What such a cache takes.
  static int64_t bytes(const KvLayout& layout);

  KvType type() const { return layout_.type; }
  void copy_open_page(int32_t from, int32_t to) override;

  // Appends the rows of a chunk for one KV head, in order, quantizing each page that becomes full:
  // keys and values are the head's columns of the first row. The mean key of the first page is
  // subtracted from all, unless smooth_k is false when that page becomes full.
  void append(int64_t layer, const SequenceChunk& chunk, int64_t head, const float* keys,
              const float* values, int64_t row_stride, bool smooth_k);

  // Where attention finds a sequence. The addresses of FP16 pages are added to k_pages and v_pages,
  // whose capacity must suffice.
  void locate(int64_t layer, const SequenceChunk& chunk, std::vector<const uint16_t*>& k_pages,
              std::vector<const uint16_t*>& v_pages, AttentionArgs& args) const;

 private:
  struct Free {
    void operator()(void* pointer) const { std::free(pointer); }
  };
  template <typename T>
  using Buffer = std::unique_ptr<T[], Free>;

  template <typename T>
  void allocate(int64_t count, Buffer<T>& buffer);
  int64_t open_page_at(int64_t layer, int64_t page) const {
    return (layer * num_open_ + page) * open_elements_;
  }
  int64_t mean_at(int64_t layer, int64_t tail) const {
    return (layer * num_open_ + tail) * layout_.num_kv_heads * layout_.head_dim;
  }
  void close_page(int64_t layer, const SequenceChunk& chunk, int64_t index, int64_t head,
                  bool smooth_k);

  KvLayout layout_;
  PageShape page_;         // of quantized pages
  int64_t num_open_;       // FP16 pages or tails
  int64_t open_elements_;  // of one, in one layer
  Buffer<uint16_t> keys_, values_;
  Buffer<uint8_t> operands_;
  Buffer<float> scales_;
  Buffer<float> means_;  // [layer][tail][kv_head][head_dim]
};

}  // namespace sagelm::cpu
