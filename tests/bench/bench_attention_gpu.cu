// Times the attention kernels on the device beside the copy bandwidth of the same run.
//   bench_attention_gpu [--quick] [--fp16] [--rest] [--json FILE]
//   bench_attention_gpu --decode
//   bench_attention_gpu --prefill
// Prints for every shape: time and TFLOPS of attention over tiles that are quantized already, of
// the quantization (with GB/s), and of the whole call from FP16 tensors. With --fp16 also of FP16
// attention, by the kernel that is chosen for the device and by the one that any has. TFLOPS count
// 4 * batch * heads * N^2 * head_dim, half of it where causal. Medians of at least 7 runs.
// --rest: 0.2 s before every run, so that each meets a card below its power limit, as the attention
// of one prompt does, and not as calls without end do.
// --decode: one query a sequence over a quantized cache, with GB/s over the bytes that the cache
// holds, beside an FP16 cache; every run finds other data in L2, read as weights are in a model.
// --prefill: steps of many tokens over a quantized cache: the append, beside that to an FP16 cache,
// and the attention.
#include <cuda_fp16.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "gpu/gpu_attention.h"
#include "gpu/gpu_ops.h"
#include "kernels/attention/sage2_sm90.h"
#include "kernels/attention/sage_quantize_sm90.h"
#include "kernels/cache/quantized_kv.h"
#include "kernels/ops/rope_append.h"

namespace {

using namespace sagelm::testing;
using sagelm::kernels::Problem;

// Standard normal values from a hash of the index.
__global__ void fill_normal(__half* x, int64_t count, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    uint64_t h =
        (static_cast<uint64_t>(i) + (static_cast<uint64_t>(seed) << 40)) * 0x9E3779B97F4A7C15u;
    h ^= h >> 32;
    h *= 0xD6E8FEB86659FD93u;
    h ^= h >> 32;
    const float u = (static_cast<uint32_t>(h) + 1.0f) * 2.3283064e-10f;
    const float v = static_cast<uint32_t>(h >> 32) * 2.3283064e-10f;
    x[i] = __float2half(sqrtf(-2.0f * logf(u)) * cospif(2.0f * v));
  }
}

// Any finite e4m3, as any INT8.
__global__ void fill_bytes(uint32_t* x, int64_t count, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    x[i] = (static_cast<uint32_t>(i) * 0x9E3779B1u ^ seed) * 0x85EBCA6Bu & 0xB7B7B7B7u;
  }
}

// Of pages that have so many words each: 0.01 as a float or, of INT4 keys, as a step around 0.
__global__ void fill_scales(uint32_t* x, int64_t count, int page_words) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    x[i] = i % page_words < sagelm::kernels::kQuantizedKvScales ? __float_as_uint(0.01f) : 0x3C24u;
  }
}

// Puts other data into L2, of which nothing has to be written back.
__global__ void read_all(const uint4* x, int64_t count, uint32_t* sum) {
  uint32_t own = 0;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    own += x[i].x + x[i].y + x[i].z + x[i].w;
  }
  if (own == 1) *sum = own;  // so that it is not left out
}

void must(sagelm_attention_status status) {
  if (status != SAGELM_ATTENTION_OK) {
    std::fprintf(stderr, "bench_attention_gpu: %s\n", sagelm_attention_last_error());
    std::exit(1);
  }
}

// So long that what follows is enqueued by then.
__global__ void wait_for_host() {
  const long long start = clock64();
  while (clock64() - start < 60000) {
  }
}

bool rest = false;  // --rest

// before: not timed, before every run. The host's time to launch does not count: the device waits.
double median_ms(
    const std::function<void()>& run, const std::function<void()>& before = [] {}) {
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  const auto once = [&] {
    before();
    if (rest) std::this_thread::sleep_for(std::chrono::milliseconds(200));
    wait_for_host<<<1, 32>>>();
    cudaEventRecord(begin);
    run();
    cudaEventRecord(end);
    check_cuda(cudaEventSynchronize(end), "timed run");
    float ms = 0;
    cudaEventElapsedTime(&ms, begin, end);
    return static_cast<double>(ms);
  };
  for (int i = 0; i < 3; ++i) once();
  const int count = rest ? 7 : std::clamp(static_cast<int>(60.0 / once()), 7, 50);
  std::vector<double> times;
  for (int i = 0; i < count; ++i) times.push_back(once());
  std::sort(times.begin(), times.end());
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return times[times.size() / 2];
}

