#include "protocol_options.h"

#include <cstdint>

namespace sagelm::cli {

void add_protocol_options(CLI::App& command, ProtocolFlags& flags) {
  constexpr int64_t kMaxTokens = int64_t{1} << 40;
  command.add_option("--protocol", flags.name, "which windows are scored: " + protocol_names())
      ->option_text("NAME (default: nonoverlap)");
  command.add_option("--ctx", flags.options.ctx, "tokens of a window")
      ->option_text("N (default: the protocol's own; lm-eval: the model's context)")
      ->check(CLI::Range(int64_t{1}, kMaxTokens));
  command
      .add_option("--stride", flags.options.stride,
                  "tokens from one window to the next (strided only)")
      ->option_text("N (default: half a window)")
      ->check(CLI::Range(int64_t{1}, kMaxTokens));
}

Protocol protocol_of(const ProtocolFlags& flags, const CommonOptions& common) {
  ProtocolOptions options = flags.options;
  if (!options.ctx) options.model_ctx = Model::inspect(load_options(common)).max_context;
  return make_protocol(flags.name, options);
}

}  // namespace sagelm::cli
