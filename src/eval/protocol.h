// Perplexity protocols: which tokens a perplexity is the average of, and what each is given as
// context. Figures of different protocols must not be compared; every result names its own. Each
// protocol is one file, protocol_<name>.cpp, which says whose it is.
//
// All of them weigh the negative log-probabilities of all scored tokens equally: perplexity =
// exp(sum of nll / number of tokens). Those that cut the text into documents also divide the same
// sum by the words and by the bytes of the documents.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace sagelm {

// ids[begin, end) are run through the model alone, positions from 0; those from ids[first_scored]
// on are scored given the earlier ones of the window. begin < first_scored < end.
struct Window {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t first_scored = 0;

  bool operator==(const Window&) const = default;
};

// A part of the text that is tokenized and scored by itself.
struct Document {
  std::string text;   // what is tokenized
  int64_t words = 0;  // of the original, as the protocol counts them
  int64_t bytes = 0;  // likewise
};

// What stands before the ids of a document.
enum class FrontTokens : uint8_t {
  kTokenizerBos,           // BOS, where the tokenizer's configuration wants one
  kPrefix,                 // BOS (EOS where there is none), whatever the configuration says
  kPrefixAndTokenizerBos,  // kPrefix's token, then kTokenizerBos's
};

struct Protocol {
  std::string name;
  std::string description;  // one sentence, for reports
  int64_t ctx = 0;          // tokens of a window
  int64_t stride = 0;       // from one window's begin to the next's
  // The first token of every window is replaced by the beginning-of-sequence token, where the
  // tokenizer's configuration wants one.
  bool bos_in_each_window = false;
  FrontTokens front = FrontTokens::kTokenizerBos;
  // What is tokenized, from the file's text; absent: the text as it is.
  std::function<std::string(std::string_view text)> prepare = {};
  // The file's documents, one at least, in place of prepare; absent: the text is one, and figures
  // are per token only.
  std::function<std::vector<Document>(std::string_view text)> documents = {};
  // The windows over that many ids of a document, front tokens included. Throws Error if they are
  // too few for one window.
  std::function<std::vector<Window>(int64_t num_ids)> windows = {};
};

// As on the command line; absent: the protocol's own.
struct ProtocolOptions {
  std::optional<int64_t> ctx = {};
  std::optional<int64_t> stride = {};
  // The model's own context: the ctx of protocols that have none of theirs.
  std::optional<int64_t> model_ctx = {};
};

// Throws UsageError listing the names.
void check_protocol_name(std::string_view name);
// Throws UsageError for an unknown name, a ctx or stride that the protocol cannot have, or if
// neither ctx nor model_ctx is given where the protocol needs one.
Protocol make_protocol(std::string_view name, const ProtocolOptions& options);
// "nonoverlap, strided, …".
std::string protocol_names();

Protocol nonoverlap_protocol(const ProtocolOptions& options);
Protocol strided_protocol(const ProtocolOptions& options);
Protocol gptq_protocol(const ProtocolOptions& options);
Protocol sage_paper_protocol(const ProtocolOptions& options);
Protocol llamacpp_protocol(const ProtocolOptions& options);
Protocol lm_eval_0_4_3_protocol(const ProtocolOptions& options);
Protocol lm_eval_0_4_9_2_protocol(const ProtocolOptions& options);

// Shared by the protocols.

// options.ctx or fallback. Throws UsageError below min_ctx.
int64_t window_size(std::string_view protocol, const ProtocolOptions& options, int64_t fallback,
                    int64_t min_ctx = 2);
// Throws UsageError if a stride is given.
void refuse_stride(std::string_view protocol, const ProtocolOptions& options);
// Every line end as "\n": Python reads text files so.
std::string with_plain_newlines(std::string_view text);
// Consecutive windows of ctx tokens, the incomplete last one dropped, scored from their token
// `first` (counted from 0 in the window) on. Throws Error if there are fewer than ctx tokens.
std::vector<Window> cut_windows(int64_t num_ids, int64_t ctx, int64_t first);

}  // namespace sagelm
