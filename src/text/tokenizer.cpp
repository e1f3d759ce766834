#include "text/tokenizer.h"

#include <sentencepiece_processor.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "base/error.h"
#include "base/json_bytes.h"
#include "base/utf8.h"
#include "text/detokenizer.h"
#include "text/sentencepiece_check.h"

namespace sagelm {
namespace {

using Json = nlohmann::json;

constexpr std::string_view kBlankSymbol = "\xE2\x96\x81";  // U+2581, sentencepiece's blank
constexpr uintmax_t kMaxModelBytes = uintmax_t{256} << 20;
constexpr uintmax_t kMaxConfigBytes = uintmax_t{16} << 20;
constexpr size_t kMaxTextBytes = size_t{1} << 30;  // sentencepiece counts bytes in int
constexpr uint64_t kMaxAddedId = 10'000'000;

std::string read_file(const std::filesystem::path& path, uintmax_t max_bytes) {
  std::error_code status;
  const uintmax_t size = std::filesystem::file_size(path, status);
  if (status) fail("{}: {}", path.string(), status.message());
  if (size > max_bytes) {
    fail("{} has {} bytes, more than any such file ({})", path.string(), size, max_bytes);
  }
  std::string bytes(size, '\0');
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  if (!file.read(bytes.data(), static_cast<std::streamsize>(size))) {
    fail("cannot read {}: {}", path.string(), std::strerror(errno != 0 ? errno : EIO));
  }
  return bytes;
}

struct AddedToken {
  std::string text;
  bool special = false;
};

// What is used of tokenizer_config.json. A token that the file does not name is absent; one that it
// names null is there and has no value.
struct TokenizerConfig {
  bool add_bos = true;
  bool add_eos = false;
  bool add_prefix_space = true;
  std::optional<std::optional<std::string>> bos_token;
  std::optional<std::optional<std::string>> eos_token;
  std::map<int32_t, AddedToken> added_tokens;
  std::string chat_template;
};

class ConfigReader {
 public:
  explicit ConfigReader(std::string where) : where_(std::move(where)) {}

  TokenizerConfig read(std::string_view text) const {
    TokenizerConfig config;
    if (text.empty()) return config;
    const Json json = parse_json_object(text, where_);
    config.add_bos = flag(json, "add_bos_token", config.add_bos);
    config.add_eos = flag(json, "add_eos_token", config.add_eos);
    config.add_prefix_space = flag(json, "add_prefix_space", config.add_prefix_space);
    config.bos_token = token(json, "bos_token");
    config.eos_token = token(json, "eos_token");
    read_added_tokens(json, config);
    read_chat_template(json, config);
    return config;
  }

 private:
  bool flag(const Json& json, const char* name, bool fallback) const {
    const auto found = json.find(name);
    if (found == json.end() || found->is_null()) return fallback;
    if (!found->is_boolean()) fail("{}: {} must be true or false", where_, name);
    return found->get<bool>();
  }

  std::optional<std::optional<std::string>> token(const Json& json, const char* name) const {
    const auto found = json.find(name);
    if (found == json.end()) return std::nullopt;
    if (found->is_null()) return std::optional<std::string>();
    const Json* text = &*found;
    if (found->is_object()) {
      const auto content = found->find("content");
      if (content != found->end()) text = &*content;
    }
    if (!text->is_string()) fail("{}: {} must be a text", where_, name);
    // Early Llama conversions wrote "": they mean the model's own token.
    if (text->get_ref<const std::string&>().empty()) return std::nullopt;
    return std::optional<std::string>(text->get<std::string>());
  }

  void read_added_tokens(const Json& json, TokenizerConfig& config) const {
    const auto found = json.find("added_tokens_decoder");
    if (found == json.end() || found->is_null()) return;
    if (!found->is_object()) fail("{}: added_tokens_decoder must be an object", where_);
    for (const auto& [key, value] : found->items()) {
      uint64_t id = 0;
      std::from_chars(key.data(), key.data() + key.size(), id);
      // One spelling per id: else two entries could be the same token.
      if (id > kMaxAddedId || key != std::to_string(id)) {
        fail("{}: added_tokens_decoder has the key \"{}\", which is not a token id from 0 to {}",
             where_, excerpt(key), kMaxAddedId);
      }
      const Json* content = nullptr;
      if (value.is_object() && value.contains("content")) content = &value["content"];
      if (content == nullptr || !content->is_string() || content->get<std::string>().empty()) {
        fail("{}: added token {} has no content", where_, id);
      }
      config.added_tokens[static_cast<int32_t>(id)] = {content->get<std::string>(),
                                                       flag(value, "special", false)};
    }
  }

