// The pages of a decode part for up to 8 query rows. Keys, then channels, are the rows of the
// products and queries their columns, of which there are no more than that: half the products and
// half the softmax that 16 rows of queries take, most of which would be empty.
#pragma once

#include <cstdint>

#include "kernels/cache/decode_queries.cuh"
#include "kernels/cache/int4_keys.cuh"
#include "kernels/cache/page_ring.cuh"
#include "kernels/common/ptx.cuh"
#include "kernels/ops/launch.cuh"

namespace sagelm::kernels::decode {

inline constexpr int kFewRows = 8;

// A thread's share of what a warp has computed so far, unnormalised: of queries 2c and 2c + 1, the
// channels g and g + 8 of every 16. state.sum is this thread's share, of its keys.
template <int kDim>
struct FewRows {
  float out[kDim / 16][4];  // channel g, then g + 8, of both queries
  SoftmaxRows state;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < kDim / 16; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[m][e] = 0.0f;
    }
    state.clear();
  }
  __device__ __forceinline__ void multiply(const float (&factor)[2]) {
#pragma unroll
    for (int m = 0; m < kDim / 16; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[m][e] *= factor[e & 1];
    }
  }
};

// x and those of the lanes that have the same queries.
template <typename Merge>
__device__ __forceinline__ float over_keys(float x, const Merge& merge) {
#pragma unroll
  for (int step = 4; step < 32; step *= 2) x = merge(x, __shfl_xor_sync(0xFFFFFFFFu, x, step));
  return x;
}

// As softmax (mma_softmax.cuh), of two tiles of 16 keys by 8 queries.
__device__ __forceinline__ void softmax_of_few(float (&s)[2][4], const float (&scale)[2],
                                               SoftmaxRows& rows, float (&shrink)[2]) {
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    const float largest = fmaxf(fmaxf(s[0][q], s[0][q + 2]), fmaxf(s[1][q], s[1][q + 2]));
    const float top = fmaxf(rows.top[q], over_keys(largest * scale[q], fmaxf));
    shrink[q] = exp2_fast(rows.top[q] - top);
    rows.top[q] = top;
    float sum = 0.0f;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
#pragma unroll
      for (int e = q; e < 4; e += 2) {
        s[t][e] = exp2_fast(fmaf(s[t][e], scale[q], -top));
        sum += s[t][e];
      }
    }
    rows.sum[q] = fmaf(rows.sum[q], shrink[q], sum);
  }
}

// The products of 16 keys, from row `row` of a page's tile on, with the queries; INT4 keys count 16
// times.
template <class Ring>
__device__ __forceinline__ void multiply_few(const uint32_t (&queries)[Ring::kDim / 32][4],
                                             uint32_t keys, int row, int32_t (&integers)[4]) {
  load_page_keys<Ring>(keys, row, [&](int k, const uint32_t(&key)[4]) {
    if constexpr (Ring::kInt4) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const uint32_t tile[4] = {low_nibbles(key[m]), low_nibbles(key[m + 2]),
                                  high_nibbles(key[m]), high_nibbles(key[m + 2])};
        multiply_int8(integers, tile, queries[k + m][0], queries[k + m][2]);
      }
    } else {
      const uint32_t tile[4] = {key[0], key[2], key[1], key[3]};
      multiply_int8(integers, tile, queries[k][0], queries[k][2]);
    }
  });
}

