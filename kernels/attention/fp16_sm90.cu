#include <cstdint>

#include "kernels/attention/fp16_sm90.h"
#include "kernels/attention/recipe.h"
#include "kernels/attention/rows_sm90.cuh"
#include "kernels/attention/work_sm90.cuh"
#include "kernels/common/ptx.cuh"
#include "kernels/common/sm90.cuh"
#include "kernels/ops/launch.cuh"

namespace sagelm::kernels {
namespace {

using namespace sm90;
using namespace hopper;

constexpr int kConsumers = 2;  // warp groups that compute, 64 query rows each
constexpr int kQueryTile = 64 * kConsumers;
constexpr int kProducers = 128;  // threads that load
constexpr int kThreads = kProducers + 128 * kConsumers;
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;
constexpr int kReleases = 4 * kConsumers;  // one per consumer warp: each reads all of a tile

// A tile is 128 rows in blocks of 64 columns: [kDim / 64][128 rows][128 bytes], the 16-byte chunks
// of a row swizzled as the 128-byte mode wants them.
constexpr int kTileRows = 128;
constexpr int kRowBytes = 128;
constexpr int kBlockBytes = kTileRows * kRowBytes;
static_assert(kQueryTile == kTileRows && kKeyTile == kTileRows);

// Weights are taken against a maximum that is raised only when a logit exceeds it by this many
// bits, which makes rescaling rare: they stay below 2^8, far from FP16's largest, and their sums
// are in FP32.
constexpr float kSlack = 8.0f;
// Where maxima start: below any logit, finite, so that no difference of two of them is NaN.
constexpr float kLowest = -1e38f;

template <int kDim>
struct SharedTiles {
  static constexpr int kStages = kDim == 128 ? 2 : 4;
  static constexpr int kTileBytes = kDim / 64 * kBlockBytes;

