#include <cuda.h>

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include "kernels/common/ptx.cuh"
#include "kernels/common/sm90.cuh"
#include "kernels/common/tensor_sm90.cuh"
#include "kernels/ops/elements.cuh"
#include "kernels/ops/gemm.h"
#include "kernels/ops/launch.cuh"

// Two blocks, a cluster, compute 256 rows of x times the same kN rows of the weights: 128 rows of x
// each, and each loads half of the weights' rows for both. In a block one warp loads slices of
// kSlice columns of k through a ring of stages, and two warp groups multiply 64 rows of x each.
// Clusters stay for many tiles, so that the slices of the next tile arrive while a tile's results
// are on their way out.

namespace sagelm::kernels {
namespace {

using namespace sm90;

constexpr int kCluster = 2;
constexpr int kConsumers = 2;  // warp groups
constexpr int kTileRows = 64 * kConsumers;
template <typename T>
constexpr bool kIsBf16 = std::is_same_v<T, __nv_bfloat16>;

constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;
constexpr int kSlice = 64;      // columns of k
constexpr int kRowBytes = 128;  // of a slice
constexpr int kStages = 4;
constexpr int kSlots = 2;  // of results on their way out, per warp
constexpr int kSlotBytes = 16 * kRowBytes;
constexpr int kReleases = kCluster * kConsumers * 4;  // of a stage: every warp that reads a block's

template <int kN>
struct Shared {
  static constexpr int kXBytes = kTileRows * kRowBytes;
  static constexpr int kHalfBytes = kN / kCluster * kRowBytes;  // of the weights

  alignas(1024) uint8_t x[kStages][kXBytes];
  alignas(1024) uint8_t weights[kStages][kCluster * kHalfBytes];
  alignas(1024) uint8_t out[4 * kConsumers][kSlots][kSlotBytes];
  uint64_t full[kStages], empty[kStages];
};

template <int kN>
struct Places {
  using Tiles = Shared<kN>;
  uint32_t base;

  __device__ explicit Places(const Tiles& shared) : base(ptx::smem_address(&shared)) {}
  __device__ uint32_t x(int s) const {
    return at(offsetof(Tiles, x)) + static_cast<uint32_t>(s * Tiles::kXBytes);
  }
  __device__ uint32_t weights(int s) const {
    return at(offsetof(Tiles, weights)) + static_cast<uint32_t>(s * kCluster * Tiles::kHalfBytes);
  }
  __device__ uint32_t out(int warp, int slot) const {
    return at(offsetof(Tiles, out)) + static_cast<uint32_t>((warp * kSlots + slot) * kSlotBytes);
  }
  __device__ uint32_t full(int s) const {
    return at(offsetof(Tiles, full)) + static_cast<uint32_t>(8 * s);
  }
  __device__ uint32_t empty(int s) const {
    return at(offsetof(Tiles, empty)) + static_cast<uint32_t>(8 * s);
  }

 private:
  __device__ uint32_t at(size_t member) const { return base + static_cast<uint32_t>(member); }
};

// The order of tiles: bands of band_rows tiles of rows, within a band the tiles of the same weights
// one after another. Clusters that work at the same time then read few rows of both from L2.
struct Order {
  int row_tiles, col_tiles, band_rows;

