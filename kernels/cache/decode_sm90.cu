// Decode from quantized pages. A block takes a few pages of one KV head of one sequence, or its
// tail; the parts are cut and merged as kernels/attention/decode_parts.cuh does. Pages come through
// a ring of bulk copies, that one of the warps keeps filled; each warp computes 32 keys of every
// page; up to 8 query rows are the columns of its products (decode_few_rows.cuh), up to 16 their
// rows. What bounds this is memory: three blocks of an SM have up to 192 KiB on their way (216 with
// INT4 keys), where about 40 are needed to hide the latency at full speed, but one of the three has
// often just begun or is about to end.
#include <algorithm>
#include <cstdint>

#include "kernels/attention/decode_parts.cuh"
#include "kernels/cache/decode_few_rows.cuh"
#include "kernels/cache/decode_queries.cuh"
#include "kernels/cache/int4_keys.cuh"
#include "kernels/cache/page_ring.cuh"
#include "kernels/cache/quantized_kv.h"
#include "kernels/common/sm90.cuh"
#include "kernels/ops/elements.cuh"
#include "kernels/ops/launch.cuh"

namespace sagelm::kernels {
namespace {

using namespace decode;

constexpr int kBlocks = 3;  // of an SM at once

// Of a sequence with so many full pages.
__host__ __device__ inline Cut cut(const Problem& p, int pages) {
  constexpr int kMostPages = 32;  // of a part: a lane of a warp each
  return cut_sequence(pages, p.num_kv_heads, 1, kMostPages);
}
__device__ inline int page_parts(const Problem& p, int pages) {
  const int part_pages = cut(p, pages).part_units;
  return (pages + part_pages - 1) / part_pages;
}

// The products of the queries with 16 keys from row `row` of a page's tile on; INT4 keys count 16
// times.
template <class Ring>
__device__ __forceinline__ void multiply_page_keys(const uint32_t (&queries)[Ring::kDim / 32][4],
                                                   uint32_t keys, int row,
                                                   int32_t (&integers)[2][4]) {
  load_page_keys<Ring>(keys, row, [&](int k, const uint32_t(&key)[4]) {
    if constexpr (Ring::kInt4) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        multiply_int8(integers[m / 2], queries[k + m % 2], low_nibbles(key[m]),
                      high_nibbles(key[m]));
      }
    } else {
      multiply_int8(integers[0], queries[k], key[0], key[1]);
      multiply_int8(integers[1], queries[k], key[2], key[3]);
    }
  });
}

