// What an MMLU question is asked with, byte for byte, against texts written by hand from the two
// programs' sources.
#include "eval/mmlu_prompt.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "base/error.h"

namespace sagelm {
namespace {

const std::vector<MmluQuestion> kShots = {
    {.question = "Find all c in Z_3 such that Z_3[x]/(x^2 + c) is a field.",
     .choices = {"0", "1", "2", "3"},
     .answer = 1},
    {.question = " Two\nlines? ", .choices = {"True, True", " b", "c ", "\"d\""}, .answer = 3},
};
const MmluQuestion kQuestion = {
    .question = "\tWhat is 2 + 2?\n", .choices = {"3", "4", "5 ", "6"}, .answer = 1};

std::string whole(MmluPrompt prompt, std::string_view subject, size_t shots) {
  return mmlu_beginning(prompt, subject, std::span(kShots).first(shots)) +
         mmlu_item(prompt, kQuestion);
}

TEST(MmluPrompt, LmEvalWithoutExamples) {
  EXPECT_EQ(whole(MmluPrompt::kLmEval, "abstract_algebra", 0),
            "The following are multiple choice questions (with answers) about abstract algebra.\n"
            "\n"
            "What is 2 + 2?\n"
            "A. 3\n"
            "B. 4\n"
            "C. 5 \n"
            "D. 6\n"
            "Answer:");
}

TEST(MmluPrompt, LmEvalWithExamples) {
  EXPECT_EQ(whole(MmluPrompt::kLmEval, "high_school_us_history", 2),
            "The following are multiple choice questions (with answers) about high school us "
            "history.\n"
            "\n"
            "Find all c in Z_3 such that Z_3[x]/(x^2 + c) is a field.\n"
            "A. 0\n"
            "B. 1\n"
            "C. 2\n"
            "D. 3\n"
            "Answer: B\n"
            "\n"
            "Two\n"
            "lines?\n"
            "A. True, True\n"
            "B.  b\n"
            "C. c \n"
            "D. \"d\"\n"
            "Answer: D\n"
            "\n"
            "What is 2 + 2?\n"
            "A. 3\n"
            "B. 4\n"
            "C. 5 \n"
            "D. 6\n"
            "Answer:");
}

TEST(MmluPrompt, OriginalWithoutExamples) {
  EXPECT_EQ(whole(MmluPrompt::kOriginal, "abstract_algebra", 0),
            "The following are multiple choice questions (with answers) about  abstract algebra.\n"
            "\n"
            "\tWhat is 2 + 2?\n"
            "\n"
            "A. 3\n"
            "B. 4\n"
            "C. 5 \n"
            "D. 6\n"
            "Answer:");
}

TEST(MmluPrompt, OriginalWithExamples) {
  EXPECT_EQ(whole(MmluPrompt::kOriginal, "anatomy", 2),
            "The following are multiple choice questions (with answers) about  anatomy.\n"
            "\n"
            "Find all c in Z_3 such that Z_3[x]/(x^2 + c) is a field.\n"
            "A. 0\n"
            "B. 1\n"
            "C. 2\n"
            "D. 3\n"
            "Answer: B\n"
            "\n"
            " Two\n"
            "lines? \n"
            "A. True, True\n"
            "B.  b\n"
            "C. c \n"
            "D. \"d\"\n"
            "Answer: D\n"
            "\n"
            "\tWhat is 2 + 2?\n"
            "\n"
            "A. 3\n"
            "B. 4\n"
            "C. 5 \n"
            "D. 6\n"
            "Answer:");
}

TEST(MmluPrompt, Names) {
  for (const auto prompt : {MmluPrompt::kLmEval, MmluPrompt::kOriginal}) {
    EXPECT_EQ(parse_mmlu_prompt(mmlu_prompt_name(prompt)), prompt);
    EXPECT_FALSE(describe_mmlu_prompt(prompt).empty());
  }
  EXPECT_THROW(parse_mmlu_prompt("lmeval"), UsageError);
}

}  // namespace
}  // namespace sagelm
