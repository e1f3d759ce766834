// docs/hopper-kernel.md tells how this kernel came to be as it is, with measurements.
#include <cstdint>

#include "kernels/attention/recipe.h"
#include "kernels/attention/rows_sm90.cuh"
#include "kernels/attention/sage2_sm90.h"
#include "kernels/attention/sage2_softmax_sm90.cuh"
#include "kernels/attention/sage2_work_sm90.cuh"
#include "kernels/attention/sage_quantize_sm90.h"
#include "kernels/common/ptx.cuh"
#include "kernels/common/sm90.cuh"
#include "kernels/ops/launch.cuh"

namespace sagelm::kernels {
namespace {

using namespace sm90;
using namespace sage2;

// In sequences of more keys than that the sums of P V are put away every so many tiles, an even
// number (Accumulators): that costs 4 %. Calls with such a sequence take a kernel of their own
// (kLong), which tells them from the others, so that a sequence's result is that of it alone.
constexpr int kLongKeys = 32768;
constexpr int kPutAwayTiles = 32;

// A warp group's queries as QK takes them. In registers, where there are enough, they are read from
// shared memory once per item and not once per tile, which saves a third of QK's reads and power.
template <int kDim>
struct Queries {
  uint32_t rows[kDim / 8];  // of the warp

  __device__ void take(uint32_t place, int row) {
    const int lane = threadIdx.x % 32;
    row += lane % 16;
#pragma unroll
    for (int k = 0; k < kDim / 32; ++k) {
      uint32_t chunks[4];
      ptx::load_matrices(chunks,
                         place + row * kDim + 16 * swizzled_chunk<kDim>(row, 2 * k + lane / 16));
#pragma unroll
      for (int i = 0; i < 4; ++i) rows[4 * k + i] = chunks[i];
    }
  }
  __device__ const uint32_t* step(int k) const { return rows + 4 * k; }
  // As the products of the warp of `thread` by itself take them.
  __device__ void chunks(int, int k, uint32_t (&to)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = rows[4 * k + i];
  }
};
template <>
struct Queries<64> {
  uint32_t rows;  // of the warp group: where they lie in shared memory

  __device__ void take(uint32_t place, int row) { rows = place + row / 64 * 64 * 64; }
  __device__ uint64_t step(int k) const { return wgmma_descriptor(rows, Swizzle::k64B) + 2 * k; }
  __device__ void chunks(int thread, int k, uint32_t (&to)[4]) const {
    const int row = thread / 32 % 4 * 16 + thread % 16;
    ptx::load_matrices(to, rows + row * 64 + 16 * swizzled_chunk<64>(row, 2 * k + thread / 16 % 2));
  }
};

template <int kDim>
__device__ inline void issue_qk(int32_t (&logits)[64], const Queries<kDim>& queries,
                                uint32_t keys) {
  const uint64_t b = wgmma_descriptor(keys, kDim == 128 ? Swizzle::k128B : Swizzle::k64B);
  wgmma_fence();
  wgmma_s8<true>(logits, queries.step(0), b);
#pragma unroll
  for (int k = 1; k < kDim / 32; ++k) wgmma_s8<false>(logits, queries.step(k), b + 2 * k);
  wgmma_commit();
}

// P V, and the sums of the rows of P.
template <int kDim>
__device__ inline void issue_pv(uint32_t (&products)[kDim / 4 + 2], const uint32_t (&p)[16],
                                uint32_t values) {
  const uint64_t b = wgmma_descriptor(values, Swizzle::k128B);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kKeyTile / 32; ++k) wgmma_e4m3(products, p + 4 * k, b + 2 * k, k > 0);
  wgmma_commit();
}

// One warp's share of these products by itself, of `thread`, with mma: 8 rows of a tile from 8n on.

// Their operands B of steps 2k (the first two) and 2k + 1.
template <int kRowBytes>
__device__ inline void load_operands(int thread, uint32_t tile, int n, int k, uint32_t (&to)[4]) {
  const int row = 8 * n + thread % 8;
  ptx::load_matrices(
      to, tile + row * kRowBytes + 16 * swizzled_chunk<kRowBytes>(row, 4 * k + thread / 8 % 4));
}
template <int kDim>
__device__ inline void multiply_keys(int thread, const Queries<kDim>& queries, uint32_t keys, int n,
                                     int32_t (&d)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] = 0;
#pragma unroll
  for (int k = 0; k < kDim / 64; ++k) {
    uint32_t a[4], b[4];
    load_operands<kDim>(thread, keys, n, k, b);
    queries.chunks(thread, 2 * k, a);
    ptx::multiply_int8(d, a, b[0], b[1]);
    queries.chunks(thread, 2 * k + 1, a);
    ptx::multiply_int8(d, a, b[2], b[3]);
  }
}
__device__ inline void multiply_values(int thread, const uint32_t (&p)[16], uint32_t values, int n,
                                       float (&d)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] = 0.0f;
