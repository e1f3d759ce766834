// How the Hopper sage2 kernel is divided: warp groups, shared memory, and which block of rows comes
// when.
#pragma once

#include <algorithm>
#include <cstddef>

#include "kernels/attention/problem.cuh"
#include "kernels/attention/sage_tiles.cuh"
#include "kernels/common/ptx.cuh"

namespace sagelm::kernels::sage2 {

constexpr int kKeyTile = kTileTokens;
constexpr int kProducerRegisters = 24;
constexpr int kQuerySlots = 2;

// Warp groups that compute, 64 query rows each: as many as the registers hold.
template <int kDim>
struct Groups {
  static constexpr int kConsumers = kDim == 128 ? 2 : 3;
  static constexpr int kConsumerRegisters = kDim == 128 ? 240 : 160;
  static constexpr int kQueryTile = 64 * kConsumers;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  // Arrivals that free a stage: one per consumer warp, since each warp reads all of a tile.
  static constexpr int kReleases = 4 * kConsumers;
};

template <int kDim>
struct SharedTiles {
  static constexpr int kStages = kDim == 128 ? 4 : 6;
  static constexpr int kQueryTile = Groups<kDim>::kQueryTile;
  static constexpr int kTileBytes = kKeyTile * kDim;

  alignas(1024) int8_t keys[kStages][kTileBytes];
  alignas(1024) uint8_t values[kStages][kTileBytes];
  alignas(1024) int8_t queries[kQuerySlots][kQueryTile * kDim];
  // Per warp: the sums of flushed tiles, [kDim / 8][32 lanes]; in the end the staged rows.
  union Out {
    float4 sums[kDim / 8][32];
    uint16_t rows[16][kDim + 8];  // padded against bank conflicts
  };
  alignas(128) Out out[4 * Groups<kDim>::kConsumers];
  alignas(16) float scales[kStages][kTileScales];
  uint64_t keys_full[kStages], keys_empty[kStages];
  uint64_t values_full[kStages], values_empty[kStages];
  uint64_t queries_full[kQuerySlots], queries_empty[kQuerySlots];
};

// Where things lie in shared memory, as the instructions want it: 32-bit addresses.
template <int kDim>
struct Places {
  using Shared = SharedTiles<kDim>;
  uint32_t base;

  __device__ explicit Places(const Shared& shared) {
    // Kept instead of computed again for every use.
    base = ptx::opaque(ptx::smem_address(&shared));
  }
  __device__ uint32_t keys(int s) const {
    return at(offsetof(Shared, keys), s * Shared::kTileBytes);
  }
  __device__ uint32_t values(int s) const {
    return at(offsetof(Shared, values), s * Shared::kTileBytes);
  }
  __device__ uint32_t queries(int s) const {
    return at(offsetof(Shared, queries), s * sizeof(Shared::queries[0]));
  }
  __device__ uint32_t scales(int s) const {
    return at(offsetof(Shared, scales), s * sizeof(Shared::scales[0]));
  }
  __device__ uint32_t keys_full(int s) const { return at(offsetof(Shared, keys_full), 8 * s); }
  __device__ uint32_t keys_empty(int s) const { return at(offsetof(Shared, keys_empty), 8 * s); }
  __device__ uint32_t values_full(int s) const { return at(offsetof(Shared, values_full), 8 * s); }
  __device__ uint32_t values_empty(int s) const {
    return at(offsetof(Shared, values_empty), 8 * s);
  }
  __device__ uint32_t queries_full(int s) const {
    return at(offsetof(Shared, queries_full), 8 * s);
  }
  __device__ uint32_t queries_empty(int s) const {
    return at(offsetof(Shared, queries_empty), 8 * s);
  }

 private:
  __device__ uint32_t at(size_t array, size_t offset) const {
    return base + static_cast<uint32_t>(array + offset);
  }
};

// A position in a ring of stages, with the parity of its next full barrier.
struct RingCursor {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// One unit of work: kQueryTile query rows of a head, one tile.
struct WorkItem {
  int b, head, kv_head, tile;
  int q_len, kv_len;
  int kv_tiles;    // key tiles that a row of this item sees
  int full_tiles;  // of them, those that all of its rows see in full

  // The key after the last one that query row `row` sees.
  __device__ int key_end(const Problem& p, int row) const {
    return p.causal ? min(kv_len, row + 1 + kv_len - q_len) : kv_len;
  }

  // The i-th tile to take. The first one sets the references of all rows, so it is one that all
  // rows see in full, if there is any; then come those with masks, then the others. Tile 0, where
  // attention sinks lie, is last: weights before it have then been rounded against their own size.
  __device__ int tile_at(int i) const {
    if (full_tiles == 0 || i > kv_tiles - full_tiles) return kv_tiles - 1 - i;
    return i == 0 ? full_tiles - 1 : kv_tiles - i;
  }
};

// Items that a head has room for.
template <int kDim>
__host__ __device__ inline int items_per_head(const SageTiles& tiles) {
  constexpr int kQueryTile = Groups<kDim>::kQueryTile;
  return (tiles.query_tiles * kTileTokens + kQueryTile - 1) / kQueryTile;
}

// Items in the order in which they are taken: heads in sections whose keys and values fit the L2
// cache together; within a section the longest rows of all heads first, so that the short ones fill
// the end. False past the last item; kv_tiles < 0 for a tile beyond its sequence.
struct Schedule {
  int section_heads;  // query heads (of all sequences) per section

  template <int kQueryTile>
  __device__ bool get(const Problem& p, int query_tiles, int index, WorkItem& item) const {
    const int heads = p.batch * p.num_heads;
    if (index >= heads * query_tiles) return false;
    const int section = index / (section_heads * query_tiles);
    const int first = section * section_heads;
    const int width = min(section_heads, heads - first);
    const int rest = index - first * query_tiles;
    const int sequence_head = first + rest % width;
    item.tile = query_tiles - 1 - rest / width;
    item.b = sequence_head / p.num_heads;
    item.head = sequence_head % p.num_heads;
    item.kv_head = item.head / (p.num_heads / p.num_kv_heads);
    item.q_len = p.q_len(item.b);
    item.kv_len = p.kv_len(item.b);
    const int rows = min(kQueryTile, item.q_len - item.tile * kQueryTile);
    if (rows <= 0) {
      item.kv_tiles = -1;
      return true;
    }
    const int last = item.tile * kQueryTile + rows - 1;
    item.kv_tiles = (max(0, item.key_end(p, last)) + kKeyTile - 1) / kKeyTile;
    item.full_tiles = max(0, item.key_end(p, item.tile * kQueryTile)) / kKeyTile;
    return true;
  }
};

// Index of an item's first row in the quantized queries.
template <int kQueryTile>
__device__ inline int64_t first_query(const Problem& p, const SageTiles& tiles,
                                      const WorkItem& item) {
  const int64_t head = static_cast<int64_t>(item.b) * p.num_heads + item.head;
  return head * tiles.query_tiles * kTileTokens + item.tile * kQueryTile;
}

}  // namespace sagelm::kernels::sage2
