// The flags that say which questions a model is asked and how; `mmlu` and `compare mmlu` share
// them.
#pragma once

#include <CLI/App.hpp>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "eval/mmlu.h"
#include "eval_options.h"
#include "json_output.h"
#include "options.h"

namespace sagelm::cli {

struct MmluFlags {
  std::string data;  // the directory
  std::string prompt = "lm-eval";
  int64_t shots = 5;
  std::vector<std::string> subjects;
  bool no_share = false;
};

// Adds --data, --shots, --prompt, --subjects and --no-share. flags must live as long as the
// command.
void add_mmlu_options(CLI::App& command, MmluFlags& flags);

// The questions as they are put to the model.
struct MmluQuestions {
  MmluPrompt prompt = MmluPrompt::kLmEval;
  std::string sha256 = {};  // of the data
  int64_t bytes = 0;        // likewise
  std::vector<MmluTask> tasks = {};
  bool bos = false;
  int64_t context = 0;  // tokens that the model holds
};

// Throws UsageError for a wrong prompt, Error with file and line for wrong data.
MmluData load_mmlu_data(const MmluFlags& flags, std::optional<int64_t> limit);
MmluQuestions prepare_questions(const MmluFlags& flags, const MmluData& data,
                                const CommonOptions& common);

// What the questions depend on beside the data, for a journal.
JournalHeader journal_header(const MmluFlags& flags, const MmluQuestions& questions);
// "data", its bytes and digest, the prompt and the flags, as results have them.
Json questions_json(const MmluFlags& flags, const MmluQuestions& questions);

}  // namespace sagelm::cli
