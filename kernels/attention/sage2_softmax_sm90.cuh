// From logits to the operand of P V in registers: SageAttention 2's P = 2^(logit - reference) in
// e4m3 (arXiv:2411.10958, section 3.3), with a reference per row in the place of a running maximum.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "kernels/attention/recipe.h"
#include "kernels/attention/rows_sm90.cuh"
#include "kernels/common/ptx.cuh"

namespace sagelm::kernels::sage2 {

using namespace hopper;

// The exponentials of a tile are taken against a row's reference. It is moved only when a weight
// comes near the largest e4m3 number. The largest weight of the tile that sets it, or moves it,
// then has so many bits: what moves it is mostly a key far above the others, and weights of those
// after it keep what is left of the range.
constexpr float kFirstBits = recipe::kLog2E4m3Max - 6.0f;
constexpr float kMovedBits = recipe::kLog2E4m3Max - 3.0f;
// The reference of a row that has seen no key: any logit is infinitely above it.
constexpr float kNothing = -1e30f;

// Of the integers of a tile's keys, times those of each row's queries, to logits in bits; and of
// its values.
struct TileScales {
  float scale[2];
  float value_scale;
};

// Whether a weight of e4m3 numbers, to whose codes kNearMost has been added, is 176 (the code 0x73)
// or more, or NaN. If none is, then none has saturated.
constexpr uint32_t kNearMost = 0x0D0D0D0Du;
__device__ inline bool near_most(uint32_t carries) { return (carries & 0x80808080u) != 0; }

__device__ inline __half2 as_halves(uint32_t x) {
  __half2 halves;
  memcpy(&halves, &x, sizeof halves);
  return halves;
}
__device__ inline uint32_t bits_of(__half2 halves) {
  uint32_t x;
  memcpy(&x, &halves, sizeof x);
  return x;
}

// The special function unit takes as long for a tile's exponentials as the matrix unit for its
// products. Some are therefore computed as packed halves: within a range of 31 bits, from 2^-15 on,
// whose lowest is as good as 0 and whose highest saturates.
constexpr float kLeastBits = -15.0f;
constexpr float kBitRange = 31.0f;
// 2^t of two t, given as (t - kLeastBits) / kBitRange cut to [0, 1].
__device__ __forceinline__ uint32_t exp2_halves(float low, float high) {
  // e + f with ten bits behind the point is, as a half, (1 + f) 2^e: a chord of 2^(e + f). Added to
  // kMagic it stands in the lowest bits of the sum, and to kMagicHigh without those of kMagic.
  constexpr float kMagic = 0x1.8p23f;  // its bits are 0x4B400000
  constexpr float kMagicHigh = kMagic - 0x4B40;
  const uint32_t x = __float_as_uint(fmaf(low, kBitRange * 1024, kMagic)) +
                     (__float_as_uint(fmaf(high, kBitRange * 1024, kMagicHigh)) << 16);
  // The mean of two chords half an octave apart is within 1 % of 2^t, 0.45 % in the mean square.
  const __half2 later = __hmul2(as_halves(x + 0x02000200u), __float2half2_rn(0.33967f));
  return bits_of(__hfma2(as_halves(x), __float2half2_rn(0.48042f), later));
}

// Whether register i of P is computed so. Those of a row's first 16 keys of a tile are not: a
// thread that sees a key of it has one there, and so a NaN passes.
template <int kDim>
__device__ constexpr bool in_halves(int i) {
  return ((kDim == 128 ? 0x6330 : 0x0010) >> i & 1) != 0;
}

// Whether register i of P belongs to row kRow of a thread's two, or to any.
constexpr int kBothRows = -1;
template <int kRow>
__device__ constexpr bool belongs(int i) {
  return kRow == kBothRows || i % 2 == kRow;
}

// A step's logits to P. Returns the union of what near_most takes.
template <int kDim, int kRow = kBothRows, int kCount>
__device__ __forceinline__ uint32_t exponentiate(const int32_t (&logits)[kCount],
                                                 uint32_t (&p)[kCount / 4], const float (&scale)[2],
                                                 const float (&offset)[2]) {
  const float unit_scale[2] = {scale[0] * (1 / kBitRange), scale[1] * (1 / kBitRange)};
  const float unit_offset[2] = {(offset[0] + kLeastBits) * (1 / kBitRange),
                                (offset[1] + kLeastBits) * (1 / kBitRange)};
  uint32_t carries = 0;
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
    if (!belongs<kRow>(i)) continue;
    const int r = i & 1;
    float x[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const auto logit = static_cast<float>(logits[8 * (i >> 1) + 2 * r + (e & 1) + 2 * (e & 2)]);
      x[e] = in_halves<kDim>(i) ? __saturatef(fmaf(logit, unit_scale[r], -unit_offset[r]))
                                : ptx::exp2_fast(fmaf(logit, scale[r], -offset[r]));
    }
    p[i] = in_halves<kDim>(i)
               ? ptx::e4m3_from_halves(exp2_halves(x[0], x[1]), exp2_halves(x[2], x[3]))
               : ptx::to_e4m3(x[0], x[1], x[2], x[3]);
    carries |= p[i] + kNearMost;
  }
  return carries;
}

