#include "kernels/ops/elements.cuh"
#include "kernels/ops/launch.cuh"
#include "kernels/ops/rmsnorm.h"

namespace sagelm::kernels {
namespace {

// One block per row, N elements at a time. A thread keeps kKept packs of the row between the two
// passes, and those of the weights, which it loads while the kernel before this one ends; what is
// left of longer rows is read again.
template <typename T, int N, int kKept>
__global__ void __launch_bounds__(1024)
    rmsnorm_kernel(const float* x, const float* weight, int64_t cols, float eps, T* out) {
  allow_next_kernel();
  __shared__ float shared[32];
  const int64_t row = blockIdx.x;
  x += row * cols;
  out += row * cols;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * N;
  const int64_t step = static_cast<int64_t>(blockDim.x) * N;
  float kept[kKept][N], weights[kKept][N];
#pragma unroll
  for (int j = 0; j < kKept; ++j) {
    if (first + j * step < cols) load(weight + first + j * step, weights[j]);
  }
  wait_for_previous_kernel();
#pragma unroll
  for (int j = 0; j < kKept; ++j) {
    if (first + j * step < cols) load(x + first + j * step, kept[j]);
  }
  float sum = 0;
#pragma unroll
  for (int j = 0; j < kKept; ++j) {
    if (first + j * step < cols) {
#pragma unroll
      for (int e = 0; e < N; ++e) sum += kept[j][e] * kept[j][e];
    }
  }
  for (int64_t i = first + kKept * step; i < cols; i += step) {
    float more[N];
    load(x + i, more);
#pragma unroll
    for (int e = 0; e < N; ++e) sum += more[e] * more[e];
  }
  const float total = block_reduce(sum, shared, Sum());
  const float scale = 1.0f / sqrtf(total / static_cast<float>(cols) + eps);
  const auto finish = [&](int64_t i, float(&values)[N], const float(&w)[N]) {
#pragma unroll
    for (int e = 0; e < N; ++e) values[e] = values[e] * scale * w[e];
    store(out + i, values);
  };
#pragma unroll
  for (int j = 0; j < kKept; ++j) {
    if (first + j * step < cols) finish(first + j * step, kept[j], weights[j]);
  }
  for (int64_t i = first + kKept * step; i < cols; i += step) {
    float more[N], w[N];
    load(x + i, more);
    load(weight + i, w);
    finish(i, more, w);
  }
}

}  // namespace

cudaError_t rmsnorm(const float* x, const float* weight, int64_t rows, int64_t cols, float eps,
                    Element type, void* out, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  // Few rows: all of a row's loads at once, for latency. Many: several blocks per multiprocessor.
  const int64_t most = rows <= 64 ? 1024 : 256;
  const int64_t packs = (cols + 3) / 4;
  const auto threads = static_cast<unsigned>(packs >= most ? most : (packs + 31) / 32 * 32);
  return with_half_type(type, [&](auto element) {
    using T = decltype(element);
    const auto kernel = cols % 4 == 0 ? rmsnorm_kernel<T, 4, 4> : rmsnorm_kernel<T, 1, 4>;
    return launch(kernel, dim3(static_cast<unsigned>(rows)), threads, stream, x, weight, cols, eps,
                  static_cast<T*>(out));
  });
}

}  // namespace sagelm::kernels
