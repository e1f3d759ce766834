#include <algorithm>

#include "kernels/common/ptx.cuh"
#include "kernels/ops/elements.cuh"
#include "kernels/ops/gemv.h"
#include "kernels/ops/launch.cuh"

namespace sagelm::kernels {
namespace {

// One block per multiprocessor computes an even share of the outputs, kTile weight rows at a time,
// for up to 8 rows of x with m16n8k16 products: the weights are the 16 x 16 operand, x the 16 x 8
// one. The order of k inside a product is free as long as both operands agree, so lane 4g + c takes
// 8 neighbours of weight rows g and g + 8 and of row g of x as its share of two products. Warps
// split k, and their sums are added at the end of a tile in a fixed order.
//
// What bounds this is memory, and what is between two products is latency: every warp streams its
// columns through a ring of its own, which it fills before it waits for the kernel in front. There
// is room for one block on a multiprocessor: were there more, a few would get two blocks of the
// same product while others had none.
constexpr int kTile = 16;
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kStep = 64;              // columns of a warp's step: 128 bytes of every row
constexpr int kTurn = kWarps * kStep;  // of the block's
constexpr int kRowBytes = 2 * kStep;
constexpr int kStepBytes = kTile * kRowBytes;
constexpr int kStages = 9;     // of a ring
constexpr int kFewStages = 5;  // where a block cannot have as much memory
constexpr int kNormKept = 8;   // packs of 4 elements of a row that a thread normalises

template <GemvOutput kOutput, typename T>
using OutputType =
    std::conditional_t<kOutput == GemvOutput::kHalf || kOutput == GemvOutput::kSwiglu, T, float>;

template <int kStages>
struct GemvMemory {
  uint8_t ring[kWarps][kStages][kStepBytes];
  float partial[2][kWarps][kGemvRows][kTile];  // of every other tile
  float squares[32];
  // Then, where the block normalises it, x: [rows][k].
};

// Where in a ring's step lies chunk `chunk` (16 bytes) of row `row`: two rows that are read
// together lie in different banks.
__device__ inline int step_offset(int row, int chunk) {
  return row * kRowBytes + (chunk ^ (row % 2 * 4)) * 16;
}

// Copies a warp's steps of the weights, one after the other through all tiles of the block.
template <typename T, bool kSwiglu>
class WeightCopies {
  static constexpr int kOutputs = kSwiglu ? kTile / 2 : kTile;

 public:
  __device__ WeightCopies(const T* weight, int64_t n, int k, int64_t begin, int64_t end, int warp,
                          uint32_t ring)
      : weight_(weight),
        second_(kSwiglu ? n : kTile / 2),
        tile_(begin),
        end_(end),
        k_(k),
        first_column_(warp * kStep),
        column_(warp * kStep),
        ring_(ring) {}

  // The next step, to stage `stage`; past the last one nothing.
  __device__ void copy(int stage) {
    const int row = static_cast<int>(threadIdx.x) % 32 / 8;
    const int chunk = static_cast<int>(threadIdx.x) % 8;
    if (tile_ < end_) {
      const int column = column_ + chunk * 8;
      const auto valid = static_cast<int>(min(end_ - tile_, int64_t{kOutputs}));
      const T* from = weight_ + (tile_ + row) * k_ + column;
      const uint32_t to = ring_ + stage * kStepBytes;
#pragma unroll
      for (int j = 0; j < kTile / 4; ++j) {
        const bool high = j >= kTile / 8;
        const int at = row + 4 * j;
        const int output = kSwiglu && high ? at - kTile / 2 : at;
        const int64_t offset = (high ? second_ : 0) + j % (kTile / 8) * 4;
        ptx::copy_async(to + step_offset(at, chunk), from + offset * k_,
                        output < valid && column < k_);
      }
      column_ += kTurn;
      if (column_ - first_column_ >= k_) {
        column_ = first_column_;
        tile_ += kOutputs;
      }
    }
    ptx::commit_copies();
  }

 private:
  const T* weight_;
  int64_t second_;  // weight rows between the halves of a tile
  int64_t tile_, end_;
  int k_, first_column_, column_;
  uint32_t ring_;
};

// The norm's weights of this thread, which need not wait for anything.
struct NormWeights {
  float values[kNormKept][4];

