#include "kernels/ops/elements.cuh"
#include "kernels/ops/launch.cuh"
#include "kernels/ops/swiglu.h"

namespace sagelm::kernels {
namespace {

constexpr int kThreads = 256;

// A block computes kThreads packs of N elements of one row.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(const T* gate_up, int64_t cols, T* out) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t row = blockIdx.x;
  const int64_t i = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * N;
  if (i >= cols) return;
  float gate[N], up[N];
  load(gate_up + row * 2 * cols + i, gate);
  load(gate_up + row * 2 * cols + cols + i, up);
#pragma unroll
  for (int e = 0; e < N; ++e) up[e] = gated(gate[e], up[e]);
  store(out + row * cols + i, up);
}

}  // namespace

cudaError_t swiglu(const void* gate_up, Element type, int64_t rows, int64_t cols, void* out,
                   cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return with_half_type(type, [&](auto element) {
    using T = decltype(element);
    const int64_t wide = cols % 8 == 0 ? 8 : 1;
    const auto kernel = wide == 8 ? swiglu_kernel<T, 8> : swiglu_kernel<T, 1>;
    const dim3 grid(static_cast<unsigned>(rows),
                    static_cast<unsigned>((cols / wide + kThreads - 1) / kThreads));
    return launch(kernel, grid, kThreads, stream, static_cast<const T*>(gate_up), cols,
                  static_cast<T*>(out));
  });
}

}  // namespace sagelm::kernels
