// The attention kernel of the sm_80 path: one block of four warps takes a tile of queries of one
// head through all keys it sees, 64 at a time, from key 0 on (so that every row has a finite
// maximum before it meets a masked tile). Copies of the next tile overlap the current one's work.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "kernels/attention/mma_operands.h"
#include "kernels/attention/mma_products.cuh"
#include "kernels/attention/mma_softmax.cuh"
#include "kernels/attention/recipe.h"
#include "kernels/common/ptx.cuh"

namespace sagelm::kernels::mma {

using namespace ptx;

// In which order blocks take the query tiles: heads in sections whose K and V stay in the L2 cache
// together; within one the longest (last) tiles first.
struct Schedule {
  int pairs;    // batch * heads
  int section;  // of pairs
  int tiles;    // of the longest sequence's queries

  __device__ void unit(int index, int* pair, int* tile) const {
    const int first = index / (section * tiles) * section;
    const int count = min(section, pairs - first);
    const int rest = index - first * tiles;
    *pair = first + rest % count;
    *tile = tiles - 1 - rest / count;
  }
};

// Copies one tile of rows of a FP16 or BF16 tensor: row r starts at group_starts[r / 16] +
// (r % 16) * token_stride. Rows from `valid` on and channels from head_dim on become zeros.
template <int kDim, int kRows, int kThreads>
__device__ __forceinline__ void copy_rows(uint32_t to, const uint16_t* from,
                                          const int64_t* group_starts, int group_step,
                                          int64_t token_stride, int valid, int head_dim) {
  constexpr int kChunks = kDim / 8;
  constexpr int kRowsAtOnce = kThreads / kChunks;
  static_assert(kRowsAtOnce <= 16 && kRows % 16 == 0);
  const int thread = thread_not_kept();
  const int chunk = thread % kChunks, first = thread / kChunks;
  const uint16_t* lane_from = from + first * token_stride + chunk * 8;
  const bool in_dim = chunk * 8 < head_dim;
#pragma unroll
  for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
    const int row = i * kRowsAtOnce + first;
    const int64_t offset =
        group_starts[i * kRowsAtOnce / 16 * group_step] + i * kRowsAtOnce % 16 * token_stride;
    copy_async(to + chunk_offset<2 * kDim>(row, chunk), lane_from + offset, in_dim && row < valid);
  }
}

// Copies kBytes that lie as they shall.
template <int kBytes, int kThreads>
__device__ __forceinline__ void copy_linear(uint32_t to, const void* from) {
  static_assert(kBytes % (16 * kThreads) == 0);
  const char* lane_from = static_cast<const char*>(from) + threadIdx.x * 16;
#pragma unroll
  for (int i = 0; i < kBytes; i += 16 * kThreads) {
    copy_async(to + threadIdx.x * 16 + i, lane_from + i);
  }
}

// Where the four groups of 16 tokens of a tile start in K and V, in elements.
struct GroupStarts {
  int64_t k, v;
};

// Finds them two tiles ahead, thread by thread of the first four, for all: the page number is asked
// for at the start of a tile's work and used at its end, so that nobody waits for it.
class GroupFinder {
 public:
  __device__ GroupFinder(const Problem& p, int b, int kv_head, int kv_len)
      : p_(p), b_(b), kv_head_(kv_head), kv_len_(kv_len) {}

  __device__ void ask(int tile) {
    if (threadIdx.x >= 4) return;
    token_ = tile * kMmaKeyTile + static_cast<int>(threadIdx.x) * 16;
    page_ = 0;
    if (p_.page_table != nullptr && token_ < kv_len_) {
      const int page = token_ / p_.page_tokens;
      token_ -= page * p_.page_tokens;
      page_ = __ldg(p_.page_table + static_cast<int64_t>(b_) * p_.page_table_stride + page);
    }
  }
  __device__ void store(GroupStarts* starts) const {
    if (threadIdx.x < 4) starts[threadIdx.x] = {start(p_.k), start(p_.v)};
  }

 private:
  __device__ int64_t start(const Tensor& x) const {
    const int64_t sequence = p_.page_table != nullptr   ? page_ * x.batch_stride
                             : p_.cu_kv_lens != nullptr ? p_.cu_kv_lens[b_] * x.token_stride
                                                        : b_ * x.batch_stride;
    return sequence + token_ * x.token_stride + kv_head_ * x.head_stride;
  }

  const Problem& p_;
  int b_, kv_head_, kv_len_;
  int token_ = 0, page_ = 0;
};

