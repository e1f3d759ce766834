// What decode kernels share, whatever their cache holds: the few query rows of a KV head are one
// tile of 16 rows, row r being query r / group of head kv_head * group + r % group. A sequence is
// cut into parts, each computed by one block whose warps stream slices of 16 keys; the parts are
// then merged in their order.
//
// Where Problem::rotations is given, every sequence has one query (and there are no cu_q_lens), and
// the kernel does all between the projections before and behind attention, so that no other kernels
// stand in the way. q points to rows [num_heads + 2 * num_kv_heads][head_dim] of unrotated queries,
// keys and values of heads of 64 or 128 channels. Blocks rotate the queries as they load them; the
// block with a sequence's last token rotates its key and puts it and the value into the cache; the
// last block of a KV head that finishes merges the parts. The rest of the cache is settled: no
// kernel that may still run writes to it, and it is read before the wait for those kernels.
#pragma once

#include <cstdint>

#include "kernels/attention/mma_softmax.cuh"
#include "kernels/attention/problem.cuh"
#include "kernels/attention/recipe.h"
#include "kernels/common/launch.h"
#include "kernels/common/ptx.cuh"
#include "kernels/ops/elements.cuh"
#include "kernels/ops/rotate.cuh"

namespace sagelm::kernels::mma {

inline constexpr int kDecodeRows = 16;
inline constexpr int kSlice = 16;  // keys

// How a sequence is cut: into parts of so many units of keys (the last may have fewer), and a bound
// of the number of parts, which no shorter sequence exceeds. The parts of all KV heads, and the
// `others` that each of them has besides, are no more than the blocks that an H200 runs at once,
// or, as a part has at most most_units, some multiple of them. It depends on nothing else: a
// sequence's result is the same in any batch and on any device.
struct Cut {
  int part_units, most_parts;
};

constexpr int kBlocksAtOnce = 3 * 132;
__host__ __device__ inline Cut cut_sequence(int units, int num_kv_heads, int others,
                                            int most_units) {
  for (int rounds = 1;; ++rounds) {
    const int room = kBlocksAtOnce * rounds / num_kv_heads - others;
    const int parts = room < 1 ? 1 : room;
    const int part = (units + parts - 1) / parts;
    if (part <= most_units) return {part < 1 ? 1 : part, parts < units ? parts : units};
  }
}

// Unnormalised results of the parts: of row (b, head, query) in [batch][heads][max_q_len] the parts
// lie one after another.
struct Parts {
  float* out;     // [rows][parts][head_dim]
  float2* stats;  // [rows][parts]: maximum of the base-2 logits, sum of 2^(logit - maximum)
  int parts;      // of the longest sequence; nothing to merge if there is one
};

inline Parts place_parts(const Problem& p, int count, void* workspace, size_t* bytes) {
  Parts parts{};
  parts.parts = count;
  const size_t rows = static_cast<size_t>(p.batch) * p.num_heads * p.max_q_len;
  WorkspaceLayout layout(workspace);
  if (count > 1) {
    layout.place(parts.out, rows * count * p.head_dim);
    layout.place(parts.stats, rows * count);
  }
  *bytes = layout.bytes();
  return parts;
}

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

// A warp copies 16 rows of FP16 K or V, token_stride elements apart; zeros from row `valid` on and
// from head_dim on.
template <int kDim>
__device__ __forceinline__ void copy_slice(uint32_t to, const void* from, int64_t token_stride,
                                           int valid, int head_dim) {
  constexpr int kChunks = kDim / 8;
  constexpr int kRowsAtOnce = 32 / kChunks;
  const int lane = threadIdx.x % 32;
  const int chunk = lane % kChunks, first = lane / kChunks;
  const uint16_t* lane_from = static_cast<const uint16_t*>(from) + first * token_stride + chunk * 8;
  const bool in_dim = chunk * 8 < head_dim;
#pragma unroll
  for (int i = 0; i < kSlice; i += kRowsAtOnce) {
    copy_async(to + chunk_offset<2 * kDim>(i + first, chunk), lane_from + i * token_stride,
               in_dim && i + first < valid);
  }
}

// Calls visit(r, query, head) for the rows g + 8r of this thread that exist.
template <typename Visit>
__device__ __forceinline__ void visit_rows(int rows, int group, int kv_head, const Visit& visit) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = threadIdx.x % 32 / 4 + 8 * r;
    if (row < rows) visit(r, row / group, kv_head * group + row % group);
  }
}