  __device__ void fetch(const float* norm, int k) {
#pragma unroll
    for (int j = 0; j < kNormKept; ++j) {
      const int i = (j * kThreads + static_cast<int>(threadIdx.x)) * 4;
      if (i < k) load(norm + i, values[j]);
    }
  }
};

// Normalises rows of x as kernels/ops/rmsnorm.h has it, into shared memory.
template <typename T>
__device__ void normalise(const float* x, const NormWeights& weights, float eps, int rows, int k,
                          T* normed, float* shared) {
  for (int row = 0; row < rows; ++row) {
    float values[kNormKept][4];
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kNormKept; ++j) {
      const int i = (j * kThreads + static_cast<int>(threadIdx.x)) * 4;
      if (i >= k) continue;
      load(x + static_cast<int64_t>(row) * k + i, values[j]);
#pragma unroll
      for (int e = 0; e < 4; ++e) sum += values[j][e] * values[j][e];
    }
    const float total = block_reduce(sum, shared, Sum());
    const float scale = 1.0f / sqrtf(total / static_cast<float>(k) + eps);
#pragma unroll
    for (int j = 0; j < kNormKept; ++j) {
      const int i = (j * kThreads + static_cast<int>(threadIdx.x)) * 4;
      if (i >= k) continue;
#pragma unroll
      for (int e = 0; e < 4; ++e) values[j][e] = values[j][e] * scale * weights.values[j][e];
      store(normed + row * k + i, values[j]);
    }
  }
  __syncthreads();
}

template <typename T, GemvOutput kOutput, bool kNorm, int kStages>
__global__ void __launch_bounds__(kThreads, 1)
    gemv_kernel(const std::conditional_t<kNorm, float, T>* x, const T* weight,
                OutputType<kOutput, T>* out, int rows, int64_t n, int k, const float* norm,
                float eps) {
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  constexpr bool kSwiglu = kOutput == GemvOutput::kSwiglu;
  constexpr int kOutputs = kSwiglu ? kTile / 2 : kTile;
  extern __shared__ __align__(128) uint8_t smem[];
  auto& memory = *reinterpret_cast<GemvMemory<kStages>*>(smem);
  T* normed = reinterpret_cast<T*>(smem + sizeof memory);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int group = static_cast<int>(threadIdx.x) % 32 / 4;
  const int quad = static_cast<int>(threadIdx.x) % 4;
  const int64_t begin = n * blockIdx.x / gridDim.x, end = n * (blockIdx.x + 1) / gridDim.x;

  allow_next_kernel();
  const uint32_t ring = ptx::smem_address(memory.ring[warp]);
  WeightCopies<T, kSwiglu> copies(weight, n, k, begin, end, warp, ring);
#pragma unroll
  for (int i = 0; i < kStages; ++i) copies.copy(i);
  if constexpr (kNorm) {
    NormWeights weights;
    weights.fetch(norm, k);
    wait_for_previous_kernel();
    normalise(x, weights, eps, rows, k, normed, memory.squares);
  } else {
    wait_for_previous_kernel();
  }

  const bool has_row = group < rows;
  const T* x_row;
  if constexpr (kNorm) {
    x_row = normed + (has_row ? group : 0) * k;
  } else {
    x_row = x + static_cast<int64_t>(has_row ? group : 0) * k;
  }
  const int first_column = warp * kStep;
  const auto fetch_x = [&](int column, uint4(&b)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = column + i * kStep / 2 + quad * 8;
      b[i] = has_row && at < k ? *reinterpret_cast<const uint4*>(x_row + at) : uint4{};
    }
  };

  int stage = 0, buffer = 0;
  uint4 b[2];
  fetch_x(first_column, b);
  for (int64_t first = begin; first < end; first += kOutputs, buffer ^= 1) {
    float even[4] = {}, odd[4] = {};
    for (int turn = 0; turn < k; turn += kTurn) {
      ptx::wait_copies<kStages - 1>();
      __syncwarp();
      const uint32_t step = ring + stage * kStepBytes;
      const uint4 now[2] = {b[0], b[1]};
      fetch_x(turn + kTurn < k ? turn + kTurn + first_column : first_column, b);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 low = ptx::load_chunk(step + step_offset(group, 4 * i + quad));
        const uint4 high = ptx::load_chunk(step + step_offset(group + 8, 4 * i + quad));
        ptx::multiply_half<kBf16>(even, {low.x, high.x, low.y, high.y}, now[i].x, now[i].y);
        ptx::multiply_half<kBf16>(odd, {low.z, high.z, low.w, high.w}, now[i].z, now[i].w);
      }
      __syncwarp();
      copies.copy(stage);
      stage = stage + 1 < kStages ? stage + 1 : 0;
    }