#pragma unroll
  for (int k = 0; k < kKeyTile / 64; ++k) {
    uint32_t b[4];
    load_operands<kKeyTile>(thread, values, n, k, b);
    const uint32_t* a = p + 8 * k;
    ptx::multiply_e4m3(d, {a[0], a[1], a[2], a[3]}, b[0], b[1]);
    ptx::multiply_e4m3(d, {a[4], a[5], a[6], a[7]}, b[2], b[3]);
  }
}

template <int kDim>
__device__ void produce(const Problem& p, const SageTiles& tiles, const Schedule& schedule,
                        SharedTiles<kDim>& shared, const Places<kDim>& places) {
  using Shared = SharedTiles<kDim>;
  constexpr int kQueryTile = Shared::kQueryTile;
  RingCursor ring, query_ring;
  ring.parity = query_ring.parity = 1;  // all stages start empty
  WorkItem item = {};
  for (int index = blockIdx.x;
       schedule.get<kQueryTile>(p, items_per_head<kDim>(tiles), index, item); index += gridDim.x) {
    if (item.kv_tiles < 0) continue;
    const int slot = query_ring.stage;
    mbarrier_wait_idle(places.queries_empty(slot), query_ring.parity);
    query_ring.advance(kQuerySlots);
    shared.items[slot] = item;
    // The last item may reach beyond the tiles that the sequence has room for.
    const int padded = (item.q_len + kTileTokens - 1) / kTileTokens * kTileTokens;
    const int rows = min(kQueryTile, padded - item.tile * kQueryTile);
    const int64_t first = first_query<kQueryTile>(p, tiles, item);
    mbarrier_expect_bytes(places.queries_full(slot),
                          rows * kDim + rows * static_cast<int>(sizeof(float)));
    bulk_copy(places.queries(slot), tiles.queries + first * kDim, rows * kDim,
              places.queries_full(slot));
    bulk_copy(places.query_scales(slot), tiles.query_scales + first,
              rows * static_cast<int>(sizeof(float)), places.queries_full(slot));
    if (item.kv_tiles == 0) continue;
    int next = tile_place(p, tiles, item, item.tile_at(0));
    for (int i = 0; i < item.kv_tiles; ++i) {
      const int s = ring.stage;
      const int place = next;
      const int key_place = key_tile_place(p, tiles, item, item.tile_at(i), place);
      // Asked for before it is needed: a page's number comes from memory.
      if (i + 1 < item.kv_tiles) next = tile_place(p, tiles, item, item.tile_at(i + 1));
      mbarrier_wait_idle(places.keys_empty(s), ring.parity);
      mbarrier_expect_bytes(places.keys_full(s), Shared::kTileBytes + sizeof(Shared::scales[0]));
      bulk_copy(places.scales(s),
                tile_at_place<kTileScales>(tiles.scales, tiles.tail_scales, key_place),
                sizeof(Shared::scales[0]), places.keys_full(s));
      bulk_copy(places.keys(s),
                tile_at_place<Shared::kTileBytes>(tiles.keys, tiles.tail_keys, key_place),
                Shared::kTileBytes, places.keys_full(s));
      mbarrier_wait_idle(places.values_empty(s), ring.parity);
      mbarrier_expect_bytes(places.values_full(s), Shared::kTileBytes);
      bulk_copy(places.values(s),
                tile_at_place<Shared::kTileBytes>(tiles.values, tiles.tail_values, place),
                Shared::kTileBytes, places.values_full(s));
      ring.advance(Shared::kStages);
    }
  }
  const int slot = query_ring.stage;
  mbarrier_wait_idle(places.queries_empty(slot), query_ring.parity);
  item.kv_tiles = -1;
  shared.items[slot] = item;
  mbarrier_arrive(places.queries_full(slot));
}

