#include "eval/mmlu_data.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "base/error.h"
#include "support/error_of.h"

namespace sagelm {
namespace {

namespace fs = std::filesystem;

std::string csv_error(std::string_view text) {
  return error_of([&] { parse_mmlu_csv("x_test.csv", text); });
}

std::string jsonl_error(std::string_view text) {
  return error_of([&] { parse_mmlu_jsonl("test.jsonl", text); });
}

// A directory that is gone when the test is over.
class MmluDirectory : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "sagelm_mmlu_XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    root_ = name;
  }
  void TearDown() override {
    std::error_code error;
    fs::remove_all(root_, error);
  }

  void write(const std::string& name, std::string_view text) const {
    fs::create_directories((root_ / name).parent_path());
    std::ofstream(root_ / name, std::ios::binary) << text;
  }
  std::string load_error(const MmluSelection& selection = {}) const {
    return error_of([&] { load_mmlu(root_, selection); });
  }
  std::string path(const std::string& name) const { return (root_ / name).string(); }

  fs::path root_;
};

const std::string kHeader = "question,choice0,choice1,choice2,choice3,answer\n";

TEST(MmluCsv, BothLayouts) {
  const auto original = parse_mmlu_csv("x.csv", "One?,1,2,3,4,C\n\"Two,\n\"\"2\"\"?\",a,b,c,d,A\n");
  ASSERT_EQ(original.size(), 2u);
  EXPECT_EQ(original[0].question, "One?");
  EXPECT_EQ(original[0].answer, 2);
  EXPECT_EQ(original[1].question, "Two,\n\"2\"?");
  EXPECT_EQ(original[1].choices, (std::array<std::string, 4>{"a", "b", "c", "d"}));
  EXPECT_EQ(original[1].line, 2);

  const auto exported = parse_mmlu_csv("x.csv", "\xEF\xBB\xBF" + kHeader + "\"é?\", 1,2,3,4,3\r\n");
  ASSERT_EQ(exported.size(), 1u);
  EXPECT_EQ(exported[0].question, "é?");
  EXPECT_EQ(exported[0].choices[0], " 1");
  EXPECT_EQ(exported[0].answer, 3);
  EXPECT_EQ(exported[0].line, 2);
}

TEST(MmluCsv, WrongRowsAreNamed) {
  EXPECT_EQ(csv_error(kHeader + "One?,1,2,3,4,A\nTwo?,1,2,3,4,E\n"),
            "x_test.csv:3: the answer is 'E', none of A to D or 0 to 3");
  EXPECT_EQ(csv_error("One?,1,2,3,4,4\n"),
            "x_test.csv:1: the answer is '4', none of A to D or 0 to 3");
  EXPECT_EQ(csv_error("One?,1,2,3,4,a\n"),
            "x_test.csv:1: the answer is 'a', none of A to D or 0 to 3");
  EXPECT_EQ(csv_error("One?,1,2,3,4,\n"),
            "x_test.csv:1: the answer is '', none of A to D or 0 to 3");
  EXPECT_EQ(csv_error("One?,1,2,3,A\n"),
            "x_test.csv:1: 5 columns, not the 6 of question, A, B, C, D, answer");
  EXPECT_EQ(csv_error("\"One\n?\",1,2,3,4,A\nTwo?,1,2,3,4,5,A\n"),
            "x_test.csv:3: 7 columns, not the 6 of question, A, B, C, D, answer");
  EXPECT_EQ(csv_error(" ,1,2,3,4,A\n"), "x_test.csv:1: the question is empty");
  EXPECT_EQ(csv_error("One?,1,2,,4,A\n"), "x_test.csv:1: choice C is empty");
  EXPECT_EQ(csv_error("One?,1,2,3,4,A\n\"Two?,1,2,3,4,A\n"),
            "x_test.csv:2: the file ends inside the quoted field that begins here");
}

TEST(MmluCsv, NotTextIsNamed) {
  EXPECT_EQ(csv_error("One?,1,2,3,4,A\nTw\xF6?,1,2,3,4,A\n"),
            "x_test.csv:2: byte 17 of the file (0xf6) is not UTF-8");
  EXPECT_EQ(csv_error(""), "x_test.csv: the file is empty");
  EXPECT_EQ(csv_error(kHeader), "x_test.csv: there is no question in the file");
}

