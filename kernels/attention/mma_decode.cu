// Decode with FP16 or BF16 keys and values: the few query rows that share a KV head are one 16-row
// tile, and a sequence is cut into parts of kPartKeys keys, so that one long sequence occupies the
// whole device. The cut depends on nothing but the position: a sequence's result is the same in any
// batch. Every warp streams slices of 16 keys through a ring of its own, without block barriers.
#include <algorithm>
#include <cstdint>

#include "kernels/attention/mma_operands.h"
#include "kernels/attention/mma_softmax.cuh"
#include "kernels/attention/recipe.h"
#include "kernels/common/launch.h"
#include "kernels/common/ptx.cuh"
#include "kernels/ops/launch.cuh"

namespace sagelm::kernels {
namespace {

using namespace mma;

constexpr int kMaxRows = 16;
constexpr int kSlice = 16;  // keys; no slice crosses a page, whose size is a multiple of this
constexpr int kPartKeys = 256;

// Unnormalised results of the parts: of row (b, head, query) in [batch][heads][max_q_len] the parts
// lie one after another.
struct Parts {
  float* out;     // [rows][parts][head_dim]
  float2* stats;  // [rows][parts]: maximum of the base-2 logits, sum of 2^(logit - maximum)
  int parts;      // of the longest sequence
};

template <bool kBf16_, int kDim_>
struct DecodeShape {
  static constexpr bool kBf16 = kBf16_;
  static constexpr int kDim = kDim_;
  static constexpr int kWarps = kDim == 256 ? 2 : 4;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kStages = kDim == 64 ? 4 : 3;
  static constexpr int kRowBytes = 2 * kDim;
  static constexpr int kSliceBytes = kSlice * kRowBytes;  // of K; as much of V
  static constexpr int kWarpBytes = kStages * 2 * kSliceBytes;
  static constexpr int kSmemBytes = kWarps * kWarpBytes;
  static constexpr int kSlicesPerWarp = kPartKeys / kSlice / kWarps;
  static_assert(kSlicesPerWarp <= 32);
  // The warps' results are merged in the same memory; padding keeps rows in different banks.
  static constexpr int kOutStride = kDim + 8;
  static_assert(kWarps * kMaxRows * (kOutStride + 2) * 4 <= kSmemBytes);
};

// What becomes of a row: its sum of P V, maximum and sum of P.
struct RowResult {
  float top, sum;

  __device__ float lse() const {
    return sum > 0.0f || sum != sum ? (top + log2f(sum)) * recipe::kLn2 : -INFINITY;
  }
  // What to multiply the row by; 0 for a row that saw no key.
  __device__ float inverse() const { return sum == 0.0f ? 0.0f : 1.0f / sum; }
};

__device__ inline void store_half(const Problem& p, int64_t offset, float x) {
  static_cast<uint16_t*>(p.out.data)[offset] =
      static_cast<uint16_t>(p.bf16 ? to_halves<true>(x, 0.0f) : to_halves<false>(x, 0.0f));
}

__device__ inline int64_t row_index(const Problem& p, int b, int head, int query) {
  return (static_cast<int64_t>(b) * p.num_heads + head) * p.max_q_len + query;
}

// Copies 16 rows of K or V from `from` on; zeros from row `valid` on and from head_dim on.
template <class S>
__device__ __forceinline__ void copy_slice(uint32_t to, const Tensor& x, int64_t from, int valid,
                                           int head_dim) {
  constexpr int kChunks = S::kDim / 8;
  constexpr int kRowsAtOnce = 32 / kChunks;
  const int lane = threadIdx.x % 32;
  const int chunk = lane % kChunks, first = lane / kChunks;
  const uint16_t* lane_from =
      static_cast<const uint16_t*>(x.data) + from + first * x.token_stride + chunk * 8;
  const bool in_dim = chunk * 8 < head_dim;
#pragma unroll
  for (int i = 0; i < kSlice; i += kRowsAtOnce) {
    copy_async(to + chunk_offset<S::kRowBytes>(i + first, chunk), lane_from + i * x.token_stride,
               in_dim && i + first < valid);
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads)
    decode_part(const __grid_constant__ Problem p, const Parts parts, const float scale) {
  extern __shared__ __align__(128) uint8_t smem[];
  constexpr int kSteps = S::kDim / 16;
  constexpr int kBlocks = S::kDim / 8;
  allow_next_kernel();
  wait_for_previous_kernel();
  const int part = blockIdx.x, kv_head = blockIdx.y, b = blockIdx.z;
  const int q_len = p.q_len(b), kv_len = p.kv_len(b);
  const int begin = part * kPartKeys;
  // A sequence without keys still has its zeros to write where the parts are not merged.
  if (q_len == 0 || (begin >= kv_len && part > 0)) return;
  const int end = min(begin + kPartKeys, kv_len);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = p.num_heads / p.num_kv_heads;
  const int rows = q_len * group;

  // Slice i of this warp starts at token begin + (i * kWarps + warp) * 16; lane i looks it up.
  int64_t k_start = 0, v_start = 0;
  const int lane_token = begin + (lane * S::kWarps + warp) * kSlice;
  if (lane < S::kSlicesPerWarp && lane_token < end) {
    k_start = p.kv_offset(p.k, b, lane_token, kv_head);
    v_start = p.kv_offset(p.v, b, lane_token, kv_head);
  }
  const int warp_begin = begin + warp * kSlice;
  const int slices =
      warp_begin < end ? (end - warp_begin + S::kWarps * kSlice - 1) / (S::kWarps * kSlice) : 0;
  const uint32_t ring = smem_address(smem) + warp * S::kWarpBytes;
  const auto copy = [&](int i) {
    const int64_t k_from = __shfl_sync(0xFFFFFFFFu, k_start, i % 32);
    const int64_t v_from = __shfl_sync(0xFFFFFFFFu, v_start, i % 32);
    if (i < slices) {
      const uint32_t to = ring + i % S::kStages * (2 * S::kSliceBytes);
      const int valid = end - (warp_begin + i * S::kWarps * kSlice);
      copy_slice<S>(to, p.k, k_from, valid, p.head_dim);
      copy_slice<S>(to + S::kSliceBytes, p.v, v_from, valid, p.head_dim);
    }
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < S::kStages; ++i) copy(i);

  // Row r of the tile is query r / group of head kv_head * group + r % group. A fragments.
  uint32_t queries[kSteps][4];
  int seen[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = lane / 4 + 8 * r;
    const int query = row / group;
    seen[r] = p.causal ? kv_len - q_len + query + 1 : kv_len;
    const uint16_t* from = static_cast<const uint16_t*>(p.q.data) +
                           p.q_offset(p.q, b, query, kv_head * group + row % group);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int channel = k * 16 + half * 8 + lane % 4 * 2;
        queries[k][half * 2 + r] = row < rows && channel < p.head_dim
                                       ? *reinterpret_cast<const uint32_t*>(from + channel)
                                       : 0;
      }
    }
  }
  // Slices below this need no mask.
  const int seen_by_all = p.causal ? kv_len - q_len + 1 : kv_len;

