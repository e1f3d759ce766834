#include "kernels/ops/elements.cuh"
#include "kernels/ops/launch.cuh"
#include "kernels/ops/named_token.cuh"
#include "kernels/ops/rows.h"

namespace sagelm::kernels {
namespace {

constexpr int kThreads = 128;

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    copy_rows_kernel(const T* table, const int32_t* ids, const int32_t* drawn, int64_t cols,
                     float* out) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t row = blockIdx.x;
  const T* from = table + static_cast<int64_t>(known_token(ids[row], drawn)) * cols;
  float* to = out + row * cols;
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * N; i < cols; i += kThreads * N) {
    float x[N];
    load(from + i, x);
    store(to + i, x);
  }
}

}  // namespace

cudaError_t copy_rows(const void* table, Element type, const int32_t* ids, int64_t count,
                      int64_t cols, float* out, cudaStream_t stream, const int32_t* drawn) {
  if (count == 0) return cudaSuccess;
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    const auto* from = static_cast<const T*>(table);
    const auto kernel = cols % 8 == 0 ? copy_rows_kernel<T, 8> : copy_rows_kernel<T, 1>;
    return launch(kernel, dim3(static_cast<unsigned>(count)), kThreads, stream, from, ids, drawn,
                  cols, out);
  });
}

}  // namespace sagelm::kernels