  // One Jinja text, or a list of named ones of which "default" is for plain chat.
  void read_chat_template(const Json& json, TokenizerConfig& config) const {
    const auto found = json.find("chat_template");
    if (found == json.end() || found->is_null()) return;
    if (found->is_string()) {
      config.chat_template = found->get<std::string>();
      return;
    }
    if (!found->is_array()) fail("{}: chat_template must be a text or a list", where_);
    for (const Json& entry : *found) {
      if (!entry.is_object() || !entry.contains("name") || !entry["name"].is_string() ||
          !entry.contains("template") || !entry["template"].is_string()) {
        fail("{}: each chat_template in a list needs a name and a template", where_);
      }
      const bool is_default = entry["name"].get_ref<const std::string&>() == "default";
      if (is_default || config.chat_template.empty()) {
        config.chat_template = entry["template"].get<std::string>();
      }
      if (is_default) return;
    }
  }

  std::string where_;
};

// added_tokens.json, {text: id}: where transformers before 4.34 wrote added tokens. It does not say
// which of them are special: those in brackets, such as <|im_end|> and [PAD], are taken to be.
std::map<int32_t, AddedToken> read_added_tokens_file(std::string_view text,
                                                     const std::string& where) {
  const Json json = parse_json_object(text, where);
  std::map<int32_t, AddedToken> tokens;
  for (const auto& [token, id] : json.items()) {
    if (token.empty() || !id.is_number_unsigned() || id.get<uint64_t>() > kMaxAddedId) {
      fail("{}: the id of token \"{}\" is not a number from 0 to {}", where, excerpt(token),
           kMaxAddedId);
    }
    const bool special = token.front() == '<' || token.front() == '[';
    if (!tokens.emplace(id.get<int32_t>(), AddedToken{token, special}).second) {
      fail("{}: two tokens have the id {}", where, id.get<int32_t>());
    }
  }
  return tokens;
}

TokenKind kind_of(PieceKind kind) {
  switch (kind) {
    case PieceKind::kUnknown:
      return TokenKind::kUnknown;
    case PieceKind::kControl:
      return TokenKind::kControl;
    case PieceKind::kByte:
      return TokenKind::kByte;
    default:
      return TokenKind::kText;
  }
}

std::string with_blanks(std::string_view piece) {
  std::string text;
  for (size_t i = 0; i < piece.size();) {
    if (piece.substr(i, kBlankSymbol.size()) == kBlankSymbol) {
      text += ' ';
      i += kBlankSymbol.size();
    } else {
      text += piece[i++];
    }
  }
  return text;
}

struct Token {
  std::string piece;
  std::string surface;
  TokenKind kind = TokenKind::kText;
};

std::unique_ptr<sentencepiece::SentencePieceProcessor> load(std::string_view bytes,
                                                            const std::string& where) {
  auto processor = std::make_unique<sentencepiece::SentencePieceProcessor>();
  if (!processor->LoadFromSerializedProto(bytes).ok()) {
    fail("{} is not a sentencepiece model that can be used", where);
  }
  return processor;
}

// The model without the blank that it puts in front of a text: serialized protobufs merge when they
// are concatenated, so that takes one more normalizer_spec {add_dummy_prefix: false}.
std::string without_dummy_prefix(std::string_view bytes) {
  return std::string(bytes) + std::string("\x1A\x02\x18\x00", 4);
}

}  // namespace

struct Tokenizer::Impl {
  Impl(std::string_view model_bytes, TokenizerConfig from_config, const std::string& where);

  const Token& token(int64_t id) const {
    if (id >= 0 && std::cmp_less(id, tokens.size())) return tokens[static_cast<size_t>(id)];
    static const Token kOfTheModelOnly = {"", "", TokenKind::kControl};
    const auto found = added.find(static_cast<int32_t>(id));
    if (found != added.end()) return found->second;
    if (id >= 0 && id < model_vocab_size) return kOfTheModelOnly;
    fail("token id {} is not in the tokenizer's vocabulary of {}", id, vocab_size);
  }

