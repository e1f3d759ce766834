// Evaluation data: the bytes of a file, checked before any model is loaded. Every function throws
// Error with file, line and reason.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace sagelm {

// Throws Error unless bytes are UTF-8 text without zero bytes that is more than white space. name
// is the file's, for messages.
void check_text(std::string_view name, std::string_view bytes);

// A line of a file.
struct TextLine {
  int64_t number;  // from 1
  std::string_view text;
};
// The lines of bytes that are more than white space.
std::vector<TextLine> filled_lines(std::string_view bytes);

struct Passage {
  int64_t line;  // in its file, from 1
  std::string text;
};

// Lines {"text": "…"}, other fields ignored, empty lines skipped. At least one passage, no passage
// empty.
std::vector<Passage> parse_passages(std::string_view name, std::string_view bytes);

}  // namespace sagelm
