#include "base/utf8.h"

#include <spdlog/fmt/fmt.h>

#include <iterator>

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

// Control characters, and what breaks lines or turns the direction of writing.
bool acts_on_a_terminal(uint32_t c) {
  return c < 0x20 || (c >= 0x7F && c <= 0x9F) || c == 0x61C || (c >= 0x200E && c <= 0x200F) ||
         (c >= 0x2028 && c <= 0x202E) || (c >= 0x2066 && c <= 0x2069);
}

}  // namespace

std::string printable(std::string_view text) {
  std::string result;
  while (!text.empty()) {
    const Utf8Char character = first_character(text);
    if (character.status == Utf8Status::kValid && !acts_on_a_terminal(character.codepoint)) {
      result += text.substr(0, character.length);
    } else if (character.length == 1) {
      fmt::format_to(std::back_inserter(result), "\\x{:02x}", static_cast<uint8_t>(text.front()));
    } else {
      fmt::format_to(std::back_inserter(result), "\\u{{{:x}}}", character.codepoint);
    }
    text.remove_prefix(character.length);
  }
  return result;
}

std::string excerpt(std::string_view text, size_t most) {
  if (text.size() <= most) return printable(text);
  size_t end = most;
  // A character has at most 3 bytes behind its first.
  while (most - end < 3 && end > 0 && (static_cast<uint8_t>(text[end]) & 0xC0U) == 0x80U) --end;
  return printable(text.substr(0, end)) + "...";
}

}  // namespace sagelm
