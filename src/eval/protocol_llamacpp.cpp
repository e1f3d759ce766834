// llamacpp: what llama.cpp's llama-perplexity prints. The raw text is tokenized once; every chunk's
// first token is replaced by BOS, and of each chunk the second half is scored, its first token left
// out (255 of 512). Its ± is our standard error: sqrt((E[nll²] - E[nll]²) / (n - 1)) = sd /
// sqrt(n).
#include "base/error.h"
#include "eval/protocol.h"

namespace sagelm {

Protocol llamacpp_protocol(const ProtocolOptions& options) {
  constexpr int64_t kDefaultCtx = 512;
  constexpr int64_t kMinCtx = 4;  // the second half of a chunk must hold a token to score
  refuse_stride("llamacpp", options);
  const int64_t ctx = window_size("llamacpp", options, kDefaultCtx, kMinCtx);
  return {.name = "llamacpp",
          .description = fmt::format("as llama.cpp: chunks of {} tokens, each starting with BOS, "
                                     "{} tokens of the second half of each scored",
                                     ctx, ctx - ctx / 2 - 1),
          .ctx = ctx,
          .stride = ctx,
          .bos_in_each_window = true,
          .windows = [ctx](int64_t num_ids) {
            if (num_ids < 2 * ctx) {
              fail("the text has {} tokens: llama.cpp's protocol needs two windows of {}", num_ids,
                   ctx);
            }
            return cut_windows(num_ids, ctx, ctx / 2 + 1);
          }};
}

}  // namespace sagelm