  std::vector<int32_t> run(const sentencepiece::SentencePieceProcessor& processor,
                           std::string_view text) const {
    if (text.size() > kMaxTextBytes) {
      fail("a text of {} bytes is too long to tokenize at once (at most {})", text.size(),
           kMaxTextBytes);
    }
    std::vector<int> ids;
    const auto status = processor.Encode(text, &ids);
    if (!status.ok()) fail("the text cannot be tokenized: {}", status.ToString());
    return ids;
  }

  // A second processor without the blank in front, made when first needed.
  const sentencepiece::SentencePieceProcessor& without_prefix() const {
    std::call_once(continuation_once, [this] {
      continuation =
          load(without_dummy_prefix(processor->serialized_model_proto()), "tokenizer.model");
    });
    return *continuation;
  }

  int32_t resolve(const std::optional<std::optional<std::string>>& spelling, int32_t fallback,
                  const char* name) const {
    if (!spelling) return fallback;
    if (!*spelling) return -1;
    const auto found = special.find(**spelling);
    if (found == special.end()) {
      fail("tokenizer_config.json names the {} '{}', which the tokenizer does not have", name,
           excerpt(**spelling));
    }
    return found->second;
  }

  TokenizerConfig config;
  std::unique_ptr<sentencepiece::SentencePieceProcessor> processor;
  std::vector<Token> tokens;                 // by id: the model's pieces
  std::unordered_map<int32_t, Token> added;  // ids beyond them
  std::unordered_map<std::string, int32_t> special;
  std::vector<std::string> spellings;
  bool strips_first_blank = false;
  bool strips_all_leading_blanks = false;
  int32_t bos = -1;
  int32_t eos = -1;
  int32_t vocab_size = 0;
  int64_t model_vocab_size = 0;  // 0: no model is known
  mutable std::once_flag continuation_once;
  mutable std::unique_ptr<sentencepiece::SentencePieceProcessor> continuation;
};

Tokenizer::Impl::Impl(std::string_view model_bytes, TokenizerConfig from_config,
                      const std::string& where)
    : config(std::move(from_config)) {
  SentencepieceModelInfo info = check_sentencepiece_model(model_bytes, where);
  processor = config.add_prefix_space ? load(model_bytes, where)
                                      : load(without_dummy_prefix(model_bytes), where);
  strips_all_leading_blanks = info.remove_extra_whitespaces;
  strips_first_blank =
      (info.add_dummy_prefix && config.add_prefix_space) || info.remove_extra_whitespaces;

  tokens.reserve(info.pieces.size());
  for (SentencepiecePiece& piece : info.pieces) {
    Token token{std::move(piece.text), "", kind_of(piece.kind)};
    const auto id = static_cast<int32_t>(tokens.size());
    if (token.kind == TokenKind::kText) {
      token.surface = with_blanks(token.piece);
    } else if (token.kind == TokenKind::kUnknown) {
      token.surface = info.unk_surface;
    } else if (token.kind == TokenKind::kByte) {
      // sentencepiece has checked the spelling <0xHH> while loading.
      const std::string digits = token.piece.substr(std::min<size_t>(3, token.piece.size()), 2);
      token.surface = static_cast<char>(std::strtoul(digits.c_str(), nullptr, 16));
    }
    // Other user-defined pieces (runs of blanks, digits) are ordinary text.
    const bool is_marker = piece.kind == PieceKind::kUserDefined && token.piece.front() == '<';
    if (piece.kind == PieceKind::kControl || piece.kind == PieceKind::kUnknown || is_marker) {
      special[token.piece] = id;
    }
    tokens.push_back(std::move(token));
  }
  vocab_size = static_cast<int32_t>(tokens.size());

  for (const auto& [id, entry] : config.added_tokens) {
    special[entry.text] = id;
    if (std::cmp_less(id, tokens.size())) {
      if (entry.special) tokens[static_cast<size_t>(id)].kind = TokenKind::kControl;
    } else {
      added[id] = {entry.text, entry.special ? "" : entry.text,
                   entry.special ? TokenKind::kControl : TokenKind::kText};
      vocab_size = std::max(vocab_size, id + 1);
    }
  }
  for (Token& token : tokens) {
    if (token.kind == TokenKind::kControl) token.surface.clear();
  }

  bos = resolve(config.bos_token, processor->bos_id(), "bos_token");
  eos = resolve(config.eos_token, processor->eos_id(), "eos_token");
  for (const auto& [spelling, id] : special) spellings.push_back(spelling);
  std::sort(spellings.begin(), spellings.end(), [](const auto& a, const auto& b) {
    return a.size() != b.size() ? a.size() > b.size() : a < b;
  });
}

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Tokenizer Tokenizer::open(const std::filesystem::path& model_dir) {
  std::error_code ignored;  // exists() with it never throws; a missing file is told below
  const auto model_path = model_dir / "tokenizer.model";
  std::error_code problem;
  if (!std::filesystem::exists(model_path, problem)) {
    if (problem) fail("cannot open {}: {}", model_path.string(), problem.message());
    if (std::filesystem::exists(model_dir / "tokenizer.json", ignored)) {
      fail(
          "{} has only a tokenizer.json, which is not supported: a sentencepiece tokenizer.model "
          "is needed",
          model_dir.string());
    }
    fail("{} has no tokenizer.model", model_dir.string());
  }
  const std::string model_bytes = read_file(model_path, kMaxModelBytes);

  TokenizerConfig config;
  const auto config_path = model_dir / "tokenizer_config.json";
  if (std::filesystem::exists(config_path, ignored)) {
    const std::string text = read_file(config_path, kMaxConfigBytes);
    if (text.empty()) fail("{} is empty", config_path.string());
    config = ConfigReader(config_path.string()).read(text);
  }
  const auto added_path = model_dir / "added_tokens.json";
  if (config.added_tokens.empty() && std::filesystem::exists(added_path, ignored)) {
    config.added_tokens =
        read_added_tokens_file(read_file(added_path, kMaxConfigBytes), added_path.string());
  }
  // Where transformers (since 4.50) writes the template.
  const auto template_path = model_dir / "chat_template.jinja";
  if (std::filesystem::exists(template_path, ignored)) {
    config.chat_template = read_file(template_path, kMaxConfigBytes);
  }
  return Tokenizer(std::make_unique<Impl>(model_bytes, std::move(config), model_path.string()));
}

Tokenizer Tokenizer::from_bytes(std::string_view model_bytes, std::string_view config_json) {
  TokenizerConfig config = ConfigReader("tokenizer_config.json").read(config_json);
  return Tokenizer(std::make_unique<Impl>(model_bytes, std::move(config), "tokenizer.model"));
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool add_bos, bool add_eos) const {
  std::vector<int32_t> ids = impl_->run(*impl_->processor, text);
  if (add_bos && impl_->bos >= 0) ids.insert(ids.begin(), impl_->bos);
  if (add_eos && impl_->eos >= 0) ids.push_back(impl_->eos);
  return ids;
}

std::vector<int32_t> Tokenizer::encode_continuation(std::string_view text) const {
  return impl_->run(impl_->without_prefix(), text);
}

std::string Tokenizer::decode(std::span<const int32_t> ids) const {
  Detokenizer detokenizer(*this);
  std::string text;
  for (const int32_t id : ids) text += detokenizer.push(id);
  return text + detokenizer.flush();
}

bool Tokenizer::add_bos_default() const { return impl_->config.add_bos && impl_->bos >= 0; }
bool Tokenizer::add_eos_default() const { return impl_->config.add_eos && impl_->eos >= 0; }
int32_t Tokenizer::bos_id() const { return impl_->bos; }
int32_t Tokenizer::eos_id() const { return impl_->eos; }
int32_t Tokenizer::vocab_size() const { return impl_->vocab_size; }

void Tokenizer::fit_to(int64_t model_vocab_size) {
  if (impl_->vocab_size > model_vocab_size) {
    fail(
        "the tokenizer has {} token ids but the model has only {} (vocab_size in config.json): "
        "they do not belong together",
        impl_->vocab_size, model_vocab_size);
  }
  impl_->model_vocab_size = model_vocab_size;
}

const std::string& Tokenizer::piece(int32_t id) const { return impl_->token(id).piece; }
TokenKind Tokenizer::kind(int32_t id) const { return impl_->token(id).kind; }
const std::string& Tokenizer::surface(int32_t id) const { return impl_->token(id).surface; }

std::optional<int32_t> Tokenizer::special_id(std::string_view spelling) const {
  const auto found = impl_->special.find(std::string(spelling));
  if (found == impl_->special.end()) return std::nullopt;
  return found->second;
}

const std::vector<std::string>& Tokenizer::special_spellings() const { return impl_->spellings; }
bool Tokenizer::strips_first_blank() const { return impl_->strips_first_blank; }
bool Tokenizer::strips_all_leading_blanks() const { return impl_->strips_all_leading_blanks; }
std::string_view Tokenizer::chat_template() const { return impl_->config.chat_template; }

}  // namespace sagelm
