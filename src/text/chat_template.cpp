#include "text/chat_template.h"

#include <algorithm>
#include <array>
#include <iterator>

#include "base/error.h"
#include "text/utf8.h"

namespace sagelm {

// Text of a format may hold {bos} and {eos}, and spellings of special tokens of the tokenizer.
struct ChatTemplate::Format {
  std::string_view name;
  bool strips;          // white space around messages is dropped
  bool system_in_user;  // the system message is a part of the first user message
  bool bos_every_turn;  // else at most one opens the conversation
  std::string_view before_system;
  std::string_view after_system;
  std::string_view before_user;
  std::string_view after_user;     // up to where the model goes on
  std::string_view before_answer;  // what the model writes itself before the answer's first letter
  std::string_view after_answer;
  std::string_view turn_end;   // the special token that ends an answer
  std::string_view stop_text;  // the start of a turn that the model must not write itself
};

std::span<const ChatTemplate::Format> ChatTemplate::formats() {
  // Sources: the chat_template of Llama-2-chat, Mistral-Instruct v0.1, OpenHermes/Qwen (ChatML),
  // zephyr-beta and TinyLlama-Chat v1.0; FastChat's conversation.py for vicuna_v1.1 and alpaca.
  static constexpr std::array<Format, 6> kFormats = {{
      {"llama2", true, true, true, "<<SYS>>\n", "\n<</SYS>>\n\n", "{bos}[INST] ", " [/INST]", " ",
       " {eos}", "{eos}", "[INST]"},
      {"mistral", false, true, false, "", "\n\n", "[INST] ", " [/INST]", "", "{eos} ", "{eos}",
       "[INST]"},
      {"chatml", false, false, false, "<|im_start|>system\n", "<|im_end|>\n", "<|im_start|>user\n",
       "<|im_end|>\n<|im_start|>assistant\n", "", "<|im_end|>\n", "<|im_end|>", "<|im_start|>"},
      {"zephyr", false, false, false, "<|system|>\n", "{eos}\n", "<|user|>\n",
       "{eos}\n<|assistant|>\n", "", "{eos}\n", "{eos}", "<|user|>"},
      {"vicuna", true, false, false, "", " ", "USER: ", " ASSISTANT:", " ", "{eos}", "{eos}",
       "USER:"},
      {"alpaca", true, false, false, "", "\n\n", "### Instruction:\n", "\n\n### Response:\n", "",
       "{eos}", "{eos}", "### Instruction:"},
  }};
  return kFormats;
}

// Collects ids; neighbouring texts become one before they are encoded.
class ChatTemplate::Builder {
 public:
  // `continues`: the first text goes on with one that is in the cache already.
  Builder(const Tokenizer& tokenizer, bool continues)
      : tokenizer_(tokenizer), continues_(continues) {}

  void content(std::string_view text) { text_ += text; }

  void format(std::string_view text) {
    while (!text.empty()) {
      std::string_view spelling;
      const size_t at = next_token(text, spelling);
      text_ += text.substr(0, at);
      text.remove_prefix(at);
      if (spelling.empty()) return;
      token(token_id(tokenizer_, spelling));
      text.remove_prefix(spelling.size());
    }
  }

  std::vector<int32_t> finish() {
    flush();
    return std::move(ids_);
  }

  // -1 where the tokenizer has no such token.
  static int32_t token_id(const Tokenizer& tokenizer, std::string_view spelling) {
    if (spelling == kBos) return tokenizer.bos_id();
    if (spelling == kEos) return tokenizer.eos_id();
    return tokenizer.special_id(spelling).value_or(-1);
  }

  static constexpr std::string_view kBos = "{bos}";
  static constexpr std::string_view kEos = "{eos}";

 private:
  // Where the first token in `text` starts, the longest one at that place; its size if none.
  size_t next_token(std::string_view text, std::string_view& spelling) const {
    size_t best = text.size();
    const auto consider = [&](std::string_view candidate) {
      const size_t at = text.find(candidate);
      if (at < best) {
        best = at;
        spelling = candidate;
      }
    };
    for (const std::string& special : tokenizer_.special_spellings()) consider(special);
    consider(kBos);
    consider(kEos);
    return best;
  }

  void token(int32_t id) {
    if (id < 0) return;
    flush();
    ids_.push_back(id);
    continues_ = false;
  }

  void flush() {
    if (text_.empty()) return;
    const std::vector<int32_t> ids =
        continues_ ? tokenizer_.encode_continuation(text_) : tokenizer_.encode(text_, false);
    ids_.insert(ids_.end(), ids.begin(), ids.end());
    text_.clear();
    continues_ = false;
  }