template <int kDim, bool kLong>
__device__ void consume(const Problem& p, const SageTiles& tiles, SharedTiles<kDim>& shared,
                        const Places<kDim>& places, int group) {
  using Shared = SharedTiles<kDim>;
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane >> 2, c = lane & 3;
  constexpr int kQueryTile = Shared::kQueryTile;
  auto& out = shared.out[group * 4 + warp];
  RingCursor ring, query_ring;
  Queries<kDim> queries;
  int32_t logits[64];
  Accumulators<kDim> sums;
  static_assert(!kLong || sizeof out >= sizeof sums.sums * 32);
  uint32_t even[16], odd[16];              // P of a tile and of the next
  const int row = group * 64 + warp * 16;  // the warp's first of an item
  // Waits for the next item and issues its first QK. False past the last one.
  const auto next_item = [&] {
    const int slot = query_ring.stage;
    mbarrier_wait(places.queries_full(slot), query_ring.parity);
    const int kv_tiles = shared.items[slot].kv_tiles;
    uint32_t keys = places.queries(slot);  // if there are none: anything that nobody writes
    queries.take(keys, row);
    if (kv_tiles > 0) {
      mbarrier_wait(places.keys_full(ring.stage), ring.parity);
      keys = places.keys(ring.stage);
    }
    issue_qk<kDim>(logits, queries, keys);
    return kv_tiles >= 0;
  };
  bool more = next_item();
  wgmma_wait<0>();
  pin(logits);
  while (more) {
    const int slot = query_ring.stage;
    query_ring.advance(kQuerySlots);
    const WorkItem item = shared.items[slot];
    RowState rows = {};
    const int first_row = item.tile * kQueryTile + row;
    const bool present = first_row < item.q_len;
    const float query_scale[2] = {present ? shared.query_scales[slot][row + g] : 0.0f,
                                  present ? shared.query_scales[slot][row + g + 8] : 0.0f};
    // Keys from there on are masked, relative to this thread's first of tile 0.
    const int row_end[2] = {item.key_end(p, first_row + g) - 4 * c,
                            item.key_end(p, first_row + g + 8) - 4 * c};
    // Tiles from there on need masks: the warp group's first row does not see all of their keys.
    const int first_masked = item.key_end(p, item.tile * kQueryTile + group * 64) / kKeyTile;
    // From this tile on, the i-th, sums have been put away.
    const int first_away = kLong && item.kv_len > kLongKeys ? kPutAwayTiles + 1 : INT32_MAX;
    bool keys_ready = false, values_ready = false;
    sums.clear();
    float value_inverse = 0.0f;  // of the tile whose products are in flight

    const auto release = [&](uint32_t barrier) {
      __syncwarp();
      if (lane == 0) mbarrier_arrive(barrier);
    };
    const auto scales_at = [&](int stage) {
      const float* scales = shared.scales[stage];
      const float key_scale = scales[c];
      TileScales of_stage;
      of_stage.value_bits = scales[kKeyGroups + 1];
      of_stage.value_inverse = scales[kKeyGroups + 2];
      of_stage.scale[0] = query_scale[0] * key_scale;
      of_stage.scale[1] = query_scale[1] * key_scale;
      return of_stage;
    };
    const auto first_end = [&](int j, int r) { return row_end[r] - j * kKeyTile; };
    // The logits of tile j to P.
    const auto weigh = [&](int j, const TileScales& scales, uint32_t(&to)[16]) {
      const float offset[2] = {rows.reference[0] - scales.value_bits,
                               rows.reference[1] - scales.value_bits};
      exponentiate<kDim>(logits, to, scales.scale, offset);
      if (j < first_masked) return;
      const int ends[2] = {first_end(j, 0), first_end(j, 1)};
      mask_weights(to, ends);
    };
    // The weights of tile j, at `stage`, by the warp alone.
    const auto weigh_alone = [&](int thread, int j, int stage, const TileScales& scales,
                                 uint32_t(&to)[16]) {
#pragma unroll 1
      for (int n = 0; n < kKeyTile / 16; ++n) {
        int32_t d[2][4];
        multiply_keys<kDim>(thread, queries, places.keys(stage), 2 * n, d[0]);
        multiply_keys<kDim>(thread, queries, places.keys(stage), 2 * n + 1, d[1]);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float offset = rows.reference[r] - scales.value_bits;
          float x[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            x[e] = ptx::exp2_fast(
                fmaf(static_cast<float>(d[e >> 1][2 * r + (e & 1)]), scales.scale[r], -offset));
          }
          const int bits = max(0, 8 * first_end(j, r) - 128 * n);
          to[2 * n + r] = ptx::to_e4m3(x[0], x[1], x[2], x[3]) & __funnelshift_lc(~0u, 0u, bits);
        }
      }
    };
    // Where rows of the i-th tile, at `stage`, have weights that may have saturated: moves their
    // references, adds the tile's products as they are then, and makes their weights of the next
    // tile again, if there is one. It is rare, and the warp does it alone and in little code: other
    // rows' weights and products stay, so that no row's result depends on its neighbours.
    const auto take_again = [&](const bool(&move)[2], int i, int stage, float(&weights)[2],
                                void* away, const auto& weigh_next) {
      // So that nothing of this is kept in registers where it is not needed.
      const int thread = static_cast<int>(ptx::opaque(threadIdx.x));
      const int j = item.tile_at(i);
      const TileScales scales = scales_at(stage);
      float largest[2] = {kNothing, kNothing};
#pragma unroll 1
      for (int n = 0; n < kKeyTile / 8; ++n) {
        int32_t d[4];
        multiply_keys<kDim>(thread, queries, places.keys(stage), n, d);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int key = 16 * (n >> 1) + 2 * (n & 1) + (e & 1);
          if (key < first_end(j, e >> 1)) {
            largest[e >> 1] = fmaxf(largest[e >> 1], static_cast<float>(d[e]));
          }
        }
      }
      move_references<kDim>(largest, move, rows, sums, scales, away);
      uint32_t p[16], products[Accumulators<kDim>::kCount + 2];
      weigh_alone(thread, j, stage, scales, p);
#pragma unroll 1
      for (int n = 0; n <= kDim / 8; ++n) {
        float d[4];
        multiply_values(thread, p, places.values(stage), n, d);
        products[2 * n] = ptx::to_halves<false>(d[0], d[1]);
        products[2 * n + 1] = ptx::to_halves<false>(d[2], d[3]);
      }
#pragma unroll
      for (int k = 0; k < Accumulators<kDim>::kCount; ++k) {
        sums.take(k, move[k & 1] ? products[k] : sums.products[k]);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (move[r]) weights[r] = __low2float(as_halves(products[2 * (kDim / 8) + r]));
      }
      weigh_next(thread);
    };
    // Waits for the products of the i-th tile, at `stage`, whose weights are p, and adds them.
    const auto finish = [&](int i, int stage, const uint32_t(&p)[16], void* away,
                            const auto& weigh_next) {
      wgmma_wait<0>();
      pin(sums.products);
      float weights[2] = {sums.weights_of(0), sums.weights_of(1)};
      const bool sure = weights[0] < kSureSum && weights[1] < kSureSum;
      if (__all_sync(0xFFFFFFFFu, sure)) {
        sums.take();
      } else {
        const bool move[2] = {saturated(p, 0) || !(weights[0] < kMostSum),
                              saturated(p, 1) || !(weights[1] < kMostSum)};
        if (__any_sync(0xFFFFFFFFu, move[0] || move[1])) {
          take_again(move, i, stage, weights, away, [&](int thread) { weigh_next(thread, move); });
        } else {
          sums.take();
        }
      }
      // From every lane: all of them read the scales.
      mbarrier_arrive(places.keys_empty(stage));
      release(places.values_empty(stage));
      rows.sum[0] = fmaf(weights[0], value_inverse, rows.sum[0]);
      rows.sum[1] = fmaf(weights[1], value_inverse, rows.sum[1]);
    };
    // From P of a tile to P of the next one, the i-th.
    const auto step = [&](int i, uint32_t(&from)[16], uint32_t(&to)[16]) {
      const int j = item.tile_at(i);
      const RingCursor now = ring;
      ring.advance(Shared::kStages);
      if (!keys_ready) mbarrier_wait(places.keys_full(ring.stage), ring.parity);
      issue_qk<kDim>(logits, queries, places.keys(ring.stage));
      if (!values_ready) mbarrier_wait(places.values_full(now.stage), now.parity);
      issue_pv<kDim>(sums.products, from, places.values(now.stage));
      wgmma_wait<1>();
      pin(logits);
      const TileScales tile = scales_at(ring.stage);
      // Asked early, so that the answer is there when it is needed.
      RingCursor next = ring;
      next.advance(Shared::kStages);
      values_ready = mbarrier_test(places.values_full(ring.stage), ring.parity);
      keys_ready = mbarrier_test(places.keys_full(next.stage), next.parity);
      weigh(j, tile, to);
      finish(i - 1, now.stage, from, i >= first_away ? &out : nullptr,
             [&](int thread, const bool(&move)[2]) {
               uint32_t again[16];
               weigh_alone(thread, j, ring.stage, scales_at(ring.stage), again);
#pragma unroll
               for (int k = 0; k < 16; ++k) {
                 if (move[k & 1]) to[k] = again[k];
               }
             });
      value_inverse = tile.value_inverse;
    };
    const auto last_step = [&](const uint32_t(&from)[16]) {
      mbarrier_wait(places.values_full(ring.stage), ring.parity);
      issue_pv<kDim>(sums.products, from, places.values(ring.stage));
      finish(item.kv_tiles - 1, ring.stage, from, item.kv_tiles > first_away ? &out : nullptr,
             [](int, const bool(&)[2]) {});
      mbarrier_arrive(places.queries_empty(slot));  // from every lane, as above
      ring.advance(Shared::kStages);
    };

    if (item.kv_tiles > 0) {
      const int j = item.tile_at(0);
      const TileScales tile = scales_at(ring.stage);
      const int ends[2] = {first_end(j, 0), first_end(j, 1)};
      set_references(logits, rows, tile, ends);
      weigh(j, tile, even);
      value_inverse = tile.value_inverse;
      for (int i = 1;;) {
        if (i == item.kv_tiles) {
          last_step(even);
          break;
        }
        if (kLong && i >= first_away && i % kPutAwayTiles == 1) {
          sums.put_away(&out, i == first_away);
        }
        step(i++, even, odd);
        if (i == item.kv_tiles) {
          last_step(odd);
          break;
        }
        step(i++, odd, even);
      }
      // store_rows adds those of four threads, which here are the same, and divides by them: they
      // come in the unit of the totals.
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        rows.sum[r] *= 0.25f / Accumulators<kDim>::kUnit;
        rows.reference[r] += Accumulators<kDim>::kUnitBits;
      }
    } else {
      mbarrier_arrive(places.queries_empty(slot));  // from every lane, as above
    }
    more = next_item();  // whose first QK runs beside what follows
    float totals[kDim / 2];
    if (item.kv_tiles > first_away) sums.bring_back(&out);
    sums.total(totals);
    const float* biases = nullptr;
    if (tiles.query_biases != nullptr) {
      biases = tiles.query_biases + first_query<kQueryTile>(p, tiles, item) + row;
    }
    store_rows<kDim>(p, item, first_row, rows, totals, out, biases);
    wgmma_wait<0>();
    pin(logits);
  }
}

