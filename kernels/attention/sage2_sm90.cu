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
// By these the products of a tile, 61,440 at most, are divided, so that a half holds those of all.
constexpr float kUnit = 0x1p8f, kLongUnit = 0x1p12f;

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
};
template <>
struct Queries<64> {
  uint32_t rows;  // of the warp group: the low word of their descriptor

  __device__ void take(uint32_t place, int row) {
    rows = ptx::opaque(wgmma_descriptor_low(place + row / 64 * 64 * 64));
  }
  __device__ uint64_t step(int k) const { return wgmma_descriptor_of(rows + 2 * k, Swizzle::k64B); }
};

template <int kDim, int kCount>
__device__ inline void issue_qk(int32_t (&logits)[kCount], const Queries<kDim>& queries,
                                uint64_t keys) {
  wgmma_fence();
  wgmma_s8<true>(logits, queries.step(0), keys);
#pragma unroll
  for (int k = 1; k < kDim / 32; ++k) wgmma_s8<false>(logits, queries.step(k), keys + 2 * k);
  wgmma_commit();
}

// P V, and the sums of the rows of P.
template <int kDim, int kCount>
__device__ inline void issue_pv(uint32_t (&products)[kDim / 4 + 2], const uint32_t (&p)[kCount],
                                uint64_t values, bool accumulate) {
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kCount / 4; ++k) {
    wgmma_e4m3(products, p + 4 * k, values + 2 * k, k > 0 || accumulate);
  }
  wgmma_commit();
}

// By a thread of its own, so that the next item is at hand when the one before it has been loaded.
template <int kDim>
__device__ void schedule_items(const Problem& p, const SageTiles& tiles, const Schedule& schedule,
                               SharedTiles<kDim>& shared, const Places<kDim>& places) {
  RingCursor slots;
  slots.parity = 1;  // all of them start empty
  WorkItem item = {};
  for (int index = blockIdx.x;; index += gridDim.x) {
    const bool more = schedule.find(p, items_per_head<kDim>(tiles), index, item);
    if (more) {
      wait_for_previous_kernel();  // with the first item at hand
      schedule.measure<SharedTiles<kDim>::kQueryTile>(p, item);
      if (item.kv_tiles < 0) continue;
    } else {
      item.kv_tiles = -1;
    }
    mbarrier_wait_idle(places.queries_empty(slots.stage), slots.parity);
    shared.items[slots.stage] = item;
    mbarrier_arrive(places.items_full(slots.stage));
    if (!more) return;
    slots.advance(kQuerySlots);
  }
}

template <int kDim>
__device__ void produce(const Problem& p, const SageTiles& tiles, SharedTiles<kDim>& shared,
                        const Places<kDim>& places) {
  using Shared = SharedTiles<kDim>;
  constexpr int kQueryTile = Shared::kQueryTile;
  RingCursor ring, query_ring;
  ring.parity = 1;                  // all stages start empty
  const uint8_t* values = nullptr;  // of the tile before, which no stage has yet
  for (;;) {
    const int slot = query_ring.stage;
    mbarrier_wait_idle(places.items_full(slot), query_ring.parity);
    query_ring.advance(kQuerySlots);
    const WorkItem item = shared.items[slot];
    if (item.kv_tiles < 0) {
      if (values != nullptr) {
        mbarrier_wait_idle(places.empty(ring.stage), ring.parity);
        mbarrier_expect_bytes(places.full(ring.stage), Shared::kTileBytes);
        bulk_copy(places.values(ring.stage), values, Shared::kTileBytes, places.full(ring.stage));
      }
      mbarrier_arrive(places.queries_full(slot));
      return;
    }
    // A page's number comes from memory: each is asked for before it is needed.
    int next = item.kv_tiles > 0 ? tile_place(p, tiles, item, item.tile_at(0)) : 0;
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
    for (int i = 0; i < item.kv_tiles; ++i) {
      const int s = ring.stage;
      const int place = next;
      const int key_place = key_tile_place(p, tiles, item, item.tile_at(i), place);
      if (i + 1 < item.kv_tiles) next = tile_place(p, tiles, item, item.tile_at(i + 1));
      mbarrier_wait_idle(places.empty(s), ring.parity);
      mbarrier_expect_bytes(places.full(s), (values == nullptr ? 1 : 2) * Shared::kTileBytes +
                                                sizeof(Shared::scales[0]));
      bulk_copy(places.scales(places.scales_slot(s, ring.parity ^ 1)),
                tile_at_place<kTileScales>(tiles.scales, tiles.tail_scales, key_place),
                sizeof(Shared::scales[0]), places.full(s));
      bulk_copy(places.keys(s),
                tile_at_place<Shared::kTileBytes>(tiles.keys, tiles.tail_keys, key_place),
                Shared::kTileBytes, places.full(s));
      if (values != nullptr) {
        bulk_copy(places.values(s), values, Shared::kTileBytes, places.full(s));
      }
      values = tile_at_place<Shared::kTileBytes>(tiles.values, tiles.tail_values, place);
      ring.advance(Shared::kStages);
    }
  }
}

