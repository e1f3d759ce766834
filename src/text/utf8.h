// UTF-8 by the rules of RFC 3629, as sentencepiece reads it: no overlong forms, no surrogates,
// nothing above U+10FFFF.
#pragma once

#include <cstddef>
#include <cstdint>
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

// `text` without white space at both ends, white space being what Python's str.strip() removes.
// Chat templates are defined in terms of that function.
std::string_view strip(std::string_view text);

}  // namespace sagelm
