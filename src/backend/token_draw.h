// How the token after a row of logits is drawn, and what stands for it until it is known.
#pragma once

#include <cstdint>
#include <limits>
#include <span>

namespace sagelm {

// Applied in this order: repeat penalty, temperature, top-k, top-p, min-p. The tokens that are left
// are drawn by their probabilities, which uniform decides: the most probable first, among equals
// the lowest id first.
struct TokenDraw {
  int64_t row = 0;         // of the logits
  double temperature = 0;  // 0: the most probable token
  int32_t top_k = 0;       // 0: off
  double top_p = 1;        // 1: off
  double min_p = 0;        // 0: off
  double uniform = 0;      // [0, 1)
  float penalty = 1;       // divides positive and multiplies negative logits of `penalized`
  std::span<const int32_t> penalized = {};  // tokens or names
  std::span<const int32_t> banned = {};     // tokens that are never drawn
};

// A name is a number below 0 that stands for a token being drawn: in the batches and the draws of
// the kNamedSteps - 1 steps that follow.
inline constexpr int64_t kMostDraws = 256;  // of a step
inline constexpr int64_t kNamedSteps = 4;
inline constexpr int64_t kNamePlaces = kMostDraws * kNamedSteps;

// Of draw i of a step; those of a step follow each other.
constexpr int32_t token_name(int64_t step, int64_t i) {
  return std::numeric_limits<int32_t>::min() +
         static_cast<int32_t>(step % kNamedSteps * kMostDraws + i);
}
// Where its token is among kNamePlaces.
constexpr int32_t name_place(int32_t name) { return name & 0x7FFFFFFF; }
constexpr bool is_token_name(int32_t token) { return token < 0 && name_place(token) < kNamePlaces; }

}  // namespace sagelm
