#include <algorithm>

#include "kernels/common/ptx.cuh"
#include "kernels/common/sm90.cuh"
#include "kernels/ops/elements.cuh"
#include "kernels/ops/gemv.h"
#include "kernels/ops/launch.cuh"

namespace sagelm::kernels {
namespace {

// One block per multiprocessor computes an even share of the outputs, kTile weight rows at a time,
// for up to 8 rows of x with m16n8k16 products: the weights are the 16 x 16 operand, x the 16 x 8
// one. The order of k inside a product is free as long as both operands agree, so lane 4g + c takes
// 8 neighbours of weight rows g and g + 8 and of row g of x as its share of two products. Warps
// split k, and their sums are added at the end of a tile in a fixed order.
//
// What bounds this is memory, and what is between two products is latency: other warps keep the
// weights coming through a ring, which they fill before these wait for the kernel in front, and go
// on with the next product of a chain while these wait for the other blocks.
constexpr int kTile = 16;
constexpr int kWarps = 8;  // that multiply
constexpr int kThreads = 32 * kWarps;
constexpr int kCopyThreads = 128;
constexpr int kStep = 64;              // columns of a warp's step
constexpr int kTurn = kWarps * kStep;  // of the block's
constexpr int kMostStages = 12;        // of the ring, a step of the block each
constexpr int kNormKept = 8;           // packs of 4 elements of a row that a thread normalises
constexpr int kRowsAtOnce = 1;         // that are normalised together

constexpr int kRowBytes = 2 * kTurn;
constexpr int kStageBytes = kTile * kRowBytes;

// Where in a stage lies chunk `chunk` (16 bytes) of row `row`: two rows that are read together lie
// in different banks.
__device__ inline int stage_offset(int row, int chunk) {
  return row * kRowBytes + (chunk ^ (row % 2 * 4)) * 16;
}

struct Link {
  const void* x;
  const void* weight;
  void* out;
  const float* norm;
  int n, k;
  int share, more;  // outputs of a block; of the first `more` blocks one more
  GemvOutput output;
  bool keeps_x;  // in shared memory

  __device__ bool gated() const { return output == GemvOutput::kSwiglu; }
  // Outputs of a tile; a gated product takes as many rows of either half of the weights.
  __device__ int tile_outputs() const { return gated() ? kTile / 2 : kTile; }
  // Outputs of the block.
  __device__ int begin() const {
    const int block = static_cast<int>(blockIdx.x);
    return share * block + min(block, more);
  }
  __device__ int end() const {
    return begin() + share + (static_cast<int>(blockIdx.x) < more ? 1 : 0);
  }
};

struct Links {
  int count;
  int rows;
  int stages;
  float eps;
  uint32_t* arrivals;
  Link links[kGemvLinks];
};

// What shared memory begins with; then come the warps' sums, float [2][kWarps][rows][kTile] of
// every other tile, then the ring, then x, T [rows][k].
struct GemvMemory {
  uint64_t full[kMostStages], empty[kMostStages];
  float squares[kGemvRows][kWarps];

