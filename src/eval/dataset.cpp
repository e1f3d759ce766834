#include "eval/dataset.h"

#include <cstddef>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/error.h"
#include "text/utf8.h"

namespace sagelm {

void check_text(std::string_view name, std::string_view bytes) {
  if (bytes.empty()) fail("{}: the file is empty", name);
  int64_t line = 1;
  for (size_t i = 0; i < bytes.size();) {
    const Utf8Char character = first_character(bytes.substr(i));
    if (character.status != Utf8Status::kValid) {
      fail("{}:{}: byte {} of the file (0x{:02x}) {}", name, line, i,
           static_cast<unsigned>(static_cast<unsigned char>(bytes[i])),
           character.status == Utf8Status::kIncomplete
               ? "starts a character that the file's end cuts"
               : "is not UTF-8");
    }
    if (bytes[i] == '\0') {
      fail("{}:{}: byte {} of the file is zero: it is not a text file", name, line, i);
    }
    if (bytes[i] == '\n') ++line;
    i += character.length;
  }
  if (strip(bytes).empty()) fail("{}: there is nothing but white space in the file", name);
}

std::vector<TextLine> filled_lines(std::string_view bytes) {
  std::vector<TextLine> lines;
  for (int64_t number = 1; !bytes.empty(); ++number) {
    const size_t end = bytes.find('\n');
    const std::string_view text = bytes.substr(0, end);
    bytes.remove_prefix(end == std::string_view::npos ? bytes.size() : end + 1);
    if (!strip(text).empty()) lines.push_back({.number = number, .text = text});
  }
  return lines;
}

std::vector<Passage> parse_passages(std::string_view name, std::string_view bytes) {
  check_text(name, bytes);
  std::vector<Passage> passages;
  for (const auto& [line, row] : filled_lines(bytes)) {
    const nlohmann::json value = nlohmann::json::parse(row, nullptr, /*allow_exceptions=*/false);
    if (!value.is_object()) {
      fail("{}:{}: not a JSON object like {{\"text\": \"…\"}}", name, line);
    }
    const auto text = value.find("text");
    if (text == value.end()) fail("{}:{}: there is no field \"text\"", name, line);
    if (!text->is_string()) fail("{}:{}: the field \"text\" is not a string", name, line);
    Passage passage{.line = line, .text = text->get<std::string>()};
    if (strip(passage.text).empty()) fail("{}:{}: the text is empty", name, line);
    passages.push_back(std::move(passage));
  }
  return passages;
}

}  // namespace sagelm