template <class S>
__global__ void __launch_bounds__(S::kThreads, 2)
    attend(const __grid_constant__ Problem p, const __grid_constant__ MmaOperands operands,
           const Schedule schedule, const float scale) {
  extern __shared__ __align__(128) uint8_t smem[];
  __shared__ GroupStarts starts[2][4];
  constexpr int kBlocks = S::kKeys / 8;
  // K or V straight from the caller's tensors
  constexpr bool kGathers = !S::kE4m3 || S::kSmoothsQ;
  __shared__ float biases[S::kSmoothsQ ? S::kMeans : 1][S::kKeys];

  int pair, tile;
  schedule.unit(blockIdx.x, &pair, &tile);
  const int b = pair / p.num_heads, head = pair % p.num_heads;
  const int kv_head = head / (p.num_heads / p.num_kv_heads);
  const int q_len = p.q_len(b), kv_len = p.kv_len(b);
  const int first_row = tile * S::kRows;
  if (first_row >= q_len) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // Query row i sees the keys below kv_len + min(0, i + ahead).
  const int ahead = p.causal ? 1 - q_len : kv_len;
  const auto seen_by = [&](int row) { return kv_len + min(0, row + ahead); };
  const int warp_row = first_row + warp * S::kWarpRows;
  const int tiles =
      (max(seen_by(min(first_row + S::kRows, q_len) - 1), 0) + S::kKeys - 1) / S::kKeys;
  // Keys that some row of this warp sees, and keys that all of them see.
  const int warp_some = warp_row < q_len ? seen_by(min(warp_row + S::kWarpRows, q_len) - 1) : 0;
  const int warp_all = seen_by(warp_row);

  const uint32_t queries_at = smem_address(smem);
  const uint32_t keys_at = queries_at + S::kQueryBytes;
  const uint32_t values_at = keys_at + S::kStages * S::kKeyBytes;
  const uint32_t plain_keys_at = values_at + S::kStages * S::kValueBytes;
  const int64_t kv_index = static_cast<int64_t>(b) * p.num_kv_heads + kv_head;
  GroupFinder finder(p, b, kv_head, kv_len);

  const auto copy_keys = [&](int j) {
    const uint32_t to = keys_at + j % S::kStages * S::kKeyBytes;
    if constexpr (S::kInt8) {
      copy_linear<S::kKeyBytes, S::kThreads>(
          to, operands.keys + (kv_index * operands.key_tiles + j) * S::kKeyBytes);
    }
    if constexpr (!S::kInt8 || S::kSmoothsQ) {
      const uint32_t plain = S::kInt8 ? plain_keys_at + j % S::kStages * S::kPlainKeyBytes : to;
      copy_rows<S::kDim, S::kKeys, S::kThreads>(plain, static_cast<const uint16_t*>(p.k.data),
                                                &starts[j % 2][0].k, 2, p.k.token_stride,
                                                kv_len - j * S::kKeys, p.head_dim);
    }
  };
  const auto copy_values = [&](int j) {
    const uint32_t to = values_at + j % S::kStages * S::kValueBytes;
    if constexpr (S::kE4m3) {
      copy_linear<S::kValueBytes, S::kThreads>(
          to, operands.values + (kv_index * operands.key_tiles + j) * S::kValueBytes);
    } else {
      copy_rows<S::kDim, S::kKeys, S::kThreads>(to, static_cast<const uint16_t*>(p.v.data),
                                                &starts[j % 2][0].v, 2, p.v.token_stride,
                                                kv_len - j * S::kKeys, p.head_dim);
    }
  };

  if constexpr (S::kInt8) {
    const int64_t row = static_cast<int64_t>(pair) * operands.query_tiles * kMmaQueryTile;
    copy_linear<S::kQueryBytes, S::kThreads>(queries_at,
                                             operands.queries + (row + first_row) * S::kDim);
  } else {
    int64_t group_starts[S::kRows / 16];
    const int64_t first = p.q_offset(p.q, b, first_row, head);
#pragma unroll
    for (int i = 0; i < S::kRows / 16; ++i) group_starts[i] = first + i * 16 * p.q.token_stride;
    copy_rows<S::kDim, S::kRows, S::kThreads>(queries_at, static_cast<const uint16_t*>(p.q.data),
                                              group_starts, 1, p.q.token_stride, q_len - first_row,
                                              p.head_dim);
  }
  if constexpr (kGathers) {
    for (int j = 0; j < 2; ++j) {
      finder.ask(j);
      finder.store(starts[j]);
    }
    __syncthreads();
  }
  if (tiles > 0) {
    copy_keys(0);
    if constexpr (S::kStages > 1) copy_values(0);
  }
  commit_copies();

  float scales[S::kRowTiles][2];
#pragma unroll
  for (int t = 0; t < S::kRowTiles; ++t) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      scales[t][r] = scale;
      if constexpr (S::kInt8) {
        scales[t][r] =
            operands
                .query_scales[static_cast<int64_t>(pair) * operands.query_tiles * kMmaQueryTile +
                              warp_row + t * 16 + r * 8 + lane / 4];
      }
    }
  }
  float out[S::kRowTiles][S::kDim / 8][4] = {};
  SoftmaxRows rows[S::kRowTiles];