template <int kDim, bool kLong>
__global__ void __launch_bounds__(Groups<kDim>::kThreads, 1)
    sage2_kernel(const __grid_constant__ Problem p, const __grid_constant__ SageTiles tiles,
                 const Schedule schedule) {
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  auto& shared = *reinterpret_cast<SharedTiles<kDim>*>(raw_shared);
  const Places<kDim> places(shared);
  if (threadIdx.x == 0)
    init_barriers(places, 1, 32 * Groups<kDim>::kReleases, Groups<kDim>::kReleases);
  using Shared = SharedTiles<kDim>;
  for (int i = threadIdx.x; i < Shared::kStages * Shared::kOnesBytes; i += blockDim.x) {
    shared.values[i / Shared::kOnesBytes][Shared::kTileBytes + i % Shared::kOnesBytes] = 0x38;
  }
  fence_proxy_async();
  __syncthreads();
  allow_next_kernel();
  wait_for_previous_kernel();
  const int group = threadIdx.x / 128;
  if (group == 0) {
    set_fewer_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce<kDim>(p, tiles, schedule, shared, places);
  } else {
    set_more_registers<Groups<kDim>::kConsumerRegisters>();
    consume<kDim, kLong>(p, tiles, shared, places, group - 1);
  }
}

template <int kDim, bool kLong>
cudaError_t attend_as(const Problem& p, const SageTiles& tiles, cudaStream_t stream) {
  constexpr int kBytes = sizeof(SharedTiles<kDim>);
  const int64_t items = int64_t{p.batch} * p.num_heads * items_per_head<kDim>(tiles);
  const int64_t kv_head_bytes = int64_t{2} * tiles.kv_tiles * SharedTiles<kDim>::kTileBytes;
  Launch plan;
  const cudaError_t error = plan_launch(reinterpret_cast<const void*>(sage2_kernel<kDim, kLong>),
                                        kBytes, p, kv_head_bytes, items, plan);
  if (error != cudaSuccess) return error;
  return launch_with_memory(sage2_kernel<kDim, kLong>, dim3(plan.grid), Groups<kDim>::kThreads,
                            kBytes, stream, p, tiles, plan.schedule);
}