struct Shape {
  int batch, heads, kv_heads, dim, n;
  bool causal;
};

constexpr int kDim = 128, kHeads = 32, kPage = sagelm::kernels::kTileTokens;  // of caches

// A cache of made-up pages, and tails.
class Cache {
 public:
  Cache(int kv_heads, int64_t pages, int64_t sequences, bool int4_keys)
      : keys_(pages * kv_heads * kPage * kDim),
        values_(keys_.bytes()),
        scales_(4 * pages * kv_heads * sagelm::kernels::quantized_kv_scales(int4_keys)),
        means_(4 * sequences * kv_heads * kDim),
        tails_(4 * sequences * kv_heads * kPage * kDim) {
    const auto words = static_cast<int64_t>(keys_.bytes()) / 4;
    fill_bytes<<<1024, 256>>>(static_cast<uint32_t*>(keys_.data()), words, 3);
    fill_bytes<<<1024, 256>>>(static_cast<uint32_t*>(values_.data()), words, 4);
    fill_scales<<<1024, 256>>>(static_cast<uint32_t*>(scales_.data()),
                               static_cast<int64_t>(scales_.bytes()) / 4,
                               sagelm::kernels::quantized_kv_scales(int4_keys));
    fill_normal<<<1024, 256>>>(static_cast<__half*>(tails_.data()),
                               static_cast<int64_t>(tails_.bytes()) / 2, 2);
    means_.fill(0);
    view_.num_heads = kHeads;
    view_.num_kv_heads = kv_heads;
    view_.head_dim = kDim;
    view_.int4_keys = int4_keys;
    view_.keys = static_cast<int8_t*>(keys_.data());
    view_.values = static_cast<uint8_t*>(values_.data());
    view_.scales = static_cast<float*>(scales_.data());
    view_.means = static_cast<float*>(means_.data());
    view_.tails = tails_.data();
  }
  const sagelm::kernels::QuantizedKv& view() const { return view_; }

 private:
  DeviceBuffer keys_, values_, scales_, means_, tails_;
  sagelm::kernels::QuantizedKv view_;
};

const int32_t* integers(const DeviceBuffer& x) { return static_cast<const int32_t*>(x.data()); }