  alignas(1024) uint8_t keys[kStages][kTileBytes];
  alignas(1024) uint8_t values[kStages][kTileBytes];
  alignas(1024) uint8_t queries[kQuerySlots][kTileBytes];
  alignas(16) uint16_t out[4 * kConsumers][16][kDim + 8];  // per warp; padded against conflicts
  uint64_t keys_full[kStages], keys_empty[kStages];
  uint64_t values_full[kStages], values_empty[kStages];
  uint64_t queries_full[kQuerySlots], queries_empty[kQuerySlots];
};

template <int kDim>
using Places = TilePlaces<SharedTiles<kDim>>;

template <int kDim, bool kBf16>
__device__ inline void issue_qk(float (&logits)[64], uint32_t queries, uint32_t keys) {
  const uint64_t a = wgmma_descriptor(queries, Swizzle::k128B);
  const uint64_t b = wgmma_descriptor(keys, Swizzle::k128B);
  wgmma_fence();
  wgmma_half<kBf16, true>(logits, a, b);
#pragma unroll
  for (int k = 1; k < kDim / 16; ++k) {
    const uint64_t step = k / 4 * (kBlockBytes / 16) + k % 4 * 2;
    wgmma_half<kBf16, false>(logits, a + step, b + step);
  }
  wgmma_commit();
}

template <int kDim, bool kBf16>
__device__ inline void issue_pv(float (&products)[kDim / 2], const uint32_t (&p)[32],
                                uint32_t values, bool accumulate) {
  const uint64_t b = wgmma_descriptor_rows(values, kBlockBytes);
  wgmma_fence();
  wgmma_half_rows<kBf16>(products, p, b, accumulate);
#pragma unroll
  for (int k = 1; k < kKeyTile / 16; ++k) {
    wgmma_half_rows<kBf16>(products, p + 4 * k, b + k * (16 * kRowBytes / 16), true);
  }
  wgmma_commit();
}

// Starts this thread's part of the copies of rows [first, first + 128) of head `head` of sequence b
// to a tile; rows from `length` on and columns from head_dim on become zeros, whatever lies there.
// 0 <= first < length. By all producers together.
template <int kDim, bool kQueries>
__device__ inline void load_tile(const Problem& p, const Tensor& x, int b, int head, int first,
                                 int length, uint32_t to) {
  constexpr int kChunks = kDim / 8;
  constexpr int kStep = kProducers / kChunks;  // rows that are loaded at a time
  static_assert(kStep % 8 == 0 && 16 % kStep == 0);
  const int lane = threadIdx.x % 32, chunk = threadIdx.x % kChunks, row = threadIdx.x / kChunks;
  // 16 rows lie at one stride whatever the layout, since pages hold multiples of 16: lane l finds
  // the first of rows 16 (l % 8) .. 16 (l % 8) + 15 for all.
  const int token = min(first + lane % 8 * 16, length - 1);
  const int64_t start = kQueries ? p.q_offset(x, b, token, head) : p.kv_offset(x, b, token, head);
  const bool present = chunk * 8 < p.head_dim;
  const int left = present ? length - first - row : 0;
  const uint16_t* from =
      static_cast<const uint16_t*>(x.data) + row * x.token_stride + (present ? chunk * 8 : 0);
  to += chunk / 8 * kBlockBytes + row * kRowBytes + ((chunk ^ row) & 7) * 16;
#pragma unroll
  for (int i = 0; i < kTileRows; i += 16) {
    const uint16_t* rows = from + __shfl_sync(0xFFFFFFFFu, start, i / 16);
#pragma unroll
    for (int j = 0; j < 16; j += kStep) {
      ptx::copy_async(to + (i + j) * kRowBytes, rows + j * x.token_stride, i + j < left);
    }
  }
}

template <int kDim>
__device__ void produce(const Problem& p, const Schedule& schedule, int query_tiles,
                        const Places<kDim>& places) {
  using Shared = SharedTiles<kDim>;
  RingCursor keys, values, queries;
  keys.parity = values.parity = queries.parity = 1;  // all stages start empty
  const auto acquire = [](uint32_t empty, uint32_t parity) {
    mbarrier_wait_idle(empty, parity);
    __syncwarp();
  };
  WorkItem item;
  for (int index = blockIdx.x; schedule.get<kQueryTile>(p, query_tiles, index, item);
       index += gridDim.x) {
    if (item.kv_tiles < 0) continue;
    const auto load_values = [&](int tile) {
      acquire(places.values_empty(values.stage), values.parity);
      load_tile<kDim, false>(p, p.v, item.b, item.kv_head, tile * kKeyTile, item.kv_len,
                             places.values(values.stage));
      arrive_after_copies(places.values_full(values.stage));
      values.advance(Shared::kStages);
    };
    acquire(places.queries_empty(queries.stage), queries.parity);
    load_tile<kDim, true>(p, p.q, item.b, item.head, item.tile * kQueryTile, item.q_len,
                          places.queries(queries.stage));
    arrive_after_copies(places.queries_full(queries.stage));
    queries.advance(kQuerySlots);
    // In the order of their use: keys of a tile, then values of the tile before.
    for (int tile = item.kv_tiles - 1; tile >= 0; --tile) {
      acquire(places.keys_empty(keys.stage), keys.parity);
      load_tile<kDim, false>(p, p.k, item.b, item.kv_head, tile * kKeyTile, item.kv_len,
                             places.keys(keys.stage));
      arrive_after_copies(places.keys_full(keys.stage));
      keys.advance(Shared::kStages);
      if (tile + 1 < item.kv_tiles) load_values(tile + 1);
    }
    if (item.kv_tiles > 0) load_values(0);
  }
  ptx::commit_copies();
  ptx::wait_copies<0>();
}

// What the rows' weights so far must be multiplied by after their maxima rose.
struct Rescale {
  bool any;  // of this warp's rows
  float factor[2];
};

// A tile's logits (scale turns them to bits) to weights in their place; updates maxima and sums.
__device__ __forceinline__ Rescale softmax(float (&logits)[64], RowState& rows, float scale) {
  Rescale rescale = {false, {1.0f, 1.0f}};
  float most[2] = {logits[0], logits[2]};
#pragma unroll
  for (int i = 1; i < 64; ++i) {
    if (i != 2) most[(i >> 1) & 1] = fmaxf(most[(i >> 1) & 1], logits[i]);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    most[r] = quad_max(most[r]) * scale;
    rescale.any |= most[r] > rows.reference[r] + kSlack;
  }
  rescale.any = __any_sync(0xFFFFFFFFu, rescale.any);
  if (rescale.any) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (most[r] > rows.reference[r] + kSlack) {
        rescale.factor[r] = ptx::exp2_fast(rows.reference[r] - most[r]);
        rows.reference[r] = most[r];
        rows.sum[r] *= rescale.factor[r];
      }
    }
  }
  float sum[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    const int r = (i >> 1) & 1;
    logits[i] = ptx::exp2_fast(fmaf(logits[i], scale, -rows.reference[r]));
    sum[r] += logits[i];
  }
  rows.sum[0] += sum[0];
  rows.sum[1] += sum[1];
  return rescale;
}

