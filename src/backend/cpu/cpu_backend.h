// The CPU backend: products on AMX or by oneDNN, our own attention (attention.h), OpenMP threads.
#pragma once

#include <memory>

#include "backend/backend.h"

namespace sagelm {

// threads 0: one per core.
std::unique_ptr<Backend> make_cpu_backend(int threads);

}  // namespace sagelm
