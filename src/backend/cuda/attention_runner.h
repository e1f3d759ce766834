// The GPU's attention on tensors of its own (backend/attention_runner.h).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <span>

#include "backend/attention_runner.h"
#include "sagelm/attention.h"

namespace sagelm::cuda {

// The C interface's name of a variant. Throws UsageError if it has none.
sagelm_attention_variant attention_variant(AttentionVariant variant);

// Copies the tensors to the current device.
std::unique_ptr<AttentionRunner> make_attention_runner(const AttentionCall& call,
                                                       std::span<const uint16_t> q,
                                                       std::span<const uint16_t> k,
                                                       std::span<const uint16_t> v,
                                                       cudaStream_t stream);

}  // namespace sagelm::cuda
