// What the persistent Hopper attention kernels share: places in shared memory, the rings of stages
// between the warp group that loads and those that compute, and which block of rows comes when.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>

#include "kernels/attention/problem.cuh"
#include "kernels/common/ptx.cuh"
#include "kernels/common/sm90.cuh"

namespace sagelm::kernels::hopper {

using sm90::RingCursor;

constexpr int kKeyTile = 128;  // keys of a stage
constexpr int kQuerySlots = 2;

// Where things lie in shared memory, as the instructions want it: 32-bit addresses.
template <typename Shared>
struct TilePlaces {
  uint32_t base;

  __device__ explicit TilePlaces(const Shared& shared) {
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

 protected:
  __device__ uint32_t at(size_t array, size_t offset) const {
    return base + static_cast<uint32_t>(array + offset);
  }
};

// For one thread, before others use it: barriers, one behind the other, that so many arrivals
// complete.
__device__ inline void init_barriers(uint32_t first, int count, int arrivals) {
  for (int i = 0; i < count; ++i) sm90::mbarrier_init(first + 8 * i, arrivals);
}

// Few rows behind many keys: so many items share a sequence's keys as would not fill the device by
// its rows alone, and are merged afterwards. That depends on the sequence, not on its neighbours.
constexpr int kFillingItems = 132;  // the multiprocessors of an H200
constexpr int kLeastPartTiles = 8;
__host__ __device__ inline int key_parts(int num_heads, int query_tiles, int key_tiles) {
  const int by_rows = query_tiles > 0 ? kFillingItems / (num_heads * query_tiles) : 1;
  const int by_keys = key_tiles / kLeastPartTiles;
  const int parts = by_rows < by_keys ? by_rows : by_keys;
  return parts > 1 ? parts : 1;
}
// Rows of all parts of such a sequence at most.
inline int most_part_rows(int num_heads, int query_tile) {
  return kFillingItems / num_heads * query_tile;
}

// One unit of work: a tile of a head's query rows, and a part of the keys that they see.
struct WorkItem {
  int b, head, kv_head, tile;
  int q_len, kv_len;
  int part, parts;
  int first_tile;      // of the part's key tiles
  int kv_tiles;        // of them, those that a row of this item sees
  int full_tiles;      // likewise, that all of its rows see in full, or first of all
  uint16_t* out;       // of row 0 of the head and the part
  int64_t out_stride;  // from a row to the next, in elements

  // The key after the last one that query row `row` sees.
  __device__ int key_end(const Problem& p, int row) const {
    return p.causal ? min(kv_len, row + 1 + kv_len - q_len) : kv_len;
  }

  // The i-th tile to take. The first one sets the references of all rows, so it is one that all
  // rows see in full, if there is any; then come those with masks, then the others. Tile 0, where
  // attention sinks lie, is last: weights before it have then been rounded against their own size.
  __device__ int tile_at(int i) const {
    if (full_tiles == 0 || i > kv_tiles - full_tiles) return first_tile + kv_tiles - 1 - i;
    return first_tile + (i == 0 ? full_tiles - 1 : kv_tiles - i);
  }
  // Index in Problem::part_lse of a query row, if it is one of several parts.
  __device__ int64_t part_place(const Problem& p, int row) const {
    return (static_cast<int64_t>(b) * p.part_rows + part * q_len + row) * p.num_heads + head;
  }
};

// Items in the order in which they are taken: heads in sections whose keys and values fit the L2
// cache together; within a section the longest rows of all heads first, so that the short ones fill
// the end. Blocks take them round by round, where the rounds are few every other one from the last
// block to the first: a block's items then add up to much the same.
struct Schedule {
  static constexpr int kFewRounds = 32;

  int section_heads;  // query heads (of all sequences) per section

  // Which rows of which head item `index` is, and of which part of their keys: what takes no data
  // that other kernels write, so that a block finds its first item while the one before it ends.
  // False past the last item.
  __device__ bool find(const Problem& p, int query_tiles, int index, WorkItem& item) const {
    const int most_parts = max(1, p.key_parts), head_items = query_tiles * most_parts;
    const int heads = p.batch * p.num_heads;
    const int blocks = static_cast<int>(gridDim.x), round = index / blocks;
    const bool few = heads * head_items <= kFewRounds * blocks;
    if (few && round % 2 == 1) index = (2 * round + 1) * blocks - 1 - index;
    if (index >= heads * head_items) return false;
    const int section = index / (section_heads * head_items);
    const int first = section * section_heads;
    const int width = min(section_heads, heads - first);
    const int rest = index - first * head_items;
    const int sequence_head = first + rest % width;
    item.tile = query_tiles - 1 - rest / width / most_parts;
    item.part = rest / width % most_parts;
    item.b = sequence_head / p.num_heads;
    item.head = sequence_head % p.num_heads;
    item.kv_head = item.head / (p.num_heads / p.num_kv_heads);
    return true;
  }

