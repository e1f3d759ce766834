#include "text/detokenizer.h"

#include <gtest/gtest.h>
#include <sentencepiece_processor.h>

#include "base/error.h"
#include "base/utf8.h"
#include "text_test_data.h"

namespace sagelm {
namespace {

std::vector<int32_t> byte_ids(const Tokenizer& tokenizer, std::string_view bytes) {
  std::vector<int32_t> ids;
  for (const char byte : bytes) {
    for (int32_t id = 0; id < tokenizer.vocab_size(); ++id) {
      if (tokenizer.kind(id) == TokenKind::kByte && tokenizer.surface(id)[0] == byte) {
        ids.push_back(id);
        break;
      }
    }
  }
  return ids;
}

TEST(Detokenizer, PrintsWholeCharactersAndAllOfThem) {
  for (const auto& dir : testing::tokenizer_dirs()) {
    const Tokenizer tokenizer = Tokenizer::open(dir);
    std::vector<std::string> texts = testing::edge_texts();
    std::mt19937 random(2);
    for (int i = 0; i < 300; ++i) texts.push_back(testing::random_utf8(random, random() % 40));
    for (const std::string& text : texts) {
      Detokenizer detokenizer(tokenizer);
      std::string printed;
      for (const int32_t id : tokenizer.encode(text, true, true)) {
        const std::string part = detokenizer.push(id);
        ASSERT_TRUE(is_valid_utf8(part)) << text;
        printed += part;
      }
      ASSERT_EQ(detokenizer.flush(), "") << text;
      ASSERT_EQ(printed, tokenizer.decode(tokenizer.encode(text, false)));
      if (text.find("\xE2\x96\x81") == std::string::npos) {
        ASSERT_EQ(printed, text);
      }
    }
  }
}

// Any ids at all, broken characters included: what sentencepiece prints for them.
TEST(Detokenizer, EqualsSentencepieceOnRandomIds) {
  for (const auto& dir : testing::tokenizer_dirs()) {
    const Tokenizer tokenizer = Tokenizer::open(dir);
    sentencepiece::SentencePieceProcessor oracle;
    ASSERT_TRUE(oracle.Load((dir / "tokenizer.model").string()).ok());
    const auto bytes = byte_ids(tokenizer, "\xE2\x96\x81\xF0\x9F\x98\x80\xC3 a\xFF");
    std::mt19937 random(3);
    const auto pieces = static_cast<uint32_t>(tokenizer.vocab_size());
    for (int i = 0; i < 2000; ++i) {
      std::vector<int32_t> ids(random() % 20);
      for (int32_t& id : ids) {
        id = random() % 3 == 0 ? static_cast<int32_t>(random() % pieces)
                               : bytes[random() % bytes.size()];
      }
      ASSERT_EQ(tokenizer.decode(ids), oracle.DecodeIds(ids));
    }
  }
}

TEST(Detokenizer, HoldsBackSplitCharacters) {
  const Tokenizer tokenizer = Tokenizer::open(testing::demo_dir());
  for (const std::string character : {"\xC3\xA9", "\xE4\xB8\xAD", "\xF0\x9F\x98\x80"}) {
    Detokenizer detokenizer(tokenizer);
    const auto ids = byte_ids(tokenizer, character);
    ASSERT_EQ(ids.size(), character.size());
    for (size_t i = 0; i + 1 < ids.size(); ++i) EXPECT_EQ(detokenizer.push(ids[i]), "");
    EXPECT_EQ(detokenizer.push(ids.back()), character);
  }
  Detokenizer cut(tokenizer);
  for (const int32_t id : byte_ids(tokenizer, "\xE4\xB8")) EXPECT_EQ(cut.push(id), "");
  EXPECT_EQ(cut.flush(), "\xEF\xBF\xBD\xEF\xBF\xBD");
}

TEST(Detokenizer, TakesTheFirstBlankOnlyFromAFreshText) {
  const Tokenizer tokenizer = Tokenizer::open(testing::demo_dir());
  const auto ids = tokenizer.encode("the old", false);
  Detokenizer detokenizer(tokenizer);
  const auto print = [&] {
    std::string text;
    for (const int32_t id : ids) text += detokenizer.push(id);
    return text;
  };
  EXPECT_EQ(print(), "the old");
  EXPECT_EQ(print(), " the old");
  EXPECT_EQ(detokenizer.flush(), "");
  EXPECT_EQ(print(), "the old");
  EXPECT_THROW(detokenizer.push(1 << 20), Error);
}

}  // namespace
}  // namespace sagelm
