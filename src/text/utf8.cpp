#include "text/utf8.h"

namespace sagelm {
namespace {

bool is_python_space(const Utf8Char& character) {
  if (character.status != Utf8Status::kValid) return false;
  const uint32_t c = character.codepoint;
  return (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 ||
         c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F ||
         c == 0x205F || c == 0x3000;
}

}  // namespace

std::string_view strip(std::string_view text) {
  while (!text.empty()) {
    const Utf8Char character = first_character(text);
    if (!is_python_space(character)) break;
    text.remove_prefix(character.length);
  }
  while (!text.empty()) {
    size_t start = text.size() - 1;
    while (start > 0 && text.size() - start < 4 &&
           (static_cast<uint8_t>(text[start]) & 0xC0U) == 0x80U) {
      --start;
    }
    const Utf8Char character = first_character(text.substr(start));
    if (!is_python_space(character) || start + character.length != text.size()) break;
    text.remove_suffix(character.length);
  }
  return text;
}

}  // namespace sagelm
