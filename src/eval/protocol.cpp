#include "eval/protocol.h"

#include <array>

#include "base/error.h"

namespace sagelm {
namespace {

struct Entry {
  std::string_view name;
  Protocol (*make)(const ProtocolOptions& options);
};

constexpr std::array kProtocols = {
    Entry{"nonoverlap", nonoverlap_protocol},
    Entry{"strided", strided_protocol},
    Entry{"gptq", gptq_protocol},
    Entry{"sage-paper", sage_paper_protocol},
    Entry{"llamacpp", llamacpp_protocol},
    Entry{"lm-eval-0.4.3", lm_eval_0_4_3_protocol},
    Entry{"lm-eval-0.4.9.2", lm_eval_0_4_9_2_protocol},
    Entry{"lm-eval", lm_eval_0_4_9_2_protocol},  // the newest
};

const Entry& find_protocol(std::string_view name) {
  for (const Entry& entry : kProtocols) {
    if (entry.name == name) return entry;
  }
  fail_usage("unknown protocol '{}': use one of {}", name, protocol_names());
}

}  // namespace

Protocol make_protocol(std::string_view name, const ProtocolOptions& options) {
  return find_protocol(name).make(options);
}

void check_protocol_name(std::string_view name) { find_protocol(name); }

std::string protocol_names() {
  std::string names;
  for (const Entry& entry : kProtocols) {
    if (!names.empty()) names += ", ";
    names += entry.name;
  }
  return names;
}

int64_t window_size(std::string_view protocol, const ProtocolOptions& options, int64_t fallback,
                    int64_t min_ctx) {
  const int64_t ctx = options.ctx.value_or(fallback);
  if (ctx < min_ctx) {
    fail_usage("the protocol {} needs windows of {} tokens or more, not {}", protocol, min_ctx,
               ctx);
  }
  return ctx;
}

void refuse_stride(std::string_view protocol, const ProtocolOptions& options) {
  if (options.stride) fail_usage("the protocol {} has no stride: use strided", protocol);
}

std::string with_plain_newlines(std::string_view text) {
  std::string plain;
  plain.reserve(text.size());
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '\r') {
      plain += text[i];
    } else if (i + 1 == text.size() || text[i + 1] != '\n') {
      plain += '\n';
    }
  }
  return plain;
}

std::vector<Window> cut_windows(int64_t num_ids, int64_t ctx, int64_t first) {
  if (num_ids < ctx) {
    fail("the text has {} tokens, fewer than one window of {}", num_ids, ctx);
  }
  std::vector<Window> windows;
  for (int64_t begin = 0; num_ids - begin >= ctx; begin += ctx) {
    windows.push_back({.begin = begin, .end = begin + ctx, .first_scored = begin + first});
  }
  return windows;
}

}  // namespace sagelm
