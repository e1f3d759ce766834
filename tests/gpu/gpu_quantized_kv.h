// A quantized KV cache on the device for tests: sequences of made tokens, appended in any steps,
// and what the host knows of them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "gpu/gpu_attention.h"
#include "gpu/gpu_ops.h"
#include "kernels/attention/sage_tiles.cuh"
#include "kernels/cache/quantized_kv.h"

namespace sagelm::testing {

struct KvShape {
  kernels::Element type = kernels::Element::kF16;
  int32_t heads = 1, kv_heads = 1, dim = 64;

  size_t width() const { return static_cast<size_t>((heads + 2 * kv_heads) * dim); }
  int32_t padded() const { return kernels::quantized_kv_dim(dim); }
};

class GpuQuantizedKv {
 public:
  // Room for sequences of so many tokens, whose QKV rows depend on the seed and the sequence alone.
  GpuQuantizedKv(const KvShape& shape, const std::vector<int>& lengths, bool smooth_k = true);

  // One step: counts[i] more tokens of sequence i, for decode() or for prefill().
  void append(const std::vector<int>& counts, bool for_prefill = false);
  // Of the last step's QKV as the append left it.
  double qkv(int sequence, int query, int column) const;
  // Of the rows as they were.
  double row(int sequence, int position, int column) const;

  struct Output {
    std::vector<double> out;  // [rows][heads][dim]
    std::vector<std::byte> raw;
    std::vector<float> lse;  // [sequences][heads][max_q_len]
  };
  // Of the last step's queries.
  Output decode() const;
  // Likewise, without lse.
  Output prefill() const;

  struct Row {
    std::vector<double> out, magnitudes;  // magnitudes: sum of P |V|
    double lse = 0;
  };
  // In float64 from what the device holds, with INT8 queries for pages, as the kernels have them;
  // query: of the last step. For prefill() the tail is a page of few tokens.
  Row oracle(int sequence, int query, int head) const;
  // In float64 from the rows as appended.
  Row exact(int sequence, int query, int head) const;

  // Of one page of a sequence, in order of tokens.
  struct Page {
    std::vector<int8_t> keys;     // [128][padded]
    std::vector<uint8_t> values;  // [128][padded], e4m3
    std::vector<float> scales;    // 4 of keys, the values', its log2, its inverse
    bool operator==(const Page&) const = default;
  };
  Page page(int sequence, int index, int kv_head) const;
  // What the recipe makes of the 16-bit tokens of a page, of as many as there are.
  Page expected_page(int sequence, int index, int kv_head, const std::vector<float>& mean) const;
  // Their bytes as they lie.
  std::vector<uint8_t> raw_keys(int sequence, int index, int kv_head) const;
  std::vector<uint8_t> raw_values(int sequence, int index, int kv_head) const;
  std::vector<float> mean(int sequence, int kv_head) const;
  // As appended: rotated, 16 bits. which: 0 keys, 1 values.
  double token(int sequence, int position, int which, int kv_head, int channel) const;
  double tail(int sequence, int place, int which, int kv_head, int channel) const;

  int length(int sequence) const { return lengths_[static_cast<size_t>(sequence)]; }
  // Throws if memory of no sequence was written to.
  void check_untouched() const;

  kernels::DecodeFromQuantizedKv decode_args() const;

 private:
  // Copies the device's memory to the host.
  void download();
  size_t place(int sequence, int index, int kv_head) const;
  double query(int sequence, int query, int head, int channel) const {
    const int position = length(sequence) - last_count(sequence) + query;
    return rotated(sequence, position, head * shape_.dim + channel);
  }
  double rotated(int sequence, int position, int column) const {
    return rotated_[static_cast<size_t>(sequence)]
                   [static_cast<size_t>(position) * shape_.width() + static_cast<size_t>(column)];
  }
  // What a KV head's rows see as tiles of quantized tokens: its pages, for prefill() with the tail.
  const std::vector<Page>& tiles(int sequence, int kv_head) const;
  int last_count(int sequence) const {
    return cu_q_lens_[static_cast<size_t>(sequence) + 1] -
           cu_q_lens_[static_cast<size_t>(sequence)];
  }

  KvShape shape_;
  bool smooth_k_;
  int pages_, sequences_, stride_;
  std::vector<std::vector<float>> rows_;      // [sequence][token][width], not rotated
  std::vector<std::vector<double>> rotated_;  // likewise, by kernels/ops/rope_append.h
  std::vector<int> lengths_;                  // appended so far
  std::vector<int32_t> page_table_, tails_, means_, cu_q_lens_;
  DeviceBuffer keys_, values_, scales_, mean_memory_, tail_memory_;
  std::vector<uint8_t> host_keys_, host_values_;
  std::vector<float> host_scales_, host_means_;
  std::vector<uint16_t> host_tails_;
  GpuArray rotations_;
  std::vector<double> qkv_rows_;  // of the last step, [rows][width]

  // Of the last step.
  bool for_prefill_ = false;
  mutable std::map<std::pair<int, int>, std::vector<Page>> tiles_;  // of those asked for
  kernels::QuantizedKvStep step_;
  DeviceBuffer prefill_workspace_;
  GpuArray qkv_;
  DeviceBuffer positions_device_, slots_device_, cu_device_, lens_device_, table_device_,
      tails_device_, means_device_;
};

}  // namespace sagelm::testing
