// UTF-8 by the rules of RFC 3629, as sentencepiece reads it: no overlong forms, no surrogates,
// nothing above U+10FFFF. And how bytes that others wrote are shown to people.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace sagelm {

inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";  // U+FFFD

enum class Utf8Status {
  kValid,       // a whole character
  kIncomplete,  // the text ends inside what may become a character
  kInvalid,     // no continuation can make this a character
};

struct Utf8Char {
  Utf8Status status;
  size_t length;       // bytes to consume: of the character if valid, else 1
  uint32_t codepoint;  // only if valid
};

// The first character of `text`, which must not be empty.
Utf8Char first_character(std::string_view text);

bool is_valid_utf8(std::string_view text);

// `text` with everything that could act on a terminal spelled out: control characters and bytes
// that are not UTF-8 as "\x1b", other line breaks and marks of writing direction as "\u{202e}".
// All else stays, so applying it twice changes nothing more. Every Error's sentence has gone
// through this.
std::string printable(std::string_view text);

// A foreign name or value as it stands in a sentence: printable, and cut with "..." behind a
// character where it is longer than `most` bytes.
std::string excerpt(std::string_view text, size_t most = 120);

}  // namespace sagelm