// A warp's 32 keys of every page of the part. Rows of a key tile are permuted (sage_tiles.cuh) such
// that this thread's logits of every 16 keys are those of keys 4c .. 4c + 3, all of scale group c;
// those are the four neighbours that it gets of every channel's row of the transposed values, so P
// goes into the product as it is.
template <bool kBf16, bool kRuns, class Ring, typename Leave>
__device__ __forceinline__ void attend_pages(const DecodeCall& call, int b, int kv_head, int q_len,
                                             int kv_len, const PageRun& run, int lane_page,
                                             Ring& ring, const Leave& leave) {
  constexpr int kDim = Ring::kDim;
  const Problem& p = call.p;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = p.num_heads / p.num_kv_heads;
  PageSource<Ring> source(call, kv_head, lane_page, ring);
  source.begin_part(0, kRuns ? min(run.part_pages, run.count) : run.count);
  uint32_t queries[kDim / 32][4];
  float query_scales[2], query_sums[2];
  take_queries<2, kBf16, Ring>(call, b, kv_head, q_len, kv_len, queries, query_scales, query_sums);
  int seen[2];
  const int seen_by_all = visible_keys(p, q_len, kv_len, group, seen);
  DecodeRows<kDim> result;
  float value_scale;  // of what is in result
  // Of the page at hand.
  float logits[2 * kWarpSlices][4];
  float key_scale = 1.0f, next_value_scale, inverse_value_scale;
  uint32_t probabilities[kWarpSlices][4];
  const auto take_keys = [&](int s) {
    const uint32_t keys = smem_address(ring.pages.keys[s]);
#pragma unroll
    for (int h = 0; h < kWarpSlices; ++h) {
      int32_t integers[2][4];
#pragma unroll
      for (int e = 0; e < 4; ++e) integers[0][e] = integers[1][e] = kIntegerSeed;
      multiply_page_keys<Ring>(queries, keys, warp * kWarpKeys + h * kSlice, integers);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        logits[2 * h][e] = __int_as_float(integers[0][e]) - kIntegerZero;
        logits[2 * h + 1][e] = __int_as_float(integers[1][e]) - kIntegerZero;
      }
    }
    if constexpr (Ring::kInt4) {
      const float* words = ring.scales[s] + kInt4Words + warp * kWarpKeys + lane % 4 * 4;
#pragma unroll
      for (int h = 0; h < kWarpSlices; ++h) {
        const uint4 four = *reinterpret_cast<const uint4*>(words + h * kSlice);
        const uint32_t word[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const uint32_t own = word[2 * n + e % 2];
            logits[2 * h + n][e] = fmaf(logits[2 * h + n][e], int4_step(own) * (1.0f / 16.0f),
                                        int4_middle(own) * query_sums[e / 2]);
          }
        }
      }
    } else {
      key_scale = ring.scales[s][lane % 4];
    }
    next_value_scale = ring.scales[s][kValueScale];
    inverse_value_scale = ring.scales[s][kValueScaleInverse];
  };
  const auto weigh = [&](int i) {
    const int first_key = (run.first + i) * kTileTokens + warp * kWarpKeys;
    if (first_key + kWarpKeys > seen_by_all) {
#pragma unroll
      for (int n = 0; n < 2 * kWarpSlices; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int key = first_key + n / 2 * kSlice + lane % 4 * 4 + n % 2 * 2 + (e & 1);
          if (key >= seen[e >> 1]) logits[n][e] = -INFINITY;
        }
      }
    }
    const float scales[2] = {query_scales[0] * key_scale, query_scales[1] * key_scale};
    float shrink[2];
    softmax<false, false>(logits, scales, result.state, shrink);
    const float change = value_scale * inverse_value_scale;
    const float factor[2] = {shrink[0] * change, shrink[1] * change};
    result.multiply(factor);
    value_scale = next_value_scale;
#pragma unroll
    for (int h = 0; h < kWarpSlices; ++h) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float(&pair)[4] = logits[2 * h + e / 2];
        probabilities[h][e] = to_halves<false>(pair[e % 2 * 2], pair[e % 2 * 2 + 1]);
      }
    }
  };
  const auto take_values = [&](int s) {
    const uint32_t values = smem_address(ring.pages.values[s]);
    static_assert(kWarpSlices == 2);
#pragma unroll
    for (int n = 0; n < kDim / 8; n += 2) {
      // Of 8 channels each: 16 keys, the next 16; then of the next 8 channels.
      uint32_t value[4];
      const int channel = n * 8 + lane / 16 * 8 + lane % 8;
      load_matrices(value, values + chunk_offset<kTileTokens>(channel, 2 * warp + lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        multiply_half<false>(result.out[n + m / 2], probabilities[m % 2],
                             halves_from_e4m3(value[m]), halves_from_e4m3(value[m] >> 16));
      }
    }
  };
  visit_parts<kRuns>(run, source, ring, result, value_scale, take_keys, weigh, take_values, leave);
}

__device__ inline const float* mean_of(const DecodeCall& call, int b, int kv_head) {
  return call.cache.means +
         (static_cast<int64_t>(call.means[b]) * call.p.num_kv_heads + kv_head) * call.p.head_dim;
}

