// A tokenizer for many texts that share most of their lines, such as prompts with the same worked
// examples: each line is tokenized once.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "text/tokenizer.h"

namespace sagelm {

class LineEncoder {
 public:
  // tokenizer must outlive it. add_bos: texts get BOS in front.
  LineEncoder(const Tokenizer& tokenizer, bool add_bos);

  // The ids that the tokenizer gives the whole text.
  std::vector<int32_t> encode(std::string_view text);

  // Whether lines can be tokenized one by one: no piece reaches across the end of a line, and a
  // line's ids do not depend on the lines before it. (So for Llama's tokenizers, where a line feed
  // is a byte piece.) If not, encode works on whole texts.
  bool by_line() const { return by_line_; }

 private:
  const Tokenizer& tokenizer_;
  bool add_bos_;
  bool by_line_;
  std::unordered_map<std::string, std::vector<int32_t>> first_lines_;  // BOS included
  std::unordered_map<std::string, std::vector<int32_t>> later_lines_;
};

}  // namespace sagelm
