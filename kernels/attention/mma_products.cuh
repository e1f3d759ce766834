// The products of the sm_80 attention kernels: what a block's tiles look like in shared memory, and
// S = Q K^T and O += P V of one warp's rows against a tile of keys.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/attention/mma_operands.h"
#include "kernels/attention/mma_softmax.cuh"
#include "kernels/common/ptx.cuh"

namespace sagelm::kernels::mma {

using namespace ptx;

enum class Products { kF16, kBf16, kSage1F16, kSage1Bf16, kSage2, kSage2_4b };

template <Products kProducts, int kDim_>
struct Shape {
  static constexpr int kDim = kDim_;
  static constexpr bool kInt8 = kProducts != Products::kF16 && kProducts != Products::kBf16;
  static constexpr bool kBf16 = kProducts == Products::kBf16 || kProducts == Products::kSage1Bf16;
  // Q is smoothed too: the logits are the products plus those of Q's means with K as it came.
  static constexpr bool kSmoothsQ = kProducts == Products::kSage2_4b;
  static constexpr bool kE4m3 = kProducts == Products::kSage2 || kSmoothsQ;
  static constexpr bool kF16Sums = kProducts == Products::kSage1F16;

  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * 32;
  // 32 rows a warp halve the shared-memory reads a product; 256 channels leave room for 16.
  static constexpr int kRowTiles = kDim == 256 ? 1 : 2;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kMeans = kRows / kMmaMeanRows;
  static constexpr int kKeys = kMmaKeyTile;
  static constexpr int kStages = kDim == 256 ? 1 : 2;
  static constexpr bool kQueriesInRegisters = kDim == 64;

  static constexpr int kQkRowBytes = kDim * (kInt8 ? 1 : 2);
  static constexpr int kQkSteps = kQkRowBytes / 32;
  static constexpr int kValueRowBytes = kE4m3 ? kKeys : 2 * kDim;
  static constexpr int kPvSteps = kE4m3 ? kKeys / 32 : kKeys / 16;
  static constexpr int kQueryBytes = kRows * kQkRowBytes;
  static constexpr int kKeyBytes = kKeys * kQkRowBytes;
  static constexpr int kPlainKeyBytes = kSmoothsQ ? kKeys * 2 * kDim : 0;
  static constexpr int kValueBytes = kKeys * kDim * (kE4m3 ? 1 : 2);
  static constexpr int kOutBytes = kRows * kDim * 2;
  static constexpr int kSmemBytes =
      std::max(kQueryBytes + kStages * (kKeyBytes + kValueBytes + kPlainKeyBytes), kOutBytes);
};

// s = Q K^T of this warp's rows. `queries` is the address of lane l's row l % 16, without swizzle.
template <class S>
__device__ __forceinline__ void multiply_keys(
    float (&s)[S::kRowTiles][S::kKeys / 8][4],
    const uint32_t (&resident)[S::kQueriesInRegisters ? S::kQkSteps : 1][S::kRowTiles][4],
    uint32_t queries, uint32_t keys) {
  constexpr int kBlocks = S::kKeys / 8;
  const int lane = threadIdx.x % 32;
  int32_t integers[S::kInt8 ? S::kRowTiles : 1][kBlocks][4];
#pragma unroll
  for (int t = 0; t < S::kRowTiles; ++t) {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if constexpr (S::kInt8) {
          integers[t][n][e] = kIntegerSeed;
        } else {
          s[t][n][e] = 0.0f;
        }
      }
    }
  }