    auto& partial = memory.partial[buffer];
    partial[warp][2 * quad][group] = even[0] + odd[0];
    partial[warp][2 * quad + 1][group] = even[1] + odd[1];
    partial[warp][2 * quad][group + 8] = even[2] + odd[2];
    partial[warp][2 * quad + 1][group + 8] = even[3] + odd[3];
    // Also keeps what is read below from being overwritten by the tile after the next.
    __syncthreads();
    const int output = static_cast<int>(threadIdx.x) % kOutputs;
    const int row = static_cast<int>(threadIdx.x) / kOutputs;
    if (row >= rows || first + output >= end) continue;
    OutputType<kOutput, T>* to = out + row * n + first + output;
    float sum = 0, up = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      sum += partial[i][row][output];
      if constexpr (kSwiglu) up += partial[i][row][output + kOutputs];
    }
    if constexpr (kSwiglu) sum = up * (sum / (1.0f + __expf(-sum)));
    if constexpr (kOutput == GemvOutput::kAdd) {
      atomicAdd(to, sum);  // nobody else's: it is for the memory to add, so that nobody waits
    } else {
      const float result[1] = {sum};
      store(to, result);
    }
  }
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

template <typename T, GemvOutput kOutput, bool kNorm, int kStages>
cudaError_t start_aligned(const Gemv& args, int blocks, cudaStream_t stream) {
  const auto kernel = gemv_kernel<T, kOutput, kNorm, kStages>;
  const size_t bytes = sizeof(GemvMemory<kStages>) +
                       (kNorm ? sizeof(T) * static_cast<size_t>(args.rows * args.k) : 0);
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  using X = std::conditional_t<kNorm, float, T>;
  return launch_with_memory(kernel, dim3(static_cast<unsigned>(blocks)), kThreads, bytes, stream,
                            static_cast<const X*>(args.x), static_cast<const T*>(args.weight),
                            static_cast<OutputType<kOutput, T>*>(args.out),
                            static_cast<int>(args.rows), args.n, static_cast<int>(args.k),
                            args.norm, args.eps);
}

template <typename T, GemvOutput kOutput>
cudaError_t start(const Gemv& args, cudaStream_t stream) {
  if (args.k % 8 != 0) {
    return launch(gemv_any_kernel<T, kOutput>,
                  dim3(static_cast<unsigned>((args.n + kWarps - 1) / kWarps)), kThreads, stream,
                  static_cast<const T*>(args.x), static_cast<const T*>(args.weight),
                  static_cast<OutputType<kOutput, T>*>(args.out), static_cast<int>(args.rows),
                  args.n, static_cast<int>(args.k));
  }
  int device = 0, multiprocessors = 0, memory = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) return error;
  const auto blocks = static_cast<int>(std::min<int64_t>(multiprocessors, args.n));
  if constexpr (kOutput != GemvOutput::kAdd) {
    if (args.norm != nullptr) return start_aligned<T, kOutput, true, kStages>(args, blocks, stream);
  }
  return memory < static_cast<int>(sizeof(GemvMemory<kStages>))
             ? start_aligned<T, kOutput, false, kFewStages>(args, blocks, stream)
             : start_aligned<T, kOutput, false, kStages>(args, blocks, stream);
}

}  // namespace

bool gemv_normalises(const Gemv& args) {
  return overlaps_kernels() && args.k % 8 == 0 && args.output != GemvOutput::kAdd &&
         args.rows * args.k <= 4 * kNormKept * kThreads;
}

cudaError_t gemv(const Gemv& args, cudaStream_t stream) {
  if (args.rows == 0 || args.n == 0) return cudaSuccess;
  if (args.rows < 0 || args.rows > kGemvRows || args.k > INT32_MAX - kTurn ||
      (args.norm != nullptr && !gemv_normalises(args))) {
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
