#include "eval/protocol_wikitext.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <utility>

#include "base/error.h"
#include "text/utf8.h"

namespace sagelm {
namespace {

// What the detokenizer replaces, in its order: first these, then white space inside kPairs, then
// kMiscellaneous ("\xC2\xB0" is the degree sign).
using Replacement = std::pair<std::string_view, std::string_view>;
constexpr std::array kPunctuation = {
    Replacement{" @-@ ", "-"}, Replacement{" @,@ ", ","}, Replacement{" @.@ ", "."},
    Replacement{" : ", ": "},  Replacement{" ; ", "; "},  Replacement{" . ", ". "},
    Replacement{" ! ", "! "},  Replacement{" ? ", "? "},  Replacement{" , ", ", "},
};
constexpr std::array kPairs = {std::pair{'(', ')'}, std::pair{'[', ']'}, std::pair{'{', '}'},
                               std::pair{'"', '"'}, std::pair{'\'', '\''}};
constexpr std::array kMiscellaneous = {
    Replacement{"= = = =", "===="}, Replacement{"= = =", "==="},
    Replacement{"= =", "=="},       Replacement{" \xC2\xB0 ", "\xC2\xB0"},
    Replacement{" \n", "\n"},       Replacement{"\n ", "\n"},
    Replacement{" N ", " 1 "},      Replacement{" 's", "'s"},
};

// As Python's str.replace: from left to right, matches do not overlap.
std::string replace_all(std::string_view text, std::string_view from, std::string_view to) {
  std::string result;
  for (size_t at = text.find(from); at != std::string_view::npos; at = text.find(from)) {
    result += text.substr(0, at);
    result += to;
    text.remove_prefix(at + from.size());
  }
  result += text;
  return result;
}

bool is_title(std::string_view line) {
  const std::string joined = replace_all(replace_all(line, "= = =", "==="), "= =", "==");
  const std::string_view title = strip(joined);
  return title.starts_with("= ") && title.ends_with(" =");
}

// The pattern /' [0-9]/ with its slashes taken literally, and so its replacement: the harness means
// something else, but this is what it does.
std::string replace_slashed_digits(std::string_view text) {
  constexpr std::string_view kStart = "/' ";
  std::string result;
  for (size_t at = text.find(kStart); at != std::string_view::npos; at = text.find(kStart)) {
    const size_t digit = at + kStart.size();
    const bool matches = digit + 1 < text.size() && text[digit] >= '0' && text[digit] <= '9' &&
                         text[digit + 1] == '/';
    result += text.substr(0, at);
    result += matches ? "/'[0-9]/" : "/";
    text.remove_prefix(matches ? digit + 2 : at + 1);
  }
  result += text;
  return result;
}

// Strips white space just inside each pair: from an opening character to the next closing one.
std::string strip_inside(std::string_view text, char opening, char closing) {
  std::string result;
  for (;;) {
    const size_t begin = text.find(opening);
    if (begin == std::string_view::npos) break;
    const size_t end = text.find(closing, begin + 1);
    if (end == std::string_view::npos) break;
    result += text.substr(0, begin + 1);
    result += strip(text.substr(begin + 1, end - begin - 1));
    result += closing;
    text.remove_prefix(end + 1);
  }
  result += text;
  return result;
}

}  // namespace

std::vector<std::string> wikitext_pages(std::string_view text) {
  const std::string plain = with_plain_newlines(text);
  std::vector<std::string> pages;
  std::string_view rest = plain;
  size_t line = 0;   // where the line being looked at begins, in rest
  size_t first = 0;  // where the page does
  for (;;) {
    const size_t end = rest.find('\n', line);
    if (line > first && is_title(rest.substr(line, end - line))) {
      const std::string_view page = rest.substr(first, line - 1 - first);
      if (!strip(page).empty()) pages.emplace_back(page);
      first = line;
    }
    if (end == std::string_view::npos) break;
    line = end + 1;
  }
  pages.emplace_back(rest.substr(first));
  return pages;
}

std::string wikitext_detokenize(std::string_view page) {
  std::string text = replace_slashed_digits(replace_all(page, "s '", "s'"));
  for (const auto& [from, to] : kPunctuation) text = replace_all(text, from, to);
  for (const auto& [opening, closing] : kPairs) text = strip_inside(text, opening, closing);
  for (const auto& [from, to] : kMiscellaneous) text = replace_all(text, from, to);
  return text;
}

int64_t wikitext_words(std::string_view page) {
  int64_t words = 1;
  bool in_space = false;
  while (!page.empty()) {
    const size_t length = first_character(page).length;
    const bool is_space = strip(page.substr(0, length)).empty();
    if (is_space && !in_space) ++words;
    in_space = is_space;
    page.remove_prefix(length);
  }
  return words;
}

std::vector<Window> rolling_windows(int64_t num_ids, int64_t ctx) {
  std::vector<Window> windows;
  for (int64_t done = 1; done < num_ids;) {
    const int64_t end = std::min(done + ctx, num_ids);
    // Of the window's ids all but the last are inputs.
    const int64_t begin = done == 1 ? 0 : end - 1 - ctx;
    windows.push_back({.begin = begin, .end = end, .first_scored = done});
    done = end;
  }
  return windows;
}

Protocol wikitext_protocol(std::string_view name, std::string_view front_description,
                           FrontTokens front, const ProtocolOptions& options) {
  refuse_stride(name, options);
  if (!options.ctx && !options.model_ctx) {
    fail_usage("the protocol {} needs the model's context or a window size", name);
  }
  const int64_t ctx = window_size(name, options, options.model_ctx.value_or(0));
  return {.name = std::string(name),
          .description = fmt::format("as lm-evaluation-harness's wikitext: detokenized pages, {}, "
                                     "{} tokens predicted at a time",
                                     front_description, ctx),
          .ctx = ctx,
          .stride = ctx,
          .front = front,
          .documents =
              [](std::string_view text) {
                std::vector<Document> documents;
                for (const std::string& page : wikitext_pages(text)) {
                  documents.push_back({.text = wikitext_detokenize(page),
                                       .words = wikitext_words(page),
                                       .bytes = static_cast<int64_t>(page.size())});
                }
                return documents;
              },
          .windows = [ctx](int64_t num_ids) { return rolling_windows(num_ids, ctx); }};
}

}  // namespace sagelm
