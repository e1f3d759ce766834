// nonoverlap: SageLM's own plain protocol, that of reference.json beside our models. The text is
// tokenized as it is, once; windows do not overlap, the incomplete last one is dropped, and all but
// the first token of each is scored.
#include "base/error.h"
#include "eval/protocol.h"

namespace sagelm {

Protocol nonoverlap_protocol(const ProtocolOptions& options) {
  constexpr int64_t kDefaultCtx = 2048;
  refuse_stride("nonoverlap", options);
  const int64_t ctx = window_size("nonoverlap", options, kDefaultCtx);
  return {.name = "nonoverlap",
          .description = fmt::format("consecutive windows of {} tokens, each run alone, all but "
                                     "the first token of each scored",
                                     ctx),
          .ctx = ctx,
          .stride = ctx,
          .windows = [ctx](int64_t num_ids) { return cut_windows(num_ids, ctx, 1); }};
}

}  // namespace sagelm
