#include "protocol_options.h"

#include <cstdint>

#include "base/error.h"

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
  if (options.ctx) return make_protocol(flags.name, options);
  options.model_ctx = Model::inspect(load_options(common)).max_context;
  Protocol protocol = make_protocol(flags.name, options);
  if (protocol.ctx > *options.model_ctx) {
    fail_usage("the protocol {} has windows of {} tokens, and the model's context is {}: see --ctx",
               protocol.name, protocol.ctx, *options.model_ctx);
  }
  return protocol;
}

}  // namespace sagelm::cli