// The tile's queries as A fragments; zeros where there is no row or no channel.
template <int kDim>
__device__ __forceinline__ void load_queries(const Problem& p, int b, int kv_head, int rows,
                                             int group, uint32_t (&queries)[kDim / 16][4]) {
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
    for (int e = 0; e < 4; ++e) queries[k][e] = 0;
  }
  visit_rows(rows, group, kv_head, [&](int r, int query, int head) {
    const uint16_t* from = static_cast<const uint16_t*>(p.q.data) + p.q_offset(p.q, b, query, head);
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int channel = k * 16 + half * 8 + threadIdx.x % 4 * 2;
        if (channel < p.head_dim) {
          queries[k][half * 2 + r] = *reinterpret_cast<const uint32_t*>(from + channel);
        }
      }
    }
  });
}

// Angles of a sequence's last token: cosines, then sines.
__device__ __forceinline__ const float* last_angles(const Problem& p, int kv_len) {
  return p.rotations + static_cast<int64_t>(kv_len - 1) * p.head_dim;
}

// Before the wait: whatever has not been read since the step before this is far away by now.
__device__ __forceinline__ void prefetch_angles(const Problem& p, int kv_len) {
  const int i = static_cast<int>(threadIdx.x) * 32;  // a line
  if (i < p.head_dim) prefetch(last_angles(p, kv_len) + i);
}

// Rotates what load_queries loaded, rounding as kernels/ops/rope_append.h does.
template <bool kBf16, int kDim>
__device__ __forceinline__ void rotate_queries(const float* angles,
                                               uint32_t (&queries)[kDim / 16][4]) {
  constexpr int kPairs = kDim / 32;
#pragma unroll
  for (int k = 0; k < kPairs; ++k) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float cosine[2], sine[2];
      const int channel = k * 16 + half * 8 + threadIdx.x % 4 * 2;
      load(angles + channel, cosine);
      load(angles + kDim / 2 + channel, sine);
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        const float2 first = from_halves(queries[k][e], kBf16);
        const float2 second = from_halves(queries[k + kPairs][e], kBf16);
        float a[2] = {first.x, first.y}, b[2] = {second.x, second.y};
        rotate_pairs(a, b, cosine, sine);
        queries[k][e] = to_halves<kBf16>(a[0], a[1]);
        queries[k + kPairs][e] = to_halves<kBf16>(b[0], b[1]);
      }
    }
  }
}

// The key and the value of a sequence's last token in the lanes of a warp: 16-byte chunks of the
// key, then of the value.
template <bool kBf16, int kDim>
struct LastToken {
  static constexpr int kChunks = kDim / 8;
  uint4 chunk;
  float cosine[8], sine[8];

  __device__ static int place() { return static_cast<int>(threadIdx.x) % 32 % kChunks; }
  __device__ static bool is_value() { return threadIdx.x % 32 >= kChunks; }
  __device__ static bool is_there() { return threadIdx.x % 32 < 2 * kChunks; }

  // From the step's row.
  __device__ void fetch(const Problem& p, int b, int kv_head, int kv_len) {
    const int head = p.num_heads + (is_value() ? p.num_kv_heads : 0) + kv_head;
    chunk = make_uint4(0, 0, 0, 0);
    if (is_there()) {
      chunk = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p.q.data) +
                                              p.q_offset(p.q, b, 0, head) + place() * 8);
    }
    const float* angles = last_angles(p, kv_len) + place() % (kChunks / 2) * 8;
    load(angles, cosine);
    load(angles + kDim / 2, sine);
  }
  __device__ void rotate_key() {
    uint32_t* words = &chunk.x;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, words[i], kChunks / 2);
      if (is_value()) continue;
      const float2 x = from_halves(words[i], kBf16), partner = from_halves(other, kBf16);
      const int e = 2 * i;
      words[i] = place() < kChunks / 2
                     ? to_halves<kBf16>(rotate_first(x.x, partner.x, cosine[e], sine[e]),
                                        rotate_first(x.y, partner.y, cosine[e + 1], sine[e + 1]))
                     : to_halves<kBf16>(rotate_second(x.x, partner.x, cosine[e], sine[e]),
                                        rotate_second(x.y, partner.y, cosine[e + 1], sine[e + 1]));
    }
  }
  // Row `row` of slices of keys and values in shared memory, which have come, and the cache's rows.
  __device__ void leave(uint32_t keys, uint32_t values, int row, uint16_t* key,
                        uint16_t* value) const {
    if (is_there()) {
      const uint32_t to = (is_value() ? values : keys) + chunk_offset<2 * kDim>(row, place());
      store_chunk(to, chunk);
      *reinterpret_cast<uint4*>((is_value() ? value : key) + place() * 8) = chunk;
    }
    __syncwarp();
  }
};

// Which keys the rows g + 8r see: those below seen[r]. Returns below which all rows see.
__device__ __forceinline__ int visible_keys(const Problem& p, int q_len, int kv_len, int group,
                                            int (&seen)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query = (threadIdx.x % 32 / 4 + 8 * r) / group;
    seen[r] = p.causal ? kv_len - q_len + query + 1 : kv_len;
  }
  return p.causal ? kv_len - q_len + 1 : kv_len;
}

