// Text to token ids and back, for checkpoints with a sentencepiece `tokenizer.model`.
//
// Ids are those of the sentencepiece library for the same text (without its blank in front where
// tokenizer_config.json says "add_prefix_space": false): nothing is added, merged or
// recognised on the way, so a literal "</s>" in a text stays text. Control ids come in only through
// add_bos/add_eos and through special_id(). A byte that is not UTF-8 counts as U+FFFD, which is
// sentencepiece's own rule.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace sagelm {

// How one id is printed.
enum class TokenKind : uint8_t {
  kText,     // its surface
  kByte,     // one byte of a character that has no piece of its own
  kUnknown,  // sentencepiece's unk_surface
  kControl,  // not at all
};

// Move-only. All const member functions may be called from several threads at once.
class Tokenizer {
 public:
  // Reads tokenizer.model and, where they are there, tokenizer_config.json, added_tokens.json (if
  // tokenizer_config.json lists no added tokens) and chat_template.jinja of a checkpoint directory.
  // Throws Error when tokenizer.model is missing or one of them is broken or contradictory.
  static Tokenizer open(const std::filesystem::path& model_dir);

  // The same from memory; an empty `config_json` means that there is no tokenizer_config.json.
  static Tokenizer from_bytes(std::string_view model_bytes, std::string_view config_json);

  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  // Ids of `text`, with BOS before and EOS behind where asked for and the model has them.
  std::vector<int32_t> encode(std::string_view text, bool add_bos, bool add_eos = false) const;

  // Ids of `text` as the continuation of a text: without the blank that sentencepiece puts in front
  // of a fresh one.
  std::vector<int32_t> encode_continuation(std::string_view text) const;

  // The text of `ids`; control ids print nothing. Throws Error for an id outside the vocabulary.
  std::string decode(std::span<const int32_t> ids) const;

  // What tokenizer_config.json says, or Llama's defaults (BOS yes, EOS no).
  bool add_bos_default() const;
  bool add_eos_default() const;

  int32_t bos_id() const;  // -1 where there is none
  int32_t eos_id() const;  // -1 where there is none

  // One more than the largest id: pieces of the model and added tokens.
  int32_t vocab_size() const;

  // Takes the model's size for its own: ids that only the model has, such as those that pad its
  // vocabulary to a round number, print nothing from then on. Throws Error when this tokenizer has
  // ids that a model with `model_vocab_size` rows lacks.
  void fit_to(int64_t model_vocab_size);

  // The piece as the model file spells it ("\u2581the", "<0x0A>", "</s>"). Like the two below it
  // throws Error for an id outside the vocabulary.
  const std::string& piece(int32_t id) const;
  TokenKind kind(int32_t id) const;
  // The bytes that an id stands for inside a text: blanks for U+2581, one byte for a byte piece,
  // nothing for a control token.
  const std::string& surface(int32_t id) const;

  // The id of a control piece, a user-defined piece "<...", or an added token of this spelling.
  std::optional<int32_t> special_id(std::string_view spelling) const;
  // All such spellings, the longest first: what a chat template's own text is searched for.
  const std::vector<std::string>& special_spellings() const;

  // What the model file says on blanks: see Detokenizer.
  bool strips_first_blank() const;
  bool strips_all_leading_blanks() const;

  // Jinja source, empty where the checkpoint has none.
  std::string_view chat_template() const;

 private:
  struct Impl;
  explicit Tokenizer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace sagelm
