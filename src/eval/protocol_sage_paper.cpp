// sage-paper: the perplexity behind SageAttention's table (arXiv:2410.02367), most likely. Its
// value for Llama-2-7B in full precision, 5.823, is that of SmoothQuant's demonstration notebook
// (arXiv:2211.10438), which scores the first 40 chunks of GPTQ's.
#include <algorithm>

#include "base/error.h"
#include "eval/protocol.h"

namespace sagelm {

Protocol sage_paper_protocol(const ProtocolOptions& options) {
  constexpr int64_t kCtx = 2048;
  static constexpr size_t kChunks = 40;
  if (options.ctx.value_or(kCtx) != kCtx) {
    fail_usage("the protocol sage-paper has windows of {} tokens, not {}: use gptq", kCtx,
               *options.ctx);
  }
  refuse_stride("sage-paper", options);
  Protocol protocol = gptq_protocol({.ctx = kCtx, .stride = {}});
  protocol.name = "sage-paper";
  protocol.description = fmt::format(
      "the first {} chunks of {} of GPTQ's WikiText2, as in SmoothQuant's demonstration and, most "
      "likely, SageAttention's table",
      kChunks, kCtx);
  protocol.windows = [all = protocol.windows](int64_t num_ids) {
    std::vector<Window> windows = all(num_ids);
    windows.resize(std::min(windows.size(), kChunks));
    return windows;
  };
  return protocol;
}

}  // namespace sagelm
