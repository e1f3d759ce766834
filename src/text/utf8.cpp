#include "text/utf8.h"

namespace sagelm {

Utf8Char first_character(std::string_view text) {
  const auto byte_at = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t lead = byte_at(0);
  if (lead < 0x80) return {Utf8Status::kValid, 1, lead};
  // The second byte's range depends on the first one: that rules out overlong forms, surrogates
  // and values above U+10FFFF.
  size_t length = 0;
  uint32_t codepoint = 0;
  uint8_t low = 0x80;
  uint8_t high = 0xBF;
  if (lead >= 0xC2 && lead <= 0xDF) {
    length = 2;
    codepoint = lead & 0x1FU;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    length = 3;
    codepoint = lead & 0x0FU;
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    length = 4;
    codepoint = lead & 0x07U;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
  } else {
    return {Utf8Status::kInvalid, 1, 0};
  }
  for (size_t i = 1; i < length; ++i) {
    if (i >= text.size()) return {Utf8Status::kIncomplete, 1, 0};
    if (byte_at(i) < low || byte_at(i) > high) return {Utf8Status::kInvalid, 1, 0};
    codepoint = codepoint << 6 | (byte_at(i) & 0x3FU);
    low = 0x80;
    high = 0xBF;
  }
  return {Utf8Status::kValid, length, codepoint};
}

bool is_valid_utf8(std::string_view text) {
  while (!text.empty()) {
    const Utf8Char character = first_character(text);
    if (character.status != Utf8Status::kValid) return false;
    text.remove_prefix(character.length);
  }
  return true;
}

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