TEST(MmluJsonl, QuestionsAsHuggingFaceHasThem) {
  const auto questions = parse_mmlu_jsonl(
      "test.jsonl",
      R"({"question":"One?","subject":"anatomy","choices":["1","2","3","4"],"answer":2})"
      "\n\n"
      R"({"question":"Two?","choices":["a","b","c","d"],"answer":"D","subject":"virology","x":1})");
  ASSERT_EQ(questions.size(), 2u);
  EXPECT_EQ(questions[0].subject->name, "anatomy");
  EXPECT_EQ(questions[0].answer, 2);
  EXPECT_EQ(questions[1].subject->name, "virology");
  EXPECT_EQ(questions[1].answer, 3);
  EXPECT_EQ(questions[1].line, 3);
}

TEST(MmluJsonl, WrongLinesAreNamed) {
  const auto with = [](const std::string& choices, const std::string& answer,
                       const std::string& subject = "anatomy") {
    return jsonl_error("\n{\"question\":\"One?\",\"choices\":" + choices + ",\"answer\":" + answer +
                       ",\"subject\":\"" + subject + "\"}\n");
  };
  const std::string four = R"(["1","2","3","4"])";
  EXPECT_EQ(with(four, "3"), "no error");
  const std::string wrong_answer = "test.jsonl:2: the answer is not one of A to D or 0 to 3";
  for (const char* answer : {"4", "-1", "\"E\"", "\"AB\"", "1.0", "null", "[1]"}) {
    EXPECT_EQ(with(four, answer), wrong_answer) << answer;
  }
  EXPECT_EQ(with(R"(["1","2","3"])", "0"), "test.jsonl:2: \"choices\" is not a list of 4");
  EXPECT_EQ(with("\"1234\"", "0"), "test.jsonl:2: \"choices\" is not a list of 4");
  EXPECT_EQ(with("[1,2,3,4]", "0"), "test.jsonl:2: one of \"choices\" is not a string");
  EXPECT_EQ(with(R"(["1","2","3"," "])", "0"), "test.jsonl:2: choice D is empty");
  EXPECT_EQ(with(four, "0", "astrology"), "test.jsonl:2: 'astrology' is none of MMLU's subjects");
  EXPECT_EQ(jsonl_error(R"({"text":"A passage."})"),
            "test.jsonl:1: there is no field \"question\"");
  EXPECT_NE(jsonl_error("[]\n").find("test.jsonl:1: "), std::string::npos);
  EXPECT_NE(jsonl_error("{\"question\n").find("test.jsonl:1: "), std::string::npos);
}

TEST_F(MmluDirectory, CsvFiles) {
  write("test/virology_test.csv", kHeader + "V1?,1,2,3,4,0\nV2?,1,2,3,4,1\n");
  write("test/anatomy_test.csv", "A1?,1,2,3,4,A\n");
  write("dev/virology_dev.csv", "VX?,1,2,3,4,D\nVY?,1,2,3,4,C\nVZ?,1,2,3,4,C\n");
  write("dev/anatomy_dev.csv", "AX?,1,2,3,4,D\nAY?,1,2,3,4,C\n");
  const MmluData data = load_mmlu(root_, {.shots = 2, .limit = 1});
  ASSERT_EQ(data.subjects.size(), 2u);
  EXPECT_EQ(data.subjects[0].info->name, "anatomy");
  EXPECT_EQ(data.subjects[1].info->name, "virology");
  ASSERT_EQ(data.subjects[1].shots.size(), 2u);
  EXPECT_EQ(data.subjects[1].shots[0].question, "VX?");
  EXPECT_EQ(data.subjects[1].shots[1].question, "VY?");
  ASSERT_EQ(data.subjects[1].questions.size(), 1u);
  EXPECT_EQ(data.subjects[1].questions[0].question, "V1?");
  EXPECT_EQ(data.subjects[1].file, path("test/virology_test.csv"));
  EXPECT_EQ(data.sha256.size(), 64u);
  // Examples that are not asked for are not read.
  EXPECT_NE(load_mmlu(root_, {.shots = 0}).sha256, data.sha256);
  EXPECT_EQ(load_mmlu(root_, {.shots = 0, .subjects = {"virology"}}).subjects.size(), 1u);

  EXPECT_EQ(load_error({.shots = 3}),
            path("dev/anatomy_dev.csv") + ": 2 examples of anatomy, fewer than the 3 asked for");
  EXPECT_THROW(load_mmlu(root_, {.subjects = {"astrology"}}), UsageError);
  EXPECT_NE(load_error({.subjects = {"marketing"}}).find(path("test/marketing_test.csv")),
            std::string::npos);
  write("dev/anatomy_dev.csv", "AX?,1,2,3,4,D\nAY?,1,2,3,4,Z\n");
  EXPECT_EQ(load_error({.shots = 1}),
            path("dev/anatomy_dev.csv") + ":2: the answer is 'Z', none of A to D or 0 to 3");
  write("test/astrology_test.csv", "A1?,1,2,3,4,A\n");
  EXPECT_EQ(load_error(),
            path("test/astrology_test.csv") + ": the file's name has none of MMLU's subjects");
}

