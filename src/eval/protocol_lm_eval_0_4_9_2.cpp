// lm-eval-0.4.9.2: the task `wikitext` of EleutherAI's lm-evaluation-harness from release 0.4.9.2
// on. There the tokenizer adds its BOS, where its configuration wants one, and the prefix token is
// put before it all the same: a Llama's page starts with BOS twice, and the second is scored.
#include "eval/protocol_wikitext.h"

namespace sagelm {

Protocol lm_eval_0_4_9_2_protocol(const ProtocolOptions& options) {
  return wikitext_protocol("lm-eval-0.4.9.2",
                           "each with BOS in front of the tokenizer's own, which is scored",
                           FrontTokens::kPrefixAndTokenizerBos, options);
}

}  // namespace sagelm
