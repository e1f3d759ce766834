// docs/hopper-kernel.md tells how this kernel came to be as it is, with measurements.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "kernels/attention/recipe.h"
#include "kernels/attention/sage2_sm90.h"
#include "kernels/attention/sage_quantize_sm90.h"
#include "kernels/common/ptx.cuh"
#include "kernels/common/sm90.cuh"

namespace sagelm::kernels {
namespace {

using namespace sm90;

constexpr int kConsumers = 2;  // warp groups that compute, 64 query rows each
constexpr int kQueryTile = 64 * kConsumers;
constexpr int kKeyTile = kTileTokens;
constexpr int kThreads = 128 * (kConsumers + 1);
constexpr int kQuerySlots = 2;
constexpr int kConsumerRegisters = 240;
constexpr int kProducerRegisters = 24;
// Arrivals that free a stage: one per consumer warp, since each warp reads all of a tile.
constexpr int kReleases = 4 * kConsumers;
static_assert(kQueryTile == kTileTokens);

// Running maxima are raised only when a logit exceeds them by this many bits, which makes rescaling
// rare; P is scaled by so much less that it cannot exceed e4m3's range.
constexpr float kSlack = 2.0f;
constexpr float kProbabilityBits = recipe::kLog2E4m3Max - kSlack;
// Finite, so that no difference of two of them is NaN. A row's maximum starts above a masked logit:
// a row that has seen no key yet has P = 0.
constexpr float kMasked = -1e30f;
constexpr float kNoKeyYet = -1e29f;

template <int kDim>
struct SharedTiles {
  static constexpr int kStages = kDim == 128 ? 4 : 6;
  static constexpr int kTileBytes = kKeyTile * kDim;

  alignas(1024) int8_t keys[kStages][kTileBytes];
  alignas(1024) uint8_t values[kStages][kTileBytes];
  alignas(1024) int8_t queries[kQuerySlots][kTileBytes];
  alignas(1024) uint16_t out[4 * kConsumers][16][kDim + 8];  // per warp; padded against conflicts
  alignas(16) float scales[kStages][kTileScales];
  uint64_t keys_full[kStages], keys_empty[kStages];
  uint64_t values_full[kStages], values_empty[kStages];
  uint64_t queries_full[kQuerySlots], queries_empty[kQuerySlots];
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

// One unit of work: 128 query rows of a head.
struct WorkItem {
  int b, head, kv_head, tile;
  int q_len, kv_len;
  int kv_tiles;  // key tiles that a row of this item sees

  // The key after the last one that query row `row` sees.
  __device__ int key_end(const Problem& p, int row) const {
    return p.causal ? min(kv_len, row + 1 + kv_len - q_len) : kv_len;
  }
};

// Items in the order in which they are taken: heads in sections whose keys and values fit the L2
// cache together; within a section the longest rows of all heads first, so that the short ones fill
// the end. False past the last item; kv_tiles < 0 for a tile beyond its sequence.
struct Schedule {
  int section_heads;  // query heads (of all sequences) per section

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
    return true;
  }
};

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
  return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}

// What a consumer thread carries along its two query rows, g and g + 8 of its warp's 16.
template <int kDim>
struct RowState {
  float out[kDim / 2];
  float largest[2];  // running maximum of logits, in bits; shared by the row's four threads
  float sum[2];      // of this thread's columns
};

// Turns logits into P: updates maxima and sums, rescales the output where a maximum rose. `scale`
// turns integers to bits for each row. ends: keys from there on are masked, relative to the first
// key of this thread (4c of the tile).
template <int kDim, bool kMask>
__device__ inline void softmax(int32_t (&logits)[64], uint32_t (&p)[16], RowState<kDim>& rows,
                               const float (&scale)[2], const int (&ends)[2]) {
  float tile_max[2];
  if constexpr (kMask) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = kMasked;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          int32_t& slot = logits[4 * j + 2 * r + e];
          const int key = 16 * (j >> 1) + 2 * (j & 1) + e;
          const float bits = key < ends[r] ? static_cast<float>(slot) * scale[r] : kMasked;
          most = fmaxf(most, bits);
          slot = __float_as_int(bits);
        }
      }
      tile_max[r] = most;
    }
  } else {
    // The scale is positive, so the largest integer is the largest logit of this thread.
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int32_t most = max(logits[2 * r], logits[2 * r + 1]);
#pragma unroll
      for (int j = 1; j < 16; ++j) {
        most = __vimax3_s32(most, logits[4 * j + 2 * r], logits[4 * j + 2 * r + 1]);
      }
      tile_max[r] = static_cast<float>(most) * scale[r];
    }
  }
  bool raised = false;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    tile_max[r] = quad_max(tile_max[r]);
    raised |= tile_max[r] > rows.largest[r] + kSlack;
  }
  if (__any_sync(0xFFFFFFFFu, raised)) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (tile_max[r] <= rows.largest[r] + kSlack) tile_max[r] = rows.largest[r];
      const float factor = ptx::exp2_fast(rows.largest[r] - tile_max[r]);
      rows.largest[r] = tile_max[r];
      rows.sum[r] *= factor;
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j) {
        rows.out[4 * j + 2 * r] *= factor;
        rows.out[4 * j + 2 * r + 1] *= factor;
      }
    }
  }
  const float offset[2] = {rows.largest[0] - kProbabilityBits, rows.largest[1] - kProbabilityBits};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float x[16];
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      const int r = (k >> 1) & 1;
      const int32_t slot = logits[16 * i + k];
      const float exponent = kMask ? __int_as_float(slot) - offset[r]
                                   : fmaf(static_cast<float>(slot), scale[r], -offset[r]);
      x[k] = ptx::exp2_fast(exponent);
      rows.sum[r] += x[k];
    }
    p[4 * i] = ptx::to_e4m3(x[0], x[1], x[4], x[5]);
    p[4 * i + 1] = ptx::to_e4m3(x[2], x[3], x[6], x[7]);
    p[4 * i + 2] = ptx::to_e4m3(x[8], x[9], x[12], x[13]);
    p[4 * i + 3] = ptx::to_e4m3(x[10], x[11], x[14], x[15]);
  }
}

