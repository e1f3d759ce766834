#include "gpu/gpu_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>

namespace sagelm::testing {
namespace {

constexpr int kPageTokens = 128;

uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
uint16_t to_f16(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}
float from_f16(uint16_t x) {
  _Float16 half;
  std::memcpy(&half, &x, sizeof half);
  return static_cast<float>(half);
}

void make_values(std::vector<float>& x, int heads, int dim, bool is_q, bool is_v, GpuInputs inputs,
                 std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> scales(static_cast<size_t>(heads * dim), 1.0f);
  std::vector<float> offsets(scales.size(), 0.0f);
  for (size_t i = 0; i < scales.size(); ++i) {
    if (inputs == GpuInputs::kHeavyTailed) scales[i] = std::exp(0.5f * normal(random));
    const size_t channel = i % static_cast<size_t>(dim);
    const bool sinks = inputs == GpuInputs::kSinks;
    const bool shifted =
        inputs == GpuInputs::kOffsetK || inputs == GpuInputs::kHeavyTailed || sinks;
    if (shifted && !is_v && channel % 16 == 0) {
      // A sink's logits are around 10.
      const float of_key = sinks ? 80.0f / std::sqrt(static_cast<float>(dim)) : 8.0f;
      offsets[i] = (is_q ? 2.0f : of_key) * (channel % 32 == 0 ? 1.0f : -1.0f);
    }
    if (inputs == GpuInputs::kBiasedV && is_v) offsets[i] = 1.0f;
  }
  for (size_t i = 0; i < x.size(); ++i) {
    const size_t channel = i % scales.size(), token = i / scales.size();
    const bool is_sink = inputs == GpuInputs::kSinks && token % 1000 == 303;
    const bool shifted = inputs != GpuInputs::kSinks || is_q || is_sink;
    x[i] = normal(random) * scales[channel] + (shifted ? offsets[channel] : 0.0f);
    if (inputs == GpuInputs::kUnevenV && is_v) {
      constexpr float kSizes[] = {1.0f, 1.0f / 64, 0.0f, 16.0f, 1.0f / 1024, 0.25f};
      x[i] *= kSizes[token / 100 % std::size(kSizes)];
    }
    if (is_sink && is_v) x[i] *= 0.01f;
  }
}

}  // namespace

std::string no_device_reason() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return std::string("no CUDA device: ") + cudaGetErrorString(error);
  return count == 0 ? "no CUDA device" : "";
}

void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

DeviceBuffer::DeviceBuffer(size_t bytes) : bytes_(bytes) {
  if (bytes > 0) check_cuda(cudaMalloc(&data_, bytes), "cudaMalloc");
}
DeviceBuffer::~DeviceBuffer() { cudaFree(data_); }
DeviceBuffer::DeviceBuffer(DeviceBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}
void DeviceBuffer::upload(const void* from, size_t bytes) {
  if (bytes > bytes_) *this = DeviceBuffer(bytes);
  if (bytes > 0) check_cuda(cudaMemcpy(data_, from, bytes, cudaMemcpyHostToDevice), "upload");
}
void DeviceBuffer::download(void* to, size_t bytes) const {
  if (bytes > 0) check_cuda(cudaMemcpy(to, data_, bytes, cudaMemcpyDeviceToHost), "download");
}
void DeviceBuffer::fill(int byte) {
  if (bytes_ > 0) check_cuda(cudaMemset(data_, byte, bytes_), "cudaMemset");
}

