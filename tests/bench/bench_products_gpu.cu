// Times the products of a Llama-2-7B layer on the device: cuBLASLt (the fastest of what it
// recommends, and the kernel of the gated activation behind gate and up) beside our own kernel.
//   bench_products_gpu [ROWS...]
// The two take turns, a few milliseconds each, since both run at the power limit; times are medians
// of the turns. Weights and activations are normal (deviations 0.02 and 1), and every launch has
// other weights than the one before. "same" says whether the results are the same bits.
#include <cublasLt.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "gpu/gpu_attention.h"
#include "kernels/ops/gemm.h"
#include "kernels/ops/swiglu.h"

namespace {

using namespace sagelm::testing;
using namespace sagelm::kernels;

constexpr int kLayers = 6, kTurns = 9, kCandidates = 8;
constexpr double kTurnOps = 6e12;  // about 9 ms
constexpr size_t kWorkspaceBytes = size_t{32} << 20;

struct Layer {
  const char* name;
  int64_t n, k;
  GemmOutput output;
  bool gated() const { return output == GemmOutput::kSwiglu; }
  bool adds() const { return output == GemmOutput::kAdd; }
  int64_t weight_rows() const { return gated() ? 2 * n : n; }
};
constexpr Layer kProducts[] = {{"QKV", 12288, 4096, GemmOutput::kHalf},
                               {"O + residual", 4096, 4096, GemmOutput::kAdd},
                               {"gate, up + SwiGLU", 11008, 4096, GemmOutput::kSwiglu},
                               {"down + residual", 4096, 11008, GemmOutput::kAdd}};

void check_lt(cublasStatus_t status) {
  if (status != CUBLAS_STATUS_SUCCESS) throw std::runtime_error(cublasLtGetStatusString(status));
}

// Normal values from a hash of the index.
__global__ void fill_normal(__half* x, int64_t count, float deviation, uint64_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    uint64_t h = ((seed << 40) + static_cast<uint64_t>(i)) * 0x9E3779B97F4A7C15u;
    h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9u;
    h = (h ^ (h >> 27)) * 0x94D049BB133111EBu;
    h ^= h >> 31;
    const float radius = (static_cast<float>(h >> 40) + 0.5f) * 0x1p-24f;
    const float turn = static_cast<float>(h & 0xFFFFFF) * 0x1p-24f;
    x[i] = __float2half(sqrtf(-2.0f * logf(radius)) * cospif(2.0f * turn) * deviation);
  }
}

DeviceBuffer normal(int64_t count, float deviation, uint64_t seed) {
  DeviceBuffer buffer(static_cast<size_t>(2 * count));
  fill_normal<<<1024, 256>>>(static_cast<__half*>(buffer.data()), count, deviation, seed);
  return buffer;
}

float microseconds(const std::function<void(int)>& work, int runs) {
  cudaEvent_t begin, end;
  check_cuda(cudaEventCreate(&begin), "timing");
  check_cuda(cudaEventCreate(&end), "timing");
  check_cuda(cudaEventRecord(begin), "timing");
  for (int i = 0; i < runs; ++i) work(i);
  check_cuda(cudaEventRecord(end), "timing");
  check_cuda(cudaEventSynchronize(end), "timing");
  float milliseconds = 0;
  check_cuda(cudaEventElapsedTime(&milliseconds, begin, end), "timing");
  check_cuda(cudaEventDestroy(begin), "timing");
  check_cuda(cudaEventDestroy(end), "timing");
  return milliseconds * 1000 / static_cast<float>(runs);
}

