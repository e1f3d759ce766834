// Ids to text while they are generated, whole characters at a time.
//
// The text is sentencepiece's: U+2581 becomes a blank, the blank that encoding puts in front of a
// text is taken away again at its start, control ids print nothing, and of a run of byte pieces
// each byte that belongs to no character becomes U+FFFD.
#pragma once

#include <cstdint>
#include <string>

#include "text/tokenizer.h"

namespace sagelm {

class Detokenizer {
 public:
  // `tokenizer` must outlive this.
  explicit Detokenizer(const Tokenizer& tokenizer) : tokenizer_(&tokenizer) {}

  // The bytes that became printable with `id`: always whole characters. Bytes of a character that
  // is not complete yet are held back. Throws Error for an id outside the vocabulary.
  std::string push(int32_t id);

  // What is still held back, as U+FFFD for each byte, and an end of the text: the next push()
  // starts a fresh one.
  std::string flush();

 private:
  std::string take_characters(bool at_end);
  std::string without_first_blank(std::string text);

  const Tokenizer* tokenizer_;
  std::string held_;          // bytes of byte pieces that may yet become a character
  bool printed_ = false;      // something of this text has been printed
  bool blank_taken_ = false;  // the first blank is gone
};

}  // namespace sagelm