#pragma unroll
  for (int t = 0; t < S::kRowTiles; ++t) rows[t].clear();
  uint32_t resident[S::kQueriesInRegisters ? S::kQkSteps : 1][S::kRowTiles][4];
  const uint32_t warp_queries_at = queries_at + warp * S::kWarpRows * S::kQkRowBytes;

  for (int j = 0; j < tiles; ++j) {
    wait_copies<0>();
    __syncthreads();
    if constexpr (S::kQueriesInRegisters) {
      if (j == 0) {
#pragma unroll
        for (int k = 0; k < S::kQkSteps; ++k) {
#pragma unroll
          for (int t = 0; t < S::kRowTiles; ++t) {
            load_matrices(resident[k][t],
                          warp_queries_at +
                              chunk_offset<S::kQkRowBytes>(t * 16 + lane % 16, 2 * k + lane / 16));
          }
        }
      }
    }
    if constexpr (S::kStages > 1) {
      if (j + 1 < tiles) {
        copy_keys(j + 1);
        copy_values(j + 1);
      }
    } else {
      copy_values(j);
    }
    commit_copies();
    if constexpr (kGathers) finder.ask(j + 2);
    if constexpr (S::kSmoothsQ) {
      const uint32_t keys = plain_keys_at + j % S::kStages * S::kPlainKeyBytes;
      const uint16_t* means =
          operands.query_means +
          (static_cast<int64_t>(pair) * operands.query_tiles * kMmaQueryTile + first_row) /
              kMmaMeanRows * S::kDim;
      if (p.bf16) {
        multiply_means<S, true>(means, keys, scale, biases);
      } else {
        multiply_means<S, false>(means, keys, scale, biases);
      }
      __syncthreads();
    }

    const int first_key = j * S::kKeys;
    const bool active = first_key < warp_some;
    float s[S::kRowTiles][kBlocks][4];
    uint32_t probabilities[S::kRowTiles][S::kPvSteps][4];
    float shrink[S::kRowTiles][2];
    float key_scale = 1.0f;
    if (active) {
      if constexpr (S::kInt8) {
        key_scale =
            operands.key_scales[(kv_index * operands.key_tiles + j) * kMmaKeyScales + lane % 4];
      }
      multiply_keys<S>(s, resident, warp_queries_at, keys_at + j % S::kStages * S::kKeyBytes);
    }
    if constexpr (S::kStages == 1) {
      __syncthreads();
      if (j + 1 < tiles) copy_keys(j + 1);
      commit_copies();
    }
    if (active) {
#pragma unroll
      for (int t = 0; t < S::kRowTiles; ++t) {
        float tile_scales[2] = {scales[t][0] * key_scale, scales[t][1] * key_scale};
        if constexpr (S::kSmoothsQ) {
          add_biases(s[t], tile_scales, biases[warp * S::kWarpRows / kMmaMeanRows]);
          tile_scales[0] = tile_scales[1] = 1.0f;
        }
        if (first_key + S::kKeys > warp_all) {
          const int row = warp_row + t * 16 + lane / 4;
          const int seen[2] = {seen_by(row), seen_by(row + 8)};
          mask(s[t], first_key, seen);
        }
        softmax<S::kInt8 && !S::kSmoothsQ, S::kE4m3>(s[t], tile_scales, rows[t], shrink[t]);
        pack_probabilities<S>(s[t], probabilities[t]);
      }
    }
    if constexpr (S::kStages == 1) {
      wait_copies<1>();
      __syncthreads();
    }
    if (active) {
      multiply_values<S>(out, probabilities, shrink, values_at + j % S::kStages * S::kValueBytes);
    }
    if constexpr (kGathers) finder.store(starts[j % 2]);
  }

  // Rows to shared memory, so that they leave in 16-byte pieces; each warp its own.
  wait_copies<0>();
  __syncthreads();
  uint8_t* warp_out = smem + warp * S::kWarpRows * 2 * S::kDim;