TEST_F(MmluDirectory, JsonlFilesHoldTheSame) {
  const auto line = [](const char* question, const char* subject, int answer) {
    return "{\"question\":\"" + std::string(question) + "\",\"subject\":\"" + subject +
           "\",\"choices\":[\"1\",\"2\",\"3\",\"4\"],\"answer\":" + std::to_string(answer) + "}\n";
  };
  write("test.jsonl", line("V1?", "virology", 0) + line("A1?", "anatomy", 3));
  write("dev.jsonl", line("AX?", "anatomy", 0) + line("VX?", "virology", 1));
  const MmluData data = load_mmlu(root_, {.shots = 1});
  ASSERT_EQ(data.subjects.size(), 2u);
  EXPECT_EQ(data.subjects[0].info->name, "anatomy");
  EXPECT_EQ(data.subjects[0].questions[0].question, "A1?");
  EXPECT_EQ(data.subjects[1].shots[0].question, "VX?");
  EXPECT_EQ(load_error({.shots = 2}),
            path("dev.jsonl") + ": 1 example of anatomy, fewer than the 2 asked for");
  EXPECT_EQ(load_error({.subjects = {"marketing"}}),
            path("test.jsonl") + ": there is no question on marketing");
}

TEST_F(MmluDirectory, WhatIsNotThere) {
  EXPECT_EQ(load_error(), root_.string() + " holds neither test/*_test.csv nor test.jsonl");
  fs::create_directories(root_ / "test");
  EXPECT_EQ(load_error(), path("test") + " holds no *_test.csv");
  write("test.jsonl", "{}\n");
  EXPECT_EQ(load_error(), root_.string() + " holds both test/*_test.csv and test.jsonl");
  root_ /= "missing";
  EXPECT_EQ(load_error(), root_.string() + " is not a directory with MMLU's questions");
}

TEST(MmluSubjects, GroupedAsInLmEval) {
  std::array<int, kNumMmluCategories> counts = {};
  for (const MmluSubjectInfo& subject : mmlu_subjects()) {
    ++counts[static_cast<size_t>(subject.category)];
    EXPECT_EQ(find_mmlu_subject(subject.name), &subject);
  }
  EXPECT_EQ(counts, (std::array<int, kNumMmluCategories>{19, 13, 12, 13}));
  EXPECT_EQ(find_mmlu_subject("abstract algebra"), nullptr);
  EXPECT_EQ(find_mmlu_subject(""), nullptr);
}

TEST(MmluShared, TheWholeDataSet) {
  const char* shared = std::getenv("SAGELM_SHARED");
  const fs::path root =
      (shared != nullptr ? fs::path(shared) : fs::path(SAGELM_SOURCE_DIR) / "../shared") /
      "data/mmlu";
  if (!fs::is_directory(root)) GTEST_SKIP() << root << " is not there";
  const MmluData data = load_mmlu(root, {.shots = 5});
  EXPECT_EQ(data.subjects.size(), 57u);
  size_t questions = 0;
  for (const MmluSubject& subject : data.subjects) {
    EXPECT_EQ(subject.shots.size(), 5u) << subject.info->name;
    questions += subject.questions.size();
  }
  EXPECT_EQ(questions, 14042u);
}

}  // namespace
}  // namespace sagelm
