// The flags that say how a text becomes a perplexity; `perplexity` and `compare perplexity` share
// them.
#pragma once

#include <CLI/App.hpp>
#include <string>

#include "eval/protocol.h"
#include "options.h"

namespace sagelm::cli {

struct ProtocolFlags {
  std::string name = "nonoverlap";
  ProtocolOptions options;
};

// Adds --protocol, --ctx and --stride. flags must live as long as the command.
void add_protocol_options(CLI::App& command, ProtocolFlags& flags);

// The protocol of the flags, its window by default as the checkpoint's headers have it. Throws
// UsageError where its own is beyond the model's context.
Protocol protocol_of(const ProtocolFlags& flags, const CommonOptions& common);

}  // namespace sagelm::cli
