#include "engine/open_checkpoint.h"

namespace sagelm {

Checkpoint open_checkpoint(const LoadOptions& options) {
  if (options.random_weights.empty()) return Checkpoint::open(options.model);
  return Checkpoint::random(options.random_weights);
}

}  // namespace sagelm