  // The rest of an item that has been found. kv_tiles < 0 for a tile or a part beyond its sequence.
  template <int kQueryTile>
  __device__ void measure(const Problem& p, WorkItem& item) const {
    item.q_len = p.q_len(item.b);
    item.kv_len = p.kv_len(item.b);
    item.parts = 1;
    item.first_tile = 0;
    const int rows = min(kQueryTile, item.q_len - item.tile * kQueryTile);
    if (rows <= 0) {
      item.kv_tiles = -1;
      return;
    }
    const int last = item.tile * kQueryTile + rows - 1;
    item.kv_tiles = (max(0, item.key_end(p, last)) + kKeyTile - 1) / kKeyTile;
    // Where items are longer than key tiles, a head's first one sees two, none of them in full: its
    // rows see more of the first.
    constexpr int kLeastFull = kQueryTile > kKeyTile ? 1 : 0;
    item.full_tiles = max(kLeastFull, max(0, item.key_end(p, item.tile * kQueryTile)) / kKeyTile);
    if (p.key_parts > 1) {
      const int tiles = (item.kv_len + kKeyTile - 1) / kKeyTile;
      item.parts = key_parts(p.num_heads, (item.q_len + kQueryTile - 1) / kQueryTile, tiles);
      const int each = (tiles + item.parts - 1) / item.parts;
      item.first_tile = item.part * each;
      item.kv_tiles = min(each, max(0, item.kv_tiles - item.first_tile));
      item.full_tiles = min(each, max(kLeastFull, item.full_tiles - item.first_tile));
      if (item.part >= item.parts) item.kv_tiles = -1;
    }
    if (item.parts > 1) {
      item.out = static_cast<uint16_t*>(p.part_out) + item.part_place(p, 0) * p.head_dim;
      item.out_stride = static_cast<int64_t>(p.num_heads) * p.head_dim;
    } else {
      item.out = static_cast<uint16_t*>(p.out.data) + p.q_offset(p.out, item.b, 0, item.head);
      item.out_stride = p.out.token_stride;
    }
  }
};

// For a warp group that computes: waits for the next item, takes its queries by take_queries(place)
// and issues its first QK by issue_qk(keys), so that it runs beside what follows; the keys are
// those at the ring's stage, there when keys_full is. False past the last item, of which it takes
// whatever lies there.
template <typename Shared, typename Take, typename Issue>
__device__ __forceinline__ bool begin_item(const Shared& shared, const TilePlaces<Shared>& places,
                                           const RingCursor& ring, uint32_t keys_full,
                                           const RingCursor& query_ring, const Take& take_queries,
                                           const Issue& issue_qk) {
  const int slot = query_ring.stage;
  sm90::mbarrier_wait(places.queries_full(slot), query_ring.parity);
  const int kv_tiles = shared.items[slot].kv_tiles;
  uint32_t keys = places.queries(slot);  // if there are none: anything that nobody writes
  take_queries(keys);
  if (kv_tiles > 0) {
    sm90::mbarrier_wait(keys_full, ring.parity);
    keys = places.keys(ring.stage);
  }
  issue_qk(keys);
  return kv_tiles >= 0;
}

// How to launch a persistent kernel of so many items, of all keys each, whose keys and values take
// kv_head_bytes per key head; lets it have its shared memory.
struct Launch {
  Schedule schedule;
  int grid;
};
inline cudaError_t plan_launch(const void* kernel, int shared_bytes, const Problem& p,
                               int64_t kv_head_bytes, int64_t items, Launch& launch) {
  int device = 0, processors = 0, l2_bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, device);
  }
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  }
  if (error != cudaSuccess) return error;
  items *= std::max(1, p.key_parts);
  launch.grid = static_cast<int>(std::min<int64_t>(items, processors));
  // Sections of heads whose keys and values fill at most about 3/4 of the L2 cache, if they can be
  // even numbers of rounds; else about half of it.
  const int64_t heads = int64_t{p.batch} * p.num_heads, group = p.num_heads / p.num_kv_heads;
  const int64_t heads_in_l2 = l2_bytes / std::max<int64_t>(1, kv_head_bytes) * group;
  const int64_t two_rounds = int64_t{2} * processors;
  const int64_t even_heads =
      std::lcm(two_rounds / std::gcd(two_rounds, std::max<int64_t>(1, items / heads)), group);
  if (even_heads <= heads_in_l2 * 3 / 4) {
    launch.schedule.section_heads = static_cast<int>(even_heads);
  } else {
    const int64_t sections =
        (heads + std::max(group, heads_in_l2 / 2) - 1) / std::max(group, heads_in_l2 / 2);
    launch.schedule.section_heads =
        static_cast<int>((heads / group + sections - 1) / sections * group);
  }
  return cudaSuccess;
}

}  // namespace sagelm::kernels::hopper