  float out[kBlocks][4] = {};
  SoftmaxRows state;
  state.clear();
  const float scales[2] = {scale, scale};
  for (int i = 0; i < slices; ++i) {
    wait_copies<S::kStages - 1>();
    __syncwarp();
    const uint32_t keys = ring + i % S::kStages * (2 * S::kSliceBytes);
    const uint32_t values = keys + S::kSliceBytes;
    const int first_key = warp_begin + i * S::kWarps * kSlice;
    float s[2][4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t key[4];
      load_matrices(
          key, keys + chunk_offset<S::kRowBytes>(lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
      multiply_half<S::kBf16>(s[0], queries[k], key[0], key[1]);
      multiply_half<S::kBf16>(s[1], queries[k], key[2], key[3]);
    }
    if (first_key + kSlice > seen_by_all) mask(s, first_key, seen);
    float shrink[2];
    softmax<false, false>(s, scales, state, shrink);
    const uint32_t probabilities[4] = {
        to_halves<S::kBf16>(s[0][0], s[0][1]), to_halves<S::kBf16>(s[0][2], s[0][3]),
        to_halves<S::kBf16>(s[1][0], s[1][1]), to_halves<S::kBf16>(s[1][2], s[1][3])};
    if (!__all_sync(0xFFFFFFFFu, shrink[0] == 1.0f && shrink[1] == 1.0f)) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out[n][e] *= shrink[e >> 1];
      }
    }
#pragma unroll
    for (int n = 0; n < kBlocks; n += 2) {
      uint32_t value[4];
      load_matrices_transposed(value,
                               values + chunk_offset<S::kRowBytes>(lane % 16, n + lane / 16));
      multiply_half<S::kBf16>(out[n], probabilities, value[0], value[1]);
      multiply_half<S::kBf16>(out[n + 1], probabilities, value[2], value[3]);
    }
    __syncwarp();
    copy(i + S::kStages);
  }