// One token of each of `batch` sequences of n - 64 tokens, 32 heads of 128.
void bench_decode(int batch, int kv_heads, int n, double copy_rate) {
  const int length = n - 64, full = length / kPage, rest = length % kPage;
  const int64_t tiles = int64_t{batch} * full * kv_heads;
  const int64_t q_count = int64_t{batch} * kHeads * kDim;
  const auto fill = [](const DeviceBuffer& x, int64_t count, uint32_t seed) {
    fill_normal<<<1024, 256>>>(static_cast<__half*>(x.data()), count, seed);
  };
  DeviceBuffer q(2 * q_count), o(2 * q_count);
  fill(q, q_count, 1);
  std::vector<int32_t> table(static_cast<size_t>(batch) * full), ids(batch), starts(batch + 1);
  std::iota(table.begin(), table.end(), 0);
  std::iota(ids.begin(), ids.end(), 0);
  std::iota(starts.begin(), starts.end(), 0);
  const DeviceBuffer table_device = upload_integers(table), ids_device = upload_integers(ids),
                     starts_device = upload_integers(starts),
                     lens_device = upload_integers(std::vector<int32_t>(batch, length));
  DeviceBuffer other(size_t{256} << 20), sum(sizeof(uint32_t));  // takes the cache's place in L2
  other.fill(0);
  const auto evict = [&] {
    read_all<<<1024, 256>>>(static_cast<const uint4*>(other.data()),
                            static_cast<int64_t>(other.bytes() / sizeof(uint4)),
                            static_cast<uint32_t*>(sum.data()));
  };

  const auto time_quantized = [&](bool int4_keys) {
    const Cache cache(kv_heads, int64_t{batch} * full, batch, int4_keys);
    sagelm::kernels::DecodeFromQuantizedKv args;
    args.cache = cache.view();
    args.step.rows = args.step.num_sequences = batch;
    args.step.max_q_len = 1;
    args.step.max_kv_len = length;
    args.step.cu_q_lens = integers(starts_device);
    args.step.kv_lens = integers(lens_device);
    args.step.page_table = integers(table_device);
    args.step.page_table_stride = full;
    args.step.tails = args.step.means = integers(ids_device);
    args.queries = q.data();
    args.out = o.data();
    args.query_stride = args.out_stride = kHeads * kDim;
    args.softmax_scale = 1.0f / std::sqrt(static_cast<float>(kDim));
    DeviceBuffer workspace(sagelm::kernels::quantized_kv_decode_workspace_bytes(args));
    return median_ms(
        [&] {
          check_cuda(sagelm::kernels::decode_from_quantized_kv(args, workspace.data(), nullptr),
                     "decode_from_quantized_kv");
        },
        evict);
  };
  const double quantized_ms = time_quantized(false), int4_ms = time_quantized(true);

  const int64_t kv_count = int64_t{batch} * kv_heads * length * kDim;
  DeviceBuffer k(2 * kv_count), v(2 * kv_count);
  fill(k, kv_count, 5);
  fill(v, kv_count, 6);
  sagelm_attention_args args{};
  args.struct_size = sizeof args;
  args.variant = SAGELM_ATTENTION_FP16;
  args.batch = batch;
  args.num_heads = kHeads;
  args.num_kv_heads = kv_heads;
  args.head_dim = kDim;
  args.max_q_len = 1;
  args.max_kv_len = length;
  args.causal = 1;
  args.q = {q.data(), kHeads * kDim, kHeads * kDim, kDim};
  args.out = {o.data(), kHeads * kDim, kHeads * kDim, kDim};
  args.k = {k.data(), int64_t{kv_heads} * length * kDim, kDim, int64_t{length} * kDim};
  args.v = {v.data(), int64_t{kv_heads} * length * kDim, kDim, int64_t{length} * kDim};
  size_t bytes = 0;
  must(sagelm_attention_workspace_bytes(&args, &bytes));
  DeviceBuffer workspace(bytes);
  args.workspace = workspace.data();
  args.workspace_bytes = bytes;
  const double half_ms = median_ms([&] { must(sagelm_attention(&args)); }, evict);

  const double tail = double(batch) * kv_heads * (4.0 * rest * kDim + 4 * kDim);
  const double held = tiles * (2.0 * kPage * kDim + 32) + tail;
  const double int4_rate = (tiles * (1.5 * kPage * kDim + 544) + tail) / int4_ms * 1e-6;
  const double rate = held / quantized_ms * 1e-6, half_rate = 4.0 * kv_count / half_ms * 1e-6;
  std::printf(
      "%5d %5d %3d %6d | %8.1fus %6.0f %4.0f%% | %8.1fus %6.0f %4.0f%% | %8.1fus %6.0f %4.0f%% | "
      "%5.2f\n",
      batch, kHeads, kv_heads, length, 1e3 * quantized_ms, rate, 100 * rate / copy_rate,
      1e3 * int4_ms, int4_rate, 100 * int4_rate / copy_rate, 1e3 * half_ms, half_rate,
      100 * half_rate / copy_rate, half_ms / quantized_ms);
  std::fflush(stdout);
}

