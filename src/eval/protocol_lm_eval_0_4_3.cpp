// lm-eval-0.4.3: the task `wikitext` of EleutherAI's lm-evaluation-harness, releases 0.4.3 to
// 0.4.9.1. A Llama's page starts with the prefix token, which is BOS; the tokenizer adds none.
#include "eval/protocol_wikitext.h"

namespace sagelm {

Protocol lm_eval_0_4_3_protocol(const ProtocolOptions& options) {
  return wikitext_protocol("lm-eval-0.4.3", "each with BOS in front", FrontTokens::kPrefix,
                           options);
}

}  // namespace sagelm