// A warp's slices of the tail: its unsmoothed keys, in their own type. A sequence with pages has a
// mean, whose product with the query is taken off, as the pages' logits lack it.
template <bool kBf16, class Ring>
__device__ __forceinline__ void attend_tail(const DecodeCall& call, int b, int kv_head, int q_len,
                                            int kv_len, Ring& ring,
                                            DecodeRows<Ring::kDim>& result) {
  constexpr int kDim = Ring::kDim;
  const Problem& p = call.p;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = p.num_heads / p.num_kv_heads;
  const int begin = kv_len / kTileTokens * kTileTokens;
  const int64_t head_elements = static_cast<int64_t>(kTileTokens) * p.head_dim;
  const uint16_t* head_keys =
      static_cast<const uint16_t*>(call.cache.tails) +
      (call.tails[b] * 2 * int64_t{p.num_kv_heads} + kv_head) * head_elements;
  const uint16_t* head_values = head_keys + p.num_kv_heads * head_elements;
  const auto first_token = [&](int i) { return (i * kWarps + warp) * kSlice; };
  const bool appends = p.rotations != nullptr;
#pragma unroll
  for (int i = 0; i < kWarpSlices; ++i) {
    const int valid = kv_len - (appends ? 1 : 0) - begin - first_token(i);
    if (begin + first_token(i) < kv_len) {
      const int64_t from = static_cast<int64_t>(first_token(i)) * p.head_dim;
      copy_slice<kDim>(smem_address(ring.tail[warp][i][0]), head_keys + from, p.head_dim, valid,
                       p.head_dim);
      copy_slice<kDim>(smem_address(ring.tail[warp][i][1]), head_values + from, p.head_dim, valid,
                       p.head_dim);
    }
    commit_copies();
  }
  const float* mean = begin > 0 ? mean_of(call, b, kv_head) : nullptr;
  if (appends) {
    prefetch_angles(p, kv_len);
    if (begin > 0 && threadIdx.x * 32 < p.head_dim) prefetch(mean + threadIdx.x * 32);
    wait_for_previous_kernel();
  }
  // The slice of this warp that the step's own token is appended to.
  int last_slice = -1;
  const int last_row = kv_len - 1 - begin;
  LastToken<kBf16, kDim> last;
  if (appends && last_row / kSlice % kWarps == warp) {
    last_slice = last_row / kSlice / kWarps;
    last.fetch(p, b, kv_head, kv_len);
  }
  uint32_t queries[kDim / 16][4];
  load_queries<kDim>(p, b, kv_head, q_len * group, group, queries);
  float means[kDim / 16][2][2] = {};
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int channel = k * 16 + half * 8 + lane % 4 * 2;
      if (begin > 0 && channel < p.head_dim) load(mean + channel, means[k][half]);
    }
  }
  if (appends) rotate_queries<kBf16, kDim>(last_angles(p, kv_len), queries);
  if (last_slice >= 0) last.rotate_key();
  float bias[2] = {};
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float2 x = to_floats<kBf16>(queries[k][e]);
      const float(&pair)[2] = means[k][e / 2];
      bias[e % 2] = fmaf(x.x, pair[0], fmaf(x.y, pair[1], bias[e % 2]));
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    bias[r] += __shfl_xor_sync(0xFFFFFFFFu, bias[r], 1);
    bias[r] += __shfl_xor_sync(0xFFFFFFFFu, bias[r], 2);
  }
  int seen[2];
  const int seen_by_all = visible_keys(p, q_len, kv_len, group, seen);
  result.clear();
  wait_copies<0>();
  __syncwarp();
  for (int i = 0; i < kWarpSlices; ++i) {
    if (begin + first_token(i) >= kv_len) break;
    if (i == last_slice) {
      uint16_t* tail = static_cast<uint16_t*>(call.cache.tails);
      const int64_t row = int64_t{last_row} * p.head_dim;
      last.leave(smem_address(ring.tail[warp][i][0]), smem_address(ring.tail[warp][i][1]),
                 last_row % kSlice, tail + (head_keys - tail) + row,
                 tail + (head_values - tail) + row);
    }
    attend_slice<kBf16, kDim>(queries, smem_address(ring.tail[warp][i][0]),
                              smem_address(ring.tail[warp][i][1]), begin + first_token(i),
                              seen_by_all, seen, bias, call.scale, result);
  }
}

