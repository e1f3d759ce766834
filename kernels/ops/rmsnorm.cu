#include <cstdint>

#include "kernels/ops/elements.cuh"
#include "kernels/ops/launch.cuh"
#include "kernels/ops/rmsnorm.h"

namespace sagelm::kernels {
namespace {

// A block takes every gridDim.x-th row, N elements at a time. A thread keeps kKept packs of the row
// between the two passes, and those of the weights, which it loads while the kernel before this one
// ends; the packs of the block's next row are on their way meanwhile. What is left of longer rows
// is read again.
template <typename T, int N, int kKept>
__global__ void __launch_bounds__(1024)
    rmsnorm_kernel(const float* x, const float* weight, int64_t rows, int64_t cols, float eps,
                   T* out) {
  allow_next_kernel();
  __shared__ float shared[32];
  const int64_t first = static_cast<int64_t>(threadIdx.x) * N;
  const int64_t step = static_cast<int64_t>(blockDim.x) * N;
  float next[kKept][N], weights[kKept][N];
  const auto load_packs = [&](const float* from, float(&to)[kKept][N]) {
#pragma unroll
    for (int j = 0; j < kKept; ++j) {
      if (first + j * step < cols) load(from + first + j * step, to[j]);
    }
  };
  load_packs(weight, weights);
  wait_for_previous_kernel();
  load_packs(x + blockIdx.x * cols, next);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    float kept[kKept][N];
#pragma unroll
    for (int j = 0; j < kKept; ++j) {
#pragma unroll
      for (int e = 0; e < N; ++e) kept[j][e] = next[j][e];
    }
    const float* from = x + row * cols;
    if (row + gridDim.x < rows) load_packs(from + gridDim.x * cols, next);
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
      load(from + i, more);
#pragma unroll
      for (int e = 0; e < N; ++e) sum += more[e] * more[e];
    }
    const float total = block_reduce(sum, shared, Sum());
    const float scale = 1.0f / sqrtf(total / static_cast<float>(cols) + eps);
    const auto finish = [&](int64_t i, float(&values)[N], const float(&w)[N]) {
#pragma unroll
      for (int e = 0; e < N; ++e) values[e] = values[e] * scale * w[e];
      store(out + row * cols + i, values);
    };
#pragma unroll
    for (int j = 0; j < kKept; ++j) {
      if (first + j * step < cols) finish(first + j * step, kept[j], weights[j]);
    }
    for (int64_t i = first + kKept * step; i < cols; i += step) {
      float more[N], w[N];
      load(from + i, more);
      load(weight + i, w);
      finish(i, more, w);
    }
  }
}

}  // namespace

cudaError_t rmsnorm(const float* x, const float* weight, int64_t rows, int64_t cols, float eps,
                    Element type, void* out, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  // Few rows: all of a row's loads at once, for latency. Many: no more blocks than the
  // multiprocessors hold, of the same number of rows.
  const bool few = rows <= 64;
  const int64_t most = few ? 1024 : 256;
  const int64_t packs = (cols + 3) / 4;
  const auto threads = static_cast<unsigned>(packs >= most ? most : (packs + 31) / 32 * 32);
  return with_half_type(type, [&](auto element) {
    using T = decltype(element);
    const auto kernel = cols % 4 == 0 ? rmsnorm_kernel<T, 4, 4> : rmsnorm_kernel<T, 1, 2>;
    int64_t blocks = rows;
    if (!few) {
      int device = 0, processors = 0, held = 0;
      cudaError_t error = cudaGetDevice(&device);
      if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
      }
      if (error == cudaSuccess) {
        error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&held, kernel,
                                                              static_cast<int>(threads), 0);
      }
      if (error != cudaSuccess) return error;
      const int64_t at_once = int64_t{held} * processors;
      const int64_t rounds = (rows + at_once - 1) / at_once;
      blocks = (rows + rounds - 1) / rounds;
    }
    return launch(kernel, dim3(static_cast<unsigned>(blocks)), threads, stream, x, weight, rows,
                  cols, eps, static_cast<T*>(out));
  });
}

}  // namespace sagelm::kernels