// Weights to the operand of P V.
template <bool kBf16>
__device__ inline void to_operand(const float (&weights)[64], uint32_t (&p)[32]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) p[i] = ptx::to_halves<kBf16>(weights[2 * i], weights[2 * i + 1]);
}

// ends: keys from there on are masked, relative to the first key of this thread (2c of the tile).
__device__ inline void mask(float (&logits)[64], const int (&ends)[2]) {
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    const int key = 8 * (i >> 2) + (i & 1);
    if (key >= ends[(i >> 1) & 1]) logits[i] = -INFINITY;
  }
}

// Copies are written as ordinary stores are: whoever reads them by asynchronous products does so
// after a fence_proxy_async of its own, since nobody waits for them at the writers.
template <int kDim, bool kBf16>
__device__ void consume(const Problem& p, const Schedule& schedule, int query_tiles,
                        SharedTiles<kDim>& shared, const Places<kDim>& places, int group) {
  using Shared = SharedTiles<kDim>;
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane >> 2, c = lane & 3;
  const float scale = p.softmax_scale * recipe::kLog2E;
  RingCursor ring, query_ring;
  float logits[64];
  float products[kDim / 2];
  uint32_t weights[32];  // P of a tile
  // The two warp groups take turns to issue a step's products, so that those of one run while the
  // other is at its softmax. Both have the same steps; the first one begins.
  constexpr int kTakers = 128 * kConsumers;
  const int turn = 1 + group, next_turn = 2 - group;
  if (group == 1) named_barrier_arrive(next_turn, kTakers);
  WorkItem item;
  for (int index = blockIdx.x; schedule.get<kQueryTile>(p, query_tiles, index, item);
       index += gridDim.x) {
    if (item.kv_tiles < 0) continue;
    RowState rows = {{kLowest, kLowest}, {0.0f, 0.0f}};
    const int first_row = item.tile * kQueryTile + group * 64 + warp * 16;
    // Keys from there on are masked, relative to this thread's first of tile 0.
    const int row_end[2] = {item.key_end(p, first_row + g) - 2 * c,
                            item.key_end(p, first_row + g + 8) - 2 * c};
    // Tiles from there on need masks: the warp group's first row does not see all of their keys.
    const int first_masked = item.key_end(p, item.tile * kQueryTile + group * 64) / kKeyTile;
    const int slot = query_ring.stage;
    const uint32_t queries = places.queries(slot) + group * 64 * kRowBytes;

    const auto release = [&](uint32_t barrier) {
      __syncwarp();
      if (lane == 0) mbarrier_arrive(barrier);
    };
    // Logits of tile j, at the ring's stage, to weights.
    const auto take_logits = [&](int j) {
      pin(logits);
      release(places.keys_empty(ring.stage));
      if (j >= first_masked) {
        const int ends[2] = {row_end[0] - j * kKeyTile, row_end[1] - j * kKeyTile};
        mask(logits, ends);
      }
      return softmax(logits, rows, scale);
    };
    mbarrier_wait(places.queries_full(slot), query_ring.parity);
    query_ring.advance(kQuerySlots);
    if (item.kv_tiles > 0) {
      int j = item.kv_tiles - 1;
      mbarrier_wait(places.keys_full(ring.stage), ring.parity);
      fence_proxy_async();
      issue_qk<kDim, kBf16>(logits, queries, places.keys(ring.stage));
      wgmma_wait<0>();
      take_logits(j);
      to_operand<kBf16>(logits, weights);
      // The softmax of a tile runs beside the products with the values of the tile before.
      while (--j >= 0) {
        const RingCursor now = ring;
        ring.advance(Shared::kStages);
        mbarrier_wait(places.keys_full(ring.stage), ring.parity);
        mbarrier_wait(places.values_full(now.stage), now.parity);
        fence_proxy_async();
        named_barrier_wait(turn, kTakers);
        issue_qk<kDim, kBf16>(logits, queries, places.keys(ring.stage));
        issue_pv<kDim, kBf16>(products, weights, places.values(now.stage), j + 2 < item.kv_tiles);
        named_barrier_arrive(next_turn, kTakers);
        wgmma_wait<1>();
        const Rescale rescale = take_logits(j);
        pin(logits);
        wgmma_wait<0>();
        pin(products);
        release(places.values_empty(now.stage));
        to_operand<kBf16>(logits, weights);
        if (rescale.any) {
#pragma unroll
          for (int i = 0; i < kDim / 2; ++i) products[i] *= rescale.factor[(i >> 1) & 1];
        }
      }
      release(places.queries_empty(slot));
      mbarrier_wait(places.values_full(ring.stage), ring.parity);
      fence_proxy_async();
      issue_pv<kDim, kBf16>(products, weights, places.values(ring.stage), item.kv_tiles > 1);
      wgmma_wait<0>();
      pin(products);
      release(places.values_empty(ring.stage));
      ring.advance(Shared::kStages);
    } else {
      release(places.queries_empty(slot));
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i) products[i] = 0.0f;
    }
    store_rows<kDim>(p, item, first_row, rows, products, shared.out[group * 4 + warp], nullptr);
  }
}

