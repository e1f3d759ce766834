// From a device's name to the backend that computes there: the one place that picks one.
#pragma once

#include <memory>
#include <string_view>

#include "backend/backend.h"

namespace sagelm {

// name: auto (the first GPU if this build and machine can use one, else the CPU), cpu, cuda (the
// first) or cuda:N. threads: of the CPU backend, 0 for one per core. Throws UsageError for an
// unknown name and Error for a device that this build or machine does not have.
std::unique_ptr<Backend> make_backend(std::string_view name, int threads);

}  // namespace sagelm
