#include "backend/cuda/arena.h"

#include <algorithm>

namespace sagelm::cuda {

ArenaLayout lay_out(const StepLimits& limits, DType activations, const AttentionRoom& attention) {
  ArenaLayout layout;
  const auto take = [&layout](size_t bytes) {
    const Part part{.at = layout.bytes, .bytes = bytes};
    layout.bytes += (bytes + 255) / 256 * 256;
    return part;
  };
  size_t largest_sum = 0;  // products add to residual streams alone
  for (const ScratchSize& slot : limits.scratch) {
    const DType type = slot.holds == Holds::kActivations ? activations : DType::kF32;
    layout.scratch.push_back(take(static_cast<size_t>(slot.rows * slot.cols) * dtype_size(type)));
    if (slot.holds == Holds::kResidual) {
      largest_sum = std::max(largest_sum, layout.scratch.back().bytes);
    }
  }
  layout.trial = take(largest_sum);
  layout.rotations = take(attention.rotation_bytes);
  layout.workspace = take(attention.workspace);
  return layout;
}

}  // namespace sagelm::cuda