#pragma unroll
  for (int k = 0; k < S::kQkSteps; ++k) {
    uint32_t a[S::kRowTiles][4];
#pragma unroll
    for (int t = 0; t < S::kRowTiles; ++t) {
      if constexpr (S::kQueriesInRegisters) {
#pragma unroll
        for (int e = 0; e < 4; ++e) a[t][e] = resident[k][t][e];
      } else {
        load_matrices(
            a[t], queries + chunk_offset<S::kQkRowBytes>(t * 16 + lane % 16, 2 * k + lane / 16));
      }
    }
#pragma unroll
    for (int n = 0; n < kBlocks; n += 2) {
      uint32_t b[4];
      load_matrices(b, keys + chunk_offset<S::kQkRowBytes>(n * 8 + lane / 16 * 8 + lane % 8,
                                                           2 * k + lane / 8 % 2));
#pragma unroll
      for (int t = 0; t < S::kRowTiles; ++t) {
        if constexpr (S::kInt8) {
          multiply_int8(integers[t][n], a[t], b[0], b[1]);
          multiply_int8(integers[t][n + 1], a[t], b[2], b[3]);
        } else {
          multiply_half<S::kBf16>(s[t][n], a[t], b[0], b[1]);
          multiply_half<S::kBf16>(s[t][n + 1], a[t], b[2], b[3]);
        }
      }
    }
  }
  if constexpr (S::kInt8) {
#pragma unroll
    for (int t = 0; t < S::kRowTiles; ++t) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[t][n][e] = __int_as_float(integers[t][n][e]);
      }
    }
  }
}

// What smoothing took out of the logits: the products of the means of the block's query groups,
// 16-bit [groups][kDim] in global memory, with a tile of plain keys, to biases in shared memory.
// Each warp computes 16 of the keys.
template <class S, bool kBf16>
__device__ __forceinline__ void multiply_means(const uint16_t* means, uint32_t keys, float scale,
                                               float (&biases)[S::kMeans][S::kKeys]) {
  static_assert(S::kKeys == 16 * S::kWarps);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int mean = lane / 4;  // the row of A
  float products[2][4] = {};
#pragma unroll
  for (int k = 0; k < S::kDim / 16; ++k) {
    uint32_t a[4] = {};
    if (mean < S::kMeans) {
      const auto* from =
          reinterpret_cast<const uint32_t*>(means + mean * S::kDim + k * 16 + lane % 4 * 2);
      a[0] = __ldg(from);
      a[2] = __ldg(from + 4);
    }
    uint32_t b[4];
    load_matrices(b, keys + chunk_offset<2 * S::kDim>(warp * 16 + lane / 16 * 8 + lane % 8,
                                                      2 * k + lane / 8 % 2));
    multiply_half<kBf16>(products[0], a, b[0], b[1]);
    multiply_half<kBf16>(products[1], a, b[2], b[3]);
  }
  if (mean >= S::kMeans) return;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    *reinterpret_cast<float2*>(&biases[mean][warp * 16 + n * 8 + lane % 4 * 2]) =
        make_float2(products[n][0] * scale, products[n][1] * scale);
  }
}

// Makes base-2 logits of integer products s (kIntegerZero added) of 16 rows.
template <int kBlocks>
__device__ __forceinline__ void add_biases(float (&s)[kBlocks][4], const float (&scale)[2],
                                           const float* biases) {
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
    const float2 bias = *reinterpret_cast<const float2*>(biases + n * 8 + threadIdx.x % 4 * 2);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      s[n][e] = fmaf(s[n][e] - kIntegerZero, scale[e >> 1], e % 2 == 0 ? bias.x : bias.y);
    }
  }
}

// P of one 16-row tile as the A operand of every step of P V. Accumulators need no exchange between
// lanes: a half step takes two key blocks, an e4m3 step four, whose columns V's order follows.
template <class S>
__device__ __forceinline__ void pack_probabilities(const float (&s)[S::kKeys / 8][4],
                                                   uint32_t (&p)[S::kPvSteps][4]) {
#pragma unroll
  for (int k = 0; k < S::kPvSteps; ++k) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int pair = e % 2 * 2;
      if constexpr (S::kE4m3) {
        const int n = 4 * k + e / 2 * 2;
        p[k][e] = to_e4m3(s[n][pair], s[n][pair + 1]) | to_e4m3(s[n + 1][pair], s[n + 1][pair + 1])
                                                            << 16;
      } else {
        const int n = 2 * k + e / 2;
        p[k][e] = to_halves<S::kBf16>(s[n][pair], s[n][pair + 1]);
      }
    }
  }
}

