// The flags of generate, chat and bench that say how tokens are drawn, and when to stop.
#pragma once

#include <CLI/App.hpp>
#include <string>

#include "json_output.h"
#include "sagelm/sagelm.hpp"

namespace sagelm::cli {

struct GenerationFlags {
  GenerateOptions options;
  bool penalty_given = false;
};

// Adds --temp --top-k --top-p --min-p --repeat-penalty --repeat-last-n. flags must live as long as
// the command.
void add_sampling_options(CLI::App& command, GenerationFlags& flags);
// Adds those and -n --stop --ignore-eos.
void add_generation_options(CLI::App& command, GenerationFlags& flags, int64_t default_tokens);

// The options as given, with the seed. At --temp 0 the repeat penalty is off unless it was asked
// for: greedy then means the most probable token. Throws UsageError for values out of range.
GenerateOptions effective_options(const GenerationFlags& flags, uint64_t seed);

// "temp 0.8, top-k off, top-p 0.9, …": what is really applied.
std::string describe_sampling(const SamplingOptions& sampling);
Json sampling_json(const SamplingOptions& sampling);

}  // namespace sagelm::cli
