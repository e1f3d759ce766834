// Times the kernels of one decode step of Llama-2-7B's shape (32 heads of 128, FP16 weights) on the
// device, each beside the time that its bytes take at the rate of a large read of the same run.
//   bench_decode_gpu [BATCH] [CONTEXT...]
// Every time is that of kLayers launches on as many layers' weights and caches, recorded as a graph
// in which a kernel may begin while the one before it ends, divided by kLayers: first of a kernel
// alone, then of whole layers, as the model runs them. A step is 32 layers and the logits.
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "gpu/gpu_attention.h"
#include "gpu/gpu_ops.h"
#include "kernels/attention/mma_decode.h"
#include "kernels/cache/quantized_kv.h"
#include "kernels/ops/gemv.h"
#include "kernels/ops/rmsnorm.h"

namespace {

using namespace sagelm::testing;
using namespace sagelm::kernels;

constexpr int kLayers = 8, kModelLayers = 32;
constexpr int64_t kHidden = 4096, kFeedForward = 11008, kVocabulary = 32000;
constexpr int kHeads = 32, kDim = 128, kPage = 128;
constexpr float kEps = 1e-5f;

// Small values around zero from a hash of the index.
__global__ void fill_halves(__half* x, int64_t count, float scale) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    const uint32_t h = (static_cast<uint32_t>(i) * 0x9E3779B1u) ^ 0x85EBCA6Bu;
    x[i] = __float2half((static_cast<float>(h * 0xC2B2AE35u >> 8) * 0x1p-23f - 1.0f) * scale);
  }
}
__global__ void fill_floats(float* x, int64_t count, float value) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    x[i] = value;
  }
}

DeviceBuffer halves(int64_t count, float scale) {
  DeviceBuffer buffer(2 * count);
  fill_halves<<<1024, 256>>>(static_cast<__half*>(buffer.data()), count, scale);
  return buffer;
}
DeviceBuffer floats(int64_t count, float value) {
  DeviceBuffer buffer(4 * count);
  fill_floats<<<1024, 256>>>(static_cast<float*>(buffer.data()), count, value);
  return buffer;
}
const int32_t* integers(const DeviceBuffer& x) { return static_cast<const int32_t*>(x.data()); }

struct Layer {
  DeviceBuffer input_norm, post_norm, qkv, o, gate_up, down;
  DeviceBuffer keys, values;                                  // FP16 pages
  DeviceBuffer key_bytes, value_bytes, scales, means, tails;  // quantized pages

  Layer(int64_t tokens, bool quantized)
      : input_norm(floats(kHidden, 1.0f)),
        post_norm(floats(kHidden, 1.0f)),
        qkv(halves(3 * kHidden * kHidden, 0.02f)),
        o(halves(kHidden * kHidden, 0.02f)),
        gate_up(halves(2 * kFeedForward * kHidden, 0.02f)),
        down(halves(kHidden * kFeedForward, 0.02f)) {
    const int64_t elements = tokens * kHidden;
    if (quantized) {
      key_bytes = halves(elements / 2, 0.01f);
      value_bytes = halves(elements / 2, 0.01f);
      scales = floats(tokens / kPage * kHeads * kQuantizedKvScales, 0.01f);
      means = floats(tokens / kPage * kHidden, 0.0f);
      tails = halves(tokens / kPage * 2 * kPage * kHidden, 1.0f);
    } else {
      keys = halves(elements, 1.0f);
      values = halves(elements, 1.0f);
    }
  }
};

// A kernel or two of a layer, and the bytes of weights and cache that it reads.
struct Op {
  const char* name;
  double bytes;
  std::function<void(const Layer&)> run;
};

