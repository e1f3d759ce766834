// How the blocks of decode (kernels/cache/decode_sm90.cu) get their pages: through a ring of bulk
// copies into shared memory.
#pragma once

#include <cstdint>

#include "kernels/attention/decode_parts.cuh"
#include "kernels/attention/sage_tiles.cuh"
#include "kernels/cache/decode_queries.cuh"
#include "kernels/cache/int4_keys.cuh"
#include "kernels/cache/quantized_kv.h"
#include "kernels/common/sm90.cuh"
#include "kernels/ops/launch.cuh"

namespace sagelm::kernels::decode {

using namespace mma;
using namespace sm90;

inline constexpr int kWarps = 4;
inline constexpr int kThreads = kWarps * 32;
inline constexpr int kWarpKeys = kTileTokens / kWarps;
inline constexpr int kWarpSlices = kWarpKeys / kSlice;  // of a page or tail

struct DecodeCall {
  Problem p;
  Parts parts;
  QuantizedKv cache;
  const int32_t* tails;
  const int32_t* means;
  float scale;      // softmax_scale * log2(e)
  int block_parts;  // of pages, that a block takes one after another
};

template <int kDim_, bool kInt4_>
struct PageRing {
  static constexpr int kDim = kDim_;
  static constexpr bool kInt4 = kInt4_;
  static constexpr int kStages = kDim == 64 ? 4 : kInt4 ? 3 : 2;  // room for three blocks an SM
  static constexpr int kTileBytes = kTileTokens * kDim;
  static constexpr int kKeyBytes = kInt4 ? kTileBytes / 2 : kTileBytes;
  static constexpr int kScales = kInt4 ? kInt4Scales : kTileScales;
  static constexpr int kSliceBytes = kSlice * 2 * kDim;  // of a tail's keys or values

  struct Pages {
    int8_t keys[kStages][kKeyBytes];
    uint8_t values[kStages][kTileBytes];
  };
  union {
    Pages pages;
    uint8_t tail[kWarps][kWarpSlices][2][kSliceBytes];
    MergeMemory<kDim, kWarps> merge;
  };
  alignas(16) float scales[kStages][kScales];
  uint64_t keys_full[kStages], keys_empty[kStages], values_full[kStages], values_empty[kStages];

  __device__ void init_barriers() {
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(smem_address(&keys_full[s]), 1);
      mbarrier_init(smem_address(&values_full[s]), 1);
      mbarrier_init(smem_address(&keys_empty[s]), kThreads);
      mbarrier_init(smem_address(&values_empty[s]), kThreads);
    }
    fence_barrier_init();
  }
};

// What fills the ring with the pages of a block's parts, one part after another: a whole warp calls
// it.
template <class Ring>
class PageSource {
 public:
  // lane_page: lane i has the id of page i.
  __device__ PageSource(const DecodeCall& call, int kv_head, int lane_page, Ring& ring)
      : call_(call), ring_(ring), kv_head_(kv_head), lane_page_(lane_page) {}

  // A part's first pages; no others than its own are brought until the next one begins.
  __device__ void begin_part(int begin, int end) {
    end_ = end;
    if (threadIdx.x / 32 != 0) return;
    for (int i = begin; i < begin + Ring::kStages; ++i) {
      bring_keys(i);
      bring_values(i);
    }
  }
  // Keys and scales of page i, if there is one, once all warps are done with what is in its place.
  __device__ void bring_keys(int i) const {
    bring(i, ring_.keys_full, ring_.keys_empty, call_.cache.keys, ring_.pages.keys, true);
  }
  __device__ void bring_values(int i) const {
    bring(i, ring_.values_full, ring_.values_empty, call_.cache.values, ring_.pages.values, false);
  }

 private:
  template <typename T, int kBytes>
  __device__ void bring(int i, uint64_t (&full)[Ring::kStages], uint64_t (&empty)[Ring::kStages],
                        const T* from, T (&to)[Ring::kStages][kBytes], bool scales) const {
    if (i >= end_) return;
    const int64_t place =
        static_cast<int64_t>(__shfl_sync(0xFFFFFFFFu, lane_page_, i)) * call_.p.num_kv_heads +
        kv_head_;
    if (threadIdx.x % 32 == 0) {
      const int s = i % Ring::kStages;
      const uint32_t barrier = smem_address(&full[s]);
      if (i >= Ring::kStages) {
        mbarrier_wait(smem_address(&empty[s]), (i / Ring::kStages & 1) ^ 1);
      }
      mbarrier_expect_bytes(barrier, kBytes + (scales ? sizeof ring_.scales[s] : 0));
      bulk_copy(smem_address(to[s]), from + place * kBytes, kBytes, barrier);
      if (scales) {
        bulk_copy(smem_address(ring_.scales[s]), call_.cache.scales + place * Ring::kScales,
                  sizeof ring_.scales[s], barrier);
      }
    }
    __syncwarp();
  }

