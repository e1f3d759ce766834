// A token is drawn from an order: of all tokens by distance, those at the same distance by id
// (token_weights.h). top-k, top-p, and the draw itself all look for the first token at which a sum
// over the order goes beyond a target. Nothing is sorted: sums over kBins parts of the order tell
// in which part that token is, and the few tokens of that part are compared with each other.
//
// A cluster of blocks shares a row, each with a slice of it. Its first block, the leader, keeps the
// books; the others add up and hand over tokens as it asks them.
#include <cooperative_groups.h>

#include "kernels/ops/draw.h"
#include "kernels/ops/elements.cuh"
#include "kernels/ops/launch.cuh"
#include "kernels/ops/named_token.cuh"
#include "kernels/ops/token_weights.h"

namespace sagelm::kernels {
namespace {

constexpr int kThreads = 512;
constexpr int kMostBlocks = 8;  // of a cluster
constexpr int kBinBits = 10;
constexpr int kBins = 1 << kBinBits;
constexpr int kBinsPerThread = kBins / kThreads;
constexpr int kListed = kThreads;  // tokens that are compared with each other
// Weights are summed in two parts of 15 bits (the upper one reaches 2^15), by additions of 32 bits:
// those of kMostDrawCols tokens.
constexpr int kLowBits = 15;

// The blocks of a row.
struct Team {
#if __CUDA_ARCH__ >= 900
  __device__ static unsigned rank() { return cooperative_groups::this_cluster().block_rank(); }
  __device__ static unsigned size() { return cooperative_groups::this_cluster().num_blocks(); }
  __device__ static void sync() { cooperative_groups::this_cluster().sync(); }
  // The same shared memory of another block.
  template <typename T>
  __device__ static T* of(T* shared, unsigned rank) {
    return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
  }
#else
  __device__ static unsigned rank() { return 0; }
  __device__ static unsigned size() { return 1; }
  __device__ static void sync() { __syncthreads(); }
  template <typename T>
  __device__ static T* of(T* shared, unsigned) {
    return shared;
  }
#endif
};

// What is known of a slice, or of all.
struct Peak {
  unsigned long long best;  // the largest logit's order and, behind it, its id's complement
  uint32_t least;           // order of the least logit that is not minus infinity
  uint32_t finite;          // whether all were

  __device__ Peak shuffled(int step) const {
    return {__shfl_xor_sync(0xFFFFFFFFu, best, step), __shfl_xor_sync(0xFFFFFFFFu, least, step),
            __shfl_xor_sync(0xFFFFFFFFu, finite, step)};
  }
  __device__ Peak operator+(const Peak& other) const {
    return {max(best, other.best), min(least, other.least), finite & other.finite};
  }
};

// Of the tokens in front of one in the order, or through it.
struct Sums {
  unsigned long long mass;
  uint32_t count;

  __device__ Sums operator+(const Sums& other) const {
    return {mass + other.mass, count + other.count};
  }
};

// Tokens whose keys are first ... first + 2^shift - 1.
struct Range {
  unsigned long long first;
  int shift;
  uint32_t count;
  Sums before;

  __device__ bool holds(unsigned long long key) const {
    return key >= first && (key - first) >> shift == 0;
  }
};

struct Token {
  unsigned long long key;
  uint32_t weight;
};

struct Shared {
  uint32_t low[kBins], high[kBins], count[kBins];  // of this block's tokens
  // The rest but for peaks is the leader's.
  Sums before[kBins + 1];  // of all tokens, in front of each part of the order
  union {
    Sums fine[kBins + 1];  // likewise of a range
    Token listed[kListed];
  };
  uint32_t num_listed;
  Range range;
  Sums found;  // through the token that was looked for
  unsigned long long found_key;
  unsigned long long last_key;  // that mass_through is asked about
  unsigned long long slice_mass[kMostBlocks];
  Sums warps[kThreads / 32];
  Peak peaks[kMostBlocks];
  Peak peak_warps[kThreads / 32];
  unsigned long long mass_warps[kThreads / 32];
};

// Increases with x, from 0 on; both zeros are the same.
__device__ inline uint32_t order_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits ^ ((bits >> 31) != 0 ? 0xFFFFFFFFu : 0x80000000u);
}
__device__ inline float logit_of(uint32_t order) {
  return __uint_as_float(order ^ ((order >> 31) != 0 ? 0x80000000u : 0xFFFFFFFFu));
}

// A block's part of a row. Every thread gets its tokens in the same way each time.
template <int N>
struct Slice {
  const float* logits;
  int begin, end;
  const uint32_t* penalized;  // a bit per token of the slice
  const uint32_t* banned;
  float penalty;