GpuAttention::GpuAttention(const GpuShape& shape) : shape_(shape) {
  const size_t batch = shape.q_lens.size();
  int64_t q_tokens = 0, kv_tokens = 0;
  for (size_t b = 0; b < batch; ++b) {
    q_starts_.push_back(q_tokens);
    kv_starts_.push_back(kv_tokens);
    q_tokens += shape.q_lens[b];
    kv_tokens += shape.kv_lens[b];
  }
  const int dim = shape.head_dim, heads = shape.num_heads, kv_heads = shape.num_kv_heads;
  std::mt19937 random(shape.seed);
  q_.resize(static_cast<size_t>(q_tokens * heads * dim));
  k_.resize(static_cast<size_t>(kv_tokens * kv_heads * dim));
  v_.resize(k_.size());
  make_values(q_, heads, dim, true, false, shape.inputs, random);
  make_values(k_, kv_heads, dim, false, false, shape.inputs, random);
  make_values(v_, kv_heads, dim, false, true, shape.inputs, random);
  const auto encode = [&](float x) { return shape.bf16 ? to_bf16(x) : to_f16(x); };
  const auto decode = [&](uint16_t x) { return shape.bf16 ? from_bf16(x) : from_f16(x); };

  // Encodes packed values into the layout's order; returns what was encoded to the float copy.
  const auto place = [&](std::vector<float>& x, int count, const std::vector<int>& lens,
                         const std::vector<int64_t>& starts, bool is_kv, DeviceBuffer& device,
                         sagelm_attention_tensor& tensor, const std::vector<int>& pages) {
    std::vector<uint16_t> raw;
    const bool paged = is_kv && shape.layout == GpuLayout::kPaged;
    const int64_t row = int64_t{count} * dim;
    if (paged) {
      raw.assign(pages.size() * kPageTokens * static_cast<size_t>(row), 0x7FFF);  // NaN
      tensor = {nullptr, kPageTokens * row, row, dim};
    } else {
      raw.resize(x.size());
      tensor = {nullptr, lens.empty() ? 0 : lens[0] * row, row, dim};
      if (shape.layout == GpuLayout::kHeadsFirst) {
        tensor.token_stride = dim;
        tensor.head_stride = int64_t{lens[0]} * dim;
      }
    }
    int64_t first_page = 0;
    for (size_t b = 0; b < lens.size(); ++b) {
      for (int t = 0; t < lens[b]; ++t) {
        for (int h = 0; h < count; ++h) {
          for (int d = 0; d < dim; ++d) {
            float& from = x[static_cast<size_t>((starts[b] + t) * row + h * dim + d)];
            int64_t to = (starts[b] + t) * row + h * dim + d;
            if (paged) {
              const int page = pages[static_cast<size_t>(first_page + t / kPageTokens)];
              to = page * tensor.batch_stride + (t % kPageTokens) * row + h * dim + d;
            } else if (shape.layout == GpuLayout::kHeadsFirst) {
              to = static_cast<int64_t>(b) * tensor.batch_stride + h * tensor.head_stride +
                   t * dim + d;
            }
            raw[static_cast<size_t>(to)] = encode(from);
            from = decode(raw[static_cast<size_t>(to)]);
          }
        }
      }
      first_page += (lens[b] + kPageTokens - 1) / kPageTokens;
    }
    device.upload(raw.data(), raw.size() * 2);
    if (device.data() == nullptr) device = DeviceBuffer(16);
    tensor.data = device.data();
  };

  std::vector<int> pages;
  int widest = 0;
  for (const int len : shape.kv_lens) {
    const int count = (len + kPageTokens - 1) / kPageTokens;
    widest = std::max(widest, count);
    pages.resize(pages.size() + static_cast<size_t>(count));
  }
  std::iota(pages.begin(), pages.end(), 0);
  std::shuffle(pages.begin(), pages.end(), random);
  place(q_, heads, shape.q_lens, q_starts_, false, q_device_, args.q, {});
  place(k_, kv_heads, shape.kv_lens, kv_starts_, true, k_device_, args.k, pages);
  place(v_, kv_heads, shape.kv_lens, kv_starts_, true, v_device_, args.v, pages);
  args.out = args.q;
  out_device_ = DeviceBuffer(std::max<size_t>(16, q_.size() * 2));
  args.out.data = out_device_.data();

  args.struct_size = sizeof args;
  args.dtype = shape.bf16 ? SAGELM_ATTENTION_BF16 : SAGELM_ATTENTION_F16;
  args.batch = static_cast<int>(batch);
  args.num_heads = heads;
  args.num_kv_heads = kv_heads;
  args.head_dim = dim;
  args.max_q_len = batch == 0 ? 0 : *std::max_element(shape.q_lens.begin(), shape.q_lens.end());
  args.max_kv_len = batch == 0 ? 0 : *std::max_element(shape.kv_lens.begin(), shape.kv_lens.end());
  args.causal = shape.causal;
  lse_.resize(batch * static_cast<size_t>(heads) * static_cast<size_t>(args.max_q_len));
  lse_device_ = DeviceBuffer(std::max<size_t>(16, lse_.size() * sizeof(float)));
  args.lse = static_cast<float*>(lse_device_.data());

  const bool packed = shape.layout == GpuLayout::kRagged || shape.layout == GpuLayout::kPaged;
  if (packed) {
    std::vector<int32_t> cu_q{0}, cu_kv{0}, table(batch * static_cast<size_t>(widest), 0);
    size_t next = 0;
    for (size_t b = 0; b < batch; ++b) {
      cu_q.push_back(cu_q.back() + shape.q_lens[b]);
      cu_kv.push_back(cu_kv.back() + shape.kv_lens[b]);
      for (int i = 0; i < (shape.kv_lens[b] + kPageTokens - 1) / kPageTokens; ++i) {
        table[b * static_cast<size_t>(widest) + static_cast<size_t>(i)] = pages[next++];
      }
    }
    cu_q_.upload(cu_q.data(), cu_q.size() * 4);
    args.cu_q_lens = static_cast<int32_t*>(cu_q_.data());
    if (shape.layout == GpuLayout::kRagged) {
      cu_kv_.upload(cu_kv.data(), cu_kv.size() * 4);
      args.cu_kv_lens = static_cast<int32_t*>(cu_kv_.data());
    } else {
      kv_lens_.upload(shape.kv_lens.data(), shape.kv_lens.size() * 4);
      page_table_.upload(table.data(), table.size() * 4);
      if (page_table_.data() == nullptr) page_table_ = DeviceBuffer(16);
      args.kv_lens = static_cast<int32_t*>(kv_lens_.data());
      args.page_table = static_cast<int32_t*>(page_table_.data());
      args.page_table_stride = widest;
      args.page_tokens = kPageTokens;
    }
  }
}