template <int kDim>
__device__ inline void issue_qk(int32_t (&logits)[64], const int8_t* queries, const int8_t* keys) {
  constexpr Swizzle kSwizzle = kDim == 128 ? Swizzle::k128B : Swizzle::k64B;
  const uint64_t a = wgmma_descriptor(queries, kSwizzle);
  const uint64_t b = wgmma_descriptor(keys, kSwizzle);
  wgmma_fence();
  wgmma_s8<true>(logits, a, b);
#pragma unroll
  for (int k = 1; k < kDim / 32; ++k) wgmma_s8<false>(logits, a + 2 * k, b + 2 * k);
  wgmma_commit();
}

template <int kDim>
__device__ inline void issue_pv(float (&products)[kDim / 2], const uint32_t (&p)[16],
                                const uint8_t* values) {
  const uint64_t b = wgmma_descriptor(values, Swizzle::k128B);
  wgmma_fence();
  wgmma_e4m3<true>(products, p, b);
#pragma unroll
  for (int k = 1; k < kKeyTile / 32; ++k) wgmma_e4m3<false>(products, p + 4 * k, b + 2 * k);
  wgmma_commit();
}

// Divides by the sum and stores a warp's 16 rows, through shared memory for whole-row writes.
template <int kDim>
__device__ void store_rows(const Problem& p, const WorkItem& item, int first_row,
                           const RowState<kDim>& rows, uint16_t (&staging)[16][kDim + 8],
                           const float* biases) {
  const int lane = threadIdx.x % 32, g = lane >> 2, c = lane & 3;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = quad_sum(rows.sum[r]);
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      const float low = rows.out[4 * j + 2 * r] * inverse;
      const float high = rows.out[4 * j + 2 * r + 1] * inverse;
      uint32_t* slot = reinterpret_cast<uint32_t*>(&staging[g + 8 * r][8 * j + 2 * c]);
      if (p.bf16) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        *slot = *reinterpret_cast<const uint32_t*>(&pair);
      } else {
        const __half2 pair = __floats2half2_rn(low, high);
        *slot = *reinterpret_cast<const uint32_t*>(&pair);
      }
    }
    const int row = first_row + g + 8 * r;
    if (p.lse != nullptr && c == 0 && row < item.q_len) {
      const float bias = biases != nullptr ? biases[g + 8 * r] : 0.0f;
      p.lse[(static_cast<int64_t>(item.b) * p.num_heads + item.head) * p.max_q_len + row] =
          sum == 0.0f ? -INFINITY
                      : (rows.largest[r] + log2f(sum) - kProbabilityBits + bias) * recipe::kLn2;
    }
  }
  __syncwarp();
  constexpr int kLanes = kDim / 8;
  const int chunk = lane % kLanes;
  if (chunk * 8 < p.head_dim) {
#pragma unroll
    for (int i = 0; i < 16; i += 32 / kLanes) {
      const int row = i + lane / kLanes;
      if (first_row + row < item.q_len) {
        uint16_t* to = static_cast<uint16_t*>(p.out.data) +
                       p.q_offset(p.out, item.b, first_row + row, item.head) + chunk * 8;
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&staging[row][chunk * 8]);
      }
    }
  }
  __syncwarp();
}

