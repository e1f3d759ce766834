// Conversations as token ids.
//
// A chat template is a list of pieces of text with control tokens between them. It is assembled
// here as ids: control tokens are put in by id, the text between two of them is encoded as one
// fresh text (as transformers' Llama tokenizers do), and what people and models write is only ever
// text: a "</s>" or "<|im_start|>" inside a message never becomes a control id.
//
// There is no Jinja interpreter: a checkpoint's template is recognised by what it contains, and one
// that is not known is refused.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "text/tokenizer.h"

namespace sagelm {

enum class Role : uint8_t { kSystem, kUser, kAssistant };

struct Message {
  Role role;
  std::string content;
};

class ChatTemplate {
 public:
  // The template that the checkpoint's own chat_template describes, llama2 where it has none.
  // Throws Error, naming --chat-template and the known names, when it is none of these.
  static ChatTemplate detect(const Tokenizer& tokenizer);

  // The template called `name`; throws UsageError with the known names when there is none.
  static ChatTemplate by_name(std::string_view name, const Tokenizer& tokenizer);

  // "llama2, mistral, chatml, zephyr, vicuna, alpaca"
  static std::string known_names();

  std::string_view name() const;

  // Ids of a whole conversation, ready for the model to answer: an optional system message, then
  // user and assistant by turns, a user's last. Throws Error for any other order.
  std::vector<int32_t> encode_prompt(std::span<const Message> messages) const;

  // Ids to append for the next user turn when the prompt so far and the ids of the answer to it
  // are in the cache already: what closes the answer, then the turn. `answer_ids` are the ids as
  // generated; what they already hold of the closing is not added again.
  // The cache then holds exactly encode_prompt(whole conversation) if the answer's ids are those
  // that encoding its text gives, and end without the end-of-answer id or with the whole closing.
  std::vector<int32_t> encode_next_turn(std::span<const int32_t> answer_ids,
                                        std::string_view user) const;

  // Ids that end an answer, besides those of config.json. May be empty.
  std::vector<int32_t> end_ids() const;

  // Texts that end an answer and are no part of it, for models that write the next turn themselves.
  std::vector<std::string> stop_texts() const;

 private:
  struct Format;
  class Builder;

  ChatTemplate(const Format& format, const Tokenizer& tokenizer, bool with_bos);
  static const Format* find(std::string_view name);
  static std::span<const Format> formats();
  void add_user(Builder& builder, std::string_view system, std::string_view user) const;
  std::string_view cleaned(std::string_view content) const;

  const Format* format_;
  const Tokenizer* tokenizer_;  // must outlive this
  bool with_bos_;               // a BOS opens the conversation
};

}  // namespace sagelm
