#include <cstdint>

#include "kernels/attention/fp16_sm90.h"
#include "kernels/attention/fp16_softmax_sm90.cuh"
#include "kernels/attention/recipe.h"
#include "kernels/attention/rows_sm90.cuh"
#include "kernels/attention/work_sm90.cuh"
#include "kernels/common/ptx.cuh"
#include "kernels/common/sm90.cuh"
#include "kernels/common/tensor_sm90.cuh"
#include "kernels/ops/launch.cuh"

namespace sagelm::kernels {
namespace {

using namespace sm90;
using namespace fp16;

constexpr int kConsumers = 2;  // warp groups that compute, 64 query rows each
constexpr int kQueryTile = 64 * kConsumers;
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kProducerRegisters = 24;
constexpr int kConsumerRegisters = 240;
// What a block has is what it was launched with; who asks for more waits for ever.
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
              65536 / kThreads / 8 * 8 * (1 + kConsumers));
constexpr int kReleases = 4 * kConsumers;  // one per consumer warp: each reads all of a tile

// A tile is 128 rows in blocks of 64 columns: [kDim / 64][128 rows][128 bytes], the 16-byte chunks
// of a row swizzled as the 128-byte mode wants them.
constexpr int kTileRows = 128;
constexpr int kRowBytes = 128;
constexpr int kBlockBytes = kTileRows * kRowBytes;
static_assert(kQueryTile == kTileRows && kKeyTile == kTileRows);
__device__ inline uint32_t chunk_at(uint32_t tile, int row, int chunk) {
  return tile + chunk / 8 * kBlockBytes + row * kRowBytes + ((chunk ^ row) & 7) * 16;
}

constexpr int kFirstTurn = 1;  // named barrier of the first consumers' turn; others follow

template <int kDim>
struct SharedTiles {
  static constexpr int kStages = kDim == 128 ? 2 : 4;
  static constexpr int kTileBytes = kDim / 64 * kBlockBytes;

  alignas(1024) uint8_t keys[kStages][kTileBytes];
  alignas(1024) uint8_t values[kStages][kTileBytes];
  alignas(1024) uint8_t queries[kQuerySlots][kTileBytes];
  alignas(16) uint16_t out[4 * kConsumers][16][kDim + 8];  // per warp; padded against conflicts
  WorkItem items[kQuerySlots];  // of the queries; kv_tiles < 0 where there is no more
  uint64_t keys_full[kStages], keys_empty[kStages];
  uint64_t values_full[kStages], values_empty[kStages];
  uint64_t queries_full[kQuerySlots], queries_empty[kQuerySlots];
};

template <int kDim>
using Places = TilePlaces<SharedTiles<kDim>>;

// How a tensor's tiles are fetched: in boxes of 64 columns and so many rows, by a map of
// [sequences or pages, heads, tokens, head_dim].
struct Source {
  CUtensorMap map;
  int box_rows;  // 0 if there is no such map
  int end;       // of every sequence, where the map's rows become zeros; -1 if it has no such end
};
struct Sources {
  Source q, k, v;
  // Whether lanes of a warp may copy a tile themselves: each of them then arrives for every tile.
  bool by_lanes;

