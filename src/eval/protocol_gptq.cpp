// gptq and sage-paper: the WikiText2 perplexity of the quantization papers (GPTQ's evaluation code,
// followed by AWQ, OmniQuant, SmoothQuant). exp(mean over chunks of a chunk's mean) is the mean
// over all tokens, the chunks being equally long.
#include <algorithm>

#include "base/error.h"
#include "eval/protocol.h"
#include "text/utf8.h"

namespace sagelm {
namespace {

constexpr int64_t kGptqCtx = 2048;
// The chunks of SmoothQuant's demonstration, whose FP16 value for Llama-2-7B (5.823) is the one in
// SageAttention's table.
constexpr size_t kSagePaperChunks = 40;

// "\n\n".join(dataset["text"]) of the Hugging Face data set made from this file: a row is a line
// with its newline, or nothing where the line is blank.
std::string join_rows(std::string_view text) {
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

Protocol sage_paper_protocol(const ProtocolOptions& options) {
  if (options.ctx.value_or(kGptqCtx) != kGptqCtx) {
    fail_usage("the protocol sage-paper has windows of {} tokens, not {}: use gptq", kGptqCtx,
               *options.ctx);
  }
  refuse_stride("sage-paper", options);
  Protocol protocol = gptq_protocol(options);
  protocol.name = "sage-paper";
  protocol.description = fmt::format(
      "the first {} chunks of {} of GPTQ's WikiText2, as in SmoothQuant's demonstration and, most "
      "likely, SageAttention's table",
      kSagePaperChunks, kGptqCtx);
  protocol.windows = [](int64_t num_ids) {
    std::vector<Window> windows = cut_windows(num_ids, kGptqCtx, 1);
    windows.resize(std::min(windows.size(), kSagePaperChunks));
    return windows;
  };
  return protocol;
}

}  // namespace sagelm