// A step of n tokens behind `before` others, 32 heads of 128: the append and the attention.
void bench_prefill(int kv_heads, int before, int n, bool int4_keys) {
  const int length = before + n, pages = length / kPage, heads = kHeads + 2 * kv_heads;
  const int64_t qkv_count = int64_t{n} * heads * kDim, out_count = int64_t{n} * kHeads * kDim;
  DeviceBuffer qkv(2 * qkv_count), rotations(int64_t{length} * kDim * 4), out(2 * out_count);
  fill_normal<<<1024, 256>>>(static_cast<__half*>(qkv.data()), qkv_count, 1);
  const DeviceBuffer frequencies = upload_integers(std::vector<int32_t>(kDim / 2, 0x3C23D70A));
  check_cuda(
      sagelm::kernels::fill_rotations(static_cast<const float*>(frequencies.data()), kDim / 2,
                                      length, static_cast<float*>(rotations.data()), nullptr),
      "fill_rotations");
  std::vector<int32_t> positions(n), slots(n), table(pages + 1);
  std::iota(positions.begin(), positions.end(), before);
  std::iota(slots.begin(), slots.end(), 0);
  std::iota(table.begin(), table.end(), 0);
  const DeviceBuffer positions_device = upload_integers(positions),
                     slots_device = upload_integers(slots), table_device = upload_integers(table),
                     starts = upload_integers({0, n}), lengths = upload_integers({length}),
                     zero = upload_integers({0});
  const Cache cache(kv_heads, pages + 1, 1, int4_keys);
  sagelm::kernels::AppendToQuantizedKv args;
  args.cache = cache.view();
  args.step.rows = args.step.max_q_len = n;
  args.step.max_kv_len = length;
  args.step.num_sequences = 1;
  args.step.max_closed_pages = pages - before / kPage;
  args.step.begins_in_first_page = before < kPage;
  args.step.closes_first_page = before < kPage && length >= kPage;
  args.step.positions = integers(positions_device);
  args.step.cu_q_lens = integers(starts);
  args.step.kv_lens = integers(lengths);
  args.step.page_table = integers(table_device);
  args.step.page_table_stride = pages + 1;
  args.step.tails = args.step.means = integers(zero);
  args.qkv = qkv.data();
  args.rotations = static_cast<const float*>(rotations.data());
  args.softmax_scale = 1.0f / std::sqrt(static_cast<float>(kDim));
  DeviceBuffer arrivals(sizeof(uint32_t) * static_cast<size_t>(kv_heads));
  arrivals.fill(0);
  args.arrivals = static_cast<uint32_t*>(arrivals.data());
  DeviceBuffer workspace(
      sagelm::kernels::quantized_kv_prefill_workspace_bytes(args.cache, args.step));
  args.prefill = workspace.data();
  const double append_ms = median_ms([&] {
    check_cuda(sagelm::kernels::append_to_quantized_kv(args, nullptr), "append_to_quantized_kv");
  });
  const sagelm::kernels::PrefillFromQuantizedKv prefill = {
      .cache = args.cache, .step = args.step, .out = out.data(), .out_stride = kHeads * kDim};
  const double attention_ms = median_ms([&] {
    check_cuda(sagelm::kernels::prefill_from_quantized_kv(prefill, workspace.data(),
                                                          workspace.bytes(), nullptr),
               "prefill_from_quantized_kv");
  });
  sagelm::kernels::RopeAppend half;
  half.type = sagelm::kernels::Element::kF16;
  half.qkv = qkv.data();
  half.rows = n;
  half.num_heads = kHeads;
  half.num_kv_heads = kv_heads;
  half.head_dim = kDim;
  half.positions = integers(positions_device);
  half.slots = integers(slots_device);
  half.rotations = args.rotations;
  DeviceBuffer half_keys(2 * int64_t{n} * kv_heads * kDim),
      half_values(2 * int64_t{n} * kv_heads * kDim);
  half.keys = half_keys.data();
  half.values = half_values.data();
  const double half_ms =
      median_ms([&] { check_cuda(sagelm::kernels::rope_append(half, nullptr), "rope_append"); });
  // All is read as 16 bits and written as 8.
  const double moved = 3.0 * static_cast<double>(qkv_count);
  const double flop = 4.0 * kHeads * kDim * n * (before + 0.5 * n);
  std::printf(
      "%6d tokens behind %6d, %2d KV heads, INT%d keys: append %8.1fus (%5.0f GB/s; fp16 %8.1fus), "
      "attention "
      "%9.1fus (%5.0f TFLOPS)\n",
      n, before, kv_heads, int4_keys ? 4 : 8, 1e3 * append_ms, moved / append_ms * 1e-6,
      1e3 * half_ms, 1e3 * attention_ms, flop / attention_ms * 1e-9);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  bool quick = false, fp16 = false, decode = false, prefill = false;
  const char* json = nullptr;
  for (int i = 1; i < argc; ++i) {
    if (!std::strcmp(argv[i], "--quick"))
      quick = true;
    else if (!std::strcmp(argv[i], "--fp16"))
      fp16 = true;
    else if (!std::strcmp(argv[i], "--rest"))
      rest = true;
    else if (!std::strcmp(argv[i], "--decode"))
      decode = true;
    else if (!std::strcmp(argv[i], "--prefill"))
      prefill = true;
    else if (!std::strcmp(argv[i], "--json") && i + 1 < argc)
      json = argv[++i];
    else {
      std::fprintf(stderr, "bench_attention_gpu: unknown argument %s\n", argv[i]);
      return 2;
    }
  }
  if (const std::string reason = no_device_reason(); !reason.empty()) {
    std::fprintf(stderr, "bench_attention_gpu: %s\n", reason.c_str());
    return 1;
  }
  FILE* out = json ? std::fopen(json, "w") : nullptr;
  DeviceBuffer a(size_t{2} << 30), b(size_t{2} << 30);
  const double copy_ms =
      median_ms([&] { cudaMemcpyAsync(b.data(), a.data(), a.bytes(), cudaMemcpyDeviceToDevice); });
  const double copy_rate = 2e-6 * static_cast<double>(a.bytes()) / copy_ms;
  std::printf("copy %.0f GB/s (read + written)\n", copy_rate);
  a = DeviceBuffer();
  b = DeviceBuffer();
  if (prefill) {
    for (const auto& [before, n] : {std::pair{0, 1024},
                                    {0, 2048},
                                    {0, 4096},
                                    {0, 8192},
                                    {6144, 2048},
                                    {14336, 2048},
                                    {30720, 2048},
                                    {16384, 200}}) {
      for (const bool int4_keys : {false, true}) bench_prefill(32, before, n, int4_keys);
    }
    for (const auto& [before, n] : {std::pair{0, 4096}, {16384, 200}}) {
      bench_prefill(8, before, n, false);
    }
    return 0;
  }
  if (decode) {
    std::printf("%5s %5s %3s %6s | %10s %6s %5s | %10s %6s %5s | %10s %6s %5s | %5s\n", "batch",
                "heads", "kv", "tokens", "int8", "GB/s", "%copy", "int4", "GB/s", "%copy", "fp16",
                "GB/s", "%copy", "fp16:8");
    for (const int kv_heads : {32, 8}) {
      for (const int batch : {1, 8, 32}) {
        for (const int n : {1024, 8192, 32768}) bench_decode(batch, kv_heads, n, copy_rate);
      }
    }
    return 0;
  }
  std::vector<Shape> shapes;
  for (int n = 1024; n <= 32768; n *= 2) {
    if (quick && n != 1024 && n != 4096 && n != 16384) continue;
    shapes.push_back({4, 32, 32, 128, n, true});
  }
  shapes.push_back({4, 32, 32, 128, 8192, false});
  shapes.push_back({4, 32, 32, 64, 16384, true});
  if (!quick) {
    for (int n = 1024; n <= 32768; n *= 2) shapes.push_back({4, 32, 32, 128, n, false});
    shapes.push_back({4, 32, 32, 64, 32768, true});
    shapes.push_back({1, 32, 32, 128, 8192, true});
    shapes.push_back({4, 32, 8, 128, 8192, true});
    shapes.push_back({4, 32, 32, 96, 8192, true});
  }
  if (out) std::fprintf(out, "{\"copy_gb_per_s\": %.1f, \"shapes\": [", copy_rate);
  std::printf("%5s %5s %3s %4s %6s %6s | %9s %7s | %9s %6s %5s | %9s %7s | %9s %7s | %9s %7s\n",
              "batch", "heads", "kv", "dim", "N", "causal", "kernel", "TFLOPS", "quantize", "GB/s",
              "%copy", "whole", "TFLOPS", "fp16", "TFLOPS", "fp16 mma", "TFLOPS");
  bool first = true;
  for (const Shape& s : shapes) {
    const int64_t q_count = int64_t{s.batch} * s.heads * s.n * s.dim;
    const int64_t kv_count = int64_t{s.batch} * s.kv_heads * s.n * s.dim;
    DeviceBuffer q(2 * q_count), k(2 * kv_count), v(2 * kv_count), o(2 * q_count);
    fill_normal<<<1024, 256>>>(static_cast<__half*>(q.data()), q_count, 1);
    fill_normal<<<1024, 256>>>(static_cast<__half*>(k.data()), kv_count, 2);
    fill_normal<<<1024, 256>>>(static_cast<__half*>(v.data()), kv_count, 3);
    check_cuda(cudaDeviceSynchronize(), "fill");
    sagelm_attention_args args{};
    args.struct_size = sizeof args;
    args.variant = SAGELM_ATTENTION_SAGE2;
    args.batch = s.batch;
    args.num_heads = s.heads;
    args.num_kv_heads = s.kv_heads;
    args.head_dim = s.dim;
    args.max_q_len = args.max_kv_len = s.n;
    args.causal = s.causal;
    const auto heads_first = [&](const DeviceBuffer& x, int heads) {
      return sagelm_attention_tensor{x.data(), int64_t{heads} * s.n * s.dim, s.dim,
                                     int64_t{s.n} * s.dim};
    };
    args.q = heads_first(q, s.heads);
    args.out = heads_first(o, s.heads);
    args.k = heads_first(k, s.kv_heads);
    args.v = heads_first(v, s.kv_heads);
    size_t bytes = 0;
    must(sagelm_attention_workspace_bytes(&args, &bytes));
    DeviceBuffer workspace(bytes);
    args.workspace = workspace.data();
    args.workspace_bytes = bytes;
    const double whole = median_ms([&] { must(sagelm_attention(&args)); });
    Problem p{};
    const auto tensor = [](const sagelm_attention_tensor& x) {
      return sagelm::kernels::Tensor{x.data, x.batch_stride, x.token_stride, x.head_stride};
    };
    p.q = tensor(args.q), p.k = tensor(args.k), p.v = tensor(args.v), p.out = tensor(args.out);
    p.batch = s.batch, p.num_heads = s.heads, p.num_kv_heads = s.kv_heads, p.head_dim = s.dim;
    p.max_q_len = p.max_kv_len = s.n;
    p.softmax_scale = 1.0f / std::sqrt(static_cast<float>(s.dim));
    p.causal = s.causal;
    p.smooth_k = true;
    const auto tiles = sagelm::kernels::sage2_sm90_tiles(p, workspace.data());
    const double kernel = median_ms([&] {
      check_cuda(sagelm::kernels::sage2_sm90_attend(p, tiles, nullptr), "sage2_sm90_attend");
    });
    const int dim = s.dim <= 64 ? 64 : 128;
    const double quantize = median_ms([&] {
      check_cuda(sagelm::kernels::quantize_to_sage_tiles(p, dim, tiles, nullptr), "quantize");
    });
    double fp16_ms = 0, fp16_mma_ms = 0;
    if (fp16) {
      args.variant = SAGELM_ATTENTION_FP16;
      must(sagelm_attention_workspace_bytes(&args, &bytes));
      if (bytes > workspace.bytes()) workspace = DeviceBuffer(bytes);
      args.workspace = workspace.data();
      args.workspace_bytes = workspace.bytes();
      fp16_ms = median_ms([&] { must(sagelm_attention(&args)); });
      args.kernel = SAGELM_ATTENTION_KERNEL_MMA;
      fp16_mma_ms = median_ms([&] { must(sagelm_attention(&args)); });
    }
    const double flop = 4.0 * s.batch * s.heads * double(s.n) * s.n * s.dim * (s.causal ? 0.5 : 1);
    const auto tflops = [&](double ms) { return ms > 0 ? flop / ms * 1e-9 : 0.0; };
    const double moved = (2.0 * s.dim + dim) * (double(s.heads) + 2 * s.kv_heads) * s.batch * s.n;
    const double rate = moved / quantize * 1e-6;
    std::printf(
        "%5d %5d %3d %4d %6d %6s | %7.3fms %7.0f | %7.3fms %6.0f %4.0f%% | %7.3fms %7.0f | %7.3fms "
        "%7.0f | %7.3fms %7.0f\n",
        s.batch, s.heads, s.kv_heads, s.dim, s.n, s.causal ? "yes" : "no", kernel, tflops(kernel),
        quantize, rate, 100 * rate / copy_rate, whole, tflops(whole), fp16_ms, tflops(fp16_ms),
        fp16_mma_ms, tflops(fp16_mma_ms));
    std::fflush(stdout);
    if (out) {
      std::fprintf(
          out,
          "%s\n{\"batch\": %d, \"heads\": %d, \"kv_heads\": %d, \"head_dim\": %d, \"n\": %d, "
          "\"causal\": %s, \"kernel_ms\": %.4f, \"kernel_tflops\": %.1f, \"quantize_ms\": "
          "%.4f, \"quantize_gb_per_s\": %.1f, \"whole_ms\": %.4f, \"whole_tflops\": %.1f, "
          "\"fp16_ms\": %.4f, \"fp16_tflops\": %.1f, \"fp16_mma_ms\": %.4f, "
          "\"fp16_mma_tflops\": %.1f}",
          first ? "" : ",", s.batch, s.heads, s.kv_heads, s.dim, s.n, s.causal ? "true" : "false",
          kernel, tflops(kernel), quantize, rate, whole, tflops(whole), fp16_ms, tflops(fp16_ms),
          fp16_mma_ms, tflops(fp16_mma_ms));
    }
    first = false;
  }
  if (out) {
    std::fprintf(out, "\n]}\n");
    std::fclose(out);
  }
  return 0;
}