template <int kDim, bool kLong>
__device__ void consume(const Problem& p, const SageTiles& tiles, SharedTiles<kDim>& shared,
                        const Places<kDim>& places, int group, int warp) {
  using Shared = SharedTiles<kDim>;
  constexpr int kSteps = Groups<kDim>::kSteps, kLastStep = kSteps - 1;
  constexpr int kStepKeys = kKeyTile / kSteps;
  constexpr int kQueryTile = Shared::kQueryTile;
  using Weights = uint32_t[kStepKeys / 8];
  const int lane = threadIdx.x % 32, g = lane >> 2, c = lane & 3;
  auto& out = shared.out[group * 4 + warp];
  RingCursor ring, next, query_ring;
  next.advance(Shared::kStages);
  Queries<kDim> queries;
  int32_t logits[kStepKeys / 2];
  Accumulators<kDim> sums;
  static_assert(!kLong || sizeof out >= sizeof sums.sums * 32);
  Weights even, odd;                       // P of a step and of the next
  const int row = group * 64 + warp * 16;  // the warp's first of an item
  const auto next_item = [&] {
    return begin_item(
        shared, places, ring, places.full(ring.stage), query_ring,
        [&](uint32_t place) { queries.take(place, row); },
        [&](uint32_t keys) {
          issue_qk(logits, queries, wgmma_descriptor(keys, Places<kDim>::kKeySwizzle));
        });
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
    // But for the first one to be taken they are the 1st to the last_masked-th.
    const int first_masked = item.key_end(p, item.tile * kQueryTile + group * 64) / kKeyTile;
    const int last_masked =
        item.first_tile + item.kv_tiles - first_masked - (item.full_tiles == 0 ? 1 : 0);
    // From this tile on, the i-th, sums have been put away.
    const bool is_long = kLong && item.kv_len > kLongKeys;
    const int first_away = is_long ? kPutAwayTiles + 1 : INT32_MAX;
    const auto is_away = [&](int i) { return kLong && i >= first_away; };
    // Sums are in units of `unit` times `value_power`, which no tile's scale of V so far exceeds.
    const float unit = is_long ? kLongUnit : kUnit;
    float value_power = 0.0f, unit_inverse = 0.0f;
    bool ready = false;  // the next stage
    TileScales tile;
    __half2 value_factor = {};  // of the tile whose products are in flight

    // From every lane: all of them read scales.
    const auto release = [&](int stage) { mbarrier_arrive(places.empty(stage)); };
    const auto next_stage = [&] {
      ring = next;
      next.advance(Shared::kStages);
      if (!ready) mbarrier_wait(places.full(ring.stage), ring.parity);
    };
    // With the logits of the first step of the tile whose keys are at the ring's stage.
    const auto take_scales = [&] {
      const float* scales = shared.scales[places.scales_slot(ring.stage, ring.parity)];
      const float key_scale = scales[c];
      tile.value_scale = scales[kValueScale];
      tile.scale[0] = query_scale[0] * key_scale;
      tile.scale[1] = query_scale[1] * key_scale;
    };
    const auto first_end = [&]<int kStep>(int i, int r) {
      return row_end[r] - item.tile_at(i) * kKeyTile - kStep * kStepKeys;
    };
    // The logits of a step of the i-th tile to P.
    const auto weigh = [&]<int kStep, int kRow = kBothRows>(int i, bool masked, Weights& to) {
      const uint32_t carries = exponentiate<kDim, kRow>(logits, to, tile.scale, rows.reference);
      if (!masked) return carries;
      const int ends[2] = {first_end.template operator()<kStep>(i, 0),
                           first_end.template operator()<kStep>(i, 1)};
      return mask_weights<kRow>(to, ends);
    };
    // Those that are near the most again, against a reference moved. Row by row, since mostly a
    // single one of a warp has such weights.
    const auto weigh_again = [&]<int kStep, int kRow>(int i, Weights& to) {
      const int end = first_end.template operator()<kStep>(i, kRow);
      void* away = is_away(i) ? &out : nullptr;
      if (move_reference<kRow>(logits, to, rows, sums, tile, end, away)) {
        weigh.template operator()<kStep, kRow>(i, i <= last_masked, to);
      }
    };
    // From the tile's scale of V: the next power of two.
    const auto set_unit = [&] {
      const uint32_t exponent = __float_as_uint(tile.value_scale) & 0x7F800000u;
      value_power = __uint_as_float(exponent + 0x00800000u);
      unit_inverse = __uint_as_float(0x7F000000u - __float_as_uint(unit * value_power));
    };
    // For tile i, when the products of those before have been taken.
    const auto raise_unit = [&](int i) {
      const float before = value_power;
      set_unit();
      const __half2 factor = __float2half2_rn(__fdividef(before, value_power));
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        sums.scale_row(r, factor);
        if (is_away(i)) sums.scale_row_away(&out, r, factor);
      }
    };
    // Waits for a tile's products, behind which kBehind others have been issued.
    const auto take_products = [&]<int kBehind = 0> {
      wgmma_wait<kBehind>();
      pin(sums.products);
      rows.sum[0] += sums.weights_of(0);
      rows.sum[1] += sums.weights_of(1);
      sums.take(value_factor);
    };
    // From P of a step to P of the next one, which is the kStep-th of the i-th tile. Its QK and P V
    // of the step before are issued together, and its softmax runs beside that P V.
    const auto step = [&]<int kStep>(int i, const Weights& from, Weights& to) {
      constexpr int kBefore = kStep == 0 ? kLastStep : kStep - 1;
      constexpr bool kTileDone = kBefore == kLastStep;  // by that P V
      const int stage_before = ring.stage;
      if (kBefore == 0) next_stage();  // with the values of the step before
      const int keys = kStep == 0 ? ring.stage : stage_before;
      issue_qk(logits, queries, places.keys_operand(keys, kStep * kStepKeys));
      issue_pv<kDim>(sums.products, from, places.values_operand(ring.stage, kBefore * kStepKeys),
                     kBefore > 0);
      wgmma_wait<1>();
      pin(logits);
      if (kStep == 0) take_scales();
      // Asked early, so that the answer is there when it is needed.
      if (kStep == 0) ready = mbarrier_test(places.full(next.stage), next.parity);
      const uint32_t carries = weigh.template operator()<kStep>(i, i <= last_masked, to);
      if (kTileDone) take_products();
      const bool raise = kStep == 0 && tile.value_scale > value_power;
      if (__any_sync(0xFFFFFFFFu, near_most(carries) || raise)) {
        if (!kTileDone) {
          take_products();
          sums.restart();
        }
        weigh_again.template operator()<kStep, 0>(i, to);
        weigh_again.template operator()<kStep, 1>(i, to);
        if (raise) raise_unit(i);
      }
      if (kStep == 0) value_factor = __float2half2_rn(tile.value_scale * unit_inverse);
      if (kStep == kLastStep) release(keys);
    };
    const auto last_step = [&](const Weights& from) {
      mbarrier_arrive(places.queries_empty(slot));  // from every lane, as above
      if (kLastStep == 0) next_stage();
      issue_pv<kDim>(sums.products, from, places.values_operand(ring.stage, kLastStep * kStepKeys),
                     kLastStep > 0);
    };
    // Before the i-th tile.
    const auto put_away = [&](int i) {
      if (is_away(i) && i % kPutAwayTiles == 1) sums.put_away(&out, i == first_away);
    };

    if (item.kv_tiles > 0) {
      const bool masked = item.tile_at(0) >= first_masked;
      take_scales();
      const int ends[2] = {first_end.template operator()<0>(0, 0),
                           first_end.template operator()<0>(0, 1)};
      set_references(logits, rows, tile, ends, masked);
      weigh.template operator()<0>(0, masked, even);
      if (kSteps == 1) release(ring.stage);
      set_unit();
      value_factor = __float2half2_rn(tile.value_scale * unit_inverse);
      sums.clear();
      for (int i = 1;; ++i) {
        if constexpr (kSteps == 2) {
          step.template operator()<1>(i - 1, even, odd);
        } else {
          if (i == item.kv_tiles) {
            last_step(even);
            break;
          }
          put_away(i);
          step.template operator()<0>(i++, even, odd);
        }
        if (i == item.kv_tiles) {
          last_step(odd);
          break;
        }
        if (kSteps == 2) put_away(i);
        step.template operator()<0>(i, odd, even);
      }
      // Before the last products are there: its first QK runs beside what follows.
      more = next_item();
      take_products.template operator()<1>();
      // The totals are divided by these: they come in their unit.
      const auto unit_bits = static_cast<float>(127 - (__float_as_int(unit_inverse) >> 23));
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        rows.sum[r] *= unit_inverse;
        rows.reference[r] += unit_bits;
      }
    } else {
      sums.clear();
      mbarrier_arrive(places.queries_empty(slot));  // from every lane, as above
      more = next_item();
    }
    if (kLong && item.kv_tiles > first_away) sums.bring_back(&out);
    const float* biases = nullptr;
    if (tiles.query_biases != nullptr) {
      biases = tiles.query_biases + first_query<kQueryTile>(p, tiles, item) + row;
    }
    const RowInverses inverses = finish_sums(p, item, first_row, rows, biases);
    if (p.bf16) {
      sums.template stage<true>(inverses, out);
    } else {
      sums.template stage<false>(inverses, out);
    }
    store_staged<kDim>(p, item, first_row, out);
    wgmma_wait<0>();
    pin(logits);
  }
}

