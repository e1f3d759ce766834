// Perplexity protocols: which tokens a perplexity is the average of, and what each is given as
// context. Figures of different protocols must not be compared; every result names its own. Each
// protocol is one file, protocol_<name>.cpp, which says whose it is.
//
// All of them average the negative log-probabilities of all scored tokens with equal weight:
// perplexity = exp(sum of nll / number of tokens).
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

struct Protocol {
  std::string name;
  std::string description;  // one sentence, for reports
  int64_t ctx = 0;          // tokens of a window
  int64_t stride = 0;       // from one window's begin to the next's
  // The first token of every window is replaced by the beginning-of-sequence token, where the
  // tokenizer's configuration wants one.
  bool bos_in_each_window = false;
  // What is tokenized, from the file's text; absent: the text as it is.
  std::function<std::string(std::string_view text)> prepare = {};
  // The windows over that many tokens. Throws Error if they are too few for one window.
  std::function<std::vector<Window>(int64_t num_ids)> windows = {};
};

// As on the command line; absent: the protocol's own.
struct ProtocolOptions {
  std::optional<int64_t> ctx;
  std::optional<int64_t> stride;
};

// Throws UsageError for an unknown name, or a ctx or stride that the protocol cannot have.
Protocol make_protocol(std::string_view name, const ProtocolOptions& options);
// "nonoverlap, strided, …".
std::string protocol_names();

Protocol nonoverlap_protocol(const ProtocolOptions& options);
Protocol strided_protocol(const ProtocolOptions& options);
Protocol gptq_protocol(const ProtocolOptions& options);
Protocol sage_paper_protocol(const ProtocolOptions& options);
Protocol llamacpp_protocol(const ProtocolOptions& options);

// Shared by the protocols.

// options.ctx or fallback. Throws UsageError below min_ctx.
int64_t window_size(std::string_view protocol, const ProtocolOptions& options, int64_t fallback,
                    int64_t min_ctx = 2);
// Throws UsageError if a stride is given.
void refuse_stride(std::string_view protocol, const ProtocolOptions& options);
// Consecutive windows of ctx tokens, the incomplete last one dropped, scored from their token
// `first` (counted from 0 in the window) on. Throws Error if there are fewer than ctx tokens.
std::vector<Window> cut_windows(int64_t num_ids, int64_t ctx, int64_t first);

}  // namespace sagelm