  // Calls function(id, logit as it is, logit that is drawn by).
  template <typename Function>
  __device__ void each(const Function& function) const {
    for (int i = begin + static_cast<int>(threadIdx.x) * N; i < end; i += kThreads * N) {
      float x[N];
      load(logits + i, x);
      // The bits of neighbours are in one word.
      const uint32_t is_penalized = penalized[(i - begin) / 32] >> ((i - begin) % 32);
      const uint32_t is_banned = banned[(i - begin) / 32] >> ((i - begin) % 32);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const float raw = x[e];
        if ((is_penalized >> e & 1) != 0) x[e] = weights::penalized(x[e], penalty);
        if ((is_banned >> e & 1) != 0) x[e] = -INFINITY;
        function(i + e, raw, x[e]);
      }
    }
  }
};

template <int N>
struct Row {
  Slice<N> slice;
  float largest, octaves;
  int id_bits;
  Shared* shared;

  // Calls function(key, distance) for the tokens that can be drawn.
  template <typename Function>
  __device__ void each(const Function& function) const {
    slice.each([&](int id, float, float x) {
      const uint32_t distance = weights::distance(largest, x, octaves);
      if (distance < weights::kFar) {
        function(static_cast<unsigned long long>(distance) << id_bits | static_cast<unsigned>(id),
                 distance);
      }
    });
  }

  // Adds up the parts of a range; its sums, in the leader's `before`, begin with those in front.
  __device__ void sum_parts(const Range& range, int part_shift, Sums* before) const {
    for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += kThreads) {
      shared->low[bin] = shared->high[bin] = shared->count[bin] = 0;
    }
    __syncthreads();
    each([&](unsigned long long key, uint32_t distance) {
      if (!range.holds(key)) return;
      const auto bin = static_cast<uint32_t>((key - range.first) >> part_shift);
      const uint32_t weight = weights::weight(distance);
      atomicAdd(&shared->low[bin], weight & ((1u << kLowBits) - 1));
      atomicAdd(&shared->high[bin], weight >> kLowBits);
      atomicAdd(&shared->count[bin], 1u);
    });
    Team::sync();
    if (Team::rank() == 0) merge_parts(range.before, before);
  }

  __device__ void merge_parts(Sums sum, Sums* before) const {
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Sums parts[kBinsPerThread];
    Sums own{0, 0};
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      const unsigned bin = threadIdx.x * kBinsPerThread + i;
      unsigned long long low = 0, high = 0;
      uint32_t count = 0;
#pragma unroll
      for (unsigned rank = 0; rank < kMostBlocks; ++rank) {  // all loads at once
        const unsigned from = rank < Team::size() ? rank : 0;
        const uint32_t of_block[] = {Team::of(shared->low, from)[bin],
                                     Team::of(shared->high, from)[bin],
                                     Team::of(shared->count, from)[bin]};
        if (rank < Team::size()) {
          low += of_block[0];
          high += of_block[1];
          count += of_block[2];
        }
      }
      parts[i] = {low + (high << kLowBits), count};
      own = own + parts[i];
    }
    Sums through = own;  // this thread's parts, and those of the lanes before it
