#include "kernels/common/ptx.cuh"
#include "kernels/ops/elements.cuh"
#include "kernels/ops/gemv.h"
#include "kernels/ops/launch.cuh"

namespace sagelm::kernels {
namespace {

// A block computes kTile outputs for up to 8 rows of x with m16n8k16 products: the weights are the
// 16 x 16 operand, x the 16 x 8 one. The order of k inside a product is free as long as both
// operands agree, so lane 4g + c takes 8 neighbours of weight rows g and g + 8 and of row g of x as
// its share of two products. Warps split k, and their sums are added at the end in a fixed order.
constexpr int kTile = 16;
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kStep = 32;  // k of the two products
constexpr int kSteps =
    4;  // a warp's at a time: 256 bytes of every row, 8 loads per thread in flight

template <GemvOutput kOutput, typename T>
using OutputType =
    std::conditional_t<kOutput == GemvOutput::kHalf || kOutput == GemvOutput::kSwiglu, T, float>;

// Weights of one turn of a warp.
struct Fragments {
  uint4 low[kSteps];   // row g
  uint4 high[kSteps];  // row g + 8

  // Columns from k on read as zeros. Each byte is used once: it goes first when caches are full.
  template <typename T>
  __device__ void fetch(const T* low_row, const T* high_row, int column, int k) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int at = column + i * kStep;
      const bool inside = at < k;
      low[i] = inside ? __ldcs(reinterpret_cast<const uint4*>(low_row + at)) : uint4{};
      high[i] = inside ? __ldcs(reinterpret_cast<const uint4*>(high_row + at)) : uint4{};
    }
  }
};

template <typename T, GemvOutput kOutput>
__global__ void __launch_bounds__(kThreads, 2)
    gemv_kernel(const T* x, const T* weight, OutputType<kOutput, T>* out, int rows, int64_t n,
                int k) {
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  constexpr bool kSwiglu = kOutput == GemvOutput::kSwiglu;
  // Outputs of a block, and how far the weight rows of the tile's second half lie from the first.
  constexpr int kOutputs = kSwiglu ? kTile / 2 : kTile;
  const int64_t second = kSwiglu ? n : kTile / 2;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kOutputs;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int group = static_cast<int>(threadIdx.x) % 32 / 4;
  const int quad = static_cast<int>(threadIdx.x) % 4;

  // Rows past the end read the last one; what they give is not stored.
  const int64_t last = (kSwiglu ? 2 * n : n) - 1;
  const T* low_row = weight + min(first + group, last) * k;
  const T* high_row = weight + min(first + group + second, last) * k;
  constexpr int kTurn = kWarps * kSteps * kStep;
  int column = warp * kSteps * kStep + quad * 8;
  Fragments now, next;
  allow_next_kernel();
  now.fetch(low_row, high_row, column, k);
  wait_for_previous_kernel();

  // The output that a thread will store, and what it is added to.
  const int output = static_cast<int>(threadIdx.x) % kOutputs;
  const int row = static_cast<int>(threadIdx.x) / kOutputs;
  const bool stores = row < rows && first + output < n;
  const int64_t place = row * n + first + output;
  float before = 0;
  if constexpr (kOutput == GemvOutput::kAdd) {
    if (stores) before = out[place];
  }

  const bool has_row = group < rows;
  const T* x_row = x + static_cast<int64_t>(has_row ? group : 0) * k;
  float even[4] = {}, odd[4] = {};
  for (; column - quad * 8 < k; column += kTurn) {
    next.fetch(low_row, high_row, column + kTurn, k);
    uint4 b[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int at = column + i * kStep;
      b[i] = has_row && at < k ? *reinterpret_cast<const uint4*>(x_row + at) : uint4{};
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      ptx::multiply_half<kBf16>(even, {now.low[i].x, now.high[i].x, now.low[i].y, now.high[i].y},
                                b[i].x, b[i].y);
      ptx::multiply_half<kBf16>(odd, {now.low[i].z, now.high[i].z, now.low[i].w, now.high[i].w},
                                b[i].z, b[i].w);
    }
    now = next;
  }

  __shared__ float partial[kWarps][kGemvRows][kTile];
  partial[warp][2 * quad][group] = even[0] + odd[0];
  partial[warp][2 * quad + 1][group] = even[1] + odd[1];
  partial[warp][2 * quad][group + 8] = even[2] + odd[2];
  partial[warp][2 * quad + 1][group + 8] = even[3] + odd[3];
  __syncthreads();
  if (!stores) return;
  float sum = 0, up = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    sum += partial[i][row][output];
    if constexpr (kSwiglu) up += partial[i][row][output + kOutputs];
  }
  if constexpr (kSwiglu) sum = up * (sum / (1.0f + __expf(-sum)));
  const float result[1] = {before + sum};
  store(out + place, result);
}

// Any k: a warp per weight row, one row of x after the other.
template <typename T, GemvOutput kOutput>
__global__ void __launch_bounds__(kThreads)
    gemv_any_kernel(const T* x, const T* weight, OutputType<kOutput, T>* out, int rows, int64_t n,
                    int k) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t output = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (output >= n) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto product = [&](int row, int64_t weight_row) {
    float sum = 0;
    for (int i = lane; i < k; i += 32) {
      sum += to_float(x[static_cast<int64_t>(row) * k + i]) * to_float(weight[weight_row * k + i]);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
    return sum;
  };
  for (int row = 0; row < rows; ++row) {
    float result[1] = {product(row, output)};
    if constexpr (kOutput == GemvOutput::kSwiglu) {
      result[0] = product(row, n + output) * (result[0] / (1.0f + __expf(-result[0])));
    }
    if (lane != 0) continue;
    const int64_t place = row * n + output;
    if constexpr (kOutput == GemvOutput::kAdd) result[0] += out[place];
    store(out + place, result);
  }
}

template <typename T, GemvOutput kOutput>
cudaError_t start(const Gemv& args, cudaStream_t stream) {
  constexpr int kOutputs = kOutput == GemvOutput::kSwiglu ? kTile / 2 : kTile;
  const bool aligned = args.k % 8 == 0;
  const auto kernel = aligned ? gemv_kernel<T, kOutput> : gemv_any_kernel<T, kOutput>;
  const int64_t per_block = aligned ? kOutputs : kWarps;
  return launch(kernel, dim3(static_cast<unsigned>((args.n + per_block - 1) / per_block)), kThreads,
                stream, static_cast<const T*>(args.x), static_cast<const T*>(args.weight),
                static_cast<OutputType<kOutput, T>*>(args.out), static_cast<int>(args.rows), args.n,
                static_cast<int>(args.k));
}

}  // namespace

cudaError_t gemv(const Gemv& args, cudaStream_t stream) {
  if (args.rows == 0 || args.n == 0) return cudaSuccess;
  if (args.rows < 0 || args.rows > kGemvRows || args.k > INT32_MAX - kWarps * kSteps * kStep) {
    return cudaErrorInvalidValue;
  }
  return with_half_type(args.type, [&](auto element) {
    using T = decltype(element);
    switch (args.output) {
      case GemvOutput::kHalf:
        return start<T, GemvOutput::kHalf>(args, stream);
      case GemvOutput::kFloat:
        return start<T, GemvOutput::kFloat>(args, stream);
      case GemvOutput::kAdd:
        return start<T, GemvOutput::kAdd>(args, stream);
      case GemvOutput::kSwiglu:
        return start<T, GemvOutput::kSwiglu>(args, stream);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace sagelm::kernels