  const Tokenizer& tokenizer_;
  bool continues_;
  std::string text_;
  std::vector<int32_t> ids_;
};

ChatTemplate::ChatTemplate(const Format& format, const Tokenizer& tokenizer, bool with_bos)
    : format_(&format), tokenizer_(&tokenizer), with_bos_(with_bos) {}

const ChatTemplate::Format* ChatTemplate::find(std::string_view name) {
  for (const Format& format : formats()) {
    if (format.name == name) return &format;
  }
  return nullptr;
}

std::string ChatTemplate::known_names() {
  std::string names;
  for (const Format& format : formats()) {
    if (!names.empty()) names += ", ";
    names += format.name;
  }
  return names;
}

ChatTemplate ChatTemplate::by_name(std::string_view name, const Tokenizer& tokenizer) {
  const Format* format = find(name);
  if (format == nullptr) {
    fail_usage("there is no chat template '{}' (known: {})", name, known_names());
  }
  return {*format, tokenizer, tokenizer.add_bos_default()};
}

ChatTemplate ChatTemplate::detect(const Tokenizer& tokenizer) {
  const std::string_view jinja = tokenizer.chat_template();
  if (jinja.empty()) return by_name("llama2", tokenizer);
  const auto has = [jinja](std::string_view text) {
    return jinja.find(text) != std::string_view::npos;
  };
  std::string_view name;
  if (has("<|start_header_id|>") || has("[AVAILABLE_TOOLS]") || has("<start_of_turn>")) {
    name = "";  // Llama 3, later Mistral and Gemma: near the ones below, but not the same
  } else if (has("[INST]") && has("[/INST]")) {
    // Llama 2 opens each turn with BOS, Mistral only the conversation.
    const size_t loop = jinja.find("for message in");
    const bool bos_in_loop =
        loop != std::string_view::npos && jinja.find("bos_token", loop) != std::string_view::npos;
    name = bos_in_loop || has("<<SYS>>") ? "llama2" : "mistral";
  } else if (has("<|im_start|>") && has("<|im_end|>")) {
    name = "chatml";
  } else if (has("<|user|>") && has("<|assistant|>") && has("eos_token") && !has("<|end|>")) {
    name = "zephyr";
  } else if (has("USER:") && has("ASSISTANT:")) {
    name = "vicuna";
  } else if (has("### Instruction:") && has("### Response:")) {
    name = "alpaca";
  }
  const Format* format = find(name);
  if (format == nullptr) {
    fail(
        "the checkpoint's chat template is not one that is known: choose one with "
        "--chat-template NAME (known: {})",
        known_names());
  }
  return {*format, tokenizer, has("bos_token")};
}

std::string_view ChatTemplate::name() const { return format_->name; }

std::string_view ChatTemplate::cleaned(std::string_view content) const {
  return format_->strips ? strip(content) : content;
}

void ChatTemplate::add_user(Builder& builder, std::string_view system,
                            std::string_view user) const {
  std::string content;
  if (!system.empty()) {
    content.append(format_->before_system).append(system).append(format_->after_system);
  }
  content += user;
  builder.format(format_->before_user);
  builder.content(cleaned(content));
  builder.format(format_->after_user);
}

std::vector<int32_t> ChatTemplate::encode_prompt(std::span<const Message> messages) const {
  Builder builder(*tokenizer_, /*continues=*/false);
  if (with_bos_ && !format_->bos_every_turn) builder.format(Builder::kBos);

  std::string_view system;
  if (!messages.empty() && messages.front().role == Role::kSystem) {
    system = messages.front().content;
    messages = messages.subspan(1);
    if (!format_->system_in_user && !system.empty()) {
      builder.format(format_->before_system);
      builder.content(cleaned(system));
      builder.format(format_->after_system);
      system = {};
    }
  }
  if (messages.size() % 2 == 0) fail("a chat prompt must end with a message of the user");
  for (size_t i = 0; i < messages.size(); ++i) {
    const Message& message = messages[i];
    if (message.role != (i % 2 == 0 ? Role::kUser : Role::kAssistant)) {
      fail("chat message {} is out of order: user and assistant must take turns", i + 1);
    }
    if (message.role == Role::kUser) {
      add_user(builder, i == 0 ? system : std::string_view(), message.content);
    } else {
      builder.format(format_->before_answer);
      builder.content(cleaned(message.content));
      builder.format(format_->after_answer);
    }
  }
  return builder.finish();
}

std::vector<int32_t> ChatTemplate::encode_next_turn(std::span<const int32_t> answer_ids,
                                                    std::string_view user) const {
  Builder closing_builder(*tokenizer_, /*continues=*/true);
  closing_builder.format(format_->after_answer);
  const std::vector<int32_t> closing = closing_builder.finish();

  // Leave out what the answer already holds: the closing's longest beginning that ends the answer,
  // or everything up to an end id that the model wrote without the blank before it.
  size_t present = std::min(closing.size(), answer_ids.size());
  while (present > 0 && !std::equal(closing.begin(), closing.begin() + static_cast<long>(present),
                                    answer_ids.end() - static_cast<long>(present))) {
    --present;
  }
  const std::vector<int32_t> ends = end_ids();
  if (!answer_ids.empty() && std::find(ends.begin(), ends.end(), answer_ids.back()) != ends.end()) {
    const auto found = std::find(closing.begin(), closing.end(), answer_ids.back());
    if (found != closing.end()) {
      present = std::max(present, static_cast<size_t>(found - closing.begin()) + 1);
    }
  }

  Builder builder(*tokenizer_, /*continues=*/true);
  builder.format(format_->after_answer);
  add_user(builder, {}, user);
  std::vector<int32_t> ids = builder.finish();
  ids.erase(ids.begin(), ids.begin() + static_cast<long>(std::min(present, ids.size())));
  return ids;
}

std::vector<int32_t> ChatTemplate::end_ids() const {
  std::vector<int32_t> ids;
  for (const std::string_view spelling : {Builder::kEos, format_->turn_end}) {
    const int32_t id = Builder::token_id(*tokenizer_, spelling);
    if (id >= 0 && std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
  }
  return ids;
}

std::vector<std::string> ChatTemplate::stop_texts() const {
  std::vector<std::string> texts;
  // A marker that is a token of its own is seen by its id, or prints nothing.
  for (const std::string_view text : {format_->turn_end, format_->stop_text}) {
    if (text != Builder::kEos && !tokenizer_->special_id(text)) texts.emplace_back(text);
  }
  return texts;
}

}  // namespace sagelm
