// One answer being drawn token by token: sampling, end-of-sequence, stop strings and text.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/sampler.h"
#include "engine/text_stream.h"
#include "sagelm/sagelm.hpp"
#include "text/detokenizer.h"

namespace sagelm {

class Answer {
 public:
  struct Of {
    const Tokenizer* tokenizer = nullptr;  // null: the text stays empty
    std::span<const int32_t> eos_ids;
    int64_t context = 0;  // tokens that prompt and answer may have together
  };
  // Tokens are appended to ids, which holds the prompt, and to result; both must outlive this, and
  // so must the tokenizer.
  Answer(const Of& model, const GenerateOptions& options, TextCallback on_text,
         std::vector<int32_t>& ids, Generation& result);

  // Draws the next token by the logits after the last one, which it may change. True: the logits
  // after the new token are wanted; false: the answer has ended.
  bool take(std::span<float> logits);
  // To be called once, after the end: the text that was held back.
  void finish();

 private:
  bool show(const std::string& text);
  bool end(StopReason reason);

  GenerateOptions options_;
  TextCallback on_text_;
  std::vector<int32_t>* ids_;
  Generation* result_;
  int64_t context_;
  std::vector<int32_t> end_ids_;
  Sampler sampler_;
  std::optional<Detokenizer> detokenizer_;
  TextStream stream_;
};

}  // namespace sagelm
