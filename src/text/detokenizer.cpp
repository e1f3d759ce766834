#include "text/detokenizer.h"

#include <utility>

#include "base/utf8.h"

namespace sagelm {

std::string Detokenizer::push(int32_t id) {
  const TokenKind kind = tokenizer_->kind(id);
  const std::string& surface = tokenizer_->surface(id);
  if (kind == TokenKind::kByte) {
    held_ += surface;
    return take_characters(/*at_end=*/false);
  }
  // Any other piece ends a run of bytes: what is not a character by now never will be.
  std::string text = take_characters(/*at_end=*/true);
  text += kind == TokenKind::kText ? without_first_blank(surface) : surface;
  printed_ = printed_ || !text.empty();
  return text;
}

std::string Detokenizer::flush() {
  std::string text = take_characters(/*at_end=*/true);
  printed_ = false;
  blank_taken_ = false;
  return text;
}

std::string Detokenizer::take_characters(bool at_end) {
  std::string text;
  size_t position = 0;
  while (position < held_.size()) {
    const std::string_view rest = std::string_view(held_).substr(position);
    const Utf8Char character = first_character(rest);
    if (character.status == Utf8Status::kIncomplete && !at_end) break;
    text += character.status == Utf8Status::kValid ? rest.substr(0, character.length)
                                                   : kReplacementCharacter;
    position += character.length;
  }
  held_.erase(0, position);
  printed_ = printed_ || !text.empty();
  return text;
}

std::string Detokenizer::without_first_blank(std::string text) {
  if (printed_ || blank_taken_ || !tokenizer_->strips_first_blank()) return text;
  if (!text.empty() && text.front() == ' ') {
    text.erase(0, 1);
    // A model that drops double blanks goes on dropping them until something is printed.
    blank_taken_ = !tokenizer_->strips_all_leading_blanks();
  }
  return text;
}

}  // namespace sagelm