// Part 0 is the tail, part 1 + i the pages from i * part_pages on. Block 0 of a sequence and KV
// head takes the tail, block 1 + i the pages' parts from i * block_parts on. kManyRows: a sequence
// may have more than kFewRows query rows in a tile. Without, the kernel needs no local memory; with
// 8 bytes of it a layer took 4 us more on an H200, though the kernel by itself took no longer.
// kRuns: blocks take several parts each.
template <bool kBf16, bool kManyRows, bool kRuns, class Ring>
__global__ void __launch_bounds__(kThreads, kBlocks)
    decode_part(const __grid_constant__ DecodeCall call) {
  extern __shared__ __align__(128) uint8_t smem[];
  auto& ring = *reinterpret_cast<Ring*>(smem);
  const Problem& p = call.p;
  const int block = blockIdx.x, kv_head = blockIdx.y, b = blockIdx.z;
  if (block > 0) {
    if (threadIdx.x == 0) ring.init_barriers();
    __syncthreads();
  }
  allow_next_kernel();
  if (p.rotations == nullptr) wait_for_previous_kernel();
  const int q_len = p.q_len(b), kv_len = p.kv_len(b), pages = kv_len / kTileTokens;
  const int part_pages = cut(p, pages).part_units;
  const int block_parts = kRuns ? call.block_parts : 1;
  const int first_part = (block - 1) * block_parts, first = first_part * part_pages;
  const PageRun run = {first, min(block_parts * part_pages, pages - first), part_pages,
                       1 + first_part};
  const int lane = threadIdx.x % 32;
  const int lane_page =
      block > 0 && lane < run.count
          ? p.page_table[static_cast<int64_t>(b) * p.page_table_stride + first + lane]
          : 0;
  // Without anything to merge, a sequence without keys still has its zeros to write.
  const bool empty = block > 0 ? run.count <= 0 : call.parts.parts > 1 && kv_len % kTileTokens == 0;
  if (q_len == 0 || empty) return;
  const int group = p.num_heads / p.num_kv_heads;
  const auto store = [&](int part) {
    store_part(p, call.parts, part, b, kv_head, q_len * group, group, ring.merge);
  };
  const auto leave = [&](int part, auto& result) {
    __syncthreads();
    leave_rows(result, static_cast<int>(threadIdx.x / 32), q_len * group, ring.merge);
    __syncthreads();
    if (kRuns) store(part);
  };
  if (block == 0) {
    DecodeRows<Ring::kDim> result;
    attend_tail<kBf16>(call, b, kv_head, q_len, kv_len, ring, result);
    leave(0, result);
  } else if (!kManyRows || q_len * group <= kFewRows) {
    attend_pages_few<kBf16, kRuns>(call, b, kv_head, q_len, kv_len, run, lane_page, ring, leave);
  } else if constexpr (kManyRows) {
    attend_pages<kBf16, kRuns>(call, b, kv_head, q_len, kv_len, run, lane_page, ring, leave);
  }
  if (!kRuns) store(block);  // once for both kinds of blocks, which is less code
  if (p.rotations != nullptr && call.parts.parts > 1) {
    const int parts = page_parts(p, pages);
    merge_if_last<Ring::kDim>(p, call.parts, 0, 1 + parts,
                              1 + (parts + block_parts - 1) / block_parts, b, kv_head,
                              q_len * group, group);
  }
}

// One block a row (query, head).
template <typename T>
__global__ void __launch_bounds__(128) merge_parts(const __grid_constant__ DecodeCall call) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const Problem& p = call.p;
  const int query = blockIdx.x / p.num_heads, head = blockIdx.x % p.num_heads, b = blockIdx.y;
  if (query >= p.q_len(b)) return;
  const int kv_len = p.kv_len(b), pages = kv_len / kTileTokens;
  float bias = 0.0f;
  if (p.lse != nullptr && pages > 0) {
    __shared__ float shared[32];
    const int channel = threadIdx.x;
    const float* mean = mean_of(call, b, head / (p.num_heads / p.num_kv_heads));
    const T* from = static_cast<const T*>(p.q.data) + p.q_offset(p.q, b, query, head);
    const float product = channel < p.head_dim ? to_float(from[channel]) * mean[channel] : 0.0f;
    bias = block_reduce(product, shared, Sum{}) * call.scale;
  }
  merge_row(p, call.parts, kv_len % kTileTokens == 0 ? 1 : 0, 1 + page_parts(p, pages), b, query,
            head, bias);
}

template <typename T, int kDim, bool kInt4>
cudaError_t launch_decode(const DecodeCall& call, cudaStream_t stream) {
  using Ring = PageRing<kDim, kInt4>;
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  constexpr int kBytes = sizeof(Ring);
  static_assert(kBlocks * (kBytes + 1024) <= 228 * 1024);
  const Problem& p = call.p;
  const auto kernel = p.max_q_len * (p.num_heads / p.num_kv_heads) > kFewRows
                          ? decode_part<kBf16, true, true, Ring>
                      : call.block_parts > 1 ? decode_part<kBf16, false, true, Ring>
                                             : decode_part<kBf16, false, false, Ring>;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  const auto sequences = static_cast<unsigned>(p.batch);
  const int blocks = 1 + (call.parts.parts - 1 + call.block_parts - 1) / call.block_parts;
  error = launch_with_memory(
      kernel, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(p.num_kv_heads), sequences),
      kThreads, kBytes, stream, call);
  if (error != cudaSuccess || call.parts.parts == 1 || p.rotations != nullptr) return error;
  return launch(merge_parts<T>, dim3(static_cast<unsigned>(p.max_q_len * p.num_heads), sequences),
                kDim, stream, call);
}

