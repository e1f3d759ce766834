#include "text/tokenizer.h"

#include <gtest/gtest.h>
#include <sentencepiece_processor.h>

#include <nlohmann/json.hpp>

#include "base/error.h"
#include "text/utf8.h"
#include "text_test_data.h"

namespace sagelm {
namespace {

using testing::demo_dir;
using testing::read_all;

std::string demo_model() { return read_all(demo_dir() / "tokenizer.model"); }

// The message of the Error that `action` throws; empty when it throws none.
template <typename Action>
std::string message_of(Action action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

std::string config_message(const std::string& config) {
  return message_of([&] { Tokenizer::from_bytes(demo_model(), config); });
}

TEST(Tokenizer, EqualsSentencepieceOnAnyText) {
  for (const auto& dir : testing::tokenizer_dirs()) {
    const Tokenizer tokenizer = Tokenizer::open(dir);
    sentencepiece::SentencePieceProcessor oracle;
    ASSERT_TRUE(oracle.Load((dir / "tokenizer.model").string()).ok());
    EXPECT_EQ(tokenizer.vocab_size(), oracle.GetPieceSize());

    std::vector<std::string> texts = testing::edge_texts();
    std::mt19937 random(1);
    for (int i = 0; i < 500; ++i) texts.push_back(testing::random_utf8(random, random() % 60));
    for (const std::string& text : texts) {
      const std::vector<int32_t> ids = tokenizer.encode(text, false);
      ASSERT_EQ(ids, oracle.EncodeAsIds(text)) << text;
      ASSERT_EQ(tokenizer.decode(ids), oracle.DecodeIds(ids)) << text;
      for (const int32_t id : ids) ASSERT_NE(tokenizer.kind(id), TokenKind::kControl) << text;
      std::vector<int32_t> with_both = ids;
      with_both.insert(with_both.begin(), tokenizer.bos_id());
      with_both.push_back(tokenizer.eos_id());
      ASSERT_EQ(tokenizer.encode(text, true, true), with_both) << text;
    }
  }
}

TEST(Tokenizer, EncodesIdsOfReferences) {
  std::vector<std::filesystem::path> models = {demo_dir()};
  const auto books = testing::shared_dir() / "models" / "books-llama2-58m";
  if (std::filesystem::exists(books)) models.push_back(books);
  for (const auto& dir : models) {
    const auto reference = nlohmann::json::parse(read_all(dir / "reference.json"));
    const Tokenizer tokenizer = Tokenizer::open(dir);
    EXPECT_TRUE(tokenizer.add_bos_default());
    EXPECT_FALSE(tokenizer.add_eos_default());
    EXPECT_EQ(tokenizer.encode(reference["prompt"].get<std::string>(), true),
              reference["prompt_ids"].get<std::vector<int32_t>>());
    EXPECT_EQ(tokenizer.decode(reference["greedy_64_ids"].get<std::vector<int32_t>>()),
              reference["greedy_64_text"].get<std::string>());
  }
}

TEST(Tokenizer, ContinuationHasNoBlankInFront) {
  const Tokenizer tokenizer = Tokenizer::open(demo_dir());
  EXPECT_EQ(tokenizer.encode_continuation(" the house"), tokenizer.encode("the house", false));
  EXPECT_TRUE(tokenizer.encode_continuation("").empty());
  std::string text;
  for (const int32_t id : tokenizer.encode_continuation("the")) text += tokenizer.surface(id);
  EXPECT_EQ(text, "the");
}

TEST(Tokenizer, InvalidUtf8CountsAsReplacementCharacters) {
  const Tokenizer tokenizer = Tokenizer::open(demo_dir());
  EXPECT_EQ(tokenizer.encode("a\xFF", false), tokenizer.encode("a\xEF\xBF\xBD", false));
}

TEST(Tokenizer, ReadsItsConfiguration) {
  const auto with = [](const std::string& config) {
    return Tokenizer::from_bytes(demo_model(), config);
  };
  EXPECT_TRUE(with("").add_bos_default());
  EXPECT_EQ(with("").bos_id(), 1);
  EXPECT_EQ(with("").eos_id(), 2);
  EXPECT_FALSE(with(R"({"add_bos_token": false})").add_bos_default());
  EXPECT_TRUE(with(R"({"add_eos_token": true})").add_eos_default());
  EXPECT_EQ(with(R"({"eos_token": {"content": "<s>"}})").eos_id(), 1);
  EXPECT_EQ(with(R"({"eos_token": ""})").eos_id(), 2);
  const Tokenizer no_prefix = with(R"({"add_prefix_space": false})");
  EXPECT_EQ(no_prefix.encode("the house", false), with("").encode_continuation("the house"));
  EXPECT_EQ(no_prefix.decode(no_prefix.encode(" the house", false)), " the house");
  const Tokenizer without_bos = with(R"({"bos_token": null})");
  EXPECT_EQ(without_bos.bos_id(), -1);
  EXPECT_FALSE(without_bos.add_bos_default());
  EXPECT_EQ(without_bos.encode("a", true), without_bos.encode("a", false));
  EXPECT_EQ(with(R"({"chat_template": "x"})").chat_template(), "x");
  EXPECT_EQ(with(R"({"chat_template": [{"name": "rag", "template": "r"},
                                       {"name": "default", "template": "d"}]})")
                .chat_template(),
            "d");

