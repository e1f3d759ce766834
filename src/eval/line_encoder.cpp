#include "eval/line_encoder.h"

#include <array>
#include <cstddef>

namespace sagelm {
namespace {

// A piece that holds a line feed among other bytes could reach across the end of a line; and rules
// about blanks show in how blanks at both ends of a line come out.
bool splits_at_lines(const Tokenizer& tokenizer) {
  for (int32_t id = 0; id < tokenizer.vocab_size(); ++id) {
    const std::string& surface = tokenizer.surface(id);
    if (surface.size() > 1 && surface.find('\n') != std::string::npos) return false;
  }
  constexpr std::array<std::string_view, 5> kLines = {"a\n", "  b  \n", "\n", " \n", "\tc d"};
  std::string text;
  std::vector<int32_t> ids;
  for (const std::string_view line : kLines) {
    text += line;
    const std::vector<int32_t> own = tokenizer.encode_continuation(line);
    ids.insert(ids.end(), own.begin(), own.end());
    if (line.back() == '\n' && (own.empty() || tokenizer.surface(own.back()) != "\n")) return false;
  }
  return tokenizer.encode_continuation(text) == ids;
}

}  // namespace

LineEncoder::LineEncoder(const Tokenizer& tokenizer, bool add_bos)
    : tokenizer_(tokenizer), add_bos_(add_bos), by_line_(splits_at_lines(tokenizer)) {}

std::vector<int32_t> LineEncoder::encode(std::string_view text) {
  if (!by_line_ || text.empty()) return tokenizer_.encode(text, add_bos_);
  std::vector<int32_t> ids;
  for (bool first = true; !text.empty(); first = false) {
    const size_t end = text.find('\n');
    const std::string line(text.substr(0, end == std::string_view::npos ? end : end + 1));
    text.remove_prefix(line.size());
    const auto [found, is_new] = (first ? first_lines_ : later_lines_).try_emplace(line);
    if (is_new) {
      found->second =
          first ? tokenizer_.encode(line, add_bos_) : tokenizer_.encode_continuation(line);
    }
    ids.insert(ids.end(), found->second.begin(), found->second.end());
  }
  return ids;
}

}  // namespace sagelm