// Makes the weights of masked keys zero: of those from `ends` of their row on, relative to the
// first key of this thread (4c of the step's). Returns what exponentiate does.
template <int kRow = kBothRows, int kCount>
__device__ inline uint32_t mask_weights(uint32_t (&p)[kCount], const int (&ends)[2]) {
  uint32_t carries = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (!belongs<kRow>(i)) continue;
    // Four keys from 16 (i / 2) on, of row i % 2.
    const int bits = max(0, 8 * ends[i & 1] - 128 * (i >> 1));
    p[i] &= __funnelshift_lc(~0u, 0u, bits);
    carries |= p[i] + kNearMost;
  }
  return carries;
}

// The products of P V, summed on two levels, both in halves, packed as the accumulators lie:
// register i is of row i % 2. The matrix unit sums those of a tile, from zero: 128 keys with
// weights up to 160 and codes of values up to recipe::kTileValueMax, 61,440 at most. `sums` takes
// them times the tile's scale of V, in a unit that keeps the sum of all tiles in range.
template <int kDim>
struct Accumulators {
  static constexpr int kCount = kDim / 4;

  // The last two are the sums of the weights of row g and of row g + 8: P is multiplied by ones
  // too.
  uint32_t products[kCount + 2];
  __half2 sums[kCount];

  // Where it stands and no earlier: the rows of the item before leave from these registers.
  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = as_halves(ptx::opaque(0));
  }
  // Once products have been taken: for others that are added to them. (That they start from zero by
  // the instruction's own flag is for all of a warp group to agree on.)
  __device__ void restart() {
#pragma unroll
    for (uint32_t& product : products) product = ptx::opaque(0);
  }
  __device__ float weights_of(int r) const { return __low2float(as_halves(products[kCount + r])); }
  // Adds a tile's products, times the factor.
  __device__ void take(__half2 factor) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = __hfma2(as_halves(products[i]), factor, sums[i]);
  }
  // Adds the sums to those put away in a warp's room of kCount * 32 of them, which may be none yet.
  __device__ void put_away(void* room, bool none) {
    __half2* const to = own(room);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      to[32 * i] = none ? sums[i] : __hadd2(to[32 * i], sums[i]);
      sums[i] = __float2half2_rn(0.0f);
    }
  }
  // The room may then be used otherwise.
  __device__ void bring_back(void* room) {
    __half2* const from = own(room);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = __hadd2(from[32 * i], sums[i]);
    __syncwarp();
  }
  __device__ void scale_row(int r, __half2 factor) {
#pragma unroll
    for (int i = r; i < kCount; i += 2) sums[i] = __hmul2(sums[i], factor);
  }
  __device__ static void scale_row_away(void* room, int r, __half2 factor) {
    __half2* const there = own(room);
#pragma unroll
    for (int i = r; i < kCount; i += 2) there[32 * i] = __hmul2(there[32 * i], factor);
  }
  // The sums times the rows' factors, to `staging`. As FP16 numbers they are multiplied as such,
  // by a power of two and by what is left: the factor alone may be beyond their range.
  template <bool kBf16>
  __device__ void stage(const RowInverses& factors, uint16_t (&staging)[16][kDim + 8]) const {
    if constexpr (kBf16) {
      stage_pairs(staging, [&](int i) {
        const float2 x = __half22float2(sums[i]);
        return ptx::to_halves<true>(x.x * factors.of[i % 2], x.y * factors.of[i % 2]);
      });
    } else {
      __half2 powers[2], rests[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        // Of the factor's exponent as much as a half can have.
        const uint32_t exponent =
            min(max(__float_as_uint(factors.of[r]) & 0x7F800000u, 0x38800000u), 0x47000000u);
        powers[r] = __float2half2_rn(__uint_as_float(exponent));
        rests[r] = __float2half2_rn(factors.of[r] * __uint_as_float(0x7F000000u - exponent));
      }
      stage_pairs(staging, [&](int i) {
        return bits_of(__hmul2(__hmul2(sums[i], powers[i % 2]), rests[i % 2]));
      });
    }
  }

 private:
  __device__ static __half2* own(void* room) {
    return static_cast<__half2*>(room) + threadIdx.x % 32;
  }
};

