// How the Hopper sage2 kernel is divided: warp groups and shared memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/attention/problem.cuh"
#include "kernels/attention/sage_tiles.cuh"
#include "kernels/attention/work_sm90.cuh"

namespace sagelm::kernels::sage2 {

using namespace hopper;

static_assert(kKeyTile == kTileTokens);
constexpr int kProducerRegisters = 24;

// Warp groups that compute, 64 query rows each: as many as the registers hold. At head size 64 they
// take a tile's keys in two steps, so that four of them fit.
template <int kDim>
struct Groups {
  static constexpr int kConsumers = kDim == 128 ? 2 : 4;
  static constexpr int kConsumerRegisters = kDim == 128 ? 240 : 112;
  static constexpr int kSteps = kDim == 128 ? 1 : 2;  // of a key tile
  static constexpr int kQueryTile = 64 * kConsumers;
  static constexpr int kThreads = 128 * (kConsumers + 1);
};

template <int kDim>
struct SharedTiles {
  static constexpr int kStages = kDim == 128 ? 4 : 6;
  static constexpr int kQueryTile = Groups<kDim>::kQueryTile;
  static constexpr int kTileBytes = kKeyTile * kDim;
  static constexpr int kOnesBytes = kKeyTile * 8;

  // A stage is what a step takes: the keys of a tile and the values of the one before it, which may
  // be the last of another item.
  alignas(1024) int8_t keys[kStages][kTileBytes];
  // Eight channels of ones in e4m3 follow: P times them is the sum of a row's weights.
  alignas(1024) uint8_t values[kStages][kTileBytes + kOnesBytes];
  alignas(1024) int8_t queries[kQuerySlots][kQueryTile * kDim];
  // Finished rows on their way out, per warp; padded against bank conflicts.
  alignas(128) uint16_t out[4 * Groups<kDim>::kConsumers][16][kDim + 8];
  // Of the keys' tile. Twice as many as stages: an arrival does not wait for loads on their way,
  // and products that read shared memory can hold those up until the copy engine has filled the
  // stage again; but who releases a stage twice has what it read before the first time.
  alignas(16) float scales[2 * kStages][kTileScales];
  alignas(16) float query_scales[kQuerySlots][kQueryTile];
  WorkItem items[kQuerySlots];  // of the queries; kv_tiles < 0 where there is no more
  uint64_t full[kStages], empty[kStages];
  uint64_t queries_full[kQuerySlots], queries_empty[kQuerySlots];
  uint64_t items_full[kQuerySlots];
};

template <int kDim>
struct Places : TilePlaces<SharedTiles<kDim>> {
  using Shared = SharedTiles<kDim>;
  static constexpr sm90::Swizzle kKeySwizzle =
      kDim == 128 ? sm90::Swizzle::k128B : sm90::Swizzle::k64B;
  uint32_t first_keys, first_values;  // low words of the descriptors of stage 0

  __device__ explicit Places(const Shared& shared) : TilePlaces<Shared>(shared) {
    // Kept as well.
    first_keys = ptx::opaque(sm90::wgmma_descriptor_low(this->keys(0)));
    first_values = ptx::opaque(sm90::wgmma_descriptor_low(values(0)));
  }
  __device__ uint32_t values(int s) const {
    return this->at(offsetof(Shared, values), s * sizeof(Shared::values[0]));
  }
  // As operands of wgmma, from key `first` of the tile on.
  __device__ uint64_t keys_operand(int s, int first) const {
    return sm90::wgmma_descriptor_of(first_keys + s * (Shared::kTileBytes / 16), kKeySwizzle) +
           first * kDim / 16;
  }
  __device__ uint64_t values_operand(int s, int first) const {
    constexpr uint32_t kStageStep = sizeof(Shared::values[0]) / 16;
    return sm90::wgmma_descriptor_of(first_values + s * kStageStep, sm90::Swizzle::k128B) +
           first / 16;
  }
  // Of the tile at a stage in the pass of the ring in which its full barriers have that parity.
  __device__ static int scales_slot(int stage, uint32_t parity) {
    return stage + static_cast<int>(parity) * Shared::kStages;
  }
  __device__ uint32_t full(int s) const { return this->at(offsetof(Shared, full), 8 * s); }
  __device__ uint32_t empty(int s) const { return this->at(offsetof(Shared, empty), 8 * s); }
  __device__ uint32_t items_full(int s) const {
    return this->at(offsetof(Shared, items_full), 8 * s);
  }
  __device__ uint32_t query_scales(int s) const {
    return this->at(offsetof(Shared, query_scales), s * sizeof(Shared::query_scales[0]));
  }
};

// Items that a head has room for.
template <int kDim>
__host__ __device__ inline int items_per_head(const SageTiles& tiles) {
  constexpr int kQueryTile = Groups<kDim>::kQueryTile;
  return (tiles.query_tiles * kTileTokens + kQueryTile - 1) / kQueryTile;
}

// Index of an item's first row in the quantized queries.
template <int kQueryTile>
__device__ inline int64_t first_query(const Problem& p, const SageTiles& tiles,
                                      const WorkItem& item) {
  return tiles.first_query(p.cu_q_lens, item.b, item.head) + item.tile * kQueryTile;
}

// Index of an item's key tile i among those of its memory; of a tile behind the pages, -1 minus it.
__device__ inline int tile_place(const Problem& p, const SageTiles& tiles, const WorkItem& item,
                                 int i) {
  const int sequence_head = item.b * p.num_kv_heads + item.kv_head;
  if (tiles.page_table == nullptr) return sequence_head * tiles.kv_tiles + i;
  if ((i + 1) * kTileTokens > item.kv_len) return -1 - sequence_head;
  const int64_t at = static_cast<int64_t>(item.b) * tiles.page_table_stride + i;
  return tiles.page_table[at] * p.num_kv_heads + item.kv_head;
}

// Likewise of the tile's keys and scales, whose values are at `place`.
__device__ inline int key_tile_place(const Problem& p, const SageTiles& tiles, const WorkItem& item,
                                     int i, int place) {
  if (!tiles.unpacked_keys || place < 0) return place;
  return (item.b * p.num_kv_heads + item.kv_head) * tiles.kv_tiles + i;
}

// Element `place` of pages or, where it is negative, of tails; elements of kSize T.
template <int kSize, typename T>
__device__ inline const T* tile_at_place(const T* pages, const T* tails, int place) {
  return place >= 0 ? pages + static_cast<int64_t>(place) * kSize
                    : tails + static_cast<int64_t>(-1 - place) * kSize;
}

}  // namespace sagelm::kernels::sage2