  struct Tile {
    int row, col;
  };
  __device__ Tile get(int index) const {
    const int band = index / (band_rows * col_tiles);
    const int first = band * band_rows;
    const int height = min(band_rows, row_tiles - first);
    const int rest = index - first * col_tiles;
    return {first + rest % height, rest / height};
  }
  __host__ __device__ int count() const { return row_tiles * col_tiles; }
};

struct Maps {
  CUtensorMap x, weight, out;
};

template <int kN, GemmOutput kOutput>
struct Tiling {
  static constexpr bool kGated = kOutput == GemmOutput::kSwiglu;
  static constexpr int kCols = kGated ? kN / 2 : kN;  // of out
  static constexpr int kPiece = kOutput == GemmOutput::kAdd ? 32 : kCols % 64 == 0 ? 64 : 32;
  static constexpr int kPieceBytes = kPiece * (kOutput == GemmOutput::kAdd ? 4 : 2);  // of a row
  static_assert(kCols % kPiece == 0 && (kPieceBytes == 128 || kPieceBytes == 64));
};

// By one thread.
template <int kN, GemmOutput kOutput>
__device__ void produce(const Maps& maps, const Order& order, int n, int slices,
                        const Places<kN>& places, int rank) {
  using Tiles = Shared<kN>;
  using Tile = Tiling<kN, kOutput>;
  RingCursor ring;
  ring.parity = 1;  // all stages start empty
  const int clusters = static_cast<int>(gridDim.x) / kCluster;
  for (int index = static_cast<int>(blockIdx.x) / kCluster; index < order.count();
       index += clusters) {
    const auto tile = order.get(index);
    const int x_row = (tile.row * kCluster + rank) * kTileRows;
    const int weight_row = tile.col * Tile::kCols + rank * (Tile::kGated ? n : kN / kCluster);
    for (int slice = 0; slice < slices; ++slice) {
      mbarrier_wait(places.empty(ring.stage), ring.parity);
      const uint32_t full = places.full(ring.stage);
      mbarrier_expect_bytes(full, Tiles::kXBytes + kCluster * Tiles::kHalfBytes);
      tensor_load(places.x(ring.stage), maps.x, x_row, slice * kSlice, full);
      tensor_load_to(places.weights(ring.stage) + static_cast<uint32_t>(rank * Tiles::kHalfBytes),
                     maps.weight, weight_row, slice * kSlice, full, (1 << kCluster) - 1);
      ring.advance(kStages);
    }
  }
}

// A warp's 16 rows of results on their way out, a piece of columns at a time.
template <int kN, typename T, GemmOutput kOutput>
class Writer {
 public:
  using Tile = Tiling<kN, kOutput>;

  __device__ Writer(const CUtensorMap& map, const Places<kN>& places, int warp)
      : map_(map), slots_(places.out(warp, 0)), lane_(static_cast<int>(threadIdx.x) % 32) {}

  // The sums of rows [row, row + 16); the tile's columns begin at col.
  __device__ __forceinline__ void write(const float (&sums)[kN / 2], int row, int col) {
    uint32_t halves[kN / 4];
    if constexpr (kOutput != GemmOutput::kAdd) {
      // All at once, which frees registers for what follows.
#pragma unroll
      for (int i = 0; i < kN / 4; ++i) {
        halves[i] = ptx::to_halves<kIsBf16<T>>(sums[2 * i], sums[2 * i + 1]);
      }
      pin(halves);
    }
#pragma unroll
    for (int piece = 0; piece < Tile::kCols / Tile::kPiece; ++piece) {
      const uint32_t slot = slots_ + static_cast<uint32_t>(slot_ * kSlotBytes);
      if (lane_ == 0) wait_stores_read<kSlots - 1>();
      __syncwarp();
      if constexpr (kOutput == GemmOutput::kAdd) {
        const int g = lane_ >> 2, c = lane_ & 3;
#pragma unroll
        for (int j = 0; j < Tile::kPiece / 8; ++j) {
          const int i = 4 * (piece * Tile::kPiece / 8 + j);
          const uint32_t at =
              slot +
              static_cast<uint32_t>(ptx::chunk_offset<kRowBytes>(g, 2 * j + c / 2) + c % 2 * 8);
          store_pair(at, sums[i], sums[i + 1]);
          store_pair(at + 8 * kRowBytes, sums[i + 2], sums[i + 3]);
        }
      } else {
#pragma unroll
        for (int j = 0; j < Tile::kPiece / 16; ++j) {
          const int i = 2 * (piece * Tile::kPiece / 8 + 2 * j);
          store_matrices(slot + static_cast<uint32_t>(ptx::chunk_offset<Tile::kPieceBytes>(
                                    lane_ % 16, 2 * j + lane_ / 16)),
                         result(halves, i), result(halves, i + 1), result(halves, i + 2),
                         result(halves, i + 3));
        }
      }
      fence_proxy_async();
      __syncwarp();
      if (lane_ == 0) {
        const int piece_col = col + piece * Tile::kPiece;
        if constexpr (kOutput == GemmOutput::kAdd) {
          tensor_add(map_, row, piece_col, slot);
        } else {
          tensor_store(map_, row, piece_col, slot);
        }
        commit_stores();
      }
      slot_ ^= 1;
    }
  }

