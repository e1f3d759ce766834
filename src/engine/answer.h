// One answer being drawn token by token: how, end-of-sequence, stop strings and text.
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

  // Whether there is room for a first token; if not, the answer has ended.
  bool wants_token();
  // How its next token is drawn by that row of logits. name: of the one in front of it, if that is
  // not known yet. Valid until the next call.
  TokenDraw next_draw(int64_t row, std::optional<int32_t> name = {});
  // Whether there may be room for another token behind the one that is being drawn.
  bool may_go_on() const;
  // The token that was drawn. True: another one is wanted; false: the answer has ended.
  bool take(int32_t id);
  // To be called once, after the end: the text that was held back.
  void finish();

 private:
  bool show(const std::string& text);
  bool end(StopReason reason);
  int64_t drawn() const { return static_cast<int64_t>(result_->ids.size()); }

  GenerateOptions options_;
  TextCallback on_text_;
  std::vector<int32_t>* ids_;
  Generation* result_;
  int64_t context_;
  std::vector<int32_t> end_ids_, banned_;
  Sampler sampler_;
  std::optional<Detokenizer> detokenizer_;
  TextStream stream_;
};

}  // namespace sagelm