template <int kDim, bool kLong>
__global__ void __launch_bounds__(Groups<kDim>::kThreads, 1)
    sage2_kernel(const __grid_constant__ Problem p, const __grid_constant__ SageTiles tiles,
                 const Schedule schedule) {
  using Shared = SharedTiles<kDim>;
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  auto& shared = *reinterpret_cast<SharedTiles<kDim>*>(raw_shared);
  const Places<kDim> places(shared);
  if (threadIdx.x == 0) {
    constexpr int kReleases = 128 * Groups<kDim>::kConsumers;
    init_barriers(places.full(0), Shared::kStages, 1);
    init_barriers(places.queries_full(0), kQuerySlots, 1);
    init_barriers(places.items_full(0), kQuerySlots, 1);
    // Threads also read scales by themselves, so that every lane releases.
    init_barriers(places.empty(0), Shared::kStages, kReleases);
    init_barriers(places.queries_empty(0), kQuerySlots, kReleases);
    fence_barrier_init();
  }
  for (int i = threadIdx.x; i < Shared::kStages * Shared::kOnesBytes; i += blockDim.x) {
    shared.values[i / Shared::kOnesBytes][Shared::kTileBytes + i % Shared::kOnesBytes] = 0x38;
  }
  fence_proxy_async();
  __syncthreads();
  allow_next_kernel();
  const int warp_of_block = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0);
  const int group = warp_of_block / 4;
  if (group == 0) {
    set_fewer_registers<kProducerRegisters>();
    // By whole warps first: only then are these threads' numbers kept in uniform registers, without
    // which they spill.
    if (warp_of_block == 0) {
      if (threadIdx.x == 0) produce<kDim>(p, tiles, shared, places);
    } else if (warp_of_block == 1) {
      if (threadIdx.x == 32) schedule_items<kDim>(p, tiles, schedule, shared, places);
    }
  } else {
    set_more_registers<Groups<kDim>::kConsumerRegisters>();
    wait_for_previous_kernel();
    consume<kDim, kLong>(p, tiles, shared, places, group - 1, warp_of_block % 4);
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