// The key of a thread's i-th logit, relative to its first.
__device__ constexpr int key_of(int i) { return 16 * (i >> 3) + 2 * (i >> 2 & 1) + (i & 1); }

// The largest logit of row r, in bits, among its keys before `end`; kNothing if there is none.
template <int kCount>
__device__ inline float largest_logit(const int32_t (&logits)[kCount], int r,
                                      const TileScales& tile, int end) {
  float most = kNothing;
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const auto logit = static_cast<float>(logits[4 * j + 2 * r + e]);
      if (key_of(4 * j + e) < end) most = fmaxf(most, logit);
    }
  }
  // The scale belongs to this thread's keys.
  return quad_max(most == kNothing ? kNothing : most * tile.scale[r]);
}

// References from the first keys, such that their weights fit whatever they are. masked: whether a
// row may not see all of them; what stands in for the logits of those that it does not see is then
// no logit. By the integers, since a thread's keys have one scale.
template <int kCount>
__device__ inline void set_references(int32_t (&logits)[kCount], RowState& rows,
                                      const TileScales& tile, const int (&ends)[2], bool masked) {
  constexpr int32_t kHidden = -0x40000000;
  if (masked) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (key_of(i) >= ends[i >> 1 & 1]) logits[i] = kHidden;
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int32_t most = logits[2 * r];
#pragma unroll
    for (int i = 1; i < kCount / 2; ++i) most = max(most, logits[4 * (i >> 1) + 2 * r + (i & 1)]);
    const float largest = most == kHidden ? kNothing : static_cast<float>(most) * tile.scale[r];
    rows.reference[r] = quad_max(largest) - kFirstBits;
  }
}

// Moves the references of those of a warp's rows that are its threads' row kRow and have a weight
// near the most. True if there is one: the weights of these rows are then to be computed again. A
// row without a weight so far takes its reference from these keys.
template <int kRow, int kDim, int kCount>
__device__ inline bool move_reference(const int32_t (&logits)[kCount],
                                      const uint32_t (&p)[kCount / 4], RowState& rows,
                                      Accumulators<kDim>& sums, const TileScales& tile, int end,
                                      void* away) {
  uint32_t carries = 0;
#pragma unroll
  for (int i = kRow; i < kCount / 4; i += 2) carries |= p[i] + kNearMost;
  const unsigned near = __ballot_sync(0xFFFFFFFFu, near_most(carries));
  if (near == 0) return false;
  const bool moves = (near >> (threadIdx.x & 28) & 15) != 0;  // of the four threads of a row
  const float largest = largest_logit(logits, kRow, tile, end);
  const float before = rows.reference[kRow];
  if (moves) rows.reference[kRow] = largest - kMovedBits;
  const __half2 factor = __float2half2_rn(ptx::exp2_fast(before - rows.reference[kRow]));
  rows.sum[kRow] *= __low2float(factor);  // as the products are
  sums.scale_row(kRow, factor);
  if (away != nullptr) sums.scale_row_away(away, kRow, factor);
  return true;
}

}  // namespace sagelm::kernels::sage2
