// The numbers of the SageAttention recipes (arXiv:2410.02367 and 2411.10958), once, for the
// quantizers, the kernels and the CPU model of them. Host and device; no CUDA header.
#pragma once

namespace sagelm::recipe {

// Softmax runs in base 2: logits are scaled by softmax_scale * log2(e).
inline constexpr float kLog2E = 1.44269504f;
inline constexpr float kLn2 = 0.69314718f;

// Symmetric integers: -128 (and -8) are never used, so that a group's largest magnitude maps to
// the largest integer in both directions.
inline constexpr float kInt8Max = 127.0f;
inline constexpr float kInt4Max = 7.0f;

// INT4 keys of a cache (docs/kv-cache.md) are rotated first, and so are the queries that meet them:
// both are multiplied by the Hadamard matrix of their size, head_dim rounded up to 64, 128 or 256,
// and by these factors, which are exact and whose product is 1 / dim. Logits stay the same, and no
// channel is much larger than the others.
inline constexpr int kRotatedDim = 64;  // the least
template <int kDim>
inline constexpr float kRotatedKeyFactor = kDim == 256 ? 0.0625f : 0.125f;
template <int kDim>
inline constexpr float kRotatedQueryFactor = kDim == 64 ? 0.125f : 0.0625f;
// They are then cut into 16 steps between their least and largest element: middle + step * integer.
inline constexpr float kInt4Steps = 15.0f;
inline constexpr float kInt4Middle = 8.0f;

// Largest finite e4m3 (1.75 * 2^8). P, in [0, 1], is scaled by it before conversion, by taking
// log2(448) off the running maximum: the row sum then carries the same factor and it cancels.
inline constexpr float kE4m3Max = 448.0f;
inline constexpr float kLog2E4m3Max = 8.80735492f;

// The largest code of V in the pages of a cache and in Hopper's tiles, whose products the matrix
// unit sums in halves, up to 65504 (sage2_softmax_sm90.cuh). Only numbers below 1/192 of the tile's
// largest are rounded more coarsely than with 448.
inline constexpr float kTileValueMax = 3.0f;

// The mean key of a page is summed in FP32 by halving: first what is mean_rows() keys or more
// apart, the furthest first, then the rest, neighbours first. Where keys are FP16 numbers it is
// made one.
constexpr int mean_rows(int head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 32 : 16; }
template <int kDim>
inline constexpr int kMeanRows = mean_rows(kDim);

// V is rounded with feedback: in runs of so many tokens, counted from the start of the sequence, a
// channel's next element is first moved against the sum of the run's errors so far, by one over the
// run's length of it, and by kValueMove of itself at most: an element near zero may be a sink's and
// have most of a row's weight. Weights of neighbours have much in common, and what is common to
// them meets the sum of the errors, which is then small (docs/accuracy.md). A run is what one
// thread has. The largest moves by less than a third of a step, so no code is beyond that of the
// largest magnitude.
constexpr int value_run(int head_dim) { return head_dim <= 64 ? 4 : 8; }
template <int kDim>
inline constexpr int kValueRun = value_run(kDim);
inline constexpr float kValueMove = 1.0f / 16;
// What is kept of a run is the next element's move over kValueMove, which grows by so much of an
// error: a power of two, so that products with it are exact.
constexpr float value_gain(int head_dim) {
  return 1.0f / (kValueMove * static_cast<float>(value_run(head_dim)));
}
template <int kDim>
inline constexpr float kValueGain = value_gain(kDim);

// A group whose largest magnitude is below this is scaled as if it were this: all zeros stay zeros
// and no scale is zero (the official CUDA quantizer's guard).
inline constexpr float kAmaxFloor = 1e-7f;
// Where factors are FP16 numbers they are at most this.
inline constexpr float kLargestHalf = 65504.0f;

}  // namespace sagelm::recipe