// As attend_pages (decode_sm90.cu). Row r of 16 in a key tile is key 4 (r / 2 % 4) + r % 2 +
// r / 8 * 2 of them: transposed, P has in thread 4g + c the weights of keys 4c .. 4c + 3 for query
// g, the neighbours that the thread gets of a channel's row of values.
template <bool kBf16, bool kRuns, class Ring, typename Leave>
__device__ __forceinline__ void attend_pages_few(const DecodeCall& call, int b, int kv_head,
                                                 int q_len, int kv_len, const PageRun& run,
                                                 int lane_page, Ring& ring, const Leave& leave) {
  constexpr int kDim = Ring::kDim;
  static_assert(kWarpSlices == 2);
  const Problem& p = call.p;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int group = p.num_heads / p.num_kv_heads;
  PageSource<Ring> source(call, kv_head, lane_page, ring);
  source.begin_part(0, kRuns ? min(run.part_pages, run.count) : run.count);
  uint32_t queries[kDim / 32][4];
  float row_scales[2], row_sums[2];
  take_queries<1, kBf16, Ring>(call, b, kv_head, q_len, kv_len, queries, row_scales, row_sums);
  float query_scales[2], query_sums[2];
  int seen[2];
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    const int row = 2 * c + q;
    query_scales[q] = __shfl_sync(0xFFFFFFFFu, row_scales[0], 4 * row);
    if constexpr (Ring::kInt4) query_sums[q] = __shfl_sync(0xFFFFFFFFu, row_sums[0], 4 * row);
    seen[q] = kv_len - q_len + row / group + 1;
  }
  const int seen_by_all = kv_len - q_len + 1;
  const int first_of_thread = g / 2 * 4 + g % 2;  // of its keys of a slice; the other is 2 on
  FewRows<kDim> result;
  float value_scale;  // of what is in result
  // Of the page at hand.
  float logits[2][4];
  float key_scale = 1.0f, next_value_scale, inverse_value_scale;
  uint32_t probabilities[2][2];
  const auto take_keys = [&](int s) {
    const uint32_t keys = smem_address(ring.pages.keys[s]);
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      int32_t integers[4] = {kIntegerSeed, kIntegerSeed, kIntegerSeed, kIntegerSeed};
      multiply_few<Ring>(queries, keys, warp * kWarpKeys + t * kSlice, integers);
#pragma unroll
      for (int e = 0; e < 4; ++e) logits[t][e] = __int_as_float(integers[e]) - kIntegerZero;
    }
    if constexpr (Ring::kInt4) {
      const float* words = ring.scales[s] + kInt4Words + warp * kWarpKeys + first_of_thread;
#pragma unroll
      for (int t = 0; t < 2; ++t) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const uint32_t own = __float_as_uint(words[t * kSlice + e / 2 * 2]);
          logits[t][e] = fmaf(logits[t][e], int4_step(own) * (1.0f / 16.0f),
                              int4_middle(own) * query_sums[e & 1]);
        }
      }
    } else {
      key_scale = ring.scales[s][g / 2];
    }
    next_value_scale = ring.scales[s][kValueScale];
    inverse_value_scale = ring.scales[s][kValueScaleInverse];
  };
  const auto weigh = [&](int i) {
    const int first_key = (run.first + i) * kTileTokens + warp * kWarpKeys;
    if (first_key + kWarpKeys > seen_by_all) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int key = first_key + t * kSlice + first_of_thread + e / 2 * 2;
          if (key >= seen[e & 1]) logits[t][e] = -INFINITY;
        }
      }
    }
    const float scales[2] = {query_scales[0] * key_scale, query_scales[1] * key_scale};
    float shrink[2];
    softmax_of_few(logits, scales, result.state, shrink);
    const float change = value_scale * inverse_value_scale;
    const float factor[2] = {shrink[0] * change, shrink[1] * change};
    result.multiply(factor);
    value_scale = next_value_scale;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        probabilities[t][e] =
            transpose_matrix(to_halves<false>(logits[t][2 * e], logits[t][2 * e + 1]));
      }
    }
  };
  const auto take_values = [&](int s) {
    const uint32_t values = smem_address(ring.pages.values[s]);
#pragma unroll
    for (int m = 0; m < kDim / 16; ++m) {
      uint32_t value[4];  // of 8 channels: 16 keys, the next 16; then of the next 8 channels
      const int channel = m * 16 + lane / 16 * 8 + lane % 8;
      load_matrices(value, values + chunk_offset<kTileTokens>(channel, 2 * warp + lane / 8 % 2));
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const uint32_t tile[4] = {halves_from_e4m3(value[t]), halves_from_e4m3(value[t + 2]),
                                  halves_from_e4m3(value[t] >> 16),
                                  halves_from_e4m3(value[t + 2] >> 16)};
        multiply_half<false>(result.out[m], tile, probabilities[t][0], probabilities[t][1]);
      }
    }
  };
  visit_parts<kRuns>(run, source, ring, result, value_scale, take_keys, weigh, take_values, leave);
}

// As leave_rows of decode_parts.cuh.
template <int kDim>
__device__ __forceinline__ void leave_rows(FewRows<kDim>& result, int warp, int rows,
                                           MergeMemory<kDim, kWarps>& memory) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    const float sum = over_keys(result.state.sum[q], [](float a, float b) { return a + b; });
    const int row = lane % 4 * 2 + q;
    if (row >= rows) continue;
    if (lane < 4) memory.stats[warp][row] = make_float2(result.state.top[q], sum);
#pragma unroll
    for (int m = 0; m < kDim / 16; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        memory.outs[warp][row][m * 16 + half * 8 + lane / 4] = result.out[m][2 * half + q];
      }
    }
  }
}

}  // namespace sagelm::kernels::decode