void GpuAttention::run() {
  size_t bytes = 0;
  if (sagelm_attention_workspace_bytes(&args, &bytes) != SAGELM_ATTENTION_OK) {
    throw std::runtime_error(sagelm_attention_last_error());
  }
  if (bytes > workspace_.bytes()) workspace_ = DeviceBuffer(bytes);
  workspace_.fill(0xFF);
  out_device_.fill(0xFF);
  lse_device_.fill(0xFF);
  args.workspace = workspace_.data();
  args.workspace_bytes = workspace_.bytes();
  if (sagelm_attention(&args) != SAGELM_ATTENTION_OK) {
    throw std::runtime_error(sagelm_attention_last_error());
  }
  check_cuda(cudaDeviceSynchronize(), "attention");
  out_.resize(q_.size());
  out_device_.download(out_.data(), out_.size() * 2);
  lse_device_.download(lse_.data(), lse_.size() * sizeof(float));
}

std::vector<double> GpuAttention::out(int b, int row, int head) const {
  const auto index = static_cast<size_t>(b);
  std::vector<double> result;
  for (int d = 0; d < shape_.head_dim; ++d) {
    int64_t at = (q_starts_[index] + row) * args.q.token_stride;
    if (args.cu_q_lens == nullptr) {
      at = b * args.q.batch_stride + row * args.q.token_stride;
    }
    const uint16_t raw = out_[static_cast<size_t>(at + head * args.q.head_stride + d)];
    result.push_back(shape_.bf16 ? from_bf16(raw) : from_f16(raw));
  }
  return result;
}

