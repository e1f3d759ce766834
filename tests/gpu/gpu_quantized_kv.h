// A quantized KV cache on the device for tests: sequences of made tokens, appended in any steps,
// and what the host knows of them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "gpu/gpu_attention.h"
#include "gpu/gpu_ops.h"
#include "kernels/attention/sage_tiles.cuh"
#include "kernels/cache/quantized_kv.h"

namespace sagelm::testing {

struct KvShape {
  kernels::Element type = kernels::Element::kF16;
  int32_t heads = 1, kv_heads = 1, dim = 64;
  bool int4_keys = false;

  size_t width() const { return static_cast<size_t>((heads + 2 * kv_heads) * dim); }
  int32_t padded() const { return kernels::quantized_kv_dim(dim); }
  // Of a page and KV head.
  int64_t value_bytes() const { return int64_t{kernels::kTileTokens} * padded(); }
  int64_t key_bytes() const { return int4_keys ? value_bytes() / 2 : value_bytes(); }
  int64_t scales() const { return kernels::quantized_kv_scales(int4_keys); }
};

// x, of 64 or 128 channels, times the Hadamard matrix, its additions in the order in which the
// kernels have them, times their factor.
std::vector<float> rotated_key(std::vector<float> x);
std::vector<float> rotated_query(std::vector<float> x);

class GpuQuantizedKv {
 public:
  // Room for sequences of so many tokens, whose QKV rows depend on the seed and the sequence alone.
  // fact, if not negative: the position of a token of sequence 0 whose key answers the query of the
  // last one, head 0, with a logit of 13, and whose values are 2 and -2 in turn.
  GpuQuantizedKv(const KvShape& shape, const std::vector<int>& lengths, bool smooth_k = true,
                 int fact = -1);

  // One step: counts[i] more tokens of sequence i.
  void append(const std::vector<int>& counts);
  // The same, for prefill().
  void append_for_prefill(const std::vector<int>& counts);

  struct Output {
    std::vector<double> out;  // [rows][heads][dim]
    std::vector<std::byte> raw;
    std::vector<float> lse;  // [sequences][heads][max_q_len]
  };
  // Of the last step's queries.
  Output decode() const;
  // Likewise after append_for_prefill, without lse. at_once: sequences whose INT4 keys the
  // workspace has room for.
  Output prefill(int at_once);
  Output prefill() { return prefill(sequences_); }
  // A step and its output (without lse), by the one kernel that does both.
  Output append_and_decode(const std::vector<int>& counts);

  struct Row {
    std::vector<double> out, magnitudes;  // magnitudes: sum of P |V|
    double lse = 0;
  };
  // In float64 from what the device holds, with INT8 queries for pages, as the decode kernel has
  // them; query: of the last step.
  Row oracle(int sequence, int query, int head) const;
  // Of head 0 of sequence 0's last query, by the FP16 kernel over plain FP16 tokens.
  std::vector<double> with_fp16_cache() const;
  // In float64 from the rows as appended.
  Row exact(int sequence, int query, int head) const;

  // Of one page of a sequence, in order of tokens.
  struct Page {
    std::vector<int8_t> keys;           // [128][padded]
    std::vector<uint8_t> values;        // [128][padded], e4m3
    std::vector<float> scales;          // 4 of keys (INT4: not written), the values', its inverse
    std::vector<float> steps, middles;  // INT4: of each key
    bool operator==(const Page&) const = default;
  };
  Page page(int sequence, int index, int kv_head) const;
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
  // Uploads a step that is not appended yet.
  void prepare(const std::vector<int>& counts);
  // Of the step that it prepares.
  kernels::AppendToQuantizedKv append_args(const std::vector<int>& counts);
  void run(const kernels::AppendToQuantizedKv& args);
  void check_arrivals() const;  // throws if they are not zeros again
  // Copies the device's memory to the host.
  void download();
  size_t place(int sequence, int index, int kv_head) const;
  double query(int sequence, int query, int head, int channel) const {
    const int position = length(sequence) - last_count(sequence) + query;
    return rotated_[static_cast<size_t>(sequence)]
                   [static_cast<size_t>(position) * shape_.width() +
                    static_cast<size_t>(head * shape_.dim + channel)];
  }
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
  DeviceBuffer keys_, values_, scales_, mean_memory_, tail_memory_, arrivals_;
  std::vector<uint8_t> host_keys_, host_values_;
  std::vector<float> host_scales_, host_means_;
  std::vector<uint16_t> host_tails_;
  GpuArray rotations_;

  // Of the last step.
  kernels::QuantizedKvStep step_;
  DeviceBuffer prefill_workspace_;
  GpuArray qkv_;
  DeviceBuffer positions_device_, slots_device_, cu_device_, lens_device_, table_device_,
      tails_device_, means_device_;
};

}  // namespace sagelm::testing
