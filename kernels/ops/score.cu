#include "kernels/ops/elements.cuh"
#include "kernels/ops/launch.cuh"
#include "kernels/ops/score.h"

namespace sagelm::kernels {
namespace {

constexpr int kThreads = 512;

__device__ inline bool is_finite(float x) {
  return (__float_as_uint(x) & 0x7F800000u) != 0x7F800000u;
}

struct Best {
  float value;
  int32_t id;
  bool finite;  // everything seen

  __device__ Best shuffled(int step) const {
    return {__shfl_xor_sync(0xFFFFFFFFu, value, step), __shfl_xor_sync(0xFFFFFFFFu, id, step),
            __shfl_xor_sync(0xFFFFFFFFu, static_cast<int>(finite), step) != 0};
  }
  __device__ Best operator+(const Best& other) const {
    const bool theirs = other.value > value || (other.value == value && other.id < id);
    return {theirs ? other.value : value, theirs ? other.id : id, finite && other.finite};
  }
};

// One block per row, N logits at a time.
template <int N>
__global__ void __launch_bounds__(kThreads)
    score_rows_kernel(const float* logits, const int32_t* targets, int64_t cols, RowScore* out) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t row = blockIdx.x;
  const float* x = logits + row * cols;
  Best best{-INFINITY, INT32_MAX, true};
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * N; i < cols; i += kThreads * N) {
    float values[N];
    load(x + i, values);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      best.finite = best.finite && is_finite(values[e]);
      if (values[e] > best.value) {
        best.value = values[e];
        best.id = static_cast<int32_t>(i + e);
      }
    }
  }
  __shared__ Best best_shared[kThreads / 32];
  best = block_reduce(best, best_shared, Sum());
  if (!best.finite) {
    if (threadIdx.x == 0) out[row] = {__int_as_float(0x7FC00000), 0};
    return;
  }
  float sum = 0;
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * N; i < cols; i += kThreads * N) {
    float values[N];
    load(x + i, values);
#pragma unroll
    for (int e = 0; e < N; ++e) sum += expf(values[e] - best.value);
  }
  __shared__ double sum_shared[kThreads / 32];
  const double total = block_reduce(static_cast<double>(sum), sum_shared, Sum());
  if (threadIdx.x == 0) {
    const double target = x[targets[row]];
    out[row] = {static_cast<float>(target - (static_cast<double>(best.value) + log(total))),
                best.id};
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    find_non_finite_kernel(const T* x, int64_t count, int32_t* flag) {
  wait_for_previous_kernel();
  bool found = false;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    found = found || !is_finite(to_float(x[i]));
  }
  if (found) *flag = 1;
}

// The finalizer of splitmix64: every bit of the result depends on every bit of x.
__device__ uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// The words' hashes are added up, so their order does not matter.
__global__ void __launch_bounds__(kThreads)
    hash_words_kernel(const uint32_t* words, int64_t count, unsigned long long* hash) {
  wait_for_previous_kernel();
  unsigned long long sum = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    sum += mix(mix(static_cast<uint64_t>(i) + 1) ^ words[i]);
  }
  atomicAdd(hash, sum);
}

unsigned blocks_for(int64_t count) {
  constexpr int64_t kMost = 1024;
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks < kMost ? blocks : kMost);
}

}  // namespace

cudaError_t score_rows(const float* logits, const int32_t* targets, int64_t rows, int64_t cols,
                       RowScore* out, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  const auto kernel = cols % 4 == 0 ? score_rows_kernel<4> : score_rows_kernel<1>;
  return launch(kernel, dim3(static_cast<unsigned>(rows)), kThreads, stream, logits, targets, cols,
                out);
}

cudaError_t find_non_finite(const void* x, Element type, int64_t count, int32_t* flag,
                            cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(flag, 0, sizeof *flag, stream);
  if (error != cudaSuccess) return error;
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    return launch(find_non_finite_kernel<T>, dim3(blocks_for(count)), kThreads, stream,
                  static_cast<const T*>(x), count, flag);
  });
}

cudaError_t hash_words(const uint32_t* words, int64_t count, uint64_t* hash, cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(hash, 0, sizeof *hash, stream);
  if (error != cudaSuccess) return error;
  return launch(hash_words_kernel, dim3(blocks_for(count)), kThreads, stream, words, count,
                reinterpret_cast<unsigned long long*>(hash));
}

}  // namespace sagelm::kernels