#pragma unroll
    for (unsigned step = 1; step < 32; step *= 2) {
      const Sums other{__shfl_up_sync(0xFFFFFFFFu, through.mass, step),
                       __shfl_up_sync(0xFFFFFFFFu, through.count, step)};
      if (lane >= step) through = through + other;
    }
    if (lane == 31) shared->warps[warp] = through;
    __syncthreads();
    for (unsigned i = 0; i < warp; ++i) sum = sum + shared->warps[i];
    sum = {sum.mass + through.mass - own.mass, sum.count + through.count - own.count};
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      before[threadIdx.x * kBinsPerThread + i] = sum;
      sum = sum + parts[i];
    }
    if (threadIdx.x == kThreads - 1) before[kBins] = sum;
    __syncthreads();
  }

  // The leader: which part of range holds the token at which the sums go beyond target.
  __device__ void choose_part(const Range& range, int part_shift, const Sums* before,
                              unsigned long long target, bool by_count) const {
    const auto value = [by_count](const Sums& sums) { return by_count ? sums.count : sums.mass; };
    for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += kThreads) {
      if (value(before[bin]) <= target && target < value(before[bin + 1])) {
        shared->range = {range.first + (static_cast<unsigned long long>(bin) << part_shift),
                         part_shift, before[bin + 1].count - before[bin].count, before[bin]};
      }
    }
  }

  // All blocks call it, the leader with its target, which lies below the sum of all: finds the
  // first token at which the sum of weights, or the count, goes beyond it. whole: what
  // shared->before holds the parts of. The leader has the result in found and found_key.
  __device__ void find(const Range& whole, int part_shift, unsigned long long target,
                       bool by_count) const {
    if (Team::rank() == 0) {
      choose_part(whole, part_shift, shared->before, target, by_count);
      if (threadIdx.x == 0) shared->num_listed = 0;
    }
    Team::sync();
    Shared* leader = Team::of(shared, 0);
    Range range = leader->range;
    while (range.count > kListed) {  // rare: most tokens at nearly the same distance
      const int fine_shift = max(0, range.shift - kBinBits);
      sum_parts(range, fine_shift, shared->fine);
      if (Team::rank() == 0) choose_part(range, fine_shift, shared->fine, target, by_count);
      Team::sync();
      range = leader->range;
    }
    each([&](unsigned long long key, uint32_t distance) {
      if (!range.holds(key)) return;
      const uint32_t at = atomicAdd(&leader->num_listed, 1u);
      leader->listed[at] = {key, weights::weight(distance)};
    });
    Team::sync();
    if (Team::rank() != 0) return;
    // Several neighbouring threads for each token, if there are few.
    const uint32_t listed = shared->num_listed;
    unsigned helpers = 1;
    while (helpers < 32 && 2 * helpers * listed <= kThreads) helpers *= 2;
    const uint32_t at = threadIdx.x / helpers;
    const Token own = shared->listed[min(at, listed - 1)];
    Sums before{0, 0};
    for (uint32_t i = threadIdx.x % helpers; i < listed; i += helpers) {
      const Token other = shared->listed[i];
      if (other.key < own.key) before = before + Sums{other.weight, 1};
    }
    for (unsigned step = 1; step < helpers; step *= 2) {
      before = before + Sums{__shfl_xor_sync(0xFFFFFFFFu, before.mass, step),
                             __shfl_xor_sync(0xFFFFFFFFu, before.count, step)};
    }
    before = before + range.before;
    const Sums through = before + Sums{own.weight, 1};
    const bool is_found =
        by_count ? before.count == target : before.mass <= target && target < through.mass;
    if (is_found && at < listed && threadIdx.x % helpers == 0) {
      shared->found = through;
      shared->found_key = own.key;
    }
    __syncthreads();
  }

  // The leader's: weights of the tokens through a key of its own.
  __device__ unsigned long long mass_through(unsigned long long last) const {
    if (Team::rank() == 0 && threadIdx.x == 0) shared->last_key = last;
    Team::sync();
    last = Team::of(shared, 0)->last_key;
    unsigned long long mass = 0;
    each([&](unsigned long long key, uint32_t distance) {
      if (key <= last) mass += weights::weight(distance);
    });
    mass = block_reduce(mass, shared->mass_warps, Sum());
    if (threadIdx.x == 0) Team::of(shared, 0)->slice_mass[Team::rank()] = mass;
    Team::sync();
    mass = 0;
    for (unsigned rank = 0; rank < Team::size(); ++rank) mass += shared->slice_mass[rank];
    return mass;  // of the leader; others have no use for it
  }
};

// Sets the bits of a slice's tokens among those that are listed.
__device__ void mark(uint32_t* bits, const int32_t* ids, int count, const int32_t* drawn, int begin,
                     int end) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    const int32_t id = known_token(ids[i], drawn);
    if (id >= begin && id < end) atomicOr(&bits[(id - begin) / 32], 1u << ((id - begin) % 32));
  }
}

