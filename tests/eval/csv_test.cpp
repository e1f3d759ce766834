#include "eval/csv.h"

#include <gtest/gtest.h>

#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"

namespace sagelm {
namespace {

using Fields = std::vector<std::string>;

std::string error_of(std::string_view bytes) {
  try {
    parse_csv("a.csv", bytes);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(Csv, FieldsAndLines) {
  const std::vector<CsvRow> rows = parse_csv("a.csv", "a,,b\r\n\n\"x\n\"\"y\"\", z\",1\n,\nlast");
  ASSERT_EQ(rows.size(), 4u);
  EXPECT_EQ(rows[0].fields, (Fields{"a", "", "b"}));
  EXPECT_EQ(rows[0].line, 1);
  EXPECT_EQ(rows[1].fields, (Fields{"x\n\"y\", z", "1"}));
  EXPECT_EQ(rows[1].line, 3);
  EXPECT_EQ(rows[2].fields, (Fields{"", ""}));
  EXPECT_EQ(rows[2].line, 5);
  EXPECT_EQ(rows[3].fields, (Fields{"last"}));
  EXPECT_EQ(rows[3].line, 6);
  EXPECT_TRUE(parse_csv("a.csv", "").empty());
  EXPECT_TRUE(parse_csv("a.csv", "\r\n\n").empty());
}

TEST(Csv, EmptyQuotedFields) {
  const std::vector<CsvRow> rows = parse_csv("a.csv", "\"\",\"\"\"\"\n\"\"");
  ASSERT_EQ(rows.size(), 2u);
  EXPECT_EQ(rows[0].fields, (Fields{"", "\""}));
  EXPECT_EQ(rows[1].fields, (Fields{""}));
}

TEST(Csv, WhatReadersWouldReadInDifferentWaysIsRefused) {
  EXPECT_NE(error_of("a\nb\"c\n").find("a.csv:2: there is a quote inside"), std::string::npos);
  EXPECT_NE(error_of("\"a\" b\n").find("a.csv:1: behind the quote"), std::string::npos);
  EXPECT_NE(error_of("x\n\"a\nb\nc").find("a.csv:2: the file ends inside"), std::string::npos);
  EXPECT_NE(error_of("a\rb\n").find("a.csv:1: there is a carriage return"), std::string::npos);
  EXPECT_NE(error_of("a\r").find("carriage return"), std::string::npos);
}

}  // namespace
}  // namespace sagelm