DecodeCall make_call(const DecodeFromQuantizedKv& args, void* workspace, size_t* bytes) {
  DecodeCall call{};
  Problem& p = call.p;
  const QuantizedKvStep& step = args.step;
  p.q = {const_cast<void*>(args.queries), 0, args.query_stride, args.cache.head_dim};
  p.out = {args.out, 0, args.out_stride, args.cache.head_dim};
  p.lse = args.lse;
  p.cu_q_lens = step.cu_q_lens;
  p.kv_lens = step.kv_lens;
  p.page_table = step.page_table;
  p.page_table_stride = step.page_table_stride;
  p.batch = step.num_sequences;
  p.num_heads = args.cache.num_heads;
  p.num_kv_heads = args.cache.num_kv_heads;
  p.head_dim = args.cache.head_dim;
  p.max_q_len = step.max_q_len;
  p.max_kv_len = step.max_kv_len;
  p.softmax_scale = args.softmax_scale;
  p.causal = true;
  p.bf16 = args.cache.type == Element::kBF16;
  p.rotations = args.rotations;
  p.arrivals = args.arrivals;
  if (args.rotations != nullptr) {
    p.cu_q_lens = nullptr;
    p.q.batch_stride = args.query_stride;
    p.out.batch_stride = args.out_stride;
  }
  const int most_pages = step.max_kv_len / kTileTokens;
  const Cut longest = cut(p, most_pages);
  call.parts = place_parts(p, 1 + longest.most_parts, workspace, bytes);
  // Where there are more parts than blocks at once, a block takes several, of which none has more
  // pages than the longest sequence's: their results are the same, and blocks begin and end less
  // often.
  constexpr int kBlockPages = 8;
  const int64_t all_parts = int64_t{p.batch} * p.num_kv_heads * longest.most_parts;
  call.block_parts = static_cast<int>(std::clamp<int64_t>(
      all_parts / kBlocksAtOnce, 1, std::max(1, kBlockPages / longest.part_units)));
  call.cache = args.cache;
  call.tails = step.tails;
  call.means = step.means;
  call.scale = args.softmax_scale * recipe::kLog2E;
  return call;
}

}  // namespace

bool quantized_kv_decode_takes(const DecodeFromQuantizedKv& args) {
  const QuantizedKv& cache = args.cache;
  return quantized_kv_refusal(cache.num_heads, cache.num_kv_heads, cache.head_dim) == nullptr &&
         int64_t{args.step.max_q_len} * (cache.num_heads / cache.num_kv_heads) <= kDecodeRows;
}

bool quantized_kv_decode_appends(const QuantizedKv& cache, const QuantizedKvStep& step) {
  return step.max_q_len == 1 && step.rows == step.num_sequences && step.max_closed_pages == 0 &&
         cache.head_dim == quantized_kv_dim(cache.head_dim);
}

size_t quantized_kv_decode_workspace_bytes(const DecodeFromQuantizedKv& args) {
  size_t bytes = 0;
  make_call(args, nullptr, &bytes);
  return bytes;
}

cudaError_t decode_from_quantized_kv(const DecodeFromQuantizedKv& args, void* workspace,
                                     cudaStream_t stream) {
  if (!quantized_kv_decode_takes(args) ||
      (args.rotations != nullptr && !quantized_kv_decode_appends(args.cache, args.step))) {
    return cudaErrorInvalidValue;
  }
  if (args.step.num_sequences == 0 || args.step.max_q_len == 0) return cudaSuccess;
  size_t bytes = 0;
  const DecodeCall call = make_call(args, workspace, &bytes);
  return with_half_type(args.cache.type, [&](auto element) {
    using T = decltype(element);
    const bool small = quantized_kv_dim(args.cache.head_dim) == 64;
    if (args.cache.int4_keys) {
      return small ? launch_decode<T, 64, true>(call, stream)
                   : launch_decode<T, 128, true>(call, stream);
    }
    return small ? launch_decode<T, 64, false>(call, stream)
                 : launch_decode<T, 128, false>(call, stream);
  });
}

}  // namespace sagelm::kernels
