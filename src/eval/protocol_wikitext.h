// The task `wikitext` of EleutherAI's lm-evaluation-harness (version 2.0 of the task), without what
// its releases differ in: pages, detokenizer, denominators and rolling windows.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "eval/protocol.h"

namespace sagelm {

// The pages of a wikitext file as the data set EleutherAI/wikitext_document_level has them: a line
// " = Title = " starts one; blank text before the first is left out; the newline before a title is
// in neither page. Line ends may be "\n", "\r\n" or "\r".
std::vector<std::string> wikitext_pages(std::string_view text);

// What is scored of a page: the harness's detokenizer, replacement by replacement.
std::string wikitext_detokenize(std::string_view page);

// The harness's number of words of a page: pieces between runs of white space, an empty piece at
// either end included.
int64_t wikitext_words(std::string_view page);

// Windows over ids, the first of which is the prefix token: ctx tokens are predicted at a time, the
// first ones from the prefix alone, each further lot from the one token before it. Only the last,
// shorter lot is given more, so that its window holds ctx inputs too. A window has up to ctx + 1
// ids, the last of which is a target only.
std::vector<Window> rolling_windows(int64_t num_ids, int64_t ctx);

// The protocol of one release, which says what stands before a page's ids.
Protocol wikitext_protocol(std::string_view name, std::string_view front_description,
                           FrontTokens front, const ProtocolOptions& options);

}  // namespace sagelm