// A thread's share of what a warp has computed so far, unnormalised.
template <int kDim>
struct DecodeRows {
  float out[kDim / 8][4];
  SoftmaxRows state;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[n][e] = 0.0f;
    }
    state.clear();
  }
  __device__ __forceinline__ void multiply(const float (&factor)[2]) {
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[n][e] *= factor[e >> 1];
    }
  }
};

// Adds the 16 keys from first_key on, rows of 2 * kDim bytes in shared memory at keys and values.
// bias[r] is taken off the products of row g + 8r; scale makes base-2 logits of what is left.
template <bool kBf16, int kDim>
__device__ __forceinline__ void attend_slice(const uint32_t (&queries)[kDim / 16][4], uint32_t keys,
                                             uint32_t values, int first_key, int seen_by_all,
                                             const int (&seen)[2], const float (&bias)[2],
                                             float scale, DecodeRows<kDim>& rows) {
  constexpr int kRowBytes = 2 * kDim;
  const int lane = threadIdx.x % 32;
  float s[2][4] = {{-bias[0], -bias[0], -bias[1], -bias[1]},
                   {-bias[0], -bias[0], -bias[1], -bias[1]}};
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t key[4];
    load_matrices(key,
                  keys + chunk_offset<kRowBytes>(lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
    multiply_half<kBf16>(s[0], queries[k], key[0], key[1]);
    multiply_half<kBf16>(s[1], queries[k], key[2], key[3]);
  }
  if (first_key + kSlice > seen_by_all) mask(s, first_key, seen);
  const float scales[2] = {scale, scale};
  float shrink[2];
  softmax<false, false>(s, scales, rows.state, shrink);
  const uint32_t probabilities[4] = {
      to_halves<kBf16>(s[0][0], s[0][1]), to_halves<kBf16>(s[0][2], s[0][3]),
      to_halves<kBf16>(s[1][0], s[1][1]), to_halves<kBf16>(s[1][2], s[1][3])};
  if (!__all_sync(0xFFFFFFFFu, shrink[0] == 1.0f && shrink[1] == 1.0f)) rows.multiply(shrink);
#pragma unroll
  for (int n = 0; n < kDim / 8; n += 2) {
    uint32_t value[4];
    load_matrices_transposed(value, values + chunk_offset<kRowBytes>(lane % 16, n + lane / 16));
    multiply_half<kBf16>(rows.out[n], probabilities, value[0], value[1]);
    multiply_half<kBf16>(rows.out[n + 1], probabilities, value[2], value[3]);
  }
}

// Where the warps of a block meet in shared memory; padding keeps rows in different banks.
template <int kDim, int kWarps>
struct MergeMemory {
  float outs[kWarps][kDecodeRows][kDim + 8];
  float2 stats[kWarps][kDecodeRows];
};

// Of warp `warp` of those that hold results.
template <int kDim, int kWarps>
__device__ __forceinline__ void leave_rows(DecodeRows<kDim>& result, int warp, int rows,
                                           MergeMemory<kDim, kWarps>& memory) {
  const int lane = threadIdx.x % 32;
  result.state.add_over_quad();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = lane / 4 + 8 * r;
    if (row >= rows) continue;
    if (lane % 4 == 0) {
      memory.stats[warp][row] = make_float2(result.state.top[r], result.state.sum[r]);
    }
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      *reinterpret_cast<float2*>(&memory.outs[warp][row][n * 8 + lane % 4 * 2]) =
          make_float2(result.out[n][2 * r], result.out[n][2 * r + 1]);
    }
  }
}