template <int kDim>
__device__ void produce(const Problem& p, const SageTiles& tiles, const Schedule& schedule,
                        SharedTiles<kDim>& shared) {
  using Shared = SharedTiles<kDim>;
  RingCursor ring, query_ring;
  ring.parity = query_ring.parity = 1;  // all stages start empty
  WorkItem item;
  for (int index = blockIdx.x; schedule.get(p, tiles.query_tiles, index, item);
       index += gridDim.x) {
    if (item.kv_tiles < 0) continue;
    mbarrier_wait(&shared.queries_empty[query_ring.stage], query_ring.parity);
    mbarrier_expect_bytes(&shared.queries_full[query_ring.stage], Shared::kTileBytes);
    const int64_t query =
        (static_cast<int64_t>(item.b) * p.num_heads + item.head) * tiles.query_tiles + item.tile;
    bulk_copy(shared.queries[query_ring.stage], tiles.queries + query * Shared::kTileBytes,
              Shared::kTileBytes, &shared.queries_full[query_ring.stage]);
    query_ring.advance(kQuerySlots);
    const int64_t first =
        (static_cast<int64_t>(item.b) * p.num_kv_heads + item.kv_head) * tiles.kv_tiles;
    for (int j = item.kv_tiles - 1; j >= 0; --j) {
      const int s = ring.stage;
      mbarrier_wait(&shared.keys_empty[s], ring.parity);
      mbarrier_expect_bytes(&shared.keys_full[s], Shared::kTileBytes + sizeof(shared.scales[s]));
      bulk_copy(shared.scales[s], tiles.scales + (first + j) * kTileScales,
                sizeof(shared.scales[s]), &shared.keys_full[s]);
      bulk_copy(shared.keys[s], tiles.keys + (first + j) * Shared::kTileBytes, Shared::kTileBytes,
                &shared.keys_full[s]);
      mbarrier_wait(&shared.values_empty[s], ring.parity);
      mbarrier_expect_bytes(&shared.values_full[s], Shared::kTileBytes);
      bulk_copy(shared.values[s], tiles.values + (first + j) * Shared::kTileBytes,
                Shared::kTileBytes, &shared.values_full[s]);
      ring.advance(Shared::kStages);
    }
  }
}

template <int kDim>
__device__ void consume(const Problem& p, const SageTiles& tiles, const Schedule& schedule,
                        SharedTiles<kDim>& shared, int group) {
  using Shared = SharedTiles<kDim>;
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane >> 2, c = lane & 3;
  RingCursor ring, query_ring;
  int32_t logits[64];
  float products[kDim / 2];
  uint32_t probabilities[16];
  WorkItem item;
  for (int index = blockIdx.x; schedule.get(p, tiles.query_tiles, index, item);
       index += gridDim.x) {
    if (item.kv_tiles < 0) continue;
    RowState<kDim> rows = {};
    rows.largest[0] = rows.largest[1] = kNoKeyYet;
    const int64_t query =
        (static_cast<int64_t>(item.b) * p.num_heads + item.head) * tiles.query_tiles + item.tile;
    const int64_t scale_index = query * kTileTokens + group * 64 + warp * 16;
    const float query_scale[2] = {tiles.query_scales[scale_index + g],
                                  tiles.query_scales[scale_index + g + 8]};
    const int first_row = item.tile * kQueryTile + group * 64 + warp * 16;
    const int row_end[2] = {item.key_end(p, first_row + g), item.key_end(p, first_row + g + 8)};
    // Tiles from here on need masks: the warp group's first row does not see all of their keys.
    const int first_masked = item.key_end(p, item.tile * kQueryTile + group * 64) / kKeyTile;

    mbarrier_wait(&shared.queries_full[query_ring.stage], query_ring.parity);
    const int8_t* queries = shared.queries[query_ring.stage] + group * 64 * kDim;
    // Takes the key tile's scales and gives its stage back; the logits are in registers.
    float scale[2], value_scale = 0;
    const auto take_scales = [&](int s) {
      const float key_scale = shared.scales[s][c];
      value_scale = shared.scales[s][kKeyGroups];
      scale[0] = query_scale[0] * key_scale;
      scale[1] = query_scale[1] * key_scale;
      __syncwarp();
      if (lane == 0) mbarrier_arrive(&shared.keys_empty[s]);
    };
    const auto mask_and_softmax = [&](int j) {
      const int ends[2] = {row_end[0] - j * kKeyTile - 4 * c, row_end[1] - j * kKeyTile - 4 * c};
      softmax<kDim, true>(logits, probabilities, rows, scale, ends);
    };
    const auto add_products = [&](int s, float by) {
      pin(products);
      if (lane == 0) mbarrier_arrive(&shared.values_empty[s]);
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i) rows.out[i] = fmaf(products[i], by, rows.out[i]);
    };

    if (item.kv_tiles > 0) {
      int j = item.kv_tiles - 1;
      mbarrier_wait(&shared.keys_full[ring.stage], ring.parity);
      issue_qk<kDim>(logits, queries, shared.keys[ring.stage]);
      wgmma_wait<0>();
      pin(logits);
      take_scales(ring.stage);
      mask_and_softmax(j);
      // The products with the values of tile j run beside those with the keys of tile j - 1.
      while (j > 0) {
        const int s = ring.stage;
        const float previous_scale = value_scale;
        mbarrier_wait(&shared.values_full[s], ring.parity);
        ring.advance(Shared::kStages);
        mbarrier_wait(&shared.keys_full[ring.stage], ring.parity);
        issue_pv<kDim>(products, probabilities, shared.values[s]);
        issue_qk<kDim>(logits, queries, shared.keys[ring.stage]);
        wgmma_wait<1>();
        add_products(s, previous_scale);
        wgmma_wait<0>();
        pin(logits);
        --j;
        take_scales(ring.stage);
        if (j >= first_masked) {
          mask_and_softmax(j);
        } else {
          softmax<kDim, false>(logits, probabilities, rows, scale, row_end);
        }
      }
      mbarrier_wait(&shared.values_full[ring.stage], ring.parity);
      issue_pv<kDim>(products, probabilities, shared.values[ring.stage]);
      wgmma_wait<0>();
      add_products(ring.stage, value_scale);
      ring.advance(Shared::kStages);
    }
    if (lane == 0) mbarrier_arrive(&shared.queries_empty[query_ring.stage]);
    query_ring.advance(kQuerySlots);
    store_rows<kDim>(p, item, first_row, rows, shared.out[group * 4 + warp],
                     tiles.query_biases != nullptr ? tiles.query_biases + scale_index : nullptr);
  }
}