  const DecodeCall& call_;
  Ring& ring_;
  int kv_head_, lane_page_, end_ = 0;
};

// The queries of a block in INT8 (decode_queries.cuh) while its first pages come in. kTiles: of 8
// rows each.
template <int kTiles, bool kBf16, class Ring>
__device__ __forceinline__ void take_queries(const DecodeCall& call, int b, int kv_head, int q_len,
                                             int kv_len, uint32_t (&queries)[Ring::kDim / 32][4],
                                             float (&scales)[2], float (&sums)[2]) {
  const Problem& p = call.p;
  const int group = p.num_heads / p.num_kv_heads;
  const bool appends = p.rotations != nullptr;
  if (appends) {
    prefetch_angles(p, kv_len);
    wait_for_previous_kernel();
  }
  quantize_rows<kTiles, kBf16, Ring::kDim, Ring::kInt4>(
      p, b, kv_head, q_len * group, group, call.scale, appends ? last_angles(p, kv_len) : nullptr,
      queries, scales, sums);
}

// The pages that a block takes: `count` from page `first` of the sequence on, in parts of
// part_pages, of which part `part` is the first.
struct PageRun {
  int first, count, part_pages, part;
};

// For every page i of a part of the run, at stage s of the ring: take_keys(s), the last that reads
// keys and scales; weigh(i); take_values(s).
template <class Ring, typename TakeKeys, typename Weigh, typename TakeValues>
__device__ __forceinline__ void visit_pages(const PageSource<Ring>& source, int begin, int end,
                                            int run_count, Ring& ring, const TakeKeys& take_keys,
                                            const Weigh& weigh, const TakeValues& take_values) {
  const int warp = threadIdx.x / 32;
  for (int i = begin; i < end; ++i) {
    const int s = i % Ring::kStages;
    const uint32_t parity = i / Ring::kStages & 1;
    mbarrier_wait(smem_address(&ring.keys_full[s]), parity);
    take_keys(s);
    if (i + Ring::kStages < run_count) mbarrier_arrive(smem_address(&ring.keys_empty[s]));
    // The other warps have most probably left the page before this one.
    if (warp == 0 && i > begin) source.bring_values(i - 1 + Ring::kStages);
    weigh(i);
    mbarrier_wait(smem_address(&ring.values_full[s]), parity);
    take_values(s);
    if (i + Ring::kStages < run_count) mbarrier_arrive(smem_address(&ring.values_empty[s]));
    if (warp == 0) source.bring_keys(i + Ring::kStages);
  }
}

// 16 keys, from row `row` of a page's tile on, as operands of products with queries: take(k, key)
// gets, in this order, 8 keys' channels 32k .. 32k + 15 and the 16 behind, then the next 8 keys'.
// INT4 keys come 64 channels at a time: both times the 32 from 32k on, then the next 32.
template <class Ring, typename Take>
__device__ __forceinline__ void load_page_keys(uint32_t keys, int row, const Take& take) {
  constexpr int kDim = Ring::kDim;
  const int lane = threadIdx.x % 32;
  const int lane_row = row + lane / 16 * 8 + lane % 8, half = lane / 8 % 2;
#pragma unroll
  for (int k = 0; k < kDim / 32; k += Ring::kInt4 ? 2 : 1) {
    uint32_t key[4];
    if constexpr (Ring::kInt4) {
      load_matrices(key, keys + int4_chunk_offset<kDim>(lane_row, k + half));
    } else {
      load_matrices(key, keys + chunk_offset<kDim>(lane_row, 2 * k + half));
    }
    take(k, key);
  }
}

// The pages of every part of a run to `result` (of value scale 1 at its end), then leave(part,
// result); take_keys, weigh and take_values as above. `value_scale` is what weigh keeps. Parts
// share the memory in which their warps meet with their pages. Without kRuns there is one part.
template <bool kRuns, class Ring, class Result, typename TakeKeys, typename Weigh,
          typename TakeValues, typename Leave>
__device__ __forceinline__ void visit_parts(const PageRun& run, PageSource<Ring>& source,
                                            Ring& ring, Result& result, float& value_scale,
                                            const TakeKeys& take_keys, const Weigh& weigh,
                                            const TakeValues& take_values, const Leave& leave) {
  const auto visit = [&](int begin, int end) {
    result.clear();
    value_scale = 1.0f;
    visit_pages(source, begin, end, run.count, ring, take_keys, weigh, take_values);
    const float factor[2] = {value_scale, value_scale};
    result.multiply(factor);
  };
  if constexpr (!kRuns) {
    visit(0, run.count);
    leave(run.part, result);
  } else {
    for (int begin = 0, part = run.part; begin < run.count; ++part) {
      const int end = min(begin + run.part_pages, run.count);
      if (begin > 0) {
        fence_proxy_async();
        __syncthreads();
        source.begin_part(begin, end);
      }
      visit(begin, end);
      leave(part, result);
      begin = end;
    }
  }
}

}  // namespace sagelm::kernels::decode
