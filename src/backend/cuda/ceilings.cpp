#include "backend/cuda/ceilings.h"

#include <cublasLt.h>

#include <algorithm>
#include <array>
#include <span>
#include <utility>
#include <vector>

#include "backend/cuda/check.h"
#include "backend/cuda/memory.h"
#include "base/dtype.h"
#include "base/measure.h"

namespace sagelm::cuda {
namespace {

constexpr int kRuns = 9;
constexpr int64_t kSize = 8192;
constexpr size_t kWorkspaceBytes = size_t{64} << 20;
constexpr int kCandidates = 8;

struct ProductType {
  cudaDataType_t in, out, scale;
  cublasComputeType_t compute;
  size_t in_bytes, out_bytes;
};

// What a matrix is filled with. Power, and with it the clock, depends on the values: these are
// spread as a model's are.
std::vector<uint8_t> random_bytes(const ProductType& type, int64_t elements, uint64_t seed) {
  std::vector<uint8_t> bytes(static_cast<size_t>(elements) * type.in_bytes);
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < elements; ++i) {
    uint64_t h = (seed + static_cast<uint64_t>(i)) * 0x9E3779B97F4A7C15u;
    h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9u;
    h ^= h >> 29;
    const int sum =
        static_cast<int>((h & 0xFF) + (h >> 8 & 0xFF) + (h >> 16 & 0xFF) + (h >> 24 & 0xFF)) -
        510;  // deviation 148
    const auto at = static_cast<size_t>(i);
    if (type.in == CUDA_R_16F) {
      const uint16_t half = float_to_half(static_cast<float>(sum) / 148.0f);
      bytes[2 * at] = static_cast<uint8_t>(half & 0xFF);
      bytes[2 * at + 1] = static_cast<uint8_t>(half >> 8);
    } else if (type.in == CUDA_R_8I) {
      bytes[at] = static_cast<uint8_t>(std::clamp(sum / 4, -127, 127));
    } else {
      // Sign, exponents 2^-4 to 2^1, mantissa.
      const auto exponent = static_cast<uint8_t>(3 + (h >> 32) % 6);
      bytes[at] = static_cast<uint8_t>((h >> 56 & 0x80) | static_cast<uint64_t>(exponent << 3) |
                                       (h >> 40 & 7));
    }
  }
  return bytes;
}

// Operations per second; 0 if cuBLASLt has no such product on this device.
double product_rate(cublasLtHandle_t handle, const ProductType& type, cudaStream_t stream) {
  const auto size = static_cast<uint64_t>(kSize);
  const int64_t elements = kSize * kSize;
  cublasLtMatmulDescOpaque_t operation;
  cublasLtMatrixLayoutOpaque_t in, out;
  const cublasOperation_t transposed = CUBLAS_OP_T;
  check(cublasLtMatmulDescInit(&operation, type.compute, type.scale), "measuring products");
  check(cublasLtMatmulDescSetAttribute(&operation, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                       sizeof transposed),
        "measuring products");
  if (type.in == CUDA_R_8F_E4M3) {
    const int8_t fast = 1;
    check(cublasLtMatmulDescSetAttribute(&operation, CUBLASLT_MATMUL_DESC_FAST_ACCUM, &fast,
                                         sizeof fast),
          "measuring products");
  }
  check(cublasLtMatrixLayoutInit(&in, type.in, size, size, kSize), "measuring products");
  check(cublasLtMatrixLayoutInit(&out, type.out, size, size, kSize), "measuring products");
  cublasLtMatmulPreference_t raw = nullptr;
  check(cublasLtMatmulPreferenceCreate(&raw), "measuring products");
  const Owner<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy> preference(raw);
  check(cublasLtMatmulPreferenceSetAttribute(raw, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                             &kWorkspaceBytes, sizeof kWorkspaceBytes),
        "measuring products");
  std::array<cublasLtMatmulHeuristicResult_t, kCandidates> results = {};
  int found = 0;
  if (cublasLtMatmulAlgoGetHeuristic(handle, &operation, &in, &in, &out, &out, raw, kCandidates,
                                     results.data(), &found) != CUBLAS_STATUS_SUCCESS) {
    return 0;
  }
  const DeviceBuffer a(static_cast<size_t>(elements) * type.in_bytes, "measuring products");
  const DeviceBuffer b(a.bytes(), "measuring products");
  const DeviceBuffer d(static_cast<size_t>(elements) * type.out_bytes, "measuring products");
  const DeviceBuffer workspace(kWorkspaceBytes, "measuring products");
  for (const DeviceBuffer* buffer : {&a, &b}) {
    const std::vector<uint8_t> bytes =
        random_bytes(type, elements, buffer == &a ? 1 : uint64_t{1} << 40);
    check(
        cudaMemcpyAsync(buffer->get(), bytes.data(), bytes.size(), cudaMemcpyHostToDevice, stream),
        "measuring products");
    check(cudaStreamSynchronize(stream), "measuring products");
  }
  const float one = 1, zero = 0;
  const int32_t integer_one = 1, integer_zero = 0;
  const bool integers = type.scale == CUDA_R_32I;
  const void* alpha = integers ? static_cast<const void*>(&integer_one) : &one;
  const void* beta = integers ? static_cast<const void*>(&integer_zero) : &zero;
  double best = 0;
  for (const auto& candidate : std::span(results).first(static_cast<size_t>(found))) {
    const auto multiply = [&] {
      return cublasLtMatmul(handle, &operation, alpha, a.get(), &in, b.get(), &in, beta, d.get(),
                            &out, d.get(), &out, &candidate.algo, workspace.get(),
                            workspace.bytes(), stream);
    };
    if (candidate.state != CUBLAS_STATUS_SUCCESS || multiply() != CUBLAS_STATUS_SUCCESS) continue;
    const double seconds = median_seconds(
        stream, [&] { check(multiply(), "measuring products"); }, kRuns);
    best = std::max(best, 2.0 * kSize * kSize * kSize / seconds);
  }
  return best;
}

double copy_rate(cudaStream_t stream) {
  constexpr size_t kBytes = size_t{1} << 30;
  const DeviceBuffer from(kBytes, "measuring a copy"), to(kBytes, "measuring a copy");
  check(cudaMemsetAsync(from.get(), 1, kBytes, stream), "measuring a copy");
  const auto copy = [&] {
    check(cudaMemcpyAsync(to.get(), from.get(), kBytes, cudaMemcpyDeviceToDevice, stream),
          "measuring a copy");
  };
  return 2.0 * static_cast<double>(kBytes) / median_seconds(stream, copy, kRuns);
}

}  // namespace

