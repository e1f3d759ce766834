// gptq: the WikiText2 perplexity of the quantization papers (GPTQ's evaluation code, followed by
// AWQ, OmniQuant and others), printed for chunks of 2048 and of 4096. exp(mean over chunks of a
// chunk's mean) is the mean over all tokens, the chunks being equally long.
#include "base/error.h"
#include "eval/protocol.h"
#include "text/utf8.h"

namespace sagelm {
namespace {

constexpr int64_t kGptqCtx = 2048;

// "\n\n".join(dataset["text"]) of the Hugging Face data set made from this file: a row is a line
// with its newline, or nothing where the line is blank.
std::string join_rows(std::string_view file) {
  const std::string plain = with_plain_newlines(file);
  std::string_view text = plain;
  std::string joined;
  bool first = true;
  while (!text.empty()) {
    const size_t newline = text.find('\n');
    const size_t length = newline == std::string_view::npos ? text.size() : newline + 1;
    const std::string_view row = text.substr(0, length);
    text.remove_prefix(length);
    if (!first) joined += "\n\n";
    first = false;
    if (!strip(row).empty()) joined += row;
  }
  return joined;
}

}  // namespace

Protocol gptq_protocol(const ProtocolOptions& options) {
  refuse_stride("gptq", options);
  const int64_t ctx = window_size("gptq", options, kGptqCtx);
  return {
      .name = "gptq",
      .description = fmt::format("as GPTQ on WikiText2: lines joined by blank lines, chunks of {} "
                                 "tokens, all but the first token of each scored",
                                 ctx),
      .ctx = ctx,
      .stride = ctx,
      .prepare = join_rows,
      .windows = [ctx](int64_t num_ids) { return cut_windows(num_ids, ctx, 1); }};
}

}  // namespace sagelm
