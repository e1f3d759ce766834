// The backend for one NVIDIA GPU, compute capability 8.0 or later.
#pragma once

#include <memory>
#include <string>

#include "backend/backend.h"

namespace sagelm {

// One sentence that says why the device cannot be used; empty if it can.
std::string cuda_problem(int device);

// Weights and activations are FP16 or BF16, as the checkpoint's embedding is stored (F32 weights
// are rounded to FP16), norms and logits float32. Throws Error with cuda_problem's sentence.
std::unique_ptr<Backend> make_cuda_backend(int device);

}  // namespace sagelm