  Tokenizer added = with(R"({"added_tokens_decoder": {
      "8192": {"content": "<|end|>", "special": true}, "8193": {"content": "word"}}})");
  EXPECT_EQ(added.vocab_size(), 8194);
  EXPECT_EQ(added.special_id("<|end|>"), 8192);
  EXPECT_EQ(added.decode(std::vector<int32_t>{8193, 8192}), "word");
  EXPECT_EQ(added.encode("<|end|>", false), with("").encode("<|end|>", false));
  EXPECT_NE(message_of([&] { added.fit_to(8192); }).find("8194"), std::string::npos);
  EXPECT_NE(message_of([&] { added.decode(std::vector<int32_t>{8195}); }).find("8195"),
            std::string::npos);
  added.fit_to(8256);  // a model whose vocabulary is padded may draw what pads it
  EXPECT_EQ(added.decode(std::vector<int32_t>{8193, 8195, 8255, 8193}), "wordword");
  EXPECT_EQ(added.vocab_size(), 8194);
  EXPECT_NE(message_of([&] { added.decode(std::vector<int32_t>{8256}); }), "");
}

TEST(Tokenizer, RefusesBrokenConfigurations) {
  for (const char* config :
       {"{",
        "[]",
        "\xFF",
        R"({"add_bos_token": 1})",
        R"({"bos_token": 5})",
        R"({"bos_token": "<no such>"})",
        R"({"chat_template": 5})",
        R"({"chat_template": [5]})",
        R"({"added_tokens_decoder": []})",
        R"({"added_tokens_decoder": {"x": {}}})",
        R"({"added_tokens_decoder": {"-1": {"content": "a"}}})",
        R"({"added_tokens_decoder": {"-0": {"content": "a"}}})",
        R"({"added_tokens_decoder": {"08": {"content": "a"}}})",
        R"({"added_tokens_decoder": {" 8": {"content": "a"}}})",
        R"({"added_tokens_decoder": {"8 ": {"content": "a"}}})",
        R"({"added_tokens_decoder": {"8\u0000": {"content": "a"}}})",
        R"({"added_tokens_decoder": {"": {"content": "a"}}})",
        R"({"added_tokens_decoder": {"10000001": {"content": "a"}}})",
        R"({"added_tokens_decoder": {}, "added_tokens_decoder": {}})",
        R"({"added_tokens_decoder": {"99999999999999999999": {"content": "a"}}})",
        R"({"added_tokens_decoder": {"9000": {"content": ""}}})"}) {
    EXPECT_NE(config_message(config).find("tokenizer_config.json"), std::string::npos) << config;
  }
}

TEST(Tokenizer, NamesWhatIsWrongInPrintableText) {
  EXPECT_NE(
      config_message(R"({"added_tokens_decoder": {"-1": {"content": "a"}}})").find("key \"-1\""),
      std::string::npos);
  EXPECT_NE(
      config_message(R"({"eos_token": "\u001b[31m\n\u009b"})").find(R"('\x1b[31m\x0a\u{9b}')"),
      std::string::npos);
  EXPECT_LT(config_message(R"({"eos_token": ")" + std::string(100000, 'x') + "\"}").size(), 400U);
  EXPECT_NE(config_message(R"({"a\u001b": 1, "a\u001b": 2})").find(R"("a\x1b")"),
            std::string::npos);
}