// All threads of the block, after a barrier behind leave_rows: stores part `part` of the rows, or
// the output itself where there is one part.
template <int kDim, int kWarps>
__device__ __forceinline__ void store_part(const Problem& p, const Parts& parts, int part, int b,
                                           int kv_head, int rows, int group,
                                           const MergeMemory<kDim, kWarps>& memory) {
  for (int i = threadIdx.x; i < rows * kDim; i += blockDim.x) {
    const int row = i / kDim, channel = i % kDim;
    if (channel >= p.head_dim) continue;
    RowResult result{kNoMaximum, 0.0f};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) result.top = fmaxf(result.top, memory.stats[w][row].x);
    float sum_out = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 stat = memory.stats[w][row];
      const float weight = exp2_fast(stat.x - result.top);
      result.sum = fmaf(stat.y, weight, result.sum);
      sum_out = fmaf(memory.outs[w][row][channel], weight, sum_out);
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

// Adds parts first .. end - 1 of a row up in their order and stores the row: one block of whole
// warps, a thread a channel. bias, the same in all threads: what to add to the base-2 logits for
// the log-sum-exp.
__device__ inline void merge_row(const Problem& p, const Parts& parts, int first, int end, int b,
                                 int query, int head, float bias) {
  const int64_t index = row_index(p, b, head, query);
  const float2* stats = parts.stats + index * parts.parts;
  const int lane = threadIdx.x % 32, channel = threadIdx.x;
  RowResult result{kNoMaximum, 0.0f};
  for (int i = first + lane; i < end; i += 32) result.top = fmaxf(result.top, stats[i].x);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    result.top = fmaxf(result.top, __shfl_xor_sync(0xFFFFFFFFu, result.top, step));
  }
  // A thread beyond the channels computes the last one again.
  const float* out = parts.out + index * parts.parts * p.head_dim + min(channel, p.head_dim - 1);
  float sum_out = 0.0f;
  for (int begin = first; begin < end; begin += 32) {
    const int count = min(32, end - begin);
    const float2 stat = lane < count ? stats[begin + lane] : make_float2(kNoMaximum, 0.0f);
    const float lane_weight = exp2_fast(stat.x - result.top);
#pragma unroll 16
    for (int i = 0; i < count; ++i) {
      const float weight = __shfl_sync(0xFFFFFFFFu, lane_weight, i);
      result.sum = fmaf(__shfl_sync(0xFFFFFFFFu, stat.y, i), weight, result.sum);
      sum_out = fmaf(out[static_cast<int64_t>(begin + i) * p.head_dim], weight, sum_out);
    }
  }
  if (channel >= p.head_dim) return;
  store_half(p, p.q_offset(p.out, b, query, head) + channel, sum_out * result.inverse());
  if (p.lse != nullptr && channel == 0) p.lse[index] = result.lse() + bias * recipe::kLn2;
}

// Whether this block is the last of `count` that store parts of a sequence and KV head; it then
// sees what the others stored. All threads call it.
__device__ inline bool is_last_of(uint32_t* arrivals, int count) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    last = add_released_acquired(arrivals, 1) == static_cast<uint32_t>(count - 1);
    if (last) *arrivals = 0;
  }
  __syncthreads();
  return last;
}

// The same sums as merge_row by one warp, for heads of kDim channels and without the log-sum-exp.
template <int kDim>
__device__ inline void merge_row_in_warp(const Problem& p, const Parts& parts, int first, int end,
                                         int b, int query, int head) {
  constexpr int kChannels = kDim / 32;
  const int64_t index = row_index(p, b, head, query);
  const float2* stats = parts.stats + index * parts.parts;
  const int lane = threadIdx.x % 32, channel = lane * kChannels;
  RowResult result{kNoMaximum, 0.0f};
  for (int i = first + lane; i < end; i += 32) result.top = fmaxf(result.top, stats[i].x);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    result.top = fmaxf(result.top, __shfl_xor_sync(0xFFFFFFFFu, result.top, step));
  }
  const float* out = parts.out + index * parts.parts * kDim + channel;
  float sum_out[kChannels] = {};
  constexpr int kAtOnce = 8;  // their loads overlap
  for (int begin = first; begin < end; begin += kAtOnce) {
    float x[kAtOnce][kChannels] = {};
    float2 stat[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      stat[i] = make_float2(kNoMaximum, 0.0f);
      if (begin + i >= end) continue;
      stat[i] = stats[begin + i];
      load(out + static_cast<int64_t>(begin + i) * kDim, x[i]);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float weight = exp2_fast(stat[i].x - result.top);
      result.sum = fmaf(stat[i].y, weight, result.sum);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) sum_out[c] = fmaf(x[i][c], weight, sum_out[c]);
    }
  }
#pragma unroll
  for (int c = 0; c < kChannels; c += 2) {
    *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.out.data) +
                                 p.q_offset(p.out, b, query, head) + channel + c) =
        p.bf16 ? to_halves<true>(sum_out[c] * result.inverse(), sum_out[c + 1] * result.inverse())
               : to_halves<false>(sum_out[c] * result.inverse(), sum_out[c + 1] * result.inverse());
  }
}

// At the end of one of the `blocks` that stored parts first .. end - 1: the last one merges the
// rows of its KV head, a warp a row.
template <int kDim>
__device__ inline void merge_if_last(const Problem& p, const Parts& parts, int first, int end,
                                     int blocks, int b, int kv_head, int rows, int group) {
  if (!is_last_of(p.arrivals + b * p.num_kv_heads + kv_head, blocks)) return;
  for (int row = threadIdx.x / 32; row < rows; row += blockDim.x / 32) {
    merge_row_in_warp<kDim>(p, parts, first, end, b, row / group, kv_head * group + row % group);
  }
}

}  // namespace sagelm::kernels::mma