template <int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    sage2_kernel(const __grid_constant__ Problem p, const __grid_constant__ SageTiles tiles,
                 const Schedule schedule) {
  extern __shared__ uint8_t raw_shared[];
  auto& shared = *reinterpret_cast<SharedTiles<kDim>*>(
      (reinterpret_cast<uintptr_t>(raw_shared) + 1023) / 1024 * 1024);
  if (threadIdx.x == 0) {
    for (int s = 0; s < SharedTiles<kDim>::kStages; ++s) {
      mbarrier_init(&shared.keys_full[s], 1);
      mbarrier_init(&shared.keys_empty[s], kReleases);
      mbarrier_init(&shared.values_full[s], 1);
      mbarrier_init(&shared.values_empty[s], kReleases);
    }
    for (int s = 0; s < kQuerySlots; ++s) {
      mbarrier_init(&shared.queries_full[s], 1);
      mbarrier_init(&shared.queries_empty[s], kReleases);
    }
    fence_barrier_init();
  }
  __syncthreads();
  const int group = threadIdx.x / 128;
  if (group == 0) {
    set_fewer_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce<kDim>(p, tiles, schedule, shared);
  } else {
    set_more_registers<kConsumerRegisters>();
    consume<kDim>(p, tiles, schedule, shared, group - 1);
  }
}

template <int kDim>
cudaError_t attend(const Problem& p, const SageTiles& tiles, cudaStream_t stream) {
  constexpr int kBytes = sizeof(SharedTiles<kDim>) + 1024;
  int device = 0, processors = 0, l2_bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, device);
  }
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(sage2_kernel<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 kBytes);
  }
  if (error != cudaSuccess) return error;
  // Sections of heads whose keys and values fill about half of the L2 cache.
  const int64_t head_bytes =
      std::max<int64_t>(1, int64_t{2} * tiles.kv_tiles * SharedTiles<kDim>::kTileBytes);
  const int64_t kv_heads = std::max<int64_t>(1, l2_bytes / 2 / head_bytes);
  const int heads = p.batch * p.num_heads;
  Schedule schedule;
  schedule.section_heads =
      static_cast<int>(std::min<int64_t>(heads, kv_heads * (p.num_heads / p.num_kv_heads)));
  const int64_t items = static_cast<int64_t>(heads) * tiles.query_tiles;
  const int grid = static_cast<int>(std::min<int64_t>(items, processors));
  sage2_kernel<kDim><<<grid, kThreads, kBytes, stream>>>(p, tiles, schedule);
  return cudaGetLastError();
}

int padded_dim(const Problem& p) { return p.head_dim <= 64 ? 64 : 128; }

}  // namespace

const char* sage2_sm90_refusal(const Problem& p) {
  if (p.head_dim > 128) return "the Hopper sage2 kernel takes head_dim up to 128";
  if (int64_t{p.batch} * p.num_heads * ((p.max_q_len + kQueryTile - 1) / kQueryTile) >= INT32_MAX) {
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