  // The warps' results meet in shared memory.
  wait_copies<0>();
  __syncthreads();
  float* outs = reinterpret_cast<float*>(smem);  // [kWarps][16][kOutStride]
  float2* stats = reinterpret_cast<float2*>(outs + S::kWarps * kMaxRows * S::kOutStride);
  state.add_over_quad();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (lane / 4 + 8 * r >= rows) continue;
    const int row = warp * kMaxRows + lane / 4 + 8 * r;
    if (lane % 4 == 0) stats[row] = make_float2(state.top[r], state.sum[r]);
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      *reinterpret_cast<float2*>(outs + row * S::kOutStride + n * 8 + lane % 4 * 2) =
          make_float2(out[n][2 * r], out[n][2 * r + 1]);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * S::kDim; i += S::kThreads) {
    const int row = i / S::kDim, channel = i % S::kDim;
    if (channel >= p.head_dim) continue;
    RowResult result{kNoMaximum, 0.0f};
#pragma unroll
    for (int w = 0; w < S::kWarps; ++w) {
      result.top = fmaxf(result.top, stats[w * kMaxRows + row].x);
    }
    float sum_out = 0.0f;
#pragma unroll
    for (int w = 0; w < S::kWarps; ++w) {
      const float2 stat = stats[w * kMaxRows + row];
      const float weight = exp2_fast(stat.x - result.top);
      result.sum = fmaf(stat.y, weight, result.sum);
      sum_out = fmaf(outs[(w * kMaxRows + row) * S::kOutStride + channel], weight, sum_out);
    }
    const int query = row / group, head = kv_head * group + row % group;
    const int64_t index = row_index(p, b, head, query);
    if (parts.parts > 1) {
      const int64_t to = index * parts.parts + part;
      parts.out[to * p.head_dim + channel] = sum_out;
      if (channel == 0) parts.stats[to] = make_float2(result.top, result.sum);
    } else {
      store_half(p, p.q_offset(p.out, b, query, head) + channel, sum_out * result.inverse());
      if (p.lse != nullptr && channel == 0) p.lse[index] = result.lse();
    }
  }
}

// One block a row (query, head): adds the parts up in their order.
__global__ void merge_parts(const __grid_constant__ Problem p, const Parts parts) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int query = blockIdx.x / p.num_heads, head = blockIdx.x % p.num_heads, b = blockIdx.y;
  if (query >= p.q_len(b)) return;
  const int count = (p.kv_len(b) + kPartKeys - 1) / kPartKeys;
  const int64_t index = row_index(p, b, head, query);
  const float2* stats = parts.stats + index * parts.parts;
  RowResult result{kNoMaximum, 0.0f};
#pragma unroll 8
  for (int i = 0; i < count; ++i) result.top = fmaxf(result.top, stats[i].x);
  const int channel = threadIdx.x;
  if (channel >= p.head_dim) return;
  const float* out = parts.out + index * parts.parts * p.head_dim + channel;
  float sum_out = 0.0f;
#pragma unroll 8
  for (int i = 0; i < count; ++i) {
    const float2 stat = stats[i];
    const float weight = exp2_fast(stat.x - result.top);
    result.sum = fmaf(stat.y, weight, result.sum);
    sum_out = fmaf(out[static_cast<int64_t>(i) * p.head_dim], weight, sum_out);
  }
  store_half(p, p.q_offset(p.out, b, query, head) + channel, sum_out * result.inverse());
  if (p.lse != nullptr && channel == 0) p.lse[index] = result.lse();
}

Parts place_parts(const Problem& p, void* workspace, size_t* bytes) {
  Parts parts{};
  parts.parts = (p.max_kv_len + kPartKeys - 1) / kPartKeys;
  const size_t rows = static_cast<size_t>(p.batch) * p.num_heads * p.max_q_len;
  WorkspaceLayout layout(workspace);
  if (parts.parts > 1) {
    layout.place(parts.out, rows * parts.parts * p.head_dim);
    layout.place(parts.stats, rows * parts.parts);
  }
  *bytes = layout.bytes();
  return parts;
}

template <bool kBf16, int kDim>
cudaError_t launch_decode(const Problem& p, const Parts& parts, cudaStream_t stream) {
  using S = DecodeShape<kBf16, kDim>;
  const cudaError_t error = cudaFuncSetAttribute(
      decode_part<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSmemBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(std::max(parts.parts, 1), p.num_kv_heads, p.batch);
  const cudaError_t started =
      launch_with_shared(decode_part<S>, grid, S::kThreads, S::kSmemBytes, stream, p, parts,
                         p.softmax_scale * recipe::kLog2E);
  if (started != cudaSuccess || parts.parts <= 1) return started;
  return launch(merge_parts, dim3(p.max_q_len * p.num_heads, p.batch), kDim, stream, p, parts);
}

template <bool kBf16>
cudaError_t decode_padded(const Problem& p, const Parts& parts, cudaStream_t stream) {
  switch (mma_padded_dim(p.head_dim)) {
    case 64:
      return launch_decode<kBf16, 64>(p, parts, stream);
    case 128:
      return launch_decode<kBf16, 128>(p, parts, stream);
    default:
      return launch_decode<kBf16, 256>(p, parts, stream);
  }
}

}  // namespace

bool mma_decode_takes(const Problem& p) {
  return static_cast<int64_t>(p.max_q_len) * (p.num_heads / p.num_kv_heads) <= kMaxRows;
}

size_t mma_decode_workspace_bytes(const Problem& p) {
  size_t bytes = 0;
  place_parts(p, nullptr, &bytes);
  return bytes;
}

cudaError_t mma_decode(const Problem& p, void* workspace, cudaStream_t stream) {
  size_t bytes = 0;
  const Parts parts = place_parts(p, workspace, &bytes);
  if (p.batch == 0 || p.max_q_len == 0) return cudaSuccess;
  return p.bf16 ? decode_padded<true>(p, parts, stream) : decode_padded<false>(p, parts, stream);
}

}  // namespace sagelm::kernels