// A cluster per draw, N logits at a time. Dynamic shared memory: two bits per token of a slice,
// which holds a multiple of 32 of them.
template <int N>
__global__ void __launch_bounds__(kThreads, 2)
    draw_tokens_kernel(const float* logits, int cols, int slice_cols, const RowDraw* draws,
                       const int32_t* integers, int32_t* drawn, int32_t* on_host) {
  __shared__ Shared shared;
  extern __shared__ uint32_t bits[];
  const RowDraw draw = draws[blockIdx.y];
  const int begin = min(cols, static_cast<int>(Team::rank()) * slice_cols);
  const int end = min(cols, begin + slice_cols);
  const int words = slice_cols / 32;
  for (int i = static_cast<int>(threadIdx.x); i < 2 * words; i += kThreads) bits[i] = 0;
  __syncthreads();
  if (draw.penalty != 1.0f) {
    mark(bits, integers + draw.history, draw.history_size, drawn, begin, end);
  }
  mark(bits + words, integers + draw.banned, draw.banned_size, drawn, begin, end);
  Team::sync();  // and all blocks are there
  wait_for_previous_kernel();

  const Slice<N> slice{
      logits + static_cast<int64_t>(draw.row) * cols, begin, end, bits, bits + words, draw.penalty};
  Peak peak{0, 0xFFFFFFFFu, 1};
  slice.each([&](int id, float raw, float x) {
    if ((__float_as_uint(raw) & 0x7F800000u) == 0x7F800000u) peak.finite = 0;
    const uint32_t order = order_of(x);
    peak.best = max(peak.best, static_cast<unsigned long long>(order) << 32 |
                                   (0xFFFFFFFFu - static_cast<uint32_t>(id)));
    if (x > -INFINITY) peak.least = min(peak.least, order);
  });
  peak = block_reduce(peak, shared.peak_warps, Sum());
  if (threadIdx.x < Team::size()) Team::of(&shared, threadIdx.x)->peaks[Team::rank()] = peak;
  Team::sync();
  for (unsigned rank = 0; rank < Team::size(); ++rank) peak = peak + shared.peaks[rank];

  const auto finish = [&](uint32_t id) {
    if (Team::rank() != 0 || threadIdx.x != 0) return;
    drawn[draw.place] = peak.finite != 0 ? static_cast<int32_t>(id) : 0;
    on_host[draw.place] = peak.finite != 0 ? static_cast<int32_t>(id) : -1;
  };
  const float largest = logit_of(static_cast<uint32_t>(peak.best >> 32));
  if (peak.finite == 0 || draw.octaves == 0.0f || largest == -INFINITY) {
    finish(0xFFFFFFFFu - static_cast<uint32_t>(peak.best));
    return;
  }

  const int id_bits = 32 - __clz(cols - 1);  // of 0: none
  const Row<N> row{slice, largest, draw.octaves, id_bits, &shared};
  const unsigned long long ids = (1ull << id_bits) - 1;
  const uint32_t farthest =
      min(weights::distance(largest, logit_of(peak.least), draw.octaves), weights::kFar - 1);
  const unsigned long long last = static_cast<unsigned long long>(farthest) << id_bits | ids;
  const int key_bits = last == 0 ? 0 : 64 - __clzll(static_cast<long long>(last));
  const int part_shift = max(0, key_bits - kBinBits);
  const Range whole{0, key_bits, 0, {0, 0}};
  row.sum_parts(whole, part_shift, shared.before);
  const auto fraction_of = [](double part, unsigned long long mass) {
    return __dmul_rn(part, static_cast<double>(mass));
  };
  // The leader's.
  unsigned long long mass = shared.before[kBins].mass;
  unsigned long long last_left = last;
  if (draw.top_k > 0) {
    row.find(whole, part_shift,
             min(static_cast<uint32_t>(draw.top_k), shared.before[kBins].count) - 1, true);
    mass = shared.found.mass;
    last_left = shared.found_key;
  }
  if (draw.top_p < 1.0) {
    const auto enough = static_cast<unsigned long long>(ceil(fraction_of(draw.top_p, mass)));
    row.find(whole, part_shift, max(enough, 1ull) - 1, false);
    mass = shared.found.mass;
    last_left = shared.found_key;
  }
  if (draw.farthest < weights::kFar) {
    mass = row.mass_through(
        min(last_left, static_cast<unsigned long long>(draw.farthest) << id_bits | ids));
  }
  const auto target = static_cast<unsigned long long>(fraction_of(draw.uniform, mass));
  row.find(whole, part_shift, min(target, mass - 1), false);
  finish(static_cast<uint32_t>(shared.found_key & ids));
}

}  // namespace

cudaError_t draw_tokens(const float* logits, int64_t cols, const RowDraw* draws, int64_t count,
                        const int32_t* integers, int32_t* drawn, int32_t* on_host,
                        cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const bool clusters = overlaps_kernels();
  const int blocks = clusters ? kMostBlocks : 1;
  if (cols < 1 || cols >= kMostDrawCols * blocks || count > 65535) return cudaErrorInvalidValue;
  const int slice_cols = static_cast<int>((cols + 32 * blocks - 1) / (32 * blocks)) * 32;
  const auto kernel = cols % 4 == 0 ? draw_tokens_kernel<4> : draw_tokens_kernel<1>;
  const size_t bytes = static_cast<size_t>(slice_cols) / 32 * 2 * sizeof(uint32_t);
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(count));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = static_cast<unsigned>(blocks);
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  config.attrs = attributes;
  config.numAttrs = clusters ? 2 : 0;
  return cudaLaunchKernelEx(&config, kernel, logits, static_cast<int>(cols), slice_cols, draws,
                            integers, drawn, on_host);
}

}  // namespace sagelm::kernels
