#include "base/utf8.h"

#include <gtest/gtest.h>

#include <random>

#include "base/error.h"

namespace sagelm {
namespace {

TEST(Utf8, KnowsCharactersFromFragments) {
  EXPECT_TRUE(is_valid_utf8("a\xC3\xA9\xE2\x82\xAC\xF4\x8F\xBF\xBF"));
  for (const char* text : {"\xC3", "\x80", "\xC0\x80", "\xE0\x80\x80", "\xED\xA0\x80",
                           "\xF4\x90\x80\x80", "\xF8\x80", "\xE2\x82"}) {
    EXPECT_FALSE(is_valid_utf8(text));
  }
}

TEST(Printable, KeepsTextAndSpellsOutTheRest) {
  const std::string text = "caf\xC3\xA9 \\x1b \xE4\xB8\xAD \xF0\x9F\x98\x80 \xC2\xB1 {}";
  EXPECT_EQ(printable(text), text);
  EXPECT_EQ(printable(""), "");
  EXPECT_EQ(printable(std::string("a\0b\r\n\t\x1B[2J\x7F", 11)),
            "a\\x00b\\x0d\\x0a\\x09\\x1b[2J\\x7f");
  EXPECT_EQ(printable("\xC3\xFF\xE2\x82"), "\\xc3\\xff\\xe2\\x82");
  EXPECT_EQ(printable("\x9B"
                      "2J"),
            "\\x9b2J");
  // C1 controls, a line separator, marks of direction.
  EXPECT_EQ(printable("\xC2\x9B\xE2\x80\xA8\xE2\x80\xAE\xE2\x81\xA6\xD8\x9C"),
            "\\u{9b}\\u{2028}\\u{202e}\\u{2066}\\u{61c}");
}

TEST(Printable, AnyBytesBecomeOneLineOfUtf8) {
  std::mt19937 random(1);
  for (int i = 0; i < 2000; ++i) {
    std::string bytes;
    for (uint32_t length = random() % 40; length > 0; --length) {
      bytes += static_cast<char>(random() % 3 == 0 ? random() % 0x100 : 0xE0 + random() % 0x10);
    }
    const std::string shown = printable(bytes);
    ASSERT_TRUE(is_valid_utf8(shown));
    for (const char c : shown) ASSERT_FALSE((c >= 0 && c < 0x20) || c == 0x7F) << shown;
    ASSERT_EQ(printable(shown), shown);
  }
}

TEST(Printable, ExcerptCutsBehindACharacter) {
  EXPECT_EQ(excerpt("abc", 3), "abc");
  EXPECT_EQ(excerpt("abcd", 3), "abc...");
  EXPECT_EQ(excerpt("ab\xE2\x82\xAC", 4), "ab...");
  EXPECT_EQ(excerpt("ab\xE2\x82\xAC", 5), "ab\xE2\x82\xAC");
  EXPECT_EQ(excerpt("a\nbc", 2), "a\\x0a...");
  // No character has that many continuation bytes.
  EXPECT_EQ(excerpt(std::string(9, '\x80'), 5), "\\x80\\x80...");
  EXPECT_LT(excerpt(std::string(100000, 'x')).size(), 200U);
}

TEST(Error, SaysNothingThatActsOnATerminal) {
  EXPECT_STREQ(Error("a\x1B[31m\n").what(), "a\\x1b[31m\\x0a");
  EXPECT_STREQ(UsageError("\xFF").what(), "\\xff");
  try {
    fail("{}: {}", "file\r", 1);
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "file\\x0d: 1");
  }
}

}  // namespace
}  // namespace sagelm
