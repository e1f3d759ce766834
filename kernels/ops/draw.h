// Draws tokens by rows of logits, as src/backend/cpu/token_draw.h does, bit for bit.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace sagelm::kernels {

// How one token is drawn; what the numbers mean: src/backend/token_draw.h. In device memory, as are
// the integers that it names.
struct RowDraw {
  double uniform;
  double top_p;
  float octaves;  // log2(e) / temperature; 0: the most probable token
  float penalty;
  uint32_t farthest;  // distance of a token that min-p leaves (token_weights.h)
  int32_t top_k;      // 0: off
  int32_t row;        // of the logits
  int32_t place;      // where the token goes
  int32_t history;    // integers[history ...] are penalized: tokens, or names (named_token.cuh)
  int32_t history_size;
  int32_t banned;  // integers[banned ...] are never drawn
  int32_t banned_size;
  int32_t unused[2];
};

// Rows of this many logits and more are refused; on Hopper and later, of eight times as many.
inline constexpr int64_t kMostDrawCols = (int64_t{1} << 17) - 64;

// What draws and integers name must be there when the kernel in front of this one starts: the
// logits need not. Draw i goes to drawn[place] and on_host[place] (memory of the host that the
// device can write to): for logits that are not all finite 0 and -1.
cudaError_t draw_tokens(const float* logits, int64_t cols, const RowDraw* draws, int64_t count,
                        const int32_t* integers, int32_t* drawn, int32_t* on_host,
                        cudaStream_t stream);

}  // namespace sagelm::kernels
