// MMLU's questions, read from a directory and checked whole before any model is loaded. Every
// function throws Error with file, line and reason.
//
// Two layouts:
//   CSV    test/SUBJECT_test.csv and dev/SUBJECT_dev.csv (RFC 4180), columns question, four
//          choices, answer. As the original files (no header, letters) and as exports of cais/mmlu
//          (header question,choice0,choice1,choice2,choice3,answer, numbers).
//   JSONL  test.jsonl and dev.jsonl, lines {"question", "choices": [4], "answer", "subject"} as in
//          cais/mmlu's configuration "all"; other fields are ignored.
// An answer is A to D or 0 to 3. The worked examples of a prompt are the first ones of dev.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "eval/mmlu_subjects.h"

namespace sagelm {

inline constexpr int kMmluChoices = 4;
inline constexpr std::array<char, kMmluChoices> kMmluLetters = {'A', 'B', 'C', 'D'};

struct MmluQuestion {
  int64_t line = 0;                                    // in its file, from 1
  const MmluSubjectInfo* subject = nullptr;            // JSONL only: a CSV file's name says it
  std::string question = {};                           // as in the file; not blank
  std::array<std::string, kMmluChoices> choices = {};  // none blank
  int answer = 0;                                      // index of the right choice
};

// At least one question. name is the file's, for messages.
std::vector<MmluQuestion> parse_mmlu_csv(std::string_view name, std::string_view bytes);
std::vector<MmluQuestion> parse_mmlu_jsonl(std::string_view name, std::string_view bytes);

struct MmluSubject {
  const MmluSubjectInfo* info = nullptr;
  std::string file = {};                     // of the questions
  std::vector<MmluQuestion> shots = {};      // the worked examples
  std::vector<MmluQuestion> questions = {};  // up to the limit
};

struct MmluSelection {
  int64_t shots = 0;                       // worked examples per subject
  std::vector<std::string> subjects = {};  // names; empty: all that are there
  std::optional<int64_t> limit = {};       // questions per subject
};

struct MmluData {
  std::vector<MmluSubject> subjects = {};  // in alphabetical order
  int64_t bytes = 0;                       // of all files read
  // Of the files read, each as a line of sha256sum with its path in the directory, in the order
  // read: dev (if examples are wanted) and test, by subject.
  std::string sha256 = {};
};

// Throws UsageError for a name in selection.subjects that is none of the 57; Error likewise for a
// file or line of another subject, and for a subject with fewer examples than selection.shots.
MmluData load_mmlu(const std::filesystem::path& directory, const MmluSelection& selection);

}  // namespace sagelm