  __host__ __device__ static constexpr int ring_at(int rows) {
    const int sums = static_cast<int>(sizeof(float)) * 2 * kWarps * kTile * rows;
    return (static_cast<int>(sizeof(GemvMemory)) + sums + 127) / 128 * 128;
  }
};

// A place in the ring, and how often it has been there before, modulo 2.
struct RingPlace {
  int stages;
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

__device__ inline void wait_for_phase(uint64_t* barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  sm90::mbarrier_wait(ptx::smem_address(barrier), parity);
#else
  while (!sm90::mbarrier_test(ptx::smem_address(barrier), parity)) {
  }
#endif
}

// The threads behind those that multiply: copy the block's steps of the weights, one after the
// other through all tiles and all products.
template <typename T>
__device__ void bring_weights(const Links& chain, GemvMemory& memory, uint32_t ring) {
  constexpr int kChunks = kRowBytes / 16;
  constexpr int kRows = kCopyThreads / kChunks;  // at once; all that a thread copies are alike
  static_assert(kRows % 2 == 0 && kTile / 2 % kRows == 0);
  const int thread = static_cast<int>(threadIdx.x) - kThreads;
  const int row = thread / kChunks, chunk = thread % kChunks;
  const int lane_offset = stage_offset(row, chunk);
  RingPlace place{chain.stages};
#pragma unroll 1
  for (int i = 0; i < chain.count; ++i) {
    const Link& link = chain.links[i];
    const int outputs = link.tile_outputs(), end = link.end();
    const int64_t k = link.k, second = (link.gated() ? link.n : kTile / 2) * k;
    const T* weight = static_cast<const T*>(link.weight) + row * k + chunk * 8;
#pragma unroll 1
    for (int first = link.begin(); first < end; first += outputs) {
      const int valid = min(end - first, outputs), valid_high = valid + kTile - outputs;
      const T* from = weight + first * k;
#pragma unroll 1
      for (int column = chunk * 8; column - chunk * 8 < link.k; column += kTurn, from += kTurn) {
        wait_for_phase(&memory.empty[place.stage], place.parity ^ 1);
        const uint32_t to = ring + place.stage * kStageBytes + lane_offset;
#pragma unroll
        for (int at = 0; at < kTile; at += kRows) {
          const bool high = at >= kTile / 2;
          ptx::copy_async(to + at * kRowBytes, from + (high ? second : 0) + at % (kTile / 2) * k,
                          column < link.k && row + at < (high ? valid_high : valid));
        }
        sm90::arrive_after_copies(ptx::smem_address(&memory.full[place.stage]));
        place.advance();
      }
    }
  }
}

// Of the warps that multiply.
__device__ inline void wait_for_warps() { sm90::named_barrier_wait(1, kThreads); }

// Calls visit(j, i) for the packs of 4 elements, the j-th one from element i on, that this thread
// takes of a row.
template <typename Visit>
__device__ __forceinline__ void visit_packs(int k, const Visit& visit) {
#pragma unroll
  for (int j = 0; j < kNormKept; ++j) {
    const int i = (j * kThreads + static_cast<int>(threadIdx.x)) * 4;
    if (i < k) visit(j, i);
  }
}

// Normalises rows of x as kernels/ops/rmsnorm.h has it, into shared memory. weights: this thread's
// share of the norm's.
template <typename T>
__device__ void normalise(const float* x, const float (&weights)[kNormKept][4], float eps, int rows,
                          int k, T* normed, float (&squares)[kGemvRows][kWarps]) {
#pragma unroll 1
  for (int first = 0; first < rows; first += kRowsAtOnce) {
    float values[kRowsAtOnce][kNormKept][4] = {};
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      if (first + r >= rows) continue;
      const float* row = x + static_cast<int64_t>(first + r) * k;
      visit_packs(k, [&](int j, int i) { load(row + i, values[r][j]); });
    }
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      if (first + r >= rows) continue;
      float sum = 0;
      visit_packs(k, [&](int j, int) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum += values[r][j][e] * values[r][j][e];
      });
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
      if (threadIdx.x % 32 == 0) squares[first + r][threadIdx.x / 32] = sum;
    }
    wait_for_warps();
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      if (first + r >= rows) continue;
      float total = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += squares[first + r][w];
      const float scale = 1.0f / sqrtf(total / static_cast<float>(k) + eps);
      visit_packs(k, [&](int j, int i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) values[r][j][e] = values[r][j][e] * scale * weights[j][e];
        store(normed + (first + r) * k + i, values[r][j]);
      });
    }
  }
}

// Copies count elements, a multiple of 8, to shared memory.
template <typename T>
__device__ void keep(const T* x, int count, T* kept) {
  constexpr int kAtOnce = 8;
  const auto* from = reinterpret_cast<const uint4*>(x) + threadIdx.x;
  auto* to = reinterpret_cast<uint4*>(kept) + threadIdx.x;
  const auto* end = reinterpret_cast<const uint4*>(x + count);
#pragma unroll 1
  for (; from < end; from += kAtOnce * kThreads, to += kAtOnce * kThreads) {
    uint4 values[kAtOnce] = {};
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (from + j * kThreads < end) values[j] = from[j * kThreads];
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (from + j * kThreads < end) to[j * kThreads] = values[j];
    }
  }
}

// Where the warps that multiply, of all blocks, wait for each other; what they wrote before is
// visible behind. All blocks have to be on the device together. They get there: each is placed as
// soon as what runs on its multiprocessor ends, which waits for none of them, and the kernel
// behind, whose blocks may take what memory is left, begins only when all of them have begun. (A
// cooperative launch would promise it, but begins when the whole device is free: 1.5 us a layer.)
// The counter's top bit changes each time that the last one arrives, so that it needs no clearing.
class Meeting {
 public:
  __device__ explicit Meeting(uint32_t* arrivals) : arrivals_(arrivals) {}

