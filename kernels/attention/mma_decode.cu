// Decode with FP16 or BF16 keys and values: the few query rows that share a KV head are one 16-row
// tile, and a sequence is cut into parts (cut_sequence), so that one long sequence occupies the
// whole device. Every warp streams slices of 16 keys through a ring of its own, without block
// barriers.
#include <algorithm>
#include <cstdint>

#include "kernels/attention/decode_parts.cuh"
#include "kernels/attention/mma_decode.h"
#include "kernels/attention/mma_operands.h"
#include "kernels/attention/recipe.h"
#include "kernels/common/ptx.cuh"
#include "kernels/ops/launch.cuh"

namespace sagelm::kernels {
namespace {

using namespace mma;

// Keys that parts are multiples of; no slice crosses a page, whose size is a multiple of kSlice.
constexpr int kUnit = 64;

// Of a sequence of so many keys, the part's being its units times kUnit.
__host__ __device__ inline Cut cut(const Problem& p, int kv_len) {
  // A warp's lanes look up where its slices lie; two warps have twice the slices that four have.
  return cut_sequence((kv_len + kUnit - 1) / kUnit, p.num_kv_heads, 0, p.head_dim > 128 ? 16 : 32);
}
__device__ inline int part_count(const Problem& p, int kv_len) {
  const int keys = cut(p, kv_len).part_units * kUnit;
  return (kv_len + keys - 1) / keys;
}

template <bool kBf16_, int kDim_>
struct DecodeShape {
  static constexpr bool kBf16 = kBf16_;
  static constexpr int kDim = kDim_;
  static constexpr int kWarps = kDim == 256 ? 2 : 4;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kStages = kDim == 64 ? 4 : kDim == 128 ? 2 : 3;
  static constexpr int kRowBytes = 2 * kDim;
  static constexpr int kSliceBytes = kSlice * kRowBytes;  // of K; as much of V
  static constexpr int kWarpBytes = kStages * 2 * kSliceBytes;
  static constexpr int kSmemBytes = kWarps * kWarpBytes;
  // The warps' results are merged in the same memory.
  static_assert(sizeof(MergeMemory<kDim, kWarps>) <= kSmemBytes);
};

template <class S>
__global__ void __launch_bounds__(S::kThreads)
    decode_part(const __grid_constant__ Problem p, const Parts parts, const float scale) {
  extern __shared__ __align__(128) uint8_t smem[];
  allow_next_kernel();
  const bool appends = S::kDim <= 128 && p.rotations != nullptr;
  if (!appends) wait_for_previous_kernel();
  const int part = blockIdx.x, kv_head = blockIdx.y, b = blockIdx.z;
  const int q_len = p.q_len(b), kv_len = p.kv_len(b);
  const int part_keys = cut(p, kv_len).part_units * kUnit;
  const int begin = part * part_keys;
  // A sequence without keys still has its zeros to write where the parts are not merged.
  if (q_len == 0 || (begin >= kv_len && part > 0)) return;
  const int end = min(begin + part_keys, kv_len);
  const int cached_end = appends ? min(end, kv_len - 1) : end;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = p.num_heads / p.num_kv_heads;
  const int rows = q_len * group;

  // Slice i of this warp starts at token begin + (i * kWarps + warp) * 16; lane i looks it up.
  int64_t k_start = 0, v_start = 0;
  const int lane_token = begin + (lane * S::kWarps + warp) * kSlice;
  if (lane_token < end) {
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
      const int valid = cached_end - (warp_begin + i * S::kWarps * kSlice);
      copy_slice<S::kDim>(to, static_cast<const uint16_t*>(p.k.data) + k_from, p.k.token_stride,
                          valid, p.head_dim);
      copy_slice<S::kDim>(to + S::kSliceBytes, static_cast<const uint16_t*>(p.v.data) + v_from,
                          p.v.token_stride, valid, p.head_dim);
    }
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < S::kStages; ++i) copy(i);
  if (appends) {
    prefetch_angles(p, kv_len);
    wait_for_previous_kernel();
  }