template <int kDim, bool kBf16>
__global__ void __launch_bounds__(kThreads, 1)
    fp16_kernel(const __grid_constant__ Problem p, const Schedule schedule, int query_tiles) {
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  auto& shared = *reinterpret_cast<SharedTiles<kDim>*>(raw_shared);
  const Places<kDim> places(shared);
  if (threadIdx.x == 0) init_barriers(places, kProducers, kReleases, kReleases);
  __syncthreads();
  allow_next_kernel();
  wait_for_previous_kernel();
  const int group = threadIdx.x / 128;
  if (group == 0) {
    set_fewer_registers<kProducerRegisters>();
    produce<kDim>(p, schedule, query_tiles, places);
  } else {
    set_more_registers<kConsumerRegisters>();
    consume<kDim, kBf16>(p, schedule, query_tiles, shared, places, group - 1);
  }
}

int query_tiles_of(const Problem& p) { return (p.max_q_len + kQueryTile - 1) / kQueryTile; }

template <int kDim, bool kBf16>
cudaError_t attend(const Problem& p, cudaStream_t stream) {
  constexpr int kBytes = sizeof(SharedTiles<kDim>);
  static_assert(kBytes <= 227 * 1024);
  const int query_tiles = query_tiles_of(p);
  const int64_t items = int64_t{p.batch} * p.num_heads * query_tiles;
  const int64_t kv_head_bytes = int64_t{4} * kDim * p.max_kv_len;
  Launch launch;
  const cudaError_t error = plan_launch(reinterpret_cast<const void*>(fp16_kernel<kDim, kBf16>),
                                        kBytes, p, kv_head_bytes, items, launch);
  if (error != cudaSuccess) return error;
  return launch_with_memory(fp16_kernel<kDim, kBf16>, dim3(launch.grid), kThreads, kBytes, stream,
                            p, launch.schedule, query_tiles);
}

}  // namespace

const char* fp16_sm90_refusal(const Problem& p) {
  if (p.head_dim > 128) return "the Hopper fp16 kernel takes head_dim up to 128";
  if (int64_t{p.batch} * p.num_heads * query_tiles_of(p) >= INT32_MAX) {
    return "the Hopper fp16 kernel takes fewer than 2^31 tiles of 128 query rows";
  }
  return nullptr;
}

cudaError_t fp16_sm90(const Problem& p, cudaStream_t stream) {
  if (p.head_dim <= 64) return p.bf16 ? attend<64, true>(p, stream) : attend<64, false>(p, stream);
  return p.bf16 ? attend<128, true>(p, stream) : attend<128, false>(p, stream);
}

}  // namespace sagelm::kernels