  // Behind the wait for the kernel in front, which may have used the counter.
  __device__ void begin() {
    if (threadIdx.x == 0) before_ = ptx::load_acquired(arrivals_);
  }

  __device__ void wait() {
    wait_for_warps();
    if (threadIdx.x == 0) {
      const uint32_t own = blockIdx.x == 0 ? kTop - (gridDim.x - 1) : 1;
      ptx::add_released(arrivals_, own);
      while (((ptx::load_acquired(arrivals_) ^ before_) & kTop) == 0) {
      }
      before_ ^= kTop;
    }
    wait_for_warps();
  }

 private:
  static constexpr uint32_t kTop = 0x80000000u;

  uint32_t* arrivals_;
  uint32_t before_ = 0;  // the last meeting ended
};

// Stores a product's output, or adds it to what is there.
template <typename T>
__device__ void put(const Link& link, int64_t at, float sum) {
  const float result[1] = {sum};
  switch (link.output) {
    case GemvOutput::kAdd:
      // Nobody else's: it is for the memory to add, so that nobody waits.
      atomicAdd(static_cast<float*>(link.out) + at, sum);
      break;
    case GemvOutput::kFloat:
      store(static_cast<float*>(link.out) + at, result);
      break;
    case GemvOutput::kHalf:
    case GemvOutput::kSwiglu:
      store(static_cast<T*>(link.out) + at, result);
      break;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads + kCopyThreads, 1)
    gemv_kernel(const __grid_constant__ Links chain) {
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  extern __shared__ __align__(128) uint8_t smem[];
  auto& memory = *reinterpret_cast<GemvMemory*>(smem);
  const int rows = chain.rows;
  const uint32_t ring = ptx::smem_address(smem) + GemvMemory::ring_at(rows);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < chain.stages; ++i) {
      sm90::mbarrier_init(ptx::smem_address(&memory.full[i]), kCopyThreads);
      sm90::mbarrier_init(ptx::smem_address(&memory.empty[i]), kThreads);
    }
  }
  __syncthreads();
  allow_next_kernel();
  if (warp >= kWarps) {
    bring_weights<T>(chain, memory, ring);
    return;
  }

  auto* partials = reinterpret_cast<float*>(smem + sizeof memory);
  T* kept = reinterpret_cast<T*>(smem + GemvMemory::ring_at(rows) + chain.stages * kStageBytes);
  const int group = static_cast<int>(threadIdx.x) % 32 / 4;
  const int quad = static_cast<int>(threadIdx.x) % 4;
  const bool has_row = group < rows;
  const int lane_column = warp * kStep + quad * 8;
  const int lane_offsets[2] = {stage_offset(group, lane_column / 8),
                               stage_offset(group, lane_column / 8 + kStep / 16)};
  constexpr int kToHigh = kTile / 2 * kRowBytes;
  RingPlace place{chain.stages};
  int buffer = 0;
  Meeting meeting(chain.arrivals);