template <int kDim>
cudaError_t attend(const Problem& p, const SageTiles& tiles, cudaStream_t stream) {
  return p.max_kv_len > kLongKeys ? attend_as<kDim, true>(p, tiles, stream)
                                  : attend_as<kDim, false>(p, tiles, stream);
}

int padded_dim(const Problem& p) { return p.head_dim <= 64 ? 64 : 128; }

}  // namespace

const char* sage2_sm90_refusal(const Problem& p) {
  if (p.head_dim > 128) return "the Hopper sage2 kernel takes head_dim up to 128";
  if (int64_t{p.batch} * p.num_heads * ((p.max_q_len + kTileTokens - 1) / kTileTokens) >=
      INT32_MAX) {
    return "the Hopper sage2 kernel takes fewer than 2^31 tiles of 128 query rows";
  }
  return nullptr;
}

size_t sage2_sm90_workspace_bytes(const Problem& p) {
  size_t bytes = 0;
  place_sage_tiles(p, padded_dim(p), nullptr, &bytes);
  return bytes;
}

SageTiles sage2_sm90_tiles(const Problem& p, void* workspace) {
  size_t bytes = 0;
  return place_sage_tiles(p, padded_dim(p), workspace, &bytes);
}

cudaError_t sage2_sm90_attend(const Problem& p, const SageTiles& tiles, cudaStream_t stream) {
  return padded_dim(p) == 64 ? attend<64>(p, tiles, stream) : attend<128>(p, tiles, stream);
}

cudaError_t sage2_sm90(const Problem& p, void* workspace, cudaStream_t stream) {
  const SageTiles tiles = sage2_sm90_tiles(p, workspace);
  const cudaError_t error = quantize_to_sage_tiles(p, padded_dim(p), tiles, stream);
  return error != cudaSuccess ? error : sage2_sm90_attend(p, tiles, stream);
}

}  // namespace sagelm::kernels