double median_seconds(cudaStream_t stream, const std::function<void()>& launch, int runs) {
  // All are enqueued before the first is waited for: no gaps are measured.
  std::vector<std::pair<Event, Event>> events;
  launch();
  for (int i = 0; i < runs; ++i) {
    const auto& [begin, end] = events.emplace_back(make_timing_event(), make_timing_event());
    check(cudaEventRecord(begin.get(), stream), "measuring");
    launch();
    check(cudaEventRecord(end.get(), stream), "measuring");
  }
  std::vector<double> seconds;
  seconds.reserve(events.size());
  for (const auto& [begin, end] : events) {
    seconds.push_back(static_cast<double>(milliseconds(begin.get(), end.get())) * 1e-3);
  }
  return spread_of(std::move(seconds)).median;
}

Ceilings measure_ceilings(cudaStream_t stream) {
  cublasLtHandle_t raw = nullptr;
  check(cublasLtCreate(&raw), "starting");
  const Owner<cublasLtHandle_t, cublasLtDestroy> handle(raw);
  const ProductType half{CUDA_R_16F, CUDA_R_16F, CUDA_R_32F, CUBLAS_COMPUTE_32F, 2, 2};
  const ProductType int8{CUDA_R_8I, CUDA_R_32I, CUDA_R_32I, CUBLAS_COMPUTE_32I, 1, 4};
  const ProductType fp8{CUDA_R_8F_E4M3, CUDA_R_16F, CUDA_R_32F, CUBLAS_COMPUTE_32F, 1, 2};
  return {.copy_bytes = copy_rate(stream),
          .half_ops = product_rate(raw, half, stream),
          .int8_ops = product_rate(raw, int8, stream),
          .fp8_ops = product_rate(raw, fp8, stream)};
}

}  // namespace sagelm::cuda