#pragma unroll
  for (int t = 0; t < S::kRowTiles; ++t) {
    rows[t].add_over_quad();
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int local = t * 16 + r * 8 + lane / 4;
      const int row = warp_row + local;
      const bool sees = seen_by(row) > 0;
      inverse[r] = sees ? 1.0f / rows[t].sum[r] : 0.0f;
      if (p.lse != nullptr && lane % 4 == 0 && row < q_len) {
        float lse = rows[t].top[r] + log2f(rows[t].sum[r]);
        if constexpr (S::kE4m3) lse -= recipe::kLog2E4m3Max;
        if constexpr (S::kInt8) {
          if (p.smooth_k) {
            lse += operands.query_biases[static_cast<int64_t>(pair) * operands.query_tiles *
                                             kMmaQueryTile +
                                         row];
          }
        }
        p.lse[static_cast<int64_t>(pair) * p.max_q_len + row] =
            sees ? lse * recipe::kLn2 : -INFINITY;
      }
    }
#pragma unroll
    for (int n = 0; n < S::kDim / 8; ++n) {
      float2 channel = make_float2(1.0f, 1.0f);
      if constexpr (S::kE4m3) {
        channel = *reinterpret_cast<const float2*>(operands.value_scales + kv_index * S::kDim +
                                                   n * 8 + lane % 4 * 2);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float low = out[t][n][2 * r] * inverse[r] * channel.x;
        const float high = out[t][n][2 * r + 1] * inverse[r] * channel.y;
        uint32_t halves;
        if constexpr (S::kE4m3) {
          halves = p.bf16 ? to_halves<true>(low, high) : to_halves<false>(low, high);
        } else {
          halves = to_halves<S::kBf16>(low, high);
        }
        *reinterpret_cast<uint32_t*>(
            warp_out + chunk_offset<2 * S::kDim>(t * 16 + r * 8 + lane / 4, n) + lane % 4 * 4) =
            halves;
      }
    }
  }
  __syncwarp();
  constexpr int kChunks = S::kDim / 8;
  uint16_t* to = static_cast<uint16_t*>(p.out.data) + p.q_offset(p.out, b, warp_row, head);
#pragma unroll
  for (int i = 0; i < S::kWarpRows * kChunks / 32; ++i) {
    const int row = (i * 32 + lane) / kChunks, chunk = (i * 32 + lane) % kChunks;
    if (warp_row + row < q_len && chunk * 8 < p.head_dim) {
      *reinterpret_cast<uint4*>(to + row * p.out.token_stride + chunk * 8) =
          *reinterpret_cast<const uint4*>(warp_out + chunk_offset<2 * S::kDim>(row, chunk));
    }
  }
}

template <Products kProducts, int kDim>
cudaError_t launch_attend(const Problem& p, const MmaOperands& operands, cudaStream_t stream) {
  using S = Shape<kProducts, kDim>;
  // K and V of a section should stay in half of the L2 cache of the smaller devices.
  constexpr int64_t kSectionBytes = 24 << 20;
  const int64_t head_bytes =
      static_cast<int64_t>(std::max(p.max_kv_len, 1)) * (S::kKeyBytes + S::kValueBytes) / S::kKeys;
  const int64_t group = p.num_heads / p.num_kv_heads;
  const int64_t pairs = static_cast<int64_t>(p.batch) * p.num_heads;
  const int64_t section = std::min(std::max<int64_t>(kSectionBytes / head_bytes, 1) * group, pairs);
  const int tiles = (p.max_q_len + S::kRows - 1) / S::kRows;
  if (pairs * tiles == 0) return cudaSuccess;
  const Schedule schedule{static_cast<int>(pairs), static_cast<int>(section), tiles};
  const cudaError_t error =
      cudaFuncSetAttribute(attend<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSmemBytes);
  if (error != cudaSuccess) return error;
  attend<S><<<static_cast<unsigned>(pairs * tiles), S::kThreads, S::kSmemBytes, stream>>>(
      p, operands, schedule, p.softmax_scale * recipe::kLog2E);
  return cudaGetLastError();
}

template <Products kProducts>
cudaError_t attend_padded(const Problem& p, const MmaOperands& operands, cudaStream_t stream) {
  switch (mma_padded_dim(p.head_dim)) {
    case 64:
      return launch_attend<kProducts, 64>(p, operands, stream);
    case 128:
      return launch_attend<kProducts, 128>(p, operands, stream);
    default:
      return launch_attend<kProducts, 256>(p, operands, stream);
  }
}

}  // namespace sagelm::kernels::mma
