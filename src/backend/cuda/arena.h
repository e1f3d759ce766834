// The memory of a model's steps besides weights and caches: one buffer, cut into parts before the
// first step.
#pragma once

#include <cstddef>
#include <vector>

#include "backend/backend.h"

namespace sagelm::cuda {

// A part of a buffer.
struct Part {
  size_t at = 0;
  size_t bytes = 0;
};

// What a step's attention takes beyond its matrices.
struct AttentionRoom {
  size_t workspace = 0;
  int64_t rotations = 0;      // positions
  int64_t arrivals = 0;       // counters of sequences and KV heads behind them
  size_t rotation_bytes = 0;  // of both
};

struct ArenaLayout {
  std::vector<Part> scratch;  // by slot
  Part trial;                 // a second result of any product that adds to what is there
  Part rotations, workspace;
  size_t bytes = 0;
};

// Parts are 256-byte aligned. The workspace, which depends on the attention kernels, comes last:
// with others of them the rest stays where it is.
ArenaLayout lay_out(const StepLimits& limits, DType activations, const AttentionRoom& attention);

}  // namespace sagelm::cuda