  __device__ void finish() {
    if (lane_ == 0) wait_stores_read<0>();
  }

 private:
  // Two neighbours of a row of results, from pair i of the rounded sums.
  __device__ static uint32_t result(const uint32_t (&halves)[kN / 4], int i) {
    if constexpr (Tile::kGated) {
      const float2 gate = unpacked(halves[i]), up = unpacked(halves[i + kN / 8]);
      return ptx::to_halves<kIsBf16<T>>(gated(gate.x, up.x), gated(gate.y, up.y));
    } else {
      return halves[i];
    }
  }
  __device__ static float2 unpacked(uint32_t pair) {
    if constexpr (kIsBf16<T>) {
      return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u)};
    } else {
      return __half22float2(*reinterpret_cast<const __half2*>(&pair));
    }
  }
  const CUtensorMap& map_;
  uint32_t slots_;
  int lane_, slot_ = 0;
};

template <int kN, typename T, GemmOutput kOutput>
__device__ void consume(const Maps& maps, const Order& order, int slices, const Places<kN>& places,
                        int rank, int group) {
  const int warp = static_cast<int>(threadIdx.x) / 32 % 4,
            lane = static_cast<int>(threadIdx.x) % 32;
  const auto release = [&](int stage) {
    __syncwarp();
    if (lane < kCluster) mbarrier_arrive_at(places.empty(stage), static_cast<uint32_t>(lane));
  };
  Writer<kN, T, kOutput> writer(maps.out, places, group * 4 + warp);
  float sums[kN / 2];
  RingCursor ring;
  const int clusters = static_cast<int>(gridDim.x) / kCluster;
  for (int index = static_cast<int>(blockIdx.x) / kCluster; index < order.count();
       index += clusters) {
    const auto tile = order.get(index);
    int before = 0;
    for (int slice = 0; slice < slices; ++slice) {
      mbarrier_wait(places.full(ring.stage), ring.parity);
      const uint64_t a = wgmma_descriptor(
          places.x(ring.stage) + static_cast<uint32_t>(group * 64 * kRowBytes), Swizzle::k128B);
      const uint64_t b = wgmma_descriptor(places.weights(ring.stage), Swizzle::k128B);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kSlice / 16; ++k) {
        wgmma_half<kIsBf16<T>>(sums, a + 2 * k, b + 2 * k, slice + k > 0);
      }
      wgmma_commit();
      if (slice > 0) {
        wgmma_wait<1>();
        release(before);
      }
      before = ring.stage;
      ring.advance(kStages);
    }
    wgmma_wait<0>();
    pin(sums);
    release(before);
    writer.write(sums, (tile.row * kCluster + rank) * kTileRows + group * 64 + warp * 16,
                 tile.col * Tiling<kN, kOutput>::kCols);
  }
  writer.finish();
}

template <int kN, typename T, GemmOutput kOutput>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_kernel(const __grid_constant__ Maps maps, const Order order, int n, int slices) {
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  const Places<kN> places(*reinterpret_cast<Shared<kN>*>(raw_shared));
  if (threadIdx.x == 0) {
    prefetch_map(maps.x);
    prefetch_map(maps.weight);
    prefetch_map(maps.out);
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(places.full(s), 1);
      mbarrier_init(places.empty(s), kReleases);
    }
    fence_barrier_init();
  }
  cluster_sync();
  allow_next_kernel();
  wait_for_previous_kernel();
  const auto rank = static_cast<int>(cluster_rank());
  const int group = static_cast<int>(threadIdx.x) / 128;
  if (group == 0) {
    set_fewer_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce<kN, kOutput>(maps, order, n, slices, places, rank);
    __syncwarp();
  } else {
    set_more_registers<kConsumerRegisters>();
    consume<kN, T, kOutput>(maps, order, slices, places, rank, group - 1);
  }
  cluster_sync();  // a block stays for what the other one still sends it
}