double GpuAttention::lse(int b, int row, int head) const {
  return lse_[(static_cast<size_t>(b) * static_cast<size_t>(shape_.num_heads) +
               static_cast<size_t>(head)) *
                  static_cast<size_t>(args.max_q_len) +
              static_cast<size_t>(row)];
}

GpuAttention::Row GpuAttention::oracle(int b, int row, int head) const {
  const auto index = static_cast<size_t>(b);
  const int dim = shape_.head_dim;
  const int kv_head = head / (shape_.num_heads / shape_.num_kv_heads);
  const int kv_len = shape_.kv_lens[index];
  const int end =
      shape_.causal ? std::min(kv_len, kv_len - shape_.q_lens[index] + row + 1) : kv_len;
  const double scale = args.softmax_scale > 0 ? static_cast<double>(args.softmax_scale)
                                              : 1.0 / std::sqrt(static_cast<double>(dim));
  const float* q =
      &q_[static_cast<size_t>(((q_starts_[index] + row) * shape_.num_heads + head) * dim)];
  const auto kv_row = [&](const std::vector<float>& x, int t) {
    return &x[static_cast<size_t>(((kv_starts_[index] + t) * shape_.num_kv_heads + kv_head) * dim)];
  };
  Row result;
  result.out.assign(static_cast<size_t>(dim), 0.0);
  std::vector<double> logits(static_cast<size_t>(std::max(0, end)));
  double most = -INFINITY;
  for (int t = 0; t < end; ++t) {
    const float* k = kv_row(k_, t);
    double dot = 0;
    for (int d = 0; d < dim; ++d) dot += static_cast<double>(q[d]) * static_cast<double>(k[d]);
    logits[static_cast<size_t>(t)] = dot * scale;
    most = std::max(most, dot * scale);
  }
  double sum = 0;
  for (int t = 0; t < end; ++t) {
    const double p = std::exp(logits[static_cast<size_t>(t)] - most);
    const float* v = kv_row(v_, t);
    sum += p;
    for (int d = 0; d < dim; ++d)
      result.out[static_cast<size_t>(d)] += p * static_cast<double>(v[d]);
  }
  for (double& x : result.out) x = sum > 0 ? x / sum : 0.0;
  result.lse = sum > 0 ? most + std::log(sum) : -INFINITY;
  return result;
}

GpuError measure_error(const GpuAttention& call, int max_rows) {
  const GpuShape& shape = call.shape();
  double difference = 0, total = 0, ab = 0, aa = 0, bb = 0;
  GpuError error;
  for (int b = 0; b < static_cast<int>(shape.q_lens.size()); ++b) {
    const int q_len = shape.q_lens[static_cast<size_t>(b)];
    const int count = std::min(q_len, max_rows);
    for (int head = 0; head < shape.num_heads; ++head) {
      for (int i = 1; i <= count; ++i) {
        const int row = static_cast<int>(int64_t{q_len} * i / count) - 1;
        const std::vector<double> actual = call.out(b, row, head);
        const GpuAttention::Row expected = call.oracle(b, row, head);
        for (size_t d = 0; d < actual.size(); ++d) {
          difference += std::abs(actual[d] - expected.out[d]);
          total += std::abs(expected.out[d]);
          ab += actual[d] * expected.out[d];
          aa += actual[d] * actual[d];
          bb += expected.out[d] * expected.out[d];
          const double worst = std::abs(actual[d] - expected.out[d]);
          if (!(worst <= error.max_abs)) error.max_abs = worst;  // keeps NaN
        }
        if (std::isfinite(expected.lse)) {
          const double off = std::abs(call.lse(b, row, head) - expected.lse);
          if (!(off <= error.max_lse)) error.max_lse = off;
        }
        ++error.rows;
      }
    }
  }
  error.relative_l1 = total > 0 ? difference / total : difference;
  error.cosine = aa > 0 && bb > 0 ? ab / std::sqrt(aa * bb) : (aa == bb ? 1.0 : 0.0);
  error.gain = bb > 0 ? ab / bb : 1.0;
  return error;
}

}  // namespace sagelm::testing