TEST(Tokenizer, RefusesBrokenModels) {
  const std::string model = demo_model();
  const auto load = [](std::string_view bytes) {
    return message_of([&] { Tokenizer::from_bytes(bytes, ""); });
  };
  EXPECT_NE(load("").find("empty"), std::string::npos);
  EXPECT_NE(load("hello").find("not a sentencepiece model"), std::string::npos);
  EXPECT_NE(load(std::string(1000, '\0')), "");
  for (size_t size = 1; size < model.size(); size += 1 + model.size() / 40) {
    // A cut between two pieces leaves a smaller model, which is then short of its byte pieces.
    (void)load(std::string_view(model).substr(0, size));
  }
  EXPECT_NE(load(std::string_view(model).substr(0, model.size() - 1)), "");

  const auto field = [](int number, const std::string& bytes) {
    return std::string{static_cast<char>(number << 3 | 2), static_cast<char>(bytes.size())} + bytes;
  };
  const auto piece = [&](const std::string& text, const std::string& score, int type) {
    return field(1, field(1, text) + "\x15" + score + "\x18" + static_cast<char>(type));
  };
  const std::string zero(4, '\0');
  const std::string unknown = piece("<unk>", zero, 2);
  EXPECT_NE(load(piece("a", zero, 1)).find("unknown pieces"), std::string::npos);
  EXPECT_NE(load(unknown + piece("a", zero, 1) + piece("a", zero, 1)).find("twice"),
            std::string::npos);
  EXPECT_NE(
      load(unknown + piece("\x1B\n", zero, 1) + piece("\x1B\n", zero, 1)).find(R"('\x1b\x0a')"),
      std::string::npos);
  EXPECT_NE(load(unknown + piece("a", "\x7F\x7F\xC0\x7F", 1)).find("NaN"), std::string::npos);
  EXPECT_NE(load(unknown + piece("a", zero, 9)).find("type"), std::string::npos);
  EXPECT_NE(load(unknown + piece("\xFF", zero, 1)).find("UTF-8"), std::string::npos);
  EXPECT_NE(load(model + field(3, field(2, "damaged map"))).find("character map"),
            std::string::npos);
  EXPECT_NE(message_of([&] { Tokenizer::open(demo_dir()).piece(8192); }).find("8192"),
            std::string::npos);
  EXPECT_NE(message_of([&] { Tokenizer::open(demo_dir()).piece(-1); }), "");
}

TEST(Tokenizer, ReadsTheFilesOfADirectory) {
  const auto dir = std::filesystem::path(::testing::TempDir()) / "sagelm_tokenizer_test";
  std::filesystem::create_directories(dir);
  EXPECT_NE(message_of([&] { Tokenizer::open(dir); }).find("no tokenizer.model"),
            std::string::npos);
  std::ofstream(dir / "tokenizer.json") << "{}";
  EXPECT_NE(message_of([&] { Tokenizer::open(dir); }).find("tokenizer.json"), std::string::npos);
  std::filesystem::copy_file(demo_dir() / "tokenizer.model", dir / "tokenizer.model");
  EXPECT_EQ(Tokenizer::open(dir).bos_id(), 1);
  std::ofstream(dir / "chat_template.jinja") << "from a file";
  EXPECT_EQ(Tokenizer::open(dir).chat_template(), "from a file");

  std::ofstream(dir / "added_tokens.json") << R"({"<|end|>": 8192, "word": 8193})";
  EXPECT_EQ(Tokenizer::open(dir).special_id("<|end|>"), 8192);
  EXPECT_EQ(Tokenizer::open(dir).decode(std::vector<int32_t>{8193, 8192}), "word");
  std::ofstream(dir / "tokenizer_config.json") << R"({"added_tokens_decoder": {
      "8192": {"content": "<|newer|>", "special": true}}})";
  EXPECT_EQ(Tokenizer::open(dir).special_id("<|end|>"), std::nullopt);
  std::filesystem::remove(dir / "tokenizer_config.json");
  for (const char* wrong : {"", "[]", R"({"a": -1})", R"({"a": 1.5})", R"({"a": 10000001})",
                            R"({"": 9000})", R"({"a": 9000, "b": 9000})", R"({"a": "9000"})"}) {
    std::ofstream(dir / "added_tokens.json") << wrong;
    EXPECT_NE(message_of([&] { Tokenizer::open(dir); }).find("added_tokens.json"),
              std::string::npos)
        << wrong;
  }
  std::filesystem::remove_all(dir);
}

TEST(Utf8, StripsWhatPythonStrips) {
  EXPECT_EQ(strip(" \t\r\n\x1C\xC2\xA0\xE3\x80\x80 a b \xE2\x80\xA8\xC2\x85 "), "a b");
  EXPECT_EQ(strip("\xE2\x80\x8B"), "\xE2\x80\x8B");
  EXPECT_EQ(strip(" \n"), "");
  EXPECT_EQ(strip("\x85"), "\x85");
}

}  // namespace
}  // namespace sagelm
