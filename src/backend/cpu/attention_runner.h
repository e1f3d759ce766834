// The CPU's attention on tensors of its own (backend/attention_runner.h).
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "backend/attention_runner.h"

namespace sagelm::cpu {

// Keeps pointers to keys and values.
std::unique_ptr<AttentionRunner> make_attention_runner(const AttentionCall& call,
                                                       std::span<const uint16_t> q,
                                                       std::span<const uint16_t> k,
                                                       std::span<const uint16_t> v);

}  // namespace sagelm::cpu