  // The slice of this warp that the step's own token is appended to.
  int last_slice = -1;
  LastToken<S::kBf16, S::kDim> last;
  if constexpr (S::kDim <= 128) {
    const int slice = (kv_len - 1 - begin) / kSlice;
    if (appends && kv_len <= end && slice % S::kWarps == warp) {
      last_slice = slice / S::kWarps;
      last.fetch(p, b, kv_head, kv_len);
    }
  }
  uint32_t queries[S::kDim / 16][4];
  load_queries<S::kDim>(p, b, kv_head, rows, group, queries);
  if constexpr (S::kDim <= 128) {
    if (appends) rotate_queries<S::kBf16, S::kDim>(last_angles(p, kv_len), queries);
    if (last_slice >= 0) last.rotate_key();
  }
  int seen[2];
  const int seen_by_all = visible_keys(p, q_len, kv_len, group, seen);
  const float no_bias[2] = {};
  DecodeRows<S::kDim> result;
  result.clear();
  for (int i = 0; i < slices; ++i) {
    wait_copies<S::kStages - 1>();
    __syncwarp();
    const uint32_t keys = ring + i % S::kStages * (2 * S::kSliceBytes);
    if constexpr (S::kDim <= 128) {
      if (i == last_slice) {
        const auto row = [&](const Tensor& x) {
          return static_cast<uint16_t*>(x.data) + p.kv_offset(x, b, kv_len - 1, kv_head);
        };
        last.leave(keys, keys + S::kSliceBytes, (kv_len - 1) % kSlice, row(p.k), row(p.v));
      }
    }
    attend_slice<S::kBf16, S::kDim>(queries, keys, keys + S::kSliceBytes,
                                    warp_begin + i * S::kWarps * kSlice, seen_by_all, seen, no_bias,
                                    scale, result);
    __syncwarp();
    copy(i + S::kStages);
  }

  // The warps' results meet in shared memory.
  wait_copies<0>();
  __syncthreads();
  auto& memory = *reinterpret_cast<MergeMemory<S::kDim, S::kWarps>*>(smem);
  leave_rows(result, warp, rows, memory);
  __syncthreads();
  store_part(p, parts, part, b, kv_head, rows, group, memory);
  if constexpr (S::kDim <= 128) {
    if (appends && parts.parts > 1) {
      const int count = part_count(p, kv_len);
      merge_if_last<S::kDim>(p, parts, 0, count, count, b, kv_head, rows, group);
    }
  }
}

// One block a row (query, head).
__global__ void merge_parts(const __grid_constant__ Problem p, const Parts parts) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int query = blockIdx.x / p.num_heads, head = blockIdx.x % p.num_heads, b = blockIdx.y;
  if (query >= p.q_len(b)) return;
  merge_row(p, parts, 0, part_count(p, p.kv_len(b)), b, query, head, 0.0f);
}

template <bool kBf16, int kDim>
cudaError_t launch_decode(const Problem& p, const Parts& parts, cudaStream_t stream) {
  using S = DecodeShape<kBf16, kDim>;
  const cudaError_t error = cudaFuncSetAttribute(
      decode_part<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSmemBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(std::max(parts.parts, 1), p.num_kv_heads, p.batch);
  const cudaError_t started =
      launch_with_memory(decode_part<S>, grid, S::kThreads, S::kSmemBytes, stream, p, parts,
                         p.softmax_scale * recipe::kLog2E);
  if (started != cudaSuccess || parts.parts <= 1 || p.rotations != nullptr) return started;
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

bool mma_decode_appends(const Problem& p) {
  return mma_decode_takes(p) && p.max_q_len == 1 && p.cu_q_lens == nullptr &&
         (p.head_dim == 64 || p.head_dim == 128);
}

bool mma_decode_takes(const Problem& p) {
  return static_cast<int64_t>(p.max_q_len) * (p.num_heads / p.num_kv_heads) <= kDecodeRows;
}

size_t mma_decode_workspace_bytes(const Problem& p) {
  size_t bytes = 0;
  place_parts(p, cut(p, p.max_kv_len).most_parts, nullptr, &bytes);
  return bytes;
}

cudaError_t mma_decode(const Problem& p, void* workspace, cudaStream_t stream) {
  size_t bytes = 0;
  const Parts parts = place_parts(p, cut(p, p.max_kv_len).most_parts, workspace, &bytes);
  if (p.batch == 0 || p.max_q_len == 0) return cudaSuccess;
  if (p.rotations != nullptr && !mma_decode_appends(p)) return cudaErrorInvalidValue;
  return p.bf16 ? decode_padded<true>(p, parts, stream) : decode_padded<false>(p, parts, stream);
}

}  // namespace sagelm::kernels