class Step {
 public:
  Step(int batch, int context, bool quantized)
      : batch_(batch),
        context_(context),
        quantized_(quantized),
        hidden_(floats(batch * kHidden, 0.5f)),
        normed_(halves(batch * kHidden, 1.0f)),
        qkv_(halves(batch * 3 * kHidden, 1.0f)),
        attended_(halves(batch * kHidden, 1.0f)),
        activated_(halves(batch * kFeedForward, 1.0f)),
        logits_(floats(batch * kVocabulary, 0.0f)),
        head_(halves(kVocabulary * kHidden, 0.02f)),
        rotations_(floats(int64_t{context} * kDim, 0.7f)) {
    cudaStreamCreate(&stream_);
    const int pages = table_stride();
    std::vector<int32_t> table(static_cast<size_t>(batch) * pages), starts(batch + 1), ids(batch);
    std::iota(table.begin(), table.end(), 0);
    std::iota(starts.begin(), starts.end(), 0);
    std::iota(ids.begin(), ids.end(), 0);
    table_ = upload_integers(table);
    starts_ = upload_integers(starts);
    ids_ = upload_integers(ids);
    lens_ = upload_integers(std::vector<int32_t>(batch, context));
    const int64_t tokens = int64_t{batch} * pages * kPage;
    for (int i = 0; i < kLayers; ++i) layers_.emplace_back(tokens, quantized);
    arrivals_ = DeviceBuffer(batch * kHeads * sizeof(uint32_t));
    arrivals_.fill(0);
    chain_arrivals_ = DeviceBuffer(sizeof(uint32_t));
    chain_arrivals_.fill(0);
    workspace_ =
        DeviceBuffer(quantized ? quantized_kv_decode_workspace_bytes(decode_args(layers_[0]))
                               : mma_decode_workspace_bytes(half_problem(layers_[0])));
    const int64_t cached = batch * int64_t{context} * kHidden * (quantized ? 2 : 4);
    ops_ = {
        {"norm + QKV", 6.0 * kHidden * kHidden,
         [this](const Layer& l) {
           normed_product(hidden_, l.input_norm, l.qkv, qkv_, 3 * kHidden, GemvOutput::kHalf);
         }},
        {"append, attention", static_cast<double>(cached), [this](const Layer& l) { attend(l); }},
        {"O + residual", 2.0 * kHidden * kHidden,
         [this](const Layer& l) {
           product(attended_, l.o, hidden_, kHidden, kHidden, GemvOutput::kAdd);
         }},
        {"norm + gate, up", 4.0 * kFeedForward * kHidden,
         [this](const Layer& l) {
           normed_product(hidden_, l.post_norm, l.gate_up, activated_, kFeedForward,
                          GemvOutput::kSwiglu);
         }},
        {"down + residual", 2.0 * kFeedForward * kHidden,
         [this](const Layer& l) {
           product(activated_, l.down, hidden_, kHidden, kFeedForward, GemvOutput::kAdd);
         }},
    };
  }

  void print(double rate) {
    std::printf("\nbatch %d, context %d, %s cache\n%-18s %9s %9s %8s %6s\n", batch_, context_,
                quantized_ ? "8-bit" : "FP16", "", "us", "at rate", "GB/s", "%");
    microseconds(ops_);  // wakes the device up
    double sum = 0, bytes = 0;
    const auto line = [rate](const char* name, double us, double moved) {
      std::printf("%-18s %9.2f %9.2f %8.0f %6.1f\n", name, us, 1e6 * moved / rate,
                  moved / us * 1e-3, 1e8 * moved / rate / us);
      std::fflush(stdout);
    };
    for (const Op& op : ops_) {
      const double us = microseconds({&op, 1});
      sum += us;
      bytes += op.bytes;
      line(op.name, us, op.bytes);
    }
    line("sum", sum, bytes);
    line("one by one", microseconds(ops_), bytes);
    std::vector<Op> products;
    for (const Op& op : ops_) {
      if (&op != &ops_[1]) products.push_back(op);
    }
    const double weights = bytes - ops_[1].bytes;
    line("without attention", microseconds(products), weights);
    const Op chain = {"chain", weights, [this](const Layer& l) { tail(l); }};
    line("a chain of them", microseconds({&chain, 1}), weights);
    const std::vector<Op> layer_ops = {ops_[1], chain};
    const double layer = microseconds(layer_ops);
    line("a layer", layer, bytes);
    const Op logits = {"logits", 2.0 * kVocabulary * kHidden, [this](const Layer& l) {
                         normed_product(hidden_, l.input_norm, head_, logits_, kVocabulary,
                                        GemvOutput::kFloat);
                       }};
    const double head = microseconds({&logits, 1});
    line("logits", head, logits.bytes);
    const double step = kModelLayers * layer + head;
    line("step", step, kModelLayers * bytes + logits.bytes);
    std::printf("%.1f tokens/s\n", 1e6 * batch_ / step);
  }