// A matrix [rows, cols] in boxes of box_rows x box_cols.
bool describe(CUtensorMap& map, Element type, const void* data, int64_t rows, int64_t cols,
              int box_rows, int box_cols) {
  const uint64_t bytes = type == Element::kF32 ? 4 : 2;
  const CUtensorMapDataType data_type = type == Element::kF32   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                        : type == Element::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(cols) * bytes};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_cols), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUtensorMapSwizzle swizzle =
      box[0] * bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  return encode_tiled()(&map, data_type, 2, const_cast<void*>(data), sizes, strides, box, steps,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

template <int kN, typename T, GemmOutput kOutput>
cudaError_t run(const Gemm& args, int processors, cudaStream_t stream) {
  using Tile = Tiling<kN, kOutput>;
  constexpr int kBytes = sizeof(Shared<kN>);
  static_assert(kBytes <= 227 * 1024);
  const auto kernel = gemm_kernel<kN, T, kOutput>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  Maps maps;
  const bool is_float = kOutput == GemmOutput::kAdd;
  if (!describe(maps.x, args.type, args.x, args.rows, args.k, kTileRows, kSlice) ||
      !describe(maps.weight, args.type, args.weight, Tile::kGated ? 2 * args.n : args.n, args.k,
                kN / kCluster, kSlice) ||
      !describe(maps.out, is_float ? Element::kF32 : args.type, args.out, args.rows, args.n, 16,
                Tile::kPiece)) {
    return cudaErrorInvalidValue;
  }

  constexpr int kBandRows = 8;
  const int clusters = processors / kCluster;
  Order order;
  order.row_tiles = static_cast<int>(tiles_of(args.rows, kCluster * kTileRows));
  order.col_tiles = static_cast<int>(tiles_of(args.n, Tile::kCols));
  order.band_rows = kBandRows;
  const int used = std::min(order.count(), clusters);
  return launch_clusters(kernel, dim3(static_cast<unsigned>(used * kCluster)), kCluster, kThreads,
                         kBytes, stream, maps, order, static_cast<int>(args.n),
                         static_cast<int>(tiles_of(args.k, kSlice)));
}

// Rounds of clusters times the width of a tile: what a product takes, but for the smaller tile's
// more frequent loads.
int64_t rounds(const Gemm& args, int cols, int clusters) {
  return tiles_of(tiles_of(args.rows, kCluster * kTileRows) * tiles_of(args.n, cols), clusters);
}

template <typename T, GemmOutput kOutput>
cudaError_t run(const Gemm& args, int processors, cudaStream_t stream) {
  const int clusters = processors / kCluster;
  const bool narrow = 192 * rounds(args, Tiling<192, kOutput>::kCols, clusters) * 100 <
                      256 * rounds(args, Tiling<256, kOutput>::kCols, clusters) * 97;
  return narrow ? run<192, T, kOutput>(args, processors, stream)
                : run<256, T, kOutput>(args, processors, stream);
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

bool gemm_takes(const Gemm& args) {
  int device = 0, major = 0, minor = 0;
  return args.type != Element::kF32 && args.n > 0 && args.k > 0 && args.n % 8 == 0 &&
         args.k % 8 == 0 && args.rows < INT32_MAX / 2 && args.n < INT32_MAX / 4 &&
         args.k < INT32_MAX / 2 && aligned(args.x) && aligned(args.weight) && aligned(args.out) &&
         cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
         major == 9 && minor == 0 && encode_tiled() != nullptr;
}

cudaError_t gemm(const Gemm& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  if (!gemm_takes(args)) return cudaErrorInvalidValue;
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) return error;
  return with_half_type(args.type, [&](auto element) {
    using T = decltype(element);
    switch (args.output) {
      case GemmOutput::kHalf:
        return run<T, GemmOutput::kHalf>(args, processors, stream);
      case GemmOutput::kAdd:
        return run<T, GemmOutput::kAdd>(args, processors, stream);
      case GemmOutput::kSwiglu:
        break;
    }
    return run<T, GemmOutput::kSwiglu>(args, processors, stream);
  });
}

}  // namespace sagelm::kernels
