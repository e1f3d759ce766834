// strided: the sliding window of Hugging Face's documentation ("Perplexity of fixed-length
// models"), on the text as it is. Each window scores the tokens that no earlier one scored, the
// last, shorter window included; unlike that page's code, every scored token has the same weight
// (the page subtracts one token from the weight of every window).
#include <algorithm>

#include "base/error.h"
#include "eval/protocol.h"

namespace sagelm {
namespace {

std::vector<Window> strided_windows(int64_t num_ids, int64_t ctx, int64_t stride) {
  if (num_ids < 2) fail("the text has {} tokens: two are needed to score one", num_ids);
  std::vector<Window> windows;
  int64_t scored_to = 1;  // the first token of the text has nothing before it
  for (int64_t begin = 0; scored_to < num_ids; begin += stride) {
    const int64_t end = std::min(begin + ctx, num_ids);
    // With stride = ctx a window's first token has no context either.
    const int64_t first = std::max(scored_to, begin + 1);
    if (first < end) windows.push_back({.begin = begin, .end = end, .first_scored = first});
    scored_to = end;
  }
  return windows;
}

}  // namespace

Protocol strided_protocol(const ProtocolOptions& options) {
  constexpr int64_t kDefaultCtx = 1024;
  const int64_t ctx = window_size("strided", options, kDefaultCtx);
  const int64_t stride = options.stride.value_or(ctx / 2);
  if (stride < 1 || stride > ctx) {
    fail_usage("the stride must be 1 to {} (the window), not {}", ctx, stride);
  }
  return {
      .name = "strided",
      .description = fmt::format("windows of {} tokens every {}, each token scored in the "
                                 "first window that holds it",
                                 ctx, stride),
      .ctx = ctx,
      .stride = stride,
      .windows = [ctx, stride](int64_t num_ids) { return strided_windows(num_ids, ctx, stride); }};
}

}  // namespace sagelm
