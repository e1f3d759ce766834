// The decode loop: a token of every answer per step.
#pragma once

#include <cstdint>
#include <span>

#include "engine/answer.h"
#include "model/llama.h"

namespace sagelm {

// An answer that is being drawn.
struct DecodedAnswer {
  Answer* answer = nullptr;
  Sequence* sequence = nullptr;  // what ran of it; of one cache with the others
  int64_t* steps = nullptr;      // counts the tokens that run
};

// Draws answers as one batch until all have ended. tokens: the first one of each, which is drawn
// already. runs_ahead (Backend::runs_ahead): a step is enqueued before the tokens in front of it
// are known; what it appended to sequences whose answers have ended by then is taken back, so that
// the result is the same as without.
void decode(Llama& llama, bool runs_ahead, std::span<const DecodedAnswer> answers,
            std::span<const int32_t> tokens);

}  // namespace sagelm