  __device__ int fills() const { return by_lanes ? 32 : 1; }
};

template <int kDim, bool kBf16>
__device__ inline void issue_qk(float (&logits)[64], const uint32_t (&queries)[kDim / 4],
                                uint32_t keys) {
  const uint64_t b = wgmma_descriptor(keys, Swizzle::k128B);
  wgmma_fence();
  wgmma_half<kBf16, true>(logits, queries, b);
#pragma unroll
  for (int k = 1; k < kDim / 16; ++k) {
    wgmma_half<kBf16, false>(logits, queries + 4 * k, b + (k / 4 * (kBlockBytes / 16) + k % 4 * 2));
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

// Fills a tile with rows [first, first + 128) of head `head` of sequence b; rows from `length` on
// and columns from head_dim on become zeros, whatever lies there. 0 <= first < length. By all of
// the producer warp, whose arrivals at the tile's barrier are Sources::fills().
template <int kDim, bool kQueries>
__device__ inline void load_tile(const Problem& p, const Tensor& x, const Source& source, int b,
                                 int head, int first, int length, uint32_t to, uint32_t full,
                                 bool by_lanes) {
  if (source.box_rows > 0 && (first + kTileRows <= length || length == source.end)) {
    if (threadIdx.x != 0) {
      if (by_lanes) mbarrier_arrive(full);
      return;
    }
    mbarrier_expect_bytes(full, SharedTiles<kDim>::kTileBytes);
    for (int i = 0; i < kTileRows; i += source.box_rows) {
      int sequence = b, token = first + i;
      if (!kQueries && p.page_table != nullptr) {
        const int page = token / p.page_tokens;
        sequence = p.page_table[static_cast<int64_t>(b) * p.page_table_stride + page];
        token -= page * p.page_tokens;
      } else if (const int32_t* starts = kQueries ? p.cu_q_lens : p.cu_kv_lens; starts != nullptr) {
        sequence = 0;
        token += starts[b];
      }
#pragma unroll
      for (int block = 0; block < kDim / 64; ++block) {
        tensor_load(to + block * kBlockBytes + i * kRowBytes, source.map, sequence, head, token,
                    64 * block, full);
      }
    }
    return;
  }
  for (int row = threadIdx.x; row < kTileRows; row += 32) {
    const int token = first + row, last = min(token, length - 1);
    const uint16_t* from =
        static_cast<const uint16_t*>(x.data) +
        (kQueries ? p.q_offset(x, b, last, head) : p.kv_offset(x, b, last, head));
    for (int chunk = 0; chunk < kDim / 8; ++chunk) {
      const bool present = token < length && chunk * 8 < p.head_dim;
      ptx::copy_async(chunk_at(to, row, chunk), from + (present ? chunk * 8 : 0), present);
    }
  }
  ptx::commit_copies();
  ptx::wait_copies<0>();
  // Such copies are written as ordinary stores are.
  fence_proxy_async();
  mbarrier_arrive(full);
}

// By one warp.
template <int kDim>
__device__ void produce(const Problem& p, const Sources& sources, const Schedule& schedule,
                        int query_tiles, SharedTiles<kDim>& shared, const Places<kDim>& places) {
  constexpr int kStages = SharedTiles<kDim>::kStages;
  int tiles = 0, slots = 0;  // of keys and of queries, loaded so far
  // Waits for the stage of the n-th tile, of a ring of so many stages, to be empty.
  const auto wait_empty = [](uint32_t empty, int n, int stages) {
    mbarrier_wait_idle(empty, n / stages % 2 ^ 1);
    __syncwarp();  // so that none falls back by a phase
  };
  WorkItem item = {};
  for (int index = blockIdx.x; schedule.find(p, query_tiles, index, item); index += gridDim.x) {
    wait_for_previous_kernel();  // with the first item at hand
    schedule.measure<kQueryTile>(p, item);
    if (item.kv_tiles < 0) continue;
    const int slot = slots % kQuerySlots;
    wait_empty(places.queries_empty(slot), slots++, kQuerySlots);
    if (threadIdx.x == 0) shared.items[slot] = item;
    load_tile<kDim, true>(p, p.q, sources.q, item.b, item.head, item.tile * kQueryTile, item.q_len,
                          places.queries(slot), places.queries_full(slot), sources.by_lanes);
    // In the order of their use: keys of a tile, then values of the tile before.
    for (int i = 0; i <= item.kv_tiles; ++i) {
      if (i < item.kv_tiles) {
        const int stage = tiles % kStages;
        wait_empty(places.keys_empty(stage), tiles++, kStages);
        load_tile<kDim, false>(p, p.k, sources.k, item.b, item.kv_head, item.tile_at(i) * kKeyTile,
                               item.kv_len, places.keys(stage), places.keys_full(stage),
                               sources.by_lanes);
      }
      if (i > 0) {
        const int n = i < item.kv_tiles ? tiles - 2 : tiles - 1, stage = n % kStages;
        wait_empty(places.values_empty(stage), n, kStages);
        load_tile<kDim, false>(p, p.v, sources.v, item.b, item.kv_head,
                               item.tile_at(i - 1) * kKeyTile, item.kv_len, places.values(stage),
                               places.values_full(stage), sources.by_lanes);
      }
    }
  }
  const int slot = slots % kQuerySlots;
  wait_empty(places.queries_empty(slot), slots, kQuerySlots);
  if (threadIdx.x == 0) {
    item.kv_tiles = -1;
    shared.items[slot] = item;
  }
  if (threadIdx.x == 0 || sources.by_lanes) mbarrier_arrive(places.queries_full(slot));
}

template <int kDim, bool kBf16>
__device__ void consume(const Problem& p, SharedTiles<kDim>& shared, const Places<kDim>& places,
                        int group) {
  using Shared = SharedTiles<kDim>;
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane >> 2, c = lane & 3;
  const int row = group * 64 + warp * 16;  // the warp's first of an item
  const float scale = p.softmax_scale * recipe::kLog2E;
  RingCursor ring, query_ring;
  uint32_t
      queries[kDim / 4];  // from shared memory once per item, which saves a third of QK's reads
  float logits[64];
  float products[kDim / 2];
  uint32_t even[32], odd[32];  // P of a tile and of the next
  // At head size 64 the two warp groups take turns to issue a step's products, so that those of one
  // run while the other is at its softmax. Both have the same steps; the first one begins.
  constexpr bool kTurns = kDim == 64;
  constexpr int kTakers = 128 * kConsumers;
  const int turn = kFirstTurn + group, next_turn = kFirstTurn + 1 - group;
  if (kTurns && group == 1) named_barrier_arrive(next_turn, kTakers);
  const auto take_queries = [&](uint32_t tile) {
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      uint32_t chunks[4];
      ptx::load_matrices(chunks, chunk_at(tile, row + lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int i = 0; i < 4; ++i) queries[4 * k + i] = chunks[i];
    }
  };
  const auto next_item = [&] {
    return begin_item(shared, places, ring, places.keys_full(ring.stage), query_ring, take_queries,
                      [&](uint32_t keys) { issue_qk<kDim, kBf16>(logits, queries, keys); });
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
    // Keys from there on are masked, relative to this thread's first of tile 0.
    const int row_end[2] = {item.key_end(p, first_row + g) - 2 * c,
                            item.key_end(p, first_row + g + 8) - 2 * c};

    const auto release = [&](uint32_t barrier) {
      __syncwarp();
      if (lane == 0) mbarrier_arrive(barrier);
    };
    // With the logits of tile j, which is at the ring's stage.
    const auto take_logits = [&](int j) {
      pin(logits);
      release(places.keys_empty(ring.stage));
      const int ends[2] = {row_end[0] - j * kKeyTile, row_end[1] - j * kKeyTile};
      if (ends[0] <= kLastKey) mask(logits, ends);  // row g sees no more than row g + 8
    };
    const auto add_sums = [&](const float(&sums)[2]) {
      rows.sum[0] += sums[0];
      rows.sum[1] += sums[1];
    };
    const auto finish_values = [&](int stage) {
      wgmma_wait<0>();
      pin(products);
      release(places.values_empty(stage));
    };
    // From P of a tile to P of the i-th, whose softmax runs beside the products with the values of
    // the tile before.
    const auto step = [&](int i, const uint32_t(&from)[32], uint32_t(&to)[32]) {
      const RingCursor now = ring;
      ring.advance(Shared::kStages);
      mbarrier_wait(places.keys_full(ring.stage), ring.parity);
      if (kTurns) {
        mbarrier_wait(places.values_full(now.stage), now.parity);
        named_barrier_wait(turn, kTakers);
      }
      issue_qk<kDim, kBf16>(logits, queries, places.keys(ring.stage));
      if (!kTurns) mbarrier_wait(places.values_full(now.stage), now.parity);
      issue_pv<kDim, kBf16>(products, from, places.values(now.stage), i > 1);
      if (kTurns) named_barrier_arrive(next_turn, kTakers);
      wgmma_wait<1>();
      take_logits(item.tile_at(i));
      float sums[2];
      const uint32_t most = exponentiate<kBf16>(logits, to, scale, rows, sums);
      finish_values(now.stage);
      if (__any_sync(0xFFFFFFFFu, near_most<kBf16>(most))) {
        move_references<kBf16>(logits, to, scale, rows, products);
        exponentiate<kBf16>(logits, to, scale, rows, sums);
      }
      add_sums(sums);
    };
    const auto last_step = [&](const uint32_t(&from)[32]) {
      mbarrier_wait(places.values_full(ring.stage), ring.parity);
      issue_pv<kDim, kBf16>(products, from, places.values(ring.stage), item.kv_tiles > 1);
      finish_values(ring.stage);
      ring.advance(Shared::kStages);
    };

    if (item.kv_tiles > 0) {
      take_logits(item.tile_at(0));
      rows.reference[0] = reference_of(logits, 0, scale);
      rows.reference[1] = reference_of(logits, 1, scale);
      float sums[2];
      exponentiate<kBf16>(logits, even, scale, rows, sums);
      add_sums(sums);
      for (int i = 1;;) {
        if (i == item.kv_tiles) {
          last_step(even);
          break;
        }
        step(i++, even, odd);
        if (i == item.kv_tiles) {
          last_step(odd);
          break;
        }
        step(i++, odd, even);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i) products[i] = 0.0f;
    }
    more = next_item();  // whose first QK runs beside what follows
    // Read again: most of it has not been kept through the loop.
    const WorkItem stored = shared.items[slot];
    store_rows<kDim>(p, stored, stored.tile * kQueryTile + row, rows, products,
                     shared.out[group * 4 + warp], nullptr);
    mbarrier_arrive(places.queries_empty(slot));  // from every lane: all of them have read it
    wgmma_wait<0>();
    pin(logits);
  }
}

template <int kDim, bool kBf16>
__global__ void __launch_bounds__(kThreads, 1)
    fp16_kernel(const __grid_constant__ Problem p, const __grid_constant__ Sources sources,
                const Schedule schedule, int query_tiles) {
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  auto& shared = *reinterpret_cast<SharedTiles<kDim>*>(raw_shared);
  const Places<kDim> places(shared);
  if (threadIdx.x == 0) {
    // Every lane releases queries, which it has read.
    constexpr int kStages = SharedTiles<kDim>::kStages;
    for (const uint32_t full : {places.keys_full(0), places.values_full(0)}) {
      init_barriers(full, kStages, sources.fills());
    }
    for (const uint32_t empty : {places.keys_empty(0), places.values_empty(0)}) {
      init_barriers(empty, kStages, kReleases);
    }
    init_barriers(places.queries_full(0), kQuerySlots, sources.fills());
    init_barriers(places.queries_empty(0), kQuerySlots, 32 * kReleases);
    fence_barrier_init();
  }
  __syncthreads();
  allow_next_kernel();
  const int group = threadIdx.x / 128;
  if (group == 0) {
    set_fewer_registers<kProducerRegisters>();
    if (threadIdx.x < 32) produce<kDim>(p, sources, schedule, query_tiles, shared, places);
  } else {
    set_more_registers<kConsumerRegisters>();
    wait_for_previous_kernel();
    consume<kDim, kBf16>(p, shared, places, group - 1);
  }
}

// Describes tensors of so many tokens (of a sequence or page), heads and sequences or pages.
Source describe(const Problem& p, const Tensor& x, int tokens, int heads, int sequences, int end,
                int box_rows) {
  Source source = {{}, box_rows, end};
  const auto unsign = [](int64_t size) { return static_cast<cuuint64_t>(size); };
  const cuuint64_t sizes[4] = {unsign(p.head_dim), unsign(tokens), unsign(heads),
                               unsign(sequences)};
  // Of a single one there is no stride, whatever stands there.
  const auto stride = [&](int count, int64_t elements) {
    return unsign(count > 1 ? 2 * elements : 2 * x.token_stride);
  };
  const cuuint64_t strides[3] = {unsign(2 * x.token_stride), stride(heads, x.head_stride),
                                 stride(sequences, x.batch_stride)};
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUtensorMapDataType type =
      p.bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  // What cannot be described, as strides that are no multiples of 16 bytes, is copied otherwise.
  if (encode_tiled() == nullptr ||
      encode_tiled()(&source.map, type, 4, x.data, sizes, strides, box, steps,
                     CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                     CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                     CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS) {
    source.box_rows = 0;
  }
  return source;
}

Sources describe(const Problem& p) {
  const auto describe_kv = [&](const Tensor& x) {
    if (p.page_table != nullptr) {
      int box_rows = kTileRows;
      while (p.page_tokens % box_rows != 0) box_rows /= 2;
      return describe(p, x, p.page_tokens, p.num_kv_heads, INT32_MAX, -1, box_rows);
    }
    if (p.cu_kv_lens != nullptr) {
      return describe(p, x, INT32_MAX, p.num_kv_heads, 1, -1, kTileRows);
    }
    return describe(p, x, p.max_kv_len, p.num_kv_heads, p.batch, p.max_kv_len, kTileRows);
  };
  const Source q =
      p.cu_q_lens != nullptr
          ? describe(p, p.q, INT32_MAX, p.num_heads, 1, -1, kTileRows)
          : describe(p, p.q, p.max_q_len, p.num_heads, p.batch, p.max_q_len, kTileRows);
  const Source k = describe_kv(p.k), v = describe_kv(p.v);
  const auto whole = [](const Source& x) { return x.box_rows > 0 && x.end >= 0; };
  return {q, k, v, p.kv_lens != nullptr || !whole(q) || !whole(k) || !whole(v)};
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
                            p, describe(p), launch.schedule, query_tiles);
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
