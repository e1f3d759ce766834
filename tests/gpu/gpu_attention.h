// Attention calls on the device for tests and benchmarks: made inputs in any of the layouts that
// sagelm/attention.h takes, and a float64 oracle of single rows.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <vector>

#include "sagelm/attention.h"

namespace sagelm::testing {

// Empty if there is a device to run on, else the reason for skipping.
std::string no_device_reason();
// Throws std::runtime_error naming the operation.
void check_cuda(cudaError_t error, const char* what);

// Device memory that frees itself.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(size_t bytes);
  ~DeviceBuffer();
  DeviceBuffer(DeviceBuffer&& other) noexcept;
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept;
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  void upload(const void* from, size_t bytes);
  void download(void* to, size_t bytes) const;
  void fill(int byte);

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

enum class GpuInputs : uint8_t {
  kNormal,       // Q, K, V standard normal
  kOffsetK,      // plus +-8 on every 16th channel of K and +-2 there on Q
  kHeavyTailed,  // the same offsets, and log-normal channel scales on Q, K and V
  kBiasedV,      // V around 1: shows a lossy accumulator as a gain error
  kUnevenV,      // V of every 100 tokens of another size: 1, 1/64, 0, 16, 1/1024, 1/4
  kSinks,        // tokens 303, 1303, ... have most of the weight, and values near zero
};
inline constexpr int kGpuInputs = 6;  // of them
enum class GpuLayout : uint8_t {
  kTokensFirst,  // [batch, tokens, heads, dim]
  kHeadsFirst,   // [batch, heads, tokens, dim]
  kRagged,       // packed tokens with cu_q_lens and cu_kv_lens
  kPaged,        // packed queries; K and V in shuffled pages whose unused rows hold NaN
};

struct GpuShape {
  std::vector<int> q_lens, kv_lens;  // of each sequence; equal lengths unless ragged or paged
  int num_heads = 1, num_kv_heads = 1, head_dim = 64;
  bool causal = true;
  bool bf16 = false;
  GpuLayout layout = GpuLayout::kTokensFirst;
  GpuInputs inputs = GpuInputs::kNormal;
  uint32_t seed = 1;
};

class GpuAttention {
 public:
  explicit GpuAttention(const GpuShape& shape);

  // What to change before run(): variant, kernel, no_smooth_k, softmax_scale.
  sagelm_attention_args args{};

  // Poisons the output, calls the library and downloads. Throws std::runtime_error with the
  // library's sentence if it refuses.
  void run();

  // Of sequence b, row `row`, head `head`, after run().
  std::vector<double> out(int b, int row, int head) const;
  double lse(int b, int row, int head) const;

  struct Row {
    std::vector<double> out;
    double lse = 0;
  };
  // The same in float64 from the rounded inputs.
  Row oracle(int b, int row, int head) const;

  const GpuShape& shape() const { return shape_; }
  const std::vector<uint16_t>& raw_out() const { return out_; }
  DeviceBuffer& workspace() { return workspace_; }

 private:
  double value(const std::vector<float>& x, int64_t token, int head, int heads, int d) const;

  GpuShape shape_;
  std::vector<int64_t> q_starts_, kv_starts_;  // packed token index of each sequence
  std::vector<float> q_, k_, v_;               // packed [token][head][dim], rounded to the dtype
  std::vector<uint16_t> out_;
  std::vector<float> lse_;
  DeviceBuffer q_device_, k_device_, v_device_, out_device_, lse_device_, workspace_;
  DeviceBuffer cu_q_, cu_kv_, kv_lens_, page_table_;
};

struct GpuError {
  double relative_l1 = 0;
  double cosine = 0;
  double max_abs = 0;
  double max_lse = 0;  // largest difference of finite log-sum-exps
  double gain = 0;     // sum a.b / sum b.b
  int64_t rows = 0;
};
// Over up to max_rows rows of every head and sequence, spread evenly, the last one included.
GpuError measure_error(const GpuAttention& call, int max_rows);

}  // namespace sagelm::testing