 private:
  double microseconds(std::span<const Op> ops) {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    check_cuda(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "recording");
    for (const Layer& layer : layers_) {
      for (const Op& op : ops) op.run(layer);
    }
    check_cuda(cudaStreamEndCapture(stream_, &graph), "recording");
    check_cuda(cudaGraphInstantiate(&exec, graph, 0), "recording");
    cudaEvent_t begin, end;
    cudaEventCreate(&begin);
    cudaEventCreate(&end);
    std::vector<float> times;
    for (int i = 0; i < 14; ++i) {
      cudaEventRecord(begin, stream_);
      check_cuda(cudaGraphLaunch(exec, stream_), "a step");
      cudaEventRecord(end, stream_);
      check_cuda(cudaEventSynchronize(end), "a step");
      float ms = 0;
      cudaEventElapsedTime(&ms, begin, end);
      if (i >= 3) times.push_back(ms);
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    return 1e3 * times[times.size() / 2] / kLayers;
  }

  Gemv gemv_args(const DeviceBuffer& x, const DeviceBuffer& weight, const DeviceBuffer& out,
                 int64_t n, int64_t k, GemvOutput output) const {
    Gemv args;
    args.x = x.data();
    args.weight = weight.data();
    args.out = out.data();
    args.rows = batch_;
    args.n = n;
    args.k = k;
    args.output = output;
    return args;
  }
  void product(const DeviceBuffer& x, const DeviceBuffer& weight, const DeviceBuffer& out,
               int64_t n, int64_t k, GemvOutput output) const {
    check_cuda(gemv(gemv_args(x, weight, out, n, k, output), stream_), "gemv");
  }
  // Of the normalised residual, in one kernel where there is one.
  void normed_product(const DeviceBuffer& x, const DeviceBuffer& norm, const DeviceBuffer& weight,
                      const DeviceBuffer& out, int64_t n, GemvOutput output) const {
    const auto* weights = static_cast<const float*>(norm.data());
    Gemv args = gemv_args(x, weight, out, n, kHidden, output);
    args.norm = weights;
    args.eps = kEps;
    if (gemv_normalises(args)) {
      check_cuda(gemv(args, stream_), "gemv");
      return;
    }
    check_cuda(rmsnorm(static_cast<const float*>(x.data()), weights, batch_, kHidden, kEps,
                       Element::kF16, normed_.data(), stream_),
               "rmsnorm");
    product(normed_, weight, out, n, kHidden, output);
  }

  // All products between one attention and the next, whose layer is taken to be the same.
  void tail(const Layer& l) const {
    Gemv chain[] = {
        gemv_args(attended_, l.o, hidden_, kHidden, kHidden, GemvOutput::kAdd),
        gemv_args(hidden_, l.gate_up, activated_, kFeedForward, kHidden, GemvOutput::kSwiglu),
        gemv_args(activated_, l.down, hidden_, kHidden, kFeedForward, GemvOutput::kAdd),
        gemv_args(hidden_, l.qkv, qkv_, 3 * kHidden, kHidden, GemvOutput::kHalf)};
    chain[1].norm = static_cast<const float*>(l.post_norm.data());
    chain[3].norm = static_cast<const float*>(l.input_norm.data());
    chain[1].eps = chain[3].eps = kEps;
    if (gemv_chains(chain)) {
      check_cuda(gemv_chain(chain, static_cast<uint32_t*>(chain_arrivals_.data()), stream_),
                 "gemv_chain");
      return;
    }
    for (const int i : {2, 3, 4, 0}) ops_[i].run(l);
  }

  // As the CUDA backend rounds it.
  int max_length() const { return (context_ + 1023) / 1024 * 1024; }
  int table_stride() const { return max_length() / kPage; }

  QuantizedKv cache(const Layer& layer) const {
    QuantizedKv cache;
    cache.num_heads = cache.num_kv_heads = kHeads;
    cache.head_dim = kDim;
    cache.keys = static_cast<int8_t*>(layer.key_bytes.data());
    cache.values = static_cast<uint8_t*>(layer.value_bytes.data());
    cache.scales = static_cast<float*>(layer.scales.data());
    cache.means = static_cast<float*>(layer.means.data());
    cache.tails = layer.tails.data();
    return cache;
  }
  QuantizedKvStep quantized_step() const {
    QuantizedKvStep step;
    step.rows = step.num_sequences = batch_;
    step.max_q_len = 1;
    step.max_kv_len = max_length();
    step.cu_q_lens = integers(starts_);
    step.kv_lens = integers(lens_);
    step.page_table = integers(table_);
    step.page_table_stride = table_stride();
    step.tails = step.means = integers(ids_);
    return step;
  }
  DecodeFromQuantizedKv decode_args(const Layer& layer) const {
    DecodeFromQuantizedKv args;
    args.cache = cache(layer);
    args.step = quantized_step();
    args.queries = qkv_.data();
    args.query_stride = 3 * kHidden;
    args.out = attended_.data();
    args.out_stride = kHidden;
    args.softmax_scale = 1.0f / std::sqrt(static_cast<float>(kDim));
    args.rotations = static_cast<const float*>(rotations_.data());
    args.arrivals = static_cast<uint32_t*>(arrivals_.data());
    return args;
  }
  Problem half_problem(const Layer& layer) const {
    Problem p{};
    p.q = {qkv_.data(), 3 * kHidden, 3 * kHidden, kDim};
    p.out = {attended_.data(), kHidden, kHidden, kDim};
    p.k = {layer.keys.data(), kPage * kHidden, kHidden, kDim};
    p.v = {layer.values.data(), kPage * kHidden, kHidden, kDim};
    p.kv_lens = integers(lens_);
    p.page_table = integers(table_);
    p.page_table_stride = table_stride();
    p.page_tokens = kPage;
    p.batch = batch_;
    p.num_heads = p.num_kv_heads = kHeads;
    p.head_dim = kDim;
    p.max_q_len = 1;
    p.max_kv_len = max_length();
    p.softmax_scale = 1.0f / std::sqrt(static_cast<float>(kDim));
    p.causal = true;
    p.rotations = static_cast<const float*>(rotations_.data());
    p.arrivals = static_cast<uint32_t*>(arrivals_.data());
    return p;
  }
  void attend(const Layer& layer) const {
    if (quantized_) {
      check_cuda(decode_from_quantized_kv(decode_args(layer), workspace_.data(), stream_),
                 "decode_from_quantized_kv");
    } else {
      check_cuda(mma_decode(half_problem(layer), workspace_.data(), stream_), "mma_decode");
    }
  }

  int batch_, context_;
  bool quantized_;
  DeviceBuffer hidden_, normed_, qkv_, attended_, activated_, logits_, head_, rotations_,
      workspace_;
  DeviceBuffer table_, starts_, ids_, lens_, arrivals_, chain_arrivals_;
  cudaStream_t stream_ = nullptr;
  std::vector<Layer> layers_;
  std::vector<Op> ops_;
};

// Bytes per second of a product that reads 3 GB of weights.
double read_rate() {
  constexpr int64_t kRows = 400000;
  const DeviceBuffer weight = halves(kRows * kHidden, 0.02f), x = halves(kHidden, 1.0f),
                     out = floats(kRows, 0.0f);
  Gemv args;
  args.x = x.data();
  args.weight = weight.data();
  args.out = out.data();
  args.rows = 1;
  args.n = kRows;
  args.k = kHidden;
  args.output = GemvOutput::kFloat;
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  float best = 1e9f;
  for (int i = 0; i < 6; ++i) {
    cudaEventRecord(begin);
    check_cuda(gemv(args, nullptr), "gemv");
    cudaEventRecord(end);
    check_cuda(cudaEventSynchronize(end), "gemv");
    float ms = 0;
    cudaEventElapsedTime(&ms, begin, end);
    best = std::min(best, ms);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return 2e3 * kRows * kHidden / best;
}

}  // namespace

int main(int argc, char** argv) {
  if (const std::string reason = no_device_reason(); !reason.empty()) {
    std::fprintf(stderr, "bench_decode_gpu: %s\n", reason.c_str());
    return 1;
  }
  const int batch = argc > 1 ? std::atoi(argv[1]) : 1;
  std::vector<int> contexts;
  for (int i = 2; i < argc; ++i) contexts.push_back(std::atoi(argv[i]));
  if (contexts.empty()) contexts = {500, 8100, 32700};
  if (batch < 1 || batch > kGemvRows || *std::min_element(contexts.begin(), contexts.end()) < 1) {
    std::fprintf(stderr, "bench_decode_gpu: batches are 1 to 8, contexts at least 1\n");
    return 2;
  }
  const double rate = read_rate();
  std::printf("a product of 3.3 GB reads at %.0f GB/s\n", rate * 1e-9);
  for (const int context : contexts) {
    for (const bool quantized : {false, true}) Step(batch, context, quantized).print(rate);
  }
  return 0;
}
