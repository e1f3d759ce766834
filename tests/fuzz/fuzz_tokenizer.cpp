// Fuzzes everything of a tokenizer that comes from a file or a person: the bytes of
// tokenizer.model, tokenizer_config.json, and texts. The input is three parts behind two 32-bit
// little-endian lengths: [model size][config size][model][config][text]. A model of size 0 stands
// for a small built-in one, so that config and text are reached without a valid protobuf.
// Only sagelm::Error may escape.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/utf8.h"
#include "text/chat_template.h"
#include "text/detokenizer.h"
#include "text/tokenizer.h"

namespace {

// A BPE model: <unk>, <s>, </s>, the blank, some letters and all byte pieces.
std::string built_in_model() {
  std::string model;
  const auto field = [](int number, const std::string& bytes) {
    return std::string{static_cast<char>(number << 3 | 2), static_cast<char>(bytes.size())} + bytes;
  };
  const auto add = [&](const std::string& piece, int type) {
    model += field(1, field(1, piece) + "\x18" + static_cast<char>(type));
  };
  add("<unk>", 2);
  add("<s>", 3);
  add("</s>", 3);
  constexpr char kHex[] = "0123456789ABCDEF";
  for (int byte = 0; byte < 256; ++byte) {
    add(std::string("<0x") + kHex[byte / 16] + kHex[byte % 16] + ">", 6);
  }
  for (const char* piece :
       {"\xE2\x96\x81", "a", "b", "ab", "<|user|>", "I", "N", "\xE2\x96\x81t"}) {
    add(piece, 1);
  }
  // trainer_spec {model_type: BPE, byte_fallback: true}, normalizer_spec {keep all blanks}
  return model + field(2, std::string("\x18\x02\x98\x02\x01", 5)) +
         field(3, std::string("\x20\x00", 2));
}

void exercise(const sagelm::Tokenizer& tokenizer, std::string_view text) {
  const auto ids = tokenizer.encode(text, true, true);
  sagelm::Detokenizer detokenizer(tokenizer);
  std::string printed;
  for (const int32_t id : ids) {
    const std::string part = detokenizer.push(id);
    if (!sagelm::is_valid_utf8(part)) std::abort();
    printed += part;
  }
  if (printed + detokenizer.flush() != tokenizer.decode(ids)) std::abort();
  const auto chat = sagelm::ChatTemplate::detect(tokenizer);
  const auto prompt = chat.encode_prompt(std::vector<sagelm::Message>{
      {sagelm::Role::kSystem, std::string(text)}, {sagelm::Role::kUser, std::string(text)}});
  (void)chat.encode_next_turn(prompt, text);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::string default_model = built_in_model();
  uint32_t lengths[2];
  if (size < sizeof(lengths)) return 0;
  std::memcpy(lengths, data, sizeof(lengths));
  std::string_view rest(reinterpret_cast<const char*>(data) + sizeof(lengths),
                        size - sizeof(lengths));
  const auto take = [&rest](size_t count) {
    const std::string_view taken = rest.substr(0, count);
    rest.remove_prefix(taken.size());
    return taken;
  };
  const std::string_view model = take(lengths[0]);
  const std::string_view config = take(lengths[1]);
  try {
    const auto tokenizer =
        sagelm::Tokenizer::from_bytes(lengths[0] == 0 ? default_model : model, config);
    exercise(tokenizer, rest);
  } catch (const sagelm::Error&) {
    return 0;
  }
  return 0;
}
