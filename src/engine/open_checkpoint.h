// From load options to a checkpoint: the one place that tells a model on disk from made-up weights.
#pragma once

#include "checkpoint/checkpoint.h"
#include "sagelm/sagelm.hpp"

namespace sagelm {

Checkpoint open_checkpoint(const LoadOptions& options);

}  // namespace sagelm