// The B operand of step k for channels n * 8 .. n * 8 + 15: two fragments of two registers.
template <class S>
__device__ __forceinline__ void load_values(uint32_t (&b)[4], uint32_t values, int k, int n) {
  const int lane = threadIdx.x % 32;
  if constexpr (S::kE4m3) {
    load_matrices(b, values + chunk_offset<S::kValueRowBytes>(n * 8 + lane / 16 * 8 + lane % 8,
                                                              2 * k + lane / 8 % 2));
  } else {
    load_matrices_transposed(
        b, values + chunk_offset<S::kValueRowBytes>(k * 16 + lane % 16, n + lane / 16));
  }
}

// out = out * shrink + P V.
template <class S>
__device__ __forceinline__ void multiply_values(float (&out)[S::kRowTiles][S::kDim / 8][4],
                                                const uint32_t (&p)[S::kRowTiles][S::kPvSteps][4],
                                                const float (&shrink)[S::kRowTiles][2],
                                                uint32_t values) {
  constexpr int kBlocks = S::kDim / 8;
  if constexpr (S::kE4m3 || S::kF16Sums) {
    // The tile's sum on its own, 32 channels at a time to spare registers.
#pragma unroll
    for (int first = 0; first < kBlocks; first += 4) {
      float wide[S::kE4m3 ? S::kRowTiles : 1][4][4] = {};
      uint32_t narrow[S::kF16Sums ? S::kRowTiles : 1][4][2] = {};
#pragma unroll
      for (int k = 0; k < S::kPvSteps; ++k) {
#pragma unroll
        for (int n = 0; n < 4; n += 2) {
          uint32_t b[4];
          load_values<S>(b, values, k, first + n);
#pragma unroll
          for (int t = 0; t < S::kRowTiles; ++t) {
            if constexpr (S::kE4m3) {
              multiply_e4m3(wide[t][n], p[t][k], b[0], b[1]);
              multiply_e4m3(wide[t][n + 1], p[t][k], b[2], b[3]);
            } else {
              multiply_half(narrow[t][n], p[t][k], b[0], b[1]);
              multiply_half(narrow[t][n + 1], p[t][k], b[2], b[3]);
            }
          }
        }
      }
#pragma unroll
      for (int t = 0; t < S::kRowTiles; ++t) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            float2 sums;
            if constexpr (S::kE4m3) {
              sums = make_float2(wide[t][n][2 * r], wide[t][n][2 * r + 1]);
            } else {
              sums = from_halves(narrow[t][n][r], false);
            }
            float(&o)[4] = out[t][first + n];
            o[2 * r] = fmaf(o[2 * r], shrink[t][r], sums.x);
            o[2 * r + 1] = fmaf(o[2 * r + 1], shrink[t][r], sums.y);
          }
        }
      }
    }
  } else {
    // Maxima settle after a few tiles: most find nothing to rescale.
    bool same = true;
#pragma unroll
    for (int t = 0; t < S::kRowTiles; ++t) {
      same = same && shrink[t][0] == 1.0f && shrink[t][1] == 1.0f;
    }
    if (!__all_sync(0xFFFFFFFFu, same)) {
#pragma unroll
      for (int t = 0; t < S::kRowTiles; ++t) {
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) out[t][n][e] *= shrink[t][e >> 1];
        }
      }
    }
#pragma unroll
    for (int k = 0; k < S::kPvSteps; ++k) {
#pragma unroll
      for (int n = 0; n < kBlocks; n += 2) {
        uint32_t b[4];
        load_values<S>(b, values, k, n);
#pragma unroll
        for (int t = 0; t < S::kRowTiles; ++t) {
          multiply_half<S::kBf16>(out[t][n], p[t][k], b[0], b[1]);
          multiply_half<S::kBf16>(out[t][n + 1], p[t][k], b[2], b[3]);
        }
      }
    }
  }
}

}  // namespace sagelm::kernels::mma
