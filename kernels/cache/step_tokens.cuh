// The tokens that a step adds to a quantized cache, as the blocks that fill tiles read them.
#pragma once

#include <cstdint>

#include "kernels/attention/quantize_tile.cuh"
#include "kernels/cache/quantized_kv.h"
#include "kernels/common/ptx.cuh"
#include "kernels/ops/elements.cuh"
#include "kernels/ops/rotate.cuh"

namespace sagelm::kernels {

__device__ inline int64_t tail_offset(const QuantizedKv& cache, int tail, bool is_value,
                                      int kv_head) {
  return ((static_cast<int64_t>(tail) * 2 + (is_value ? 1 : 0)) * cache.num_kv_heads + kv_head) *
         kTileTokens * cache.head_dim;
}

template <bool kBf16>
__device__ inline uint4 pack(const float (&x)[8]) {
  return make_uint4(ptx::to_halves<kBf16>(x[0], x[1]), ptx::to_halves<kBf16>(x[2], x[3]),
                    ptx::to_halves<kBf16>(x[4], x[5]), ptx::to_halves<kBf16>(x[6], x[7]));
}
__device__ inline uint4 shuffle(const uint4& x, int lane) {
  return make_uint4(__shfl_sync(0xFFFFFFFFu, x.x, lane), __shfl_sync(0xFFFFFFFFu, x.y, lane),
                    __shfl_sync(0xFFFFFFFFu, x.z, lane), __shfl_sync(0xFFFFFFFFu, x.w, lane));
}

enum class Part { kQuery, kKey, kValue };

// Where the tokens of a sequence are while its tiles are being filled: before the step's first row
// in the tail, then in QKV. Queries and keys come as RowShare shares them.
template <int kDim, bool kBf16>
struct StepTokens {
  using Share = RowShare<kDim>;

  uint16_t* tail;        // token 0 of its page; not of queries
  const uint16_t* rows;  // the step's first row
  const float* angles;   // of position 0; null for values
  int row_stride;        // elements
  int head_dim;
  int start, end;      // positions of the step's tokens
  int first_position;  // of token 0

  // head: among the query or the KV heads.
  __device__ StepTokens(const AppendToQuantizedKv& args, int b, int head, Part part)
      : head_dim(args.cache.head_dim) {
    const QuantizedKv& cache = args.cache;
    const QuantizedKvStep& step = args.step;
    // What a step of one sequence needs no memory for.
    const bool alone = step.num_sequences == 1 && step.max_q_len > 1;
    const int first_row = alone ? 0 : step.cu_q_lens[b];
    const bool is_value = part == Part::kValue;
    const int column_head =
        head + (part == Part::kQuery ? 0 : cache.num_heads + (is_value ? cache.num_kv_heads : 0));
    row_stride = (cache.num_heads + 2 * cache.num_kv_heads) * head_dim;
    end = alone ? step.max_kv_len : step.kv_lens[b];
    start = end - (alone ? step.rows : step.cu_q_lens[b + 1] - first_row);
    first_position = 0;
    tail = part == Part::kQuery ? nullptr
                                : static_cast<uint16_t*>(cache.tails) +
                                      tail_offset(cache, step.tails[b], is_value, head);
    rows = static_cast<const uint16_t*>(args.qkv) + int64_t{first_row} * row_stride +
           column_head * head_dim;
    angles = is_value ? nullptr : args.rotations;
  }