float median(std::vector<float> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// x W^T by cuBLASLt.
class Vendor {
 public:
  Vendor(cublasLtHandle_t handle, const Layer& layer, int64_t rows)
      : handle_(handle), beta_(layer.adds() ? 1.0f : 0.0f), workspace_(kWorkspaceBytes) {
    const cublasOperation_t transposed = CUBLAS_OP_T;
    check_lt(cublasLtMatmulDescInit(&operation_, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    check_lt(cublasLtMatmulDescSetAttribute(&operation_, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                            sizeof transposed));
    const auto n = static_cast<uint64_t>(layer.weight_rows()), k = static_cast<uint64_t>(layer.k);
    const auto m = static_cast<uint64_t>(rows);
    check_lt(cublasLtMatrixLayoutInit(&weight_, CUDA_R_16F, k, n, layer.k));
    check_lt(cublasLtMatrixLayoutInit(&x_, CUDA_R_16F, k, m, layer.k));
    check_lt(cublasLtMatrixLayoutInit(&out_, layer.adds() ? CUDA_R_32F : CUDA_R_16F, n, m,
                                      layer.weight_rows()));
  }

  void run(const void* x, const void* weight, void* out) {
    const float one = 1;
    check_lt(cublasLtMatmul(handle_, &operation_, &one, weight, &weight_, x, &x_, &beta_, out,
                            &out_, out, &out_, &algorithm_, workspace_.data(), kWorkspaceBytes,
                            nullptr));
  }

  void choose(const void* x, const void* weight, void* out) {
    cublasLtMatmulPreference_t preference = nullptr;
    check_lt(cublasLtMatmulPreferenceCreate(&preference));
    check_lt(cublasLtMatmulPreferenceSetAttribute(preference,
                                                  CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                  &kWorkspaceBytes, sizeof kWorkspaceBytes));
    cublasLtMatmulHeuristicResult_t results[kCandidates];
    int found = 0;
    check_lt(cublasLtMatmulAlgoGetHeuristic(handle_, &operation_, &weight_, &x_, &out_, &out_,
                                            preference, kCandidates, results, &found));
    check_lt(cublasLtMatmulPreferenceDestroy(preference));
    float best = 0;
    cublasLtMatmulAlgo_t fastest = results[0].algo;
    for (int i = 0; i < found; ++i) {
      if (results[i].state != CUBLAS_STATUS_SUCCESS) continue;
      algorithm_ = results[i].algo;
      run(x, weight, out);
      const float time = microseconds([&](int) { run(x, weight, out); }, 3);
      if (best == 0 || time < best) {
        best = time;
        fastest = algorithm_;
      }
    }
    algorithm_ = fastest;
  }

 private:
  cublasLtHandle_t handle_;
  float beta_;
  DeviceBuffer workspace_;
  cublasLtMatmulDescOpaque_t operation_;
  cublasLtMatrixLayoutOpaque_t weight_, x_, out_;
  cublasLtMatmulAlgo_t algorithm_;
};

// Of one product; adds its times to those of a layer.
void measure(cublasLtHandle_t handle, const Layer& layer, int64_t rows, double (&sums)[2]) {
  std::vector<DeviceBuffer> weights;
  for (int i = 0; i < kLayers; ++i) {
    weights.push_back(normal(layer.weight_rows() * layer.k, 0.02f, 2 + static_cast<uint64_t>(i)));
  }
  const DeviceBuffer x = normal(rows * layer.k, 1.0f, 1);
  const auto bytes = static_cast<size_t>(rows * layer.n * (layer.adds() ? 4 : 2));
  DeviceBuffer theirs(bytes), ours(bytes), gate_up(layer.gated() ? 2 * bytes : 0);
  theirs.fill(0);
  ours.fill(0);

  Vendor vendor(handle, layer, rows);
  const auto run_theirs = [&](int i) {
    vendor.run(x.data(), weights[i % kLayers].data(),
               layer.gated() ? gate_up.data() : theirs.data());
    if (!layer.gated()) return;
    check_cuda(swiglu(gate_up.data(), Element::kF16, rows, layer.n, theirs.data(), nullptr),
               "swiglu");
  };
  Gemm args;
  args.x = x.data();
  args.out = ours.data();
  args.rows = rows;
  args.n = layer.n;
  args.k = layer.k;
  args.output = layer.output;
  const auto run_ours = [&](int i) {
    args.weight = weights[i % kLayers].data();
    check_cuda(gemm(args, nullptr), "gemm");
  };
  vendor.choose(x.data(), weights[0].data(), layer.gated() ? gate_up.data() : theirs.data());
  theirs.fill(0);
  run_theirs(0);
  run_ours(0);
  std::vector<char> a(bytes), b(bytes);
  theirs.download(a.data(), bytes);
  ours.download(b.data(), bytes);

  const double ops = 2.0 * static_cast<double>(rows * layer.weight_rows() * layer.k);
  const int runs = std::max(3, static_cast<int>(kTurnOps / ops));
  std::vector<float> their_times, our_times;
  for (int turn = 0; turn < kTurns; ++turn) {
    their_times.push_back(microseconds(run_theirs, runs));
    our_times.push_back(microseconds(run_ours, runs));
  }
  const double their_time = median(their_times), our_time = median(our_times);
  std::printf("%6ld rows, %-18s cuBLASLt %7.1f us (%3.0f TFLOPS), ours %7.1f (%3.0f), %.3f%s\n",
              static_cast<long>(rows), layer.name, their_time, ops / their_time * 1e-6, our_time,
              ops / our_time * 1e-6, our_time / their_time, a == b ? ", same" : "");
  sums[0] += their_time;
  sums[1] += our_time;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (const std::string reason = no_device_reason(); !reason.empty()) {
      std::printf("skipped: %s\n", reason.c_str());
      return 0;
    }
    std::vector<int64_t> rows;
    for (int i = 1; i < argc; ++i) rows.push_back(std::atoll(argv[i]));
    if (rows.empty()) rows = {1024, 2048, 8192};
    cublasLtHandle_t handle = nullptr;
    check_lt(cublasLtCreate(&handle));
    for (const int64_t count : rows) {
      double sums[2] = {0, 0};
      for (const Layer& layer : kProducts) measure(handle, layer, count, sums);
      std::printf("%6ld rows, a layer: cuBLASLt %.1f us, ours %.1f, %.3f\n",
                  static_cast<long>(count), sums[0], sums[1], sums[1] / sums[0]);
    }
    check_lt(cublasLtDestroy(handle));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
