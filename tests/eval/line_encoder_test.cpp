// Texts tokenized line by line against the same texts tokenized whole.
#include "eval/line_encoder.h"

#include <gtest/gtest.h>

#include <string>

namespace sagelm {
namespace {

TEST(LineEncoder, TheIdsOfTheWholeText) {
  const Tokenizer tokenizer = Tokenizer::open(std::string(SAGELM_SOURCE_DIR) + "/models/demo");
  for (const bool bos : {true, false}) {
    LineEncoder encoder(tokenizer, bos);
    EXPECT_TRUE(encoder.by_line());
    for (const char* text : {
             "",
             "\n",
             "\n\n",
             " ",
             "One line",
             "The following are multiple choice questions (with answers) about anatomy.\n\nWhat?\n"
             "A. True, True\nB.  two blanks\nC. one behind \nD. \"d\"\nAnswer: D\n\nWhat?\nA. 1",
             "\n leading\n  blanks\n\tand tabs\n",
             "\r\nrow ends\r\n",
             "naïve café\n日本語\n€ 5\n",
             "the same\nthe same\nthe same",
         }) {
      // Twice: from what it has kept as well.
      EXPECT_EQ(encoder.encode(text), tokenizer.encode(text, bos)) << text;
      EXPECT_EQ(encoder.encode(text), tokenizer.encode(text, bos)) << text;
    }
  }
}

}  // namespace
}  // namespace sagelm