  __device__ bool is_row(int token) const {
    const int position = first_position + token;
    return position >= start && position < end;
  }
  // A token of a KV head in the tail.
  __device__ uint16_t* tail_row(int token) const { return tail + token * head_dim; }
  // Whether a tile's tokens are all the step's and heads have all channels.
  __device__ bool is_whole() const {
    return head_dim == kDim && first_position >= start && first_position + kTileTokens <= end;
  }
  // 8 channels of a token of a whole tile.
  __device__ const uint16_t* row_of(int token) const {
    return rows + int64_t{first_position - start + token} * row_stride;
  }
  __device__ bool inside(int chunk) const { return chunk * 8 < head_dim; }
  // 8 channels, of the query head that many further; zeros past the end and beyond the head's.
  __device__ uint4 load_chunk(int token, int chunk, int heads = 0) const {
    const int position = first_position + token;
    if (!inside(chunk) || position >= end) return make_uint4(0, 0, 0, 0);
    const uint16_t* from = position < start
                               ? tail_row(token)
                               : rows + int64_t{position - start} * row_stride + heads * head_dim;
    return ptx::load_once(from + chunk * 8);  // leaves the L1 cache to the angles
  }
  __device__ void load_row(int token, uint4 (&raw)[2], int heads = 0) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      raw[half] = load_chunk(token, Share::chunk(half), heads);
    }
  }
  // A row of heads of all channels by its angles, of which the thread's begin at `angle`.
  template <int kHeads>
  __device__ static void rotate_whole(const float* angle, uint4 (*raw)[2]) {
    float cosine[8], sine[8];
    load(angle, cosine);
    load(angle + kDim / 2, sine);
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float a[8], b[8];
      unpack<kBf16>(raw[h][0], a);
      unpack<kBf16>(raw[h][1], b);
      rotate_pairs(a, b, cosine, sine);
      raw[h][0] = pack<kBf16>(a);
      raw[h][1] = pack<kBf16>(b);
    }
  }
  __device__ const float* angles_of(int token) const {
    return angles + static_cast<int64_t>(first_position + token) * kDim + Share::lane() * 8;
  }
  // The thread's share of a tile of keys, and their rotation.
  __device__ void load_keys(uint4 (&raw)[Share::kSteps][2]) const {
    if (is_whole()) {
      const uint16_t* from = row_of(Share::row(0)) + Share::lane() * 8;
#pragma unroll
      for (int i = 0; i < Share::kSteps; ++i) {
        raw[i][0] = ptx::load_once(from);
        raw[i][1] = ptx::load_once(from + kDim / 2);
        from += Share::kRows * row_stride;
      }
    } else {
#pragma unroll
      for (int i = 0; i < Share::kSteps; ++i) load_row(Share::row(i), raw[i]);
    }
  }
  __device__ void rotate_keys(uint4 (&raw)[Share::kSteps][2]) const {
    if (is_whole()) {
      const float* angle = angles_of(Share::row(0));
#pragma unroll
      for (int i = 0; i < Share::kSteps; ++i) {
        rotate_whole<1>(angle + i * Share::kRows * kDim, &raw[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < Share::kSteps; ++i) rotate<1>(Share::row(i), &raw[i]);
    }
  }
  // The thread's share of a tile of values.
  __device__ void load_values(uint4 (&raw)[ValueShare<kDim>::kSteps][2]) const {
    using Values = ValueShare<kDim>;
    const int chunk = Values::chunk();
    if (is_whole()) {
      const uint16_t* from = row_of(Values::token(0, 0)) + chunk * 8;
#pragma unroll
      for (int i = 0; i < Values::kSteps; ++i) {
        raw[i][0] = ptx::load_once(from);
        raw[i][1] = ptx::load_once(from + row_stride);
        from += 2 * row_stride;
      }
    } else {
#pragma unroll
      for (int i = 0; i < Values::kSteps; ++i) {
        raw[i][0] = load_chunk(Values::token(i, 0), chunk);
        raw[i][1] = load_chunk(Values::token(i, 1), chunk);
      }
    }
  }
  // Rows of kHeads heads by their token's angles, if they are the step's.
  template <int kHeads>
  __device__ void rotate(int token, uint4 (*raw)[2]) const {
    const bool wanted = is_row(token);
    if (head_dim == kDim) {
      if (wanted) rotate_whole<kHeads>(angles_of(token), raw);
      return;
    }
    const float* angle = angles + static_cast<int64_t>(first_position + token) * head_dim;
    float cosine[8], sine[8];
    // The partners are in other lanes.
    const int half_chunks = head_dim / 16;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      uint4 rotated[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int chunk = Share::chunk(half);
        const bool second = chunk >= half_chunks;
        const int partner_chunk = second ? chunk - half_chunks : chunk + half_chunks;
        const int lane = static_cast<int>(threadIdx.x) % 32 / Share::kLanes * Share::kLanes +
                         partner_chunk % Share::kLanes;
        const uint4 low = shuffle(raw[h][0], lane), high = shuffle(raw[h][1], lane);
        rotated[half] = raw[h][half];
        if (!wanted || !inside(chunk)) continue;
        float x[8], partner[8];
        unpack<kBf16>(raw[h][half], x);
        unpack<kBf16>(partner_chunk < Share::kLanes ? low : high, partner);
        load(angle + chunk % half_chunks * 8, cosine);
        load(angle + head_dim / 2 + chunk % half_chunks * 8, sine);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          x[e] = second ? rotate_second(x[e], partner[e], cosine[e], sine[e])
                        : rotate_first(x[e], partner[e], cosine[e], sine[e]);
        }
        rotated[half] = pack<kBf16>(x);
      }
      raw[h][0] = rotated[0];
      raw[h][1] = rotated[1];
    }
  }
};

}  // namespace sagelm::kernels