#pragma unroll 1
  for (int i = 0; i < chain.count; ++i) {
    const Link& link = chain.links[i];
    const int k = link.k;
    float norm[kNormKept][4] = {};  // need not wait for anything
    if (link.norm != nullptr) {
      visit_packs(k, [&](int j, int at) { load(link.norm + at, norm[j]); });
    }
    if (i == 0) {
      wait_for_previous_kernel();
      if (chain.count > 1) meeting.begin();
    } else {
      meeting.wait();
    }
    if (link.norm != nullptr) {
      normalise(static_cast<const float*>(link.x), norm, chain.eps, rows, k, kept, memory.squares);
    } else if (link.keeps_x) {
      keep(static_cast<const T*>(link.x), rows * k, kept);
    }
    wait_for_warps();
    const T* x_row = (link.keeps_x ? kept : static_cast<const T*>(link.x)) +
                     static_cast<int64_t>(has_row ? group : 0) * k;
    const auto fetch_x = [&](int turn, uint4(&b)[2]) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = turn + lane_column + half * kStep / 2;
        b[half] = has_row && at < k ? *reinterpret_cast<const uint4*>(x_row + at) : uint4{};
      }
    };

    const int outputs = link.tile_outputs();
    const int end = link.end();
    uint4 b[2];
    fetch_x(0, b);
    for (int first = link.begin(); first < end; first += outputs, buffer ^= 1) {
      float even[4] = {}, odd[4] = {};
#pragma unroll 1
      for (int turn = 0; turn < k; turn += kTurn) {
        const uint4 now[2] = {b[0], b[1]};
        fetch_x(turn + kTurn < k ? turn + kTurn : 0, b);
        wait_for_phase(&memory.full[place.stage], place.parity);
        const uint32_t step = ring + place.stage * kStageBytes;
        uint4 low[2], high[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          low[half] = ptx::load_chunk(step + lane_offsets[half]);
          high[half] = ptx::load_chunk(step + lane_offsets[half] + kToHigh);
        }
        // From every lane: all of them have read the stage.
        sm90::mbarrier_arrive(ptx::smem_address(&memory.empty[place.stage]));
        place.advance();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4 &l = low[half], &h = high[half];
          ptx::multiply_half<kBf16>(even, {l.x, h.x, l.y, h.y}, now[half].x, now[half].y);
          ptx::multiply_half<kBf16>(odd, {l.z, h.z, l.w, h.w}, now[half].z, now[half].w);
        }
      }

      float* partial = partials + buffer * kWarps * kTile * rows;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = 2 * quad + e % 2;
        if (row < rows) partial[(warp * rows + row) * kTile + group + e / 2 * 8] = even[e] + odd[e];
      }
      // Also keeps what is read below from being overwritten by the tile after the next.
      wait_for_warps();
      const int output = static_cast<int>(threadIdx.x) & (outputs - 1);
      const int row = static_cast<int>(threadIdx.x) >> (link.gated() ? 3 : 4);
      if (row >= rows || first + output >= end) continue;
      float sum = 0, up = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float* from = partial + (w * rows + row) * kTile + output;
        sum += from[0];
        if (link.gated()) up += from[kTile / 2];
      }
      if (link.gated()) sum = up * (sum / (1.0f + __expf(-sum)));
      put<T>(link, int64_t{row} * link.n + first + output, sum);
    }
  }
}

template <GemvOutput kOutput, typename T>
using OutputType =
    std::conditional_t<kOutput == GemvOutput::kHalf || kOutput == GemvOutput::kSwiglu, T, float>;

// Any k: a warp per weight row, one row of x after the other.
template <typename T, GemvOutput kOutput>
__global__ void __launch_bounds__(kThreads)
    gemv_any_kernel(const T* x, const T* weight, OutputType<kOutput, T>* out, int rows, int64_t n,
                    int k) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t output = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (output >= n) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto product = [&](int row, int64_t weight_row) {
    float sum = 0;
    for (int i = lane; i < k; i += 32) {
      sum += to_float(x[static_cast<int64_t>(row) * k + i]) * to_float(weight[weight_row * k + i]);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
    return sum;
  };
  for (int row = 0; row < rows; ++row) {
    float result[1] = {product(row, output)};
    if constexpr (kOutput == GemvOutput::kSwiglu) {
      result[0] = product(row, n + output) * (result[0] / (1.0f + __expf(-result[0])));
    }
    if (lane != 0) continue;
    const int64_t place = row * n + output;
    if constexpr (kOutput == GemvOutput::kAdd) result[0] += out[place];
    store(out + place, result);
  }
}

template <typename T, GemvOutput kOutput>
cudaError_t start_any(const Gemv& args, cudaStream_t stream) {
  return launch(gemv_any_kernel<T, kOutput>,
                dim3(static_cast<unsigned>((args.n + kWarps - 1) / kWarps)), kThreads, stream,
                static_cast<const T*>(args.x), static_cast<const T*>(args.weight),
                static_cast<OutputType<kOutput, T>*>(args.out), static_cast<int>(args.rows), args.n,
                static_cast<int>(args.k));
}

struct Room {
  int multiprocessors = 0;
  int memory = 0;  // shared memory of a block

  cudaError_t ask() {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    }
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    return error;
  }
};

int64_t x_bytes(const Gemv& args) { return int64_t{sizeof(uint16_t)} * args.rows * args.k; }

