#include "eval/dataset.h"

#include <gtest/gtest.h>

#include <functional>
#include <string>

#include "base/error.h"
#include "support/error_of.h"

namespace sagelm {
namespace {

std::string text_error(std::string_view bytes) {
  return error_of([bytes] { check_text("f.txt", bytes); });
}

std::string passage_error(std::string_view bytes) {
  return error_of([bytes] { parse_passages("f.jsonl", bytes); });
}

TEST(CheckText, TakesUtf8) {
  EXPECT_EQ(text_error("a"), "no error");
  EXPECT_EQ(text_error("Grüße, 世界 🙂\r\n\n"), "no error");
}

TEST(CheckText, NamesFileLineAndByte) {
  EXPECT_EQ(text_error(""), "f.txt: the file is empty");
  EXPECT_EQ(text_error("ab\ncd\xff\n"), "f.txt:2: byte 5 of the file (0xff) is not UTF-8");
  EXPECT_EQ(text_error("a\xe4\xb8"),
            "f.txt:1: byte 1 of the file (0xe4) starts a character that the file's end cuts");
}

TEST(CheckText, RefusesWhatIsNoText) {
  EXPECT_EQ(text_error(" \n\t\r\n"), "f.txt: there is nothing but white space in the file");
  EXPECT_EQ(text_error(std::string_view("ab\n\0", 4)),
            "f.txt:2: byte 3 of the file is zero: it is not a text file");
  EXPECT_EQ(text_error("\x93NUMPY"), "f.txt:1: byte 0 of the file (0x93) is not UTF-8");
  EXPECT_EQ(text_error("a\n\xed\xa0\x80"), "f.txt:2: byte 2 of the file (0xed) is not UTF-8");
}

TEST(ParsePassages, LinesKeepTheirNumbers) {
  const auto passages = parse_passages(
      "f.jsonl", "{\"text\": \"one\", \"id\": 3}\n\n  {\"text\":\"t\\u00e9\\n\"}\r\n");
  ASSERT_EQ(passages.size(), 2u);
  EXPECT_EQ(passages[0].line, 1);
  EXPECT_EQ(passages[0].text, "one");
  EXPECT_EQ(passages[1].line, 3);
  EXPECT_EQ(passages[1].text, "té\n");
}

TEST(ParsePassages, SaysWhichLineIsWrongAndWhy) {
  EXPECT_EQ(passage_error(""), "f.jsonl: the file is empty");
  EXPECT_EQ(passage_error("\n \n"), "f.jsonl: there is nothing but white space in the file");
  EXPECT_EQ(passage_error("{\"text\": \"a\"}\nnot json\n"),
            "f.jsonl:2: not a JSON object like {\"text\": \"…\"}");
  EXPECT_EQ(passage_error("[\"text\"]"), "f.jsonl:1: not a JSON object like {\"text\": \"…\"}");
  EXPECT_EQ(passage_error("{\"txt\": \"a\"}"), "f.jsonl:1: there is no field \"text\"");
  EXPECT_EQ(passage_error("{\"text\": 3}"), "f.jsonl:1: the field \"text\" is not a string");
  EXPECT_EQ(passage_error("{\"text\": \" \"}"), "f.jsonl:1: the text is empty");
  EXPECT_EQ(passage_error("{\"text\": \"a\xc3\x28\"}"),
            "f.jsonl:1: byte 11 of the file (0xc3) is not UTF-8");
}

}  // namespace
}  // namespace sagelm