// One block a multiprocessor, whose shared memory has no room for two: were there more, a few would
// get two blocks of the same product while others had none. x that leaves a ring of kFewStages no
// room is read where it is, unless it is normalised.
template <typename T>
cudaError_t start_links(std::span<const Gemv> products, uint32_t* arrivals, const Room& room,
                        cudaStream_t stream) {
  constexpr int kFewStages = 5;
  Links chain = {};
  chain.count = static_cast<int>(products.size());
  chain.rows = static_cast<int>(products.front().rows);
  chain.arrivals = arrivals;
  const int64_t left = room.memory - GemvMemory::ring_at(chain.rows);
  int64_t kept = 0;
  int blocks = 1;
  for (size_t i = 0; i < products.size(); ++i) {
    const Gemv& from = products[i];
    Link& link = chain.links[i];
    link.x = from.x;
    link.weight = from.weight;
    link.out = from.out;
    link.norm = from.norm;
    link.n = static_cast<int>(from.n);
    link.k = static_cast<int>(from.k);
    link.output = from.output;
    link.keeps_x = from.norm != nullptr || x_bytes(from) + kFewStages * kStageBytes <= left;
    if (link.keeps_x) kept = std::max(kept, x_bytes(from));
    if (from.norm != nullptr) chain.eps = from.eps;
    blocks = std::max(blocks, std::min(room.multiprocessors, link.n));
  }
  for (Link& link : std::span(chain.links).first(products.size())) {
    link.share = link.n / blocks;
    link.more = link.n % blocks;
  }
  chain.stages = static_cast<int>(std::min<int64_t>(kMostStages, (left - kept) / kStageBytes));
  const auto kernel = gemv_kernel<T>;
  const int64_t bytes = room.memory - left + kept + chain.stages * kStageBytes;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(bytes));
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  }
  if (error != cudaSuccess) return error;
  return launch_with_memory(kernel, dim3(static_cast<unsigned>(blocks)), kThreads + kCopyThreads,
                            static_cast<size_t>(bytes), stream, chain);
}

// Whether gemv_kernel takes such a product.
bool is_aligned(const Gemv& args) {
  return args.rows > 0 && args.rows <= kGemvRows && args.k % 8 == 0 &&
         args.k <= INT32_MAX - kTurn && args.n <= INT32_MAX / 2 &&
         (args.norm == nullptr || gemv_normalises(args));
}

cudaError_t start_aligned(std::span<const Gemv> products, uint32_t* arrivals, cudaStream_t stream) {
  Room room;
  const cudaError_t error = room.ask();
  if (error != cudaSuccess) return error;
  return with_half_type(products.front().type, [&](auto element) {
    return start_links<decltype(element)>(products, arrivals, room, stream);
  });
}

}  // namespace

bool gemv_normalises(const Gemv& args) {
  constexpr int64_t kMost = 4 * kNormKept * kThreads;
  return overlaps_kernels() && args.k % 8 == 0 && args.output != GemvOutput::kAdd &&
         args.rows * args.k <= kMost;
}

bool gemv_chains(std::span<const Gemv> products) {
  return !products.empty() && products.size() <= kGemvLinks && overlaps_kernels() &&
         std::ranges::all_of(products, [&](const Gemv& args) {
           return is_aligned(args) && args.rows == products.front().rows &&
                  args.type == products.front().type && args.n > 0;
         });
}

cudaError_t gemv_chain(std::span<const Gemv> products, uint32_t* arrivals, cudaStream_t stream) {
  return gemv_chains(products) ? start_aligned(products, arrivals, stream) : cudaErrorInvalidValue;
}

cudaError_t gemv(const Gemv& args, cudaStream_t stream) {
  if (args.rows == 0 || args.n == 0) return cudaSuccess;
  if (is_aligned(args)) return start_aligned({&args, 1}, nullptr, stream);
  if (args.rows < 0 || args.rows > kGemvRows || args.norm != nullptr || args.k % 8 == 0) {
    return cudaErrorInvalidValue;
  }
  return with_half_type(args.type, [&](auto element) {
    using T = decltype(element);
    switch (args.output) {
      case GemvOutput::kHalf:
        return start_any<T, GemvOutput::kHalf>(args, stream);
      case GemvOutput::kFloat:
        return start_any<T, GemvOutput::kFloat>(args, stream);
      case GemvOutput::kAdd:
        return start_any<T, GemvOutput::kAdd>(args, stream);
      case GemvOutput::kSwiglu:
        return start_any<T, GemvOutput::kSwiglu>(args, stream);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace sagelm::kernels
